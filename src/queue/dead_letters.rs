//! Reading a dead-letter queue without taking from it.
//!
//! SQS shows a message only by hiding it from everyone else for a while. A [`Reader`] keeps hidden what it has seen, so that
//! each message is seen once, and gives everything back at the end. Memory follows the number of messages: a few hundred
//! bytes each, their bodies not counted, which the caller keeps or drops.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::sync::watch;
use tokio::time::Instant;

use super::sqs::{BATCH, DeadLetter, Extension, Queue, Sqs, SqsError};

/// The longest that a message that was seen stays hidden unless it is extended or given back: what a reader that was killed
/// costs the next one.
const MOST_VISIBILITY: Duration = Duration::from_secs(60);

/// Long poll. SQS asks all of its servers only if a receive may wait; one that may not wait sees a sample of them.
const WAIT: Duration = Duration::from_secs(1);

/// So many receives in a row without a message are the end: standard queues promise no order and no full answer.
const QUIET_RECEIVES: u32 = 2;

/// So many receives in a row with nothing but messages seen before are the end of what this reader can see: SQS is too slow
/// to keep hidden all that it holds.
const REPEATED_RECEIVES: u32 = 20;

/// Looks for messages that are there by SQS's count and were not seen: its counts lag behind, and messages come late.
const LOOKS_FOR_UNSEEN: u32 = 2;

/// Batches on their way at once when messages are kept or given back. At 100 ms a call they keep 3,200 messages a second,
/// each twice a minute: nearly as many as [`MOST_HELD`].
const BATCHES_AT_ONCE: usize = 32;

/// SQS lets 120,000 messages of a queue be received and not deleted, and then answers receives with nothing, as if it were
/// empty.
pub const MOST_HELD: usize = 100_000;

/// Reads one dead-letter queue from end to end.
pub struct Reader {
    sqs: Sqs,
    dead: Queue,
    visibility: Duration,
    stop: watch::Receiver<bool>,
    seen: HashSet<String>,
    held: VecDeque<Held>,
    deleted: u64,
    quiet: u32,
    repeated: u32,
    looked: u32,
    missed: Option<Missed>,
}

/// Why a reading is not the whole queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missed {
    /// By SQS's count about so many messages are there that did not show themselves: somebody else has received them.
    Hidden(u64),
    /// [`MOST_HELD`] messages are held, and more would not be shown.
    TooMany,
    /// What was held became visible again faster than SQS could be asked to keep it.
    TooSlow,
}

/// A message that is hidden because of us.
struct Held {
    id: String,
    receipt: String,
    until: Instant,
}

impl Reader {
    /// Reads `dead` until its end, or until `stop` says so. What it holds is hidden for `visibility` at a time, at most a
    /// minute.
    pub fn new(sqs: Sqs, dead: Queue, visibility: Duration, stop: watch::Receiver<bool>) -> Self {
        Reader {
            sqs,
            dead,
            visibility: visibility.min(MOST_VISIBILITY),
            stop,
            seen: HashSet::new(),
            held: VecDeque::new(),
            deleted: 0,
            quiet: 0,
            repeated: 0,
            looked: 0,
            missed: None,
        }
    }

    /// Why the reading that ended is not the whole queue; `None` if it is, as far as SQS tells.
    pub fn missed(&self) -> Option<Missed> {
        self.missed
    }

    /// The next messages, none seen before; `None` at the end, and once the reading is to stop. Received messages are held
    /// until they are deleted or given back.
    pub async fn next(&mut self) -> Result<Option<Vec<DeadLetter>>, SqsError> {
        self.missed = None;
        loop {
            self.keep().await;
            if *self.stop.borrow() {
                return Ok(None);
            }
            if self.held.len() >= MOST_HELD {
                self.missed = Some(Missed::TooMany);
                return Ok(None);
            }
            if self.repeated >= REPEATED_RECEIVES {
                self.missed = Some(Missed::TooSlow);
                return Ok(None);
            }
            if self.quiet >= QUIET_RECEIVES {
                match self.unseen().await? {
                    0 => return Ok(None),
                    _ if self.looked < LOOKS_FOR_UNSEEN => self.looked += 1,
                    unseen => {
                        self.missed = Some(Missed::Hidden(unseen));
                        return Ok(None);
                    }
                }
            }
            let letters = self.sqs.receive_dead_letters(&self.dead, WAIT, self.visibility).await?;
            let is_empty = letters.is_empty();
            let new = self.hold(letters);
            if !new.is_empty() {
                (self.quiet, self.repeated) = (0, 0);
                return Ok(Some(new));
            }
            match is_empty {
                true => self.quiet += 1,
                false => self.repeated += 1,
            }
        }
    }

    /// Notes what was received, and returns what was not seen before.
    fn hold(&mut self, letters: Vec<DeadLetter>) -> Vec<DeadLetter> {
        let mut new = Vec::new();
        for letter in letters {
            let message = &letter.message;
            let is_new = self.seen.insert(message.id.clone());
            if !is_new {
                // SQS may deliver a message once more, and then the newest receipt is the one that counts.
                self.held.retain(|held| held.id != message.id);
            }
            self.held.push_back(Held {
                id: message.id.clone(),
                receipt: message.receipt.clone(),
                until: message.received_at + self.visibility,
            });
            if is_new {
                new.push(letter);
            }
        }
        new
    }

    /// About how many messages are in the queue, hidden or not, beside those that were seen.
    async fn unseen(&self) -> Result<u64, SqsError> {
        let known = (self.seen.len() as u64).saturating_sub(self.deleted);
        Ok(self.sqs.depth(&self.dead).await?.saturating_sub(known))
    }

    /// Extends what has half of its time left, once; to be called between messages. What SQS does not extend is delivered
    /// again, and known. A stop ends it between batches.
    pub async fn keep(&mut self) {
        let due_until = Instant::now() + self.visibility / 2;
        let (due, rest): (VecDeque<Held>, VecDeque<Held>) =
            std::mem::take(&mut self.held).into_iter().partition(|held| held.until < due_until);
        self.held = rest;
        if due.is_empty() {
            return;
        }
        let mut batches: Vec<Vec<Held>> = Vec::with_capacity(due.len().div_ceil(BATCH));
        for held in due {
            match batches.last_mut() {
                Some(batch) if batch.len() < BATCH => batch.push(held),
                _ => batches.push(vec![held]),
            }
        }
        let (sqs, dead, visibility, stop) = (&self.sqs, &self.dead, self.visibility, &self.stop);
        let kept: Vec<(Vec<Held>, Option<SqsError>)> = stream::iter(batches)
            .map(|batch| async move {
                // What is not extended is given back with everything else.
                if *stop.borrow() {
                    return (batch, None);
                }
                extend(sqs, dead, batch, visibility).await
            })
            .buffer_unordered(BATCHES_AT_ONCE)
            .collect()
            .await;
        let mut first_error = None;
        for (batch, error) in kept {
            self.held.extend(batch);
            first_error = first_error.or(error);
        }
        if let Some(error) = first_error {
            tracing::warn!(%error, "dead letters were not kept hidden; others may see them meanwhile");
        }
    }

    /// Makes sure that a message that was read is still ours, before something is done that cannot be taken back; `false`:
    /// its time was over, and somebody else has it or had it.
    pub async fn is_held(&mut self, id: &str) -> bool {
        let Some(at) = self.held.iter().position(|held| held.id == id) else { return false };
        if self.held[at].until > Instant::now() {
            return true;
        }
        // Nobody says whether it was received by another meanwhile, but SQS refuses a receipt that is not the newest.
        let held = self.held.remove(at).into_iter().collect();
        let (kept, error) = extend(&self.sqs, &self.dead, held, self.visibility).await;
        let is_held = error.is_none() && !kept.is_empty();
        self.held.extend(kept);
        is_held
    }

    /// Deletes a message that was read; `false`: SQS did not do it, and the message is still there.
    pub async fn delete(&mut self, id: &str) -> Result<bool, SqsError> {
        let Some(at) = self.held.iter().position(|held| held.id == id) else { return Ok(false) };
        let deleted = self.sqs.delete(&self.dead, &[self.held[at].receipt.clone()]).await? == 0;
        if deleted {
            self.held.remove(at);
            self.deleted += 1;
        }
        Ok(deleted)
    }

    /// Makes everything visible again that is still held. Where that fails, it becomes visible by itself within a minute.
    pub async fn give_back(self) {
        let receipts: Vec<(String, Duration)> =
            self.held.into_iter().map(|held| (held.receipt, Duration::ZERO)).collect();
        let (sqs, dead) = (&self.sqs, &self.dead);
        let failures = stream::iter(receipts.chunks(BATCH))
            .map(|batch| async move { sqs.change_visibility(dead, batch).await.err() })
            .buffer_unordered(BATCHES_AT_ONCE)
            .filter_map(std::future::ready);
        // All of them, also after one that failed.
        let failures: Vec<SqsError> = failures.collect().await;
        if let Some(error) = failures.first() {
            tracing::warn!(%error, "dead letters were not given back; they are visible again within a minute");
        }
    }
}

/// Extends one batch, and returns what is still ours of it: a receipt that SQS refused is of no use any more. What was not
/// extended now keeps its old time, and is due again at the next pass.
async fn extend(sqs: &Sqs, dead: &Queue, batch: Vec<Held>, visibility: Duration) -> (Vec<Held>, Option<SqsError>) {
    let entries: Vec<_> = batch.iter().map(|held| (held.receipt.clone(), visibility)).collect();
    let asked_at = Instant::now();
    let answers = match sqs.change_visibility(dead, &entries).await {
        Ok(answers) => answers,
        Err(error) => return (batch, Some(error)),
    };
    let kept = batch.into_iter().zip(answers).filter_map(|(held, answer)| match answer {
        Extension::Extended => Some(Held { until: asked_at + visibility, ..held }),
        Extension::Failed(_) => Some(held),
        Extension::Refused(_) => None,
    });
    (kept.collect(), None)
}
