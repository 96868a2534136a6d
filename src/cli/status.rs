//! `write-api status`: how runs are, from their durable record alone, so it works whichever process has them.

mod figures;
mod json;
mod text;

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use tokio::signal;

use self::figures::is_over;
use crate::config::Config;
use crate::db::Database;
use crate::db::operations::RunStatus;

/// Between two looks with `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

pub(super) const HELP: &str = "\
Needs: Postgres.

Examples:
  write-api status                     the newest runs
  write-api status nightly-1 --watch   one run, until it is over
  write-api status --json | jq '.[] | select(.phase == \"waiting\")'

Phases: running; waiting (nobody works on it, its event has to be delivered); cancelling; cancelled; publishing (complete, \
its records are not all on Kafka); unpublished (complete, its publication is quarantined); complete; failed. The rate is that of the last 15 to 30 seconds; the time left follows \
from it, without publishing.

Exit codes: 0 shown, 1 no such run, or no database, 64 wrong usage, 78 wrong configuration.";

/// Which runs, and how they are shown.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Id of the refresh event. Without it, the newest runs as a table.
    #[arg(value_name = "EVENT_ID")]
    event_id: Option<String>,
    /// At most this many runs in the table.
    #[arg(long, value_name = "N", default_value_t = 20, conflicts_with = "event_id",
          value_parser = clap::value_parser!(i64).range(1..=10_000))]
    limit: i64,
    /// Look again every second, until every run shown is over or until Ctrl-C. Where there is no terminal, a line is
    /// printed for each change.
    #[arg(long)]
    watch: bool,
    /// A JSON document on one line: an object for one run, an array for the table. With --watch, one a second.
    #[arg(long)]
    json: bool,
}

/// Shows the runs once, or until they are over.
pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let database = Database::new(&config.database)?;
    if !options.watch {
        show(options, &look(&database, options).await?)?;
        return Ok(());
    }
    tokio::select! {
        watched = watch(&database, options) => watched,
        interrupted = signal::ctrl_c() => Ok(interrupted?),
    }
}

async fn look(database: &Database, options: &Options) -> anyhow::Result<Vec<RunStatus>> {
    let runs = database.run_statuses(options.event_id.as_deref(), options.limit).await?;
    match &options.event_id {
        Some(id) if runs.is_empty() => Err(unknown_run(id)),
        _ => Ok(runs),
    }
}

/// What to say where there is no such run.
pub(super) fn unknown_run(id: &str) -> anyhow::Error {
    anyhow::anyhow!(
        "there is no run {id:?}: its event was never sent, or waits to be opened; `write-api status` lists the runs"
    )
}

async fn watch(database: &Database, options: &Options) -> anyhow::Result<()> {
    let in_place = !options.json && io::stdout().is_terminal();
    let mut lines = HashMap::new();
    loop {
        let runs = look(database, options).await?;
        if in_place {
            // Home and clear, then the same page as without --watch.
            print!("\x1b[H\x1b[2J");
            show(options, &runs)?;
        } else if options.json {
            show(options, &runs)?;
        } else {
            print_changes(&runs, &mut lines)?;
        }
        if runs.iter().all(is_over) {
            return Ok(());
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

fn show(options: &Options, runs: &[RunStatus]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match (options.json, options.event_id.is_some()) {
        (true, true) => runs.iter().try_for_each(|run| writeln!(out, "{}", json::document(run)))?,
        (true, false) => writeln!(out, "{}", json::documents(runs))?,
        (false, true) => runs.iter().try_for_each(|run| write!(out, "{}", text::page(run)))?,
        (false, false) => write!(out, "{}", text::table(runs))?,
    }
    out.flush()
}

/// A line for each run that is not as it was.
fn print_changes(runs: &[RunStatus], before: &mut HashMap<String, String>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for run in runs {
        let line = text::line(run);
        if before.get(&run.run_id) != Some(&line) {
            writeln!(out, "{line}")?;
            before.insert(run.run_id.clone(), line);
        }
    }
    out.flush()
}
