//! `write-api dlq list` and `write-api dlq show`: looking changes nothing.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{bail, ensure};
use clap::Args;
use futures::future::join_all;
use serde_json::json;

use super::filter::Filters;
use super::letter::Letter;
use super::{DeadLane, INTERRUPTED, Stop, dead_lanes, next_letters, partial};
use crate::cli::text::printable;
use crate::cli::{count, print};
use crate::config::Config;
use crate::queue::dead_letters::Reader;
use crate::queue::sqs::Sqs;

pub(super) const LIST_HELP: &str = "\
Needs: of SQS the permissions sqs:GetQueueUrl, GetQueueAttributes, ReceiveMessage and ChangeMessageVisibility on the \
dead-letter queues.

Examples:
  write-api dlq list
  write-api dlq list --lane events --reason invalid_json --newer-than 1d
  write-api dlq list --json > letters.ndjson     with bodies, one letter a line

AGE is since the message was sent to the dead-letter queue, or, where SQS itself moved it, since its producer sent it. RE \
counts how often it was redriven. Letters that another command or a consumer has received are hidden: the list then says \
so, as it does when it is interrupted, with --json in a last line {\"partial\": [...]}. It sees at most 100,000 letters of a lane, because SQS shows no more at \
once.

Exit codes: 0 listed, also if there is nothing, 1 failed, interrupted, or not all could be seen, 64 wrong usage, 78 wrong configuration.";

pub(super) const SHOW_HELP: &str = "\
Needs: as `write-api dlq list`.

Example:
  write-api dlq show nightly-1

Exit codes: 0 shown, 1 no such letter, failed, interrupted, or not all could be seen, 64 wrong usage, 78 wrong configuration.";

/// Which letters.
#[derive(Debug, Args)]
pub(in crate::cli) struct ListOptions {
    #[command(flatten)]
    filters: Filters,
    /// At most this many, of all lanes together.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// One JSON document a line, with the body.
    #[arg(long)]
    json: bool,
}

/// Which letter.
#[derive(Debug, Args)]
pub(in crate::cli) struct ShowOptions {
    /// Id of the event, of the message, or of the message in its first queue.
    #[arg(value_name = "EVENT_OR_MESSAGE_ID")]
    id: String,
    /// One JSON document a line.
    #[arg(long)]
    json: bool,
}

pub(super) async fn list(config: &Config, sqs: &Sqs, stop: &Stop, options: &ListOptions) -> anyhow::Result<()> {
    let found = look(config, sqs, stop, &options.filters, options.limit).await?;
    let mut out = String::new();
    if options.json {
        found.letters.iter().try_for_each(|letter| writeln!(out, "{}", letter.document()))?;
        if !found.partial.is_empty() {
            writeln!(out, "{}", json!({"partial": found.partial}))?;
        }
        print(out)?;
        return found.whole();
    }
    if !found.letters.is_empty() {
        writeln!(out, "{}", Letter::heads())?;
    }
    let mut sums: BTreeMap<(&str, &str, &str), u64> = BTreeMap::new();
    for letter in &found.letters {
        writeln!(out, "{}", letter.line())?;
        *sums.entry((letter.lane.as_str(), letter.kind, &letter.code)).or_default() += 1;
    }
    writeln!(out, "{}", count(found.letters.len() as u64, "dead letter"))?;
    for ((lane, kind, code), number) in sums {
        writeln!(out, "  {number:>6}  {lane}  {kind}  {}", printable(code))?;
    }
    print(out)?;
    found.whole()
}

pub(super) async fn show(config: &Config, sqs: &Sqs, stop: &Stop, options: &ShowOptions) -> anyhow::Result<()> {
    let found = look(config, sqs, stop, &Filters::by_id(&options.id), None).await?;
    ensure!(
        !found.letters.is_empty(),
        "no dead letter has the id {:?}{}; `write-api dlq list` shows what is there",
        options.id,
        if found.partial.is_empty() {
            String::new()
        } else {
            format!("; not all could be seen: {}", found.partial.join("; "))
        }
    );
    let mut out = String::new();
    for (index, letter) in found.letters.iter().enumerate() {
        match options.json {
            true => writeln!(out, "{}", letter.document())?,
            false => write!(out, "{}{}", if index > 0 { "\n" } else { "" }, letter.page())?,
        }
    }
    print(out)?;
    found.whole()
}

/// What a look found.
struct Found {
    letters: Vec<Letter>,
    /// Why there may be more, for each lane in words.
    partial: Vec<String>,
}

impl Found {
    /// An error if it is not all there is.
    fn whole(&self) -> anyhow::Result<()> {
        if !self.partial.is_empty() {
            bail!("this is not the whole: {}", self.partial.join("; "));
        }
        Ok(())
    }
}

/// Looks at all lanes at once: each ends with receives that wait in vain.
async fn look(config: &Config, sqs: &Sqs, stop: &Stop, filters: &Filters, limit: Option<u32>) -> anyhow::Result<Found> {
    let lanes = dead_lanes(config, sqs, stop, filters).await?;
    let looks = lanes.iter().map(|lane| look_at(config, sqs, lane, stop, filters, limit));
    let mut found = Found { letters: Vec::new(), partial: Vec::new() };
    for lane in join_all(looks).await {
        let Found { letters, partial } = lane?;
        found.letters.extend(letters);
        found.partial.extend(partial);
    }
    found.letters.truncate(limit.map_or(usize::MAX, |limit| limit as usize));
    if *stop.borrow() {
        found.partial.push(INTERRUPTED.to_owned());
    }
    Ok(found)
}

async fn look_at(
    config: &Config,
    sqs: &Sqs,
    lane: &DeadLane,
    stop: &Stop,
    filters: &Filters,
    limit: Option<u32>,
) -> anyhow::Result<Found> {
    let mut reader = Reader::new(sqs.clone(), lane.dead.clone(), config.queue.visibility_timeout, stop.clone());
    let most = limit.map_or(usize::MAX, |limit| limit as usize);
    let looking = async {
        let mut letters = Vec::new();
        while letters.len() < most
            && let Some(more) = next_letters(&mut reader, lane.name, filters, stop).await?
        {
            letters.extend(more);
        }
        letters.truncate(most);
        letters.sort_by_key(|letter| letter.sent_at);
        anyhow::Ok(letters)
    };
    let letters = looking.await;
    let partial = reader.missed().map(|missed| partial(lane.name, missed));
    reader.give_back().await;
    Ok(Found { letters: letters?, partial: partial.into_iter().collect() })
}
