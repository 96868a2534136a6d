//! Reading a dead-letter queue without taking from it.
//!
//! SQS shows a message only by hiding it from everyone else for a while. A [`Reader`] keeps hidden what it has seen, so that
//! each message is seen once, and gives everything back at the end. Memory follows the number of messages: a few hundred
//! bytes each, their bodies not counted, which the caller keeps or drops.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::time::Instant;

use super::sqs::{BATCH, DeadLetter, Extension, Queue, Sqs, SqsError};

/// The longest that a message that was seen stays hidden unless it is extended or given back: what a reader that was killed
/// costs the next one.
const MOST_VISIBILITY: Duration = Duration::from_secs(60);

/// Long poll. SQS asks all of its servers only if a receive may wait; one that may not wait sees a sample of them.
const WAIT: Duration = Duration::from_secs(1);

/// So many receives in a row without a new message are the end: standard queues promise no order and no full answer.
const QUIET_RECEIVES: u32 = 2;

/// Batches on their way at once when everything is given back.
const GIVEN_BACK_AT_ONCE: usize = 8;

/// Reads one dead-letter queue from end to end.
pub struct Reader {
    sqs: Sqs,
    dead: Queue,
    visibility: Duration,
    seen: HashSet<String>,
    held: VecDeque<Held>,
    quiet: u32,
}

/// A message that is hidden because of us.
struct Held {
    id: String,
    receipt: String,
    until: Instant,
}

impl Reader {
    /// Reads `dead`. What it holds is hidden for `visibility` at a time, at most a minute.
    pub fn new(sqs: Sqs, dead: Queue, visibility: Duration) -> Self {
        let visibility = visibility.min(MOST_VISIBILITY);
        Reader { sqs, dead, visibility, seen: HashSet::new(), held: VecDeque::new(), quiet: 0 }
    }

    /// The next messages, none seen before; `None` at the end. Received messages are held until they are deleted or given
    /// back.
    pub async fn next(&mut self) -> Result<Option<Vec<DeadLetter>>, SqsError> {
        while self.quiet < QUIET_RECEIVES {
            self.keep().await;
            let letters = self.sqs.receive_dead_letters(&self.dead, WAIT, self.visibility).await?;
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
            if !new.is_empty() {
                self.quiet = 0;
                return Ok(Some(new));
            }
            self.quiet += 1;
        }
        Ok(None)
    }

    /// Extends what has half of its time left; to be called between messages. What SQS does not extend is delivered again, and known.
    pub async fn keep(&mut self) {
        while self.held.front().is_some_and(|oldest| oldest.until < Instant::now() + self.visibility / 2) {
            let mut batch: Vec<Held> = self.held.drain(..self.held.len().min(BATCH)).collect();
            let entries: Vec<_> = batch.iter().map(|held| (held.receipt.clone(), self.visibility)).collect();
            let (asked_at, visibility) = (Instant::now(), self.visibility);
            let answers = self.sqs.change_visibility(&self.dead, &entries).await.unwrap_or_else(|error| {
                tracing::warn!(%error, "dead letters were not kept hidden; others may see them meanwhile");
                Vec::new()
            });
            let mut answers = answers.into_iter();
            // A receipt that SQS refused is of no use any more. Of one that was not extended now, the time is taken as if
            // it had been: it is not asked for in vain all the time.
            batch.retain(|_| !matches!(answers.next(), Some(Extension::Refused(_))));
            self.held.extend(batch.into_iter().map(|held| Held { until: asked_at + visibility, ..held }));
        }
    }

    /// Deletes a message that was read; `false`: SQS did not do it, and the message is still there.
    pub async fn delete(&mut self, id: &str) -> Result<bool, SqsError> {
        let Some(at) = self.held.iter().position(|held| held.id == id) else { return Ok(false) };
        let deleted = self.sqs.delete(&self.dead, &[self.held[at].receipt.clone()]).await? == 0;
        if deleted {
            self.held.remove(at);
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
            .buffer_unordered(GIVEN_BACK_AT_ONCE)
            .filter_map(std::future::ready);
        // All of them, also after one that failed.
        let failures: Vec<SqsError> = failures.collect().await;
        if let Some(error) = failures.first() {
            tracing::warn!(%error, "dead letters were not given back; they are visible again within a minute");
        }
    }
}
