//! `write-api dlq discard`: dead letters deleted for good.

use anyhow::{Context, bail};
use clap::Args;

use super::{Meant, Stop, dead_lanes, interrupted, next_letters, partial, tell, unless_stopped};
use crate::cli::count;
use crate::config::Config;
use crate::queue::dead_letters::{LAST_ANSWER, Reader};
use crate::queue::sqs::Sqs;

pub(super) const HELP: &str = "\
Needs: of SQS the permissions sqs:GetQueueUrl, GetQueueAttributes, ReceiveMessage, ChangeMessageVisibility and DeleteMessage \
on the dead-letter queues.

Examples:
  write-api dlq list --reason invalid_json --json > kept.ndjson
  write-api dlq discard --reason invalid_json --dry-run
  write-api dlq discard --reason invalid_json --yes

Nothing brings a discarded event back: keep `dlq list --json`, which has the bodies.

Exit codes: 0 everything that was meant is deleted, 1 failed, interrupted, or letters were left or could not be seen, 64 wrong usage, neither --dry-run nor --yes \
included, 78 wrong configuration.";

/// What to delete.
#[derive(Debug, Args)]
pub(in crate::cli) struct Options {
    #[command(flatten)]
    meant: Meant,
    /// Yes, delete for good.
    #[arg(long)]
    yes: bool,
}

impl Options {
    /// What the parser cannot see.
    pub(super) fn check(&self) -> Result<(), String> {
        match (self.meant.dry_run, self.yes) {
            (false, false) => {
                Err("nothing brings a discarded letter back: --dry-run shows what would go, --yes deletes it"
                    .to_owned())
            }
            (true, true) => Err("--dry-run changes nothing and --yes deletes: leave one of them out".to_owned()),
            _ => self.meant.check(),
        }
    }
}

pub(super) async fn run(config: &Config, sqs: &Sqs, stop: &Stop, options: &Options) -> anyhow::Result<()> {
    let Meant { filters, dry_run, .. } = &options.meant;
    let mut left = options.meant.limit();
    let (mut done, mut kept) = (0, 0);
    let mut unseen = Vec::new();
    for lane in dead_lanes(config, sqs, stop, filters).await? {
        let mut reader = Reader::new(sqs.clone(), lane.dead.clone(), config.queue.visibility_timeout, stop.clone());
        let discarding = async {
            while left > 0
                && let Some(letters) = next_letters(&mut reader, lane.name, filters, stop).await?
            {
                for letter in letters {
                    if left == 0 || *stop.borrow() {
                        break;
                    }
                    left -= 1;
                    let what = if *dry_run {
                        done += 1;
                        "would discard"
                    } else {
                        let id = &letter.message_id;
                        let deleted = unless_stopped(stop, LAST_ANSWER, reader.delete(id)).await;
                        if deleted.with_context(|| {
                            format!("interrupted; whether SQS has deleted message {id} is not known")
                        })?? {
                            done += 1;
                            "discarded"
                        } else {
                            kept += 1;
                            "not deleted, somebody else may have it"
                        }
                    };
                    tell(what, &letter, "")?;
                }
            }
            anyhow::Ok(())
        };
        let ended = discarding.await;
        unseen.extend(reader.missed().filter(|_| left > 0).map(|missed| partial(lane.name, missed)));
        reader.give_back().await;
        if let Err(error) = ended {
            return Err(error.context(format!("the discard stopped after {}", count(done, "letter"))));
        }
    }
    println!("{} {}", count(done, "letter"), if *dry_run { "would be discarded" } else { "discarded" });
    if *stop.borrow() {
        return Err(interrupted());
    }
    if kept > 0 {
        unseen.push(format!("{} not deleted; look at what is there now, and discard again", count(kept, "letter")));
    }
    if !unseen.is_empty() {
        bail!("not everything that was meant was done: {}", unseen.join("; "));
    }
    Ok(())
}
