//! `write-api dlq discard`: dead letters deleted for good.

use anyhow::bail;
use clap::Args;

use super::filter::Filters;
use super::{Stop, dead_lanes, interrupted, next_letters};
use crate::cli::{count, print};
use crate::config::Config;
use crate::queue::dead_letters::Reader;
use crate::queue::sqs::Sqs;

pub(super) const HELP: &str = "\
Needs: of SQS the permissions sqs:GetQueueUrl, ReceiveMessage, ChangeMessageVisibility and DeleteMessage on the dead-letter \
queues.

Examples:
  write-api dlq list --reason invalid_json --json > kept.ndjson
  write-api dlq discard --reason invalid_json --dry-run
  write-api dlq discard --reason invalid_json --yes

Nothing brings a discarded event back: keep `dlq list --json`, which has the bodies.

Exit codes: 0 everything that was meant is deleted, 1 failed or interrupted, 64 wrong usage, neither --dry-run nor --yes \
included, 78 wrong configuration.";

/// What to delete.
#[derive(Debug, Args)]
pub(in crate::cli) struct Options {
    #[command(flatten)]
    pub(super) filters: Filters,
    /// Everything, without a filter.
    #[arg(long)]
    pub(super) all: bool,
    /// At most this many letters.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Tell what would be deleted, and change nothing.
    #[arg(long, required_unless_present = "yes", conflicts_with = "yes")]
    dry_run: bool,
    /// Yes, delete for good.
    #[arg(long)]
    yes: bool,
}

pub(super) async fn run(config: &Config, sqs: &Sqs, stop: &Stop, options: &Options) -> anyhow::Result<()> {
    let mut left = options.limit.map_or(u64::MAX, u64::from);
    let (mut done, mut kept) = (0, 0);
    for lane in dead_lanes(config, sqs, &options.filters).await? {
        let mut reader = Reader::new(sqs.clone(), lane.dead.clone(), config.queue.visibility_timeout);
        let discarding = async {
            while left > 0
                && let Some(letters) = next_letters(&mut reader, lane.name, &options.filters, stop).await?
            {
                for letter in letters {
                    if left == 0 || *stop.borrow() {
                        break;
                    }
                    left -= 1;
                    let what = if options.dry_run {
                        done += 1;
                        "would discard"
                    } else if reader.delete(&letter.message_id).await? {
                        done += 1;
                        "discarded"
                    } else {
                        kept += 1;
                        "not deleted by SQS"
                    };
                    let (lane, kind, code) = (letter.lane.as_str(), letter.kind, &letter.code);
                    let (name, message) = (letter.name(), &letter.message_id);
                    print(format!("{what}  {lane}  {kind}  {code}  {name}  message {message}\n"))?;
                }
            }
            anyhow::Ok(())
        };
        let ended = discarding.await;
        reader.give_back().await;
        if let Err(error) = ended {
            return Err(error.context(format!("the discard stopped after {}", count(done, "letter"))));
        }
    }
    println!("{} {}", count(done, "letter"), if options.dry_run { "would be discarded" } else { "discarded" });
    if *stop.borrow() {
        return Err(interrupted());
    }
    if kept > 0 {
        bail!("SQS did not delete {}; discard again", count(kept, "letter"));
    }
    Ok(())
}
