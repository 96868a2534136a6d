//! `write-api dlq redrive`: dead letters once more to the queue that they came from.
//!
//! Read first, then send. Letters are read in rounds, and nothing is read while a round is sent, so that a letter that the
//! service refuses again, which is a copy of the one just sent, is never taken for a copy left behind and deleted. In later
//! rounds a letter whose event was sent before is left where it is.
//!
//! Each letter is sent, then deleted. A crash in between leaves it in both queues, and never in none; the next redrive
//! sends it a second time, which the event's id absorbs.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::filter::Filters;
use super::letter::Letter;
use super::{DeadLane, Stop, dead_lanes, interrupted, next_letters};
use crate::cli::{count, print};
use crate::config::Config;
use crate::db::Database;
use crate::fault;
use crate::queue::dead_letters::Reader;
use crate::queue::sqs::{Queue, Sqs};

/// After so many redrives a letter is left unless it is forced: whatever refuses it has not been mended.
const MOST_REDRIVES: u32 = 3;

/// Letters of one round, and bytes of their bodies: what a redrive holds in memory.
const ROUND: usize = 1_000;
const ROUND_BYTES: usize = 32 * 1024 * 1024;

pub(super) const HELP: &str = "\
Needs: Postgres, and of SQS the permissions sqs:GetQueueUrl, ReceiveMessage, ChangeMessageVisibility and DeleteMessage on \
the dead-letter queues, GetQueueUrl and SendMessage on the lanes' queues.

Examples:
  write-api dlq redrive --reason invalid_data --dry-run
  write-api dlq redrive --kind valuations.refresh --newer-than 12h
  write-api dlq redrive --lane events --all --rate 100

The producer's own message attributes are not kept; the event is in the body. A letter that was redriven 3 times is left \
unless --force. What the service refuses again during the redrive is left as well.

Exit codes: 0 everything that was meant is sent, 1 failed, interrupted, or letters were left, 64 wrong usage, 78 wrong \
configuration.";

/// What to send again, and how.
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
    /// At most this many messages a second, one after another.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    /// Also letters that were redriven 3 times already.
    #[arg(long)]
    force: bool,
    /// Tell what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

/// What was done.
#[derive(Default)]
struct Sums {
    sent: u64,
    duplicates: u64,
    left: u64,
}

pub(super) async fn run(config: &Config, sqs: &Sqs, stop: &Stop, options: &Options) -> anyhow::Result<()> {
    let database = Database::new(&config.database)?;
    let mut pace = interval(Duration::from_secs(1) / options.rate);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sums = Sums::default();
    for lane in dead_lanes(config, sqs, &options.filters).await? {
        let name = &lane.source_name;
        let source = sqs.queue(name).await.with_context(|| format!("is there a queue {name}? `write-api check`"))?;
        let mut redrive = Redrive {
            sqs,
            database: &database,
            options,
            stop,
            source,
            reader: Reader::new(sqs.clone(), lane.dead.clone(), config.queue.visibility_timeout),
            sent: HashSet::new(),
        };
        let done = redrive.lane(&lane, &mut pace, &mut sums).await;
        redrive.reader.give_back().await;
        if let Err(error) = done {
            return Err(error.context(format!("the redrive stopped after {}", count(sums.sent, "letter"))));
        }
    }
    let would_be = if options.dry_run { "would be " } else { "" };
    println!(
        "{} {would_be}redriven, {} {would_be}deleted, {} {would_be}left",
        count(sums.sent, "letter"),
        count(sums.duplicates, "duplicate"),
        sums.left
    );
    if *stop.borrow() {
        return Err(interrupted());
    }
    if sums.left > 0 && !options.dry_run {
        bail!("{} left in the dead-letter queue; the lines above say why", count(sums.left, "letter"));
    }
    Ok(())
}

struct Redrive<'a> {
    sqs: &'a Sqs,
    database: &'a Database,
    options: &'a Options,
    stop: &'a Stop,
    source: Queue,
    reader: Reader,
    /// Identities that were sent.
    sent: HashSet<[u8; 32]>,
}

impl Redrive<'_> {
    /// A lane's whole dead-letter queue, round by round.
    async fn lane(&mut self, lane: &DeadLane, pace: &mut Interval, sums: &mut Sums) -> anyhow::Result<()> {
        loop {
            let most = self.options.limit.map_or(u64::MAX, u64::from) - sums.sent - sums.duplicates - sums.left;
            let mut round = Vec::new();
            let mut bytes = 0;
            let mut is_end = false;
            while round.len() < ROUND && bytes < ROUND_BYTES && (round.len() as u64) < most {
                let Some(letters) = next_letters(&mut self.reader, lane.name, &self.options.filters, self.stop).await?
                else {
                    is_end = true;
                    break;
                };
                bytes += letters.iter().map(|letter| letter.body.len()).sum::<usize>();
                round.extend(letters);
            }
            round.truncate(usize::try_from(most).unwrap_or(usize::MAX));
            for copies in groups(round) {
                if *self.stop.borrow() {
                    return Ok(());
                }
                self.event(copies, pace, sums).await?;
                self.reader.keep().await;
            }
            if is_end || most == 0 {
                return Ok(());
            }
        }
    }

    /// All copies of one event: the first is sent, and with it the others are done.
    async fn event(&mut self, copies: Vec<Letter>, pace: &mut Interval, sums: &mut Sums) -> anyhow::Result<()> {
        let letter = &copies[0];
        let left = if self.sent.contains(&letter.identity) {
            Some("its event was sent a moment ago: it was refused again, or it is a copy that appeared late")
        } else if letter.redrives >= MOST_REDRIVES && !self.options.force {
            Some("it was redriven 3 times and came back each time; mend what refuses it, or --force")
        } else {
            None
        };
        if let Some(why) = left {
            sums.left += copies.len() as u64;
            return copies.iter().try_for_each(|letter| tell("left", letter, why));
        }
        if self.options.dry_run {
            let why = match self.quarantined(letter).await? {
                true => "its quarantined run would go on",
                false => "",
            };
            tell("would redrive", letter, why)?;
        } else {
            pace.tick().await;
            let why = self.send(letter).await?;
            tell("redriven", letter, why)?;
        }
        self.sent.insert(letter.identity);
        sums.sent += 1;
        for duplicate in &copies[1..] {
            let why = format!("a copy of message {}", letter.message_id);
            if self.options.dry_run {
                tell("would delete", duplicate, &why)?;
            } else {
                let deleted = self.reader.delete(&duplicate.message_id).await?;
                tell("deleted", duplicate, if deleted { &why } else { STILL_THERE })?;
            }
            sums.duplicates += 1;
        }
        Ok(())
    }

    /// Sends a letter, then deletes it. The run goes on before the message can arrive: a message of a quarantined run would
    /// be refused again. Whoever fails in between leaves the letter where it is, and the next redrive sends it.
    async fn send(&mut self, letter: &Letter) -> anyhow::Result<&'static str> {
        let goes_on = match identity_of_run(letter) {
            Some((event_id, digest)) => self.database.release_quarantined(event_id, digest).await?,
            None => false,
        };
        fault::point("redrive.before_send", &letter.message_id);
        let redrives = letter.redrives.saturating_add(1);
        self.sqs.send_redriven(&self.source, &letter.body, redrives).await.with_context(|| {
            let id = &letter.message_id;
            match goes_on {
                true => {
                    format!("message {id} was not sent and is still here; its run waits for it, redrive it once more")
                }
                false => format!("message {id} was not sent and is still here"),
            }
        })?;
        fault::point("redrive.after_send", &letter.message_id);
        let deleted = self.reader.delete(&letter.message_id).await.with_context(|| {
            format!("message {} was sent, and is still in the dead-letter queue", letter.message_id)
        })?;
        fault::point("redrive.after_delete", &letter.message_id);
        Ok(match (deleted, goes_on) {
            (false, _) => STILL_THERE,
            (true, true) => "its quarantined run goes on",
            (true, false) => "",
        })
    }

    async fn quarantined(&self, letter: &Letter) -> anyhow::Result<bool> {
        match identity_of_run(letter) {
            Some((event_id, digest)) => Ok(self.database.is_quarantined(event_id, digest).await?),
            None => Ok(false),
        }
    }
}

const STILL_THERE: &str = "SQS did not delete it: it is still in the dead-letter queue, and will be a copy there";

/// What the record of a slow event is found by; `None` for other events.
fn identity_of_run(letter: &Letter) -> Option<(&str, &[u8; 32])> {
    use crate::events::envelope::{KIND_PUBLISH, KIND_REFRESH};
    let is_slow = [KIND_REFRESH, KIND_PUBLISH].contains(&letter.kind);
    Some((letter.event_id.as_deref()?, letter.digest.as_ref()?)).filter(|_| is_slow)
}

/// Copies together, in the order in which the first of each came; of copies the one that was redriven most often first, so
/// that its count goes on.
fn groups(letters: Vec<Letter>) -> Vec<Vec<Letter>> {
    let mut places: HashMap<[u8; 32], usize> = HashMap::new();
    let mut groups: Vec<Vec<Letter>> = Vec::new();
    for letter in letters {
        match places.get(&letter.identity) {
            Some(place) => groups[*place].push(letter),
            None => {
                places.insert(letter.identity, groups.len());
                groups.push(vec![letter]);
            }
        }
    }
    for copies in &mut groups {
        copies.sort_by_key(|letter| std::cmp::Reverse(letter.redrives));
    }
    groups
}

/// The line of one letter.
fn tell(done: &str, letter: &Letter, why: &str) -> anyhow::Result<()> {
    let (lane, kind, code) = (letter.lane.as_str(), letter.kind, &letter.code);
    let line = format!("{done}  {lane}  {kind}  {code}  {}  message {}", letter.name(), letter.message_id);
    print(format!("{line}{}{why}\n", if why.is_empty() { "" } else { ": " }))
}
