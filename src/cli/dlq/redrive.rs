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

use super::letter::Letter;
use super::{DeadLane, Meant, Stop, dead_lanes, interrupted, look_up, next_letters, partial, tell, unless_stopped};
use crate::cli::count;
use crate::config::Config;
use crate::db::Database;
use crate::fault;
use crate::queue::dead_letters::{Hold, LAST_ANSWER, Reader};
use crate::queue::sqs::{Queue, REDRIVES_UNREADABLE, Sqs, SqsError};

/// After so many redrives a letter is left unless it is forced: whatever refuses it has not been mended.
const MOST_REDRIVES: u32 = 3;

/// Letters of one round, and bytes of their bodies: what a redrive holds in memory.
const ROUND: usize = 1_000;
const ROUND_BYTES: usize = 32 * 1024 * 1024;

pub(super) const HELP: &str = "\
Needs: Postgres, and of SQS the permissions sqs:GetQueueUrl, GetQueueAttributes, ReceiveMessage, ChangeMessageVisibility \
and DeleteMessage on the dead-letter queues, GetQueueUrl and SendMessage on the lanes' queues.

Examples:
  write-api dlq redrive --reason invalid_data --dry-run
  write-api dlq redrive --kind valuations.refresh --newer-than 12h
  write-api dlq redrive --lane events --all --rate 100

The producer's own message attributes are not kept; the event is in the body. A letter that was redriven 3 times is left \
unless --force, and so is one with no room for the attribute that counts. What the service refuses again during the redrive \
is left as well, and so is what SQS refuses.

Exit codes: 0 everything that was meant is sent, 1 failed, interrupted, or letters were left or could not be seen, 64 wrong usage, 78 wrong \
configuration.";

/// What to send again, and how.
#[derive(Debug, Args)]
pub(in crate::cli) struct Options {
    #[command(flatten)]
    pub(super) meant: Meant,
    /// At most this many messages a second, one after another.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    /// Also letters that were redriven 3 times already, and those with no room for the attribute that counts.
    #[arg(long)]
    force: bool,
}

/// What was done.
#[derive(Default)]
struct Sums {
    sent: u64,
    duplicates: u64,
    left: u64,
    /// Sent, and still in the dead-letter queue.
    not_deleted: u64,
    /// What could not be seen, in words.
    unseen: Vec<String>,
    /// Events that were sent, with the ids that their messages had in their first queue.
    events: HashMap<[u8; 32], HashSet<String>>,
}

pub(super) async fn run(config: &Config, sqs: &Sqs, stop: &Stop, options: &Options) -> anyhow::Result<()> {
    let database = Database::new(&config.database)?;
    // Asked before a letter is touched; and what it answers says more than a pool that times out.
    unless_stopped(stop, Duration::ZERO, database.ping()).await.ok_or_else(interrupted)??;
    let mut pace = interval(Duration::from_secs(1) / options.rate);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sums = Sums::default();
    for lane in dead_lanes(config, sqs, stop, &options.meant.filters).await? {
        let source = look_up(sqs, stop, &lane.source_name).await?;
        let mut redrive = Redrive {
            sqs,
            database: &database,
            options,
            stop,
            source,
            reader: Reader::new(sqs.clone(), lane.dead.clone(), config.queue.visibility_timeout, stop.clone()),
        };
        let done = redrive.lane(&lane, &mut pace, &mut sums).await;
        redrive.reader.give_back().await;
        if let Err(error) = done {
            return Err(error.context(format!("the redrive stopped after {}", count(sums.sent, "letter"))));
        }
    }
    let dry_run = options.meant.dry_run;
    let would_be = if dry_run { "would be " } else { "" };
    println!(
        "{} {would_be}redriven, {} {would_be}deleted, {} {would_be}left",
        count(sums.sent, "letter"),
        count(sums.duplicates, "duplicate"),
        sums.left
    );
    if *stop.borrow() {
        return Err(interrupted());
    }
    let mut problems = sums.unseen;
    if sums.left > 0 && !dry_run {
        problems.insert(
            0,
            format!("{} left in the dead-letter queue; the lines above say why", count(sums.left, "letter")),
        );
    }
    if sums.not_deleted > 0 {
        problems
            .insert(0, format!("{} sent and not deleted; the lines above say why", count(sums.not_deleted, "letter")));
    }
    if !problems.is_empty() {
        bail!("not everything that was meant was done: {}", problems.join("; "));
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
}

impl Redrive<'_> {
    /// A lane's whole dead-letter queue, round by round.
    async fn lane(&mut self, lane: &DeadLane, pace: &mut Interval, sums: &mut Sums) -> anyhow::Result<()> {
        loop {
            let most = self.options.meant.limit() - sums.sent - sums.duplicates - sums.left;
            let mut round = Vec::new();
            let mut bytes = 0;
            let mut is_end = false;
            while round.len() < ROUND && bytes < ROUND_BYTES && (round.len() as u64) < most {
                let Some(letters) =
                    next_letters(&mut self.reader, lane.name, &self.options.meant.filters, self.stop).await?
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
                sums.unseen.extend(self.reader.missed().map(|missed| partial(lane.name, missed)));
                return Ok(());
            }
        }
    }

    /// All copies of one event: the first is sent, and with it the others are done.
    async fn event(&mut self, copies: Vec<Letter>, pace: &mut Interval, sums: &mut Sums) -> anyhow::Result<()> {
        let letter = &copies[0];
        if let Some(origins) = sums.events.get(&letter.identity) {
            // What is refused again has the id of the message that was sent just now, and not the old one.
            let (known, others): (Vec<_>, Vec<_>) =
                copies.iter().partition(|copy| copy.origin_id.as_ref().is_some_and(|id| origins.contains(id)));
            for copy in known {
                self.duplicate(copy, "a copy of a message that was sent a moment ago", sums).await?;
            }
            return left(others, "its event was sent a moment ago: it was refused again, or it is a copy of it", sums);
        }
        if letter.redrives >= MOST_REDRIVES && !self.options.force {
            let why = if letter.redrives == REDRIVES_UNREADABLE {
                "how often it was redriven cannot be read; mend what refuses it, or --force"
            } else {
                "it was redriven 3 times or more and came back each time; mend what refuses it, or --force"
            };
            return left(&copies, why, sums);
        }
        if self.options.meant.dry_run {
            match unless_stopped(self.stop, Duration::ZERO, self.quarantined(letter)).await.transpose()? {
                Some(true) => tell("would redrive", letter, "its quarantined run would go on")?,
                Some(false) => tell("would redrive", letter, "")?,
                None => return Ok(()),
            }
        } else {
            if unless_stopped(self.stop, Duration::ZERO, pace.tick()).await.is_none() {
                return Ok(());
            }
            // A copy of it may be ours still, and is left as well: whoever has this one may be sending it.
            let Some(hold) = unless_stopped(self.stop, Duration::ZERO, self.reader.hold_of(&letter.message_id)).await
            else {
                return Ok(());
            };
            match hold {
                Hold::Ours => {}
                Hold::Lost => {
                    return left(&copies, "its time was over, and somebody else may have it; redrive again", sums);
                }
                Hold::Unknown(why) => {
                    let why = format!("SQS did not say whether somebody else has it; redrive again: {why}");
                    return left(&copies, &why, sums);
                }
            }
            match self.send(letter).await? {
                Fate::Redriven(why) => tell("redriven", letter, &why)?,
                Fate::NotDeleted(why) => {
                    sums.not_deleted += 1;
                    tell("redriven, not deleted", letter, &why)?;
                }
                Fate::Refused(why) => return left(&copies, &format!("SQS refuses it: {why}"), sums),
            }
        }
        let origins = copies.iter().filter_map(|copy| copy.origin_id.clone()).collect();
        sums.events.insert(letter.identity, origins);
        sums.sent += 1;
        for (at, copy) in copies.iter().enumerate().skip(1) {
            if *self.stop.borrow() {
                return left(&copies[at..], "its event was sent, and the command was interrupted", sums);
            }
            self.duplicate(copy, &format!("a copy of message {}", letter.message_id), sums).await?;
        }
        Ok(())
    }

    /// Deletes a letter whose event was sent with another.
    async fn duplicate(&mut self, copy: &Letter, why: &str, sums: &mut Sums) -> anyhow::Result<()> {
        if self.options.meant.dry_run {
            sums.duplicates += 1;
            return tell("would delete", copy, why);
        }
        match unless_stopped(self.stop, LAST_ANSWER, self.reader.delete(&copy.message_id)).await.transpose()? {
            Some(true) => {
                sums.duplicates += 1;
                tell("deleted", copy, why)
            }
            Some(false) => left([copy], &format!("{why}, and SQS did not delete it"), sums),
            None => left([copy], &format!("{why}, and {INTERRUPTED_EARLY}"), sums),
        }
    }

    /// Sends a letter, then deletes it. The run goes on before the message can arrive: a message of a quarantined run would
    /// be refused again. Whoever fails in between leaves the letter where it is, and the next redrive sends it. A stop waits
    /// for an answer that is on its way, but not long.
    async fn send(&mut self, letter: &Letter) -> anyhow::Result<Fate> {
        let id = letter.message_id.as_str();
        let release = async {
            match identity_of_run(letter) {
                Some((event_id, digest)) => self.database.release_quarantined(event_id, digest).await,
                None => Ok(false),
            }
        };
        let goes_on = unless_stopped(self.stop, LAST_ANSWER, release)
            .await
            .with_context(|| format!("{INTERRUPTED_EARLY}; message {id} was not sent and is still here"))??;
        let waits = if goes_on { "; its run waits for it, redrive it once more" } else { "" };
        fault::point("redrive.before_send", id);
        let counted = match unless_stopped(self.stop, LAST_ANSWER, self.send_counted(letter)).await {
            Some(Ok(counted)) => counted,
            Some(Err(error)) if error.is_about_the_message() => {
                let alternative =
                    if self.options.force { "" } else { "; --force sends it without its count of redrives" };
                return Ok(Fate::Refused(format!("{error}{waits}{alternative}")));
            }
            Some(Err(error)) => {
                return Err(error).with_context(|| format!("message {id} was not sent and is still here{waits}"));
            }
            None => bail!("{INTERRUPTED_EARLY}; message {id} is still here, and may have been sent{waits}"),
        };
        fault::point("redrive.after_send", id);
        let mut why = Vec::new();
        if goes_on {
            why.push("its quarantined run goes on");
        }
        if !counted {
            why.push("without its count of redrives, for which it has no room");
        }
        let stop = self.stop;
        let delete = async {
            // The send may have taken longer than the letter was ours. Where SQS cannot be asked, the delete tells.
            if self.reader.ask(id).await == Hold::Lost {
                return Ok(Some(SOMEBODY_HAS_IT));
            }
            let deleted = self.reader.delete(id).await?;
            fault::point("redrive.after_delete", id);
            Ok::<_, SqsError>((!deleted).then_some(STILL_THERE))
        };
        let still_there = format!("message {id} was sent, and is still in the dead-letter queue");
        match unless_stopped(stop, LAST_ANSWER, delete).await {
            Some(Ok(None)) => Ok(Fate::Redriven(why.join("; "))),
            Some(Ok(Some(problem))) => {
                why.insert(0, problem);
                Ok(Fate::NotDeleted(why.join("; ")))
            }
            Some(Err(error)) => Err(error).context(still_there),
            None => bail!("{INTERRUPTED_EARLY}; {still_there} unless SQS has deleted it meanwhile"),
        }
    }

    /// Sends a letter with its count of redrives; whether it went with it. SQS counts attributes towards the largest size, and
    /// an event of just that size has room for none. Without the count nothing would stop it from going round, so it is sent
    /// so only by force.
    async fn send_counted(&self, letter: &Letter) -> Result<bool, SqsError> {
        let redrives = letter.redrives.saturating_add(1);
        match self.sqs.send_redriven(&self.source, &letter.body, redrives).await {
            Err(error) if error.is_about_the_message() && self.options.force => {
                self.sqs.send_redriven(&self.source, &letter.body, 0).await.map(|()| false)
            }
            sent => sent.map(|()| true),
        }
    }

    async fn quarantined(&self, letter: &Letter) -> anyhow::Result<bool> {
        match identity_of_run(letter) {
            Some((event_id, digest)) => Ok(self.database.is_quarantined(event_id, digest).await?),
            None => Ok(false),
        }
    }
}

const INTERRUPTED_EARLY: &str = "interrupted before an answer came";
const STILL_THERE: &str = "SQS did not delete it: it is still in the dead-letter queue, and will be a copy there";
const SOMEBODY_HAS_IT: &str = "its time was over, and somebody else has it: it will be a copy in the dead-letter queue";

/// What became of a letter.
enum Fate {
    /// It was sent and deleted, and what there is to say besides.
    Redriven(String),
    /// It was sent, and not deleted: why not, and what there is to say besides.
    NotDeleted(String),
    /// SQS will not have it, and says why.
    Refused(String),
}

/// Counts letters that stay where they are, and says why.
fn left<'a>(letters: impl IntoIterator<Item = &'a Letter>, why: &str, sums: &mut Sums) -> anyhow::Result<()> {
    letters.into_iter().try_for_each(|letter| {
        sums.left += 1;
        tell("left", letter, why)
    })
}

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
