//! `write-api audit`: proves that the books balance, from the run's row to the records on Kafka.
//!
//! Nothing here is shared with the code that it checks: the statements are in `db::audit`, the rules of records in
//! [`expected`]. The topic is read once, whatever the number of runs; held in memory are a few hundred bytes a run and at
//! most about 20 bytes a record, by which a missing one is known.

mod account;
mod books;
mod expected;
mod records;
mod report;

use std::collections::HashSet;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use time::OffsetDateTime;

use self::account::{Account, Gap};
use self::records::Topic;
use crate::config::Config;
use crate::db::Database;

/// Silence of Kafka after which the reading is given up.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) const HELP: &str = "\
Needs: Postgres (SELECT on every table), and Kafka brokers that let this client read the topic.

Examples:
  write-api audit                     every run, newest first
  write-api audit --run nightly-1
  write-api audit --settled --json    nothing is under way: what is unfinished is a gap as well

The whole topic is read, once. Kinds of gaps are explained in docs/operations.md.

Exit codes: 0 the books balance, 1 gaps, no such run, or the audit failed, 3 the topic is truncated: retention removed \
records that would prove a run, and everything else balances, 64 wrong usage, 78 wrong configuration.";

/// What to audit.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Only this run, by the id of its refresh event.
    #[arg(long, value_name = "EVENT_ID")]
    run: Option<String>,
    /// Only runs opened at this time or later, RFC 3339.
    #[arg(long, value_name = "TIME", conflicts_with = "run", value_parser = super::text::moment)]
    since: Option<OffsetDateTime>,
    /// Take what is unfinished for a gap: nothing should be under way.
    #[arg(long)]
    settled: bool,
    /// One JSON document.
    #[arg(long)]
    json: bool,
}

/// How the audit ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing is missing, nothing is wrong.
    Balanced,
    /// Something is.
    Gaps,
    /// What the topic still has is right; the rest cannot be proven any more.
    Truncated,
}

impl Verdict {
    pub(super) fn exit_code(self) -> ExitCode {
        ExitCode::from(match self {
            Verdict::Balanced => 0,
            Verdict::Gaps => 1,
            Verdict::Truncated => 3,
        })
    }
}

/// All that was found.
struct Found {
    accounts: Vec<Account>,
    /// What of the database belongs to no run.
    of_no_run: Vec<Gap>,
    topic: Topic,
}

impl Found {
    fn verdict(&self) -> Verdict {
        let mut accounts = self.accounts.iter();
        let gaps = !self.topic.gaps.is_empty() || !self.of_no_run.is_empty();
        if gaps || accounts.clone().any(|account| !account.gaps.is_empty()) {
            Verdict::Gaps
        } else if accounts.any(|account| account.truncated > 0) {
            Verdict::Truncated
        } else {
            Verdict::Balanced
        }
    }
}

/// Audits and reports.
pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<Verdict> {
    let database = Database::new(&config.database)?;
    database.ping().await.map_err(|error| {
        anyhow::anyhow!(
            "{error}; see that Postgres runs at {} and that database.url names it; `write-api check` tells more",
            config.database.address()
        )
    })?;
    let run_ids = database.audited_runs(options.run.as_deref(), options.since).await?;
    if let (Some(run_id), true) = (&options.run, run_ids.is_empty()) {
        return Err(super::status::unknown_run(run_id));
    }
    let mut accounts = Vec::with_capacity(run_ids.len());
    for run_id in run_ids {
        // Pruned since the list was made: there is nothing to audit.
        accounts.extend(books::account(&database, &run_id, config.database.statement_timeout).await?);
    }
    let of_all_runs = options.run.is_none() && options.since.is_none();
    let topic = records::check(&database, &config.kafka, &mut accounts, of_all_runs, PATIENCE).await?;
    let of_no_run = if of_all_runs { books::of_no_run(&database).await? } else { Vec::new() };
    settle(&database, &mut accounts, options.settled).await?;
    let found = Found { accounts, of_no_run, topic };
    let verdict = found.verdict();
    super::print(match options.json {
        true => report::document(&found, verdict),
        false => report::text(&found, verdict),
    })?;
    Ok(verdict)
}

/// What can only be said when everything was read.
async fn settle(database: &Database, accounts: &mut Vec<Account>, settled: bool) -> anyhow::Result<()> {
    for account in accounts.iter_mut().filter(|account| account.records > 0 && account.publications == 0) {
        // It may have begun after the books were read.
        if account.state == "complete" && database.publication_books(&account.run_id).await?.is_empty() {
            let what = format!("{} on Kafka, and no publication is recorded", super::count(account.records, "record"));
            account.is_wrong("publication_missing", what);
        }
    }
    if settled {
        for account in accounts.iter_mut() {
            let unfinished = account.unfinished.clone();
            account.gap("unfinished", unfinished.len() as u64, unfinished);
        }
    }
    // Of a run that retention has begun to remove meanwhile, rows may have been gone when they were looked for.
    let run_ids: Vec<String> = accounts.iter().map(|account| account.run_id.clone()).collect();
    let there: HashSet<String> = database.unpruned_runs(&run_ids).await?.into_iter().collect();
    accounts.retain(|account| there.contains(&account.run_id));
    Ok(())
}
