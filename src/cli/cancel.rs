//! `write-api cancel`: ends a run, wherever it is worked on.

use std::time::Duration;

use clap::Args;
use tokio::time::{Instant, sleep};

use super::status::unknown_run;
use super::text::{span, thousands};
use crate::config::Config;
use crate::db::Database;
use crate::db::operations::{CancelClaim, RunStatus};

/// How long the end of the work is waited for. A worker that lives obeys within seconds; the lease of one that died ends
/// within `queue.visibility_timeout`, 60 s by default.
const PATIENCE: Duration = Duration::from_secs(120);

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(250);

pub(super) const HELP: &str = "\
Needs: Postgres.

Example:
  write-api cancel nightly-1

Answers that are out are awaited for up to 5 seconds and kept; nothing is published. `write-api retry` lets the run go on.

Exit codes: 0 cancelled, 1 no such run, it is over already, or its worker has not ended it within two minutes, 64 wrong \
usage, 78 wrong configuration.";

/// Which run.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Id of the refresh event.
    #[arg(value_name = "EVENT_ID")]
    event_id: String,
}

/// Asks for the end and waits for it. The request stands, whatever becomes of this process.
pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let database = Database::new(&config.database)?;
    let id = options.event_id.as_str();
    let deadline = Instant::now() + PATIENCE;
    let mut claim = database.cancel_run(id).await?;
    if let CancelClaim::Requested(_) = claim {
        eprintln!("the cancel of run {id} is requested; waiting for its worker to end it");
    }
    loop {
        match claim {
            CancelClaim::Cancelled => break,
            CancelClaim::Requested(lease) if Instant::now() >= deadline => anyhow::bail!(
                "the cancel of run {id} stands, but its worker has not ended it in {}; its lease ends in {} unless it is \
                 renewed, and the next delivery of the event ends the run then",
                span(PATIENCE.as_secs_f64()),
                span(lease.as_secs_f64())
            ),
            CancelClaim::Requested(_) => {}
            CancelClaim::Ended(state) => anyhow::bail!("run {id} is {state} already: there is nothing to cancel"),
            CancelClaim::Unknown => return Err(unknown_run(id)),
        }
        sleep(INTERVAL).await;
        let run = status(&database, id).await?;
        claim = match run.lease_left_seconds {
            _ if run.state != "running" => break,
            // To ask again would cancel what somebody else has just let go on.
            _ if !run.cancel_requested => anyhow::bail!("run {id} was cancelled, and retried since"),
            Some(left) if left > 0.0 => CancelClaim::Requested(Duration::from_secs_f64(left)),
            _ => database.cancel_run(id).await?,
        };
    }
    let run = status(&database, id).await?;
    println!(
        "run {id} is {}: {} of {} listings are done and stay so; `write-api retry` lets it go on",
        run.state,
        thousands(run.valued + run.failed),
        thousands(run.selected)
    );
    Ok(())
}

async fn status(database: &Database, id: &str) -> anyhow::Result<RunStatus> {
    database.run_statuses(Some(id), 1).await?.pop().ok_or_else(|| unknown_run(id))
}
