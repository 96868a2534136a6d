//! `write-api retry`: lets a cancelled or failed run go on where it was.

use anyhow::Context;
use clap::Args;

use super::status::unknown_run;
use super::text::thousands;
use crate::config::Config;
use crate::db::Database;
use crate::events::{lane, outgoing};

pub(super) const HELP: &str = "\
Needs: Postgres, and a running service, which sends the event.

Example:
  write-api retry nightly-1

Exit codes: 0 it goes on, 1 no such run, or it is neither cancelled nor failed, 64 wrong usage, 78 wrong configuration.";

/// Which run.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Id of the refresh event.
    #[arg(value_name = "EVENT_ID")]
    event_id: String,
}

/// Opens the run again and has its event sent by the outbox, in one transaction.
pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let database = Database::new(&config.database)?;
    let id = options.event_id.as_str();
    let event = database.kept_event(id).await?.ok_or_else(|| unknown_run(id))?;
    let data = event.data.with_context(|| {
        format!(
            "run {id} is from before events were kept and cannot be retried; `write-api send refresh` makes a new run"
        )
    })?;
    let body = outgoing::refresh_event(id, &event.source, event.time, event.traceparent.as_deref(), &data)
        .with_context(|| format!("the data kept of run {id} are no JSON"))?;
    let reopened = database.reopen_run(id, lane::VALUATIONS, &body).await?;
    let run = database.run_statuses(Some(id), 1).await?.pop().ok_or_else(|| unknown_run(id))?;
    if !reopened {
        anyhow::bail!(match run.state.as_str() {
            _ if run.is_pruned => format!(
                "run {id} is older than retention.age and is being removed; `write-api send refresh` makes a new run"
            ),
            "running" if run.cancel_requested =>
                format!("run {id} is being cancelled; retry it once `write-api status` says that it is"),
            "running" => format!("run {id} is running and goes on by itself; `write-api send refresh` makes a new run"),
            "complete" if run.publication_state.as_deref() == Some("failed") => format!(
                "run {id} is complete and its publication is quarantined: `write-api dlq redrive --reason quarantined` lets \
                 it go on"
            ),
            state => format!("run {id} is {state}; `write-api send refresh` makes a new run"),
        });
    }
    println!(
        "run {id} goes on: {} of {} listings are left; a running service sends its event within {:?}",
        thousands((run.selected - run.valued - run.failed).max(0)),
        thousands(run.selected),
        config.outbox.poll_interval
    );
    Ok(())
}
