//! Reading a dead-letter queue without taking from it.
//!
//! SQS shows a message only by hiding it from everyone else for a while. A [`Reader`] keeps hidden what it has seen, so that
//! each message is seen once, and gives everything back at the end. Memory follows the number of messages: a few hundred
//! bytes each, their bodies not counted, which the caller keeps or drops.

use std::collections::HashSet;
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::batch::BATCH;
use super::sqs::{DeadLetter, Extension, Queue, Sqs, SqsError};

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

/// So often in the time that messages stay hidden it is looked which are to be extended. One that could not be is tried again
/// at the next look, and not at once.
const LOOKS_FOR_DUE: u32 = 16;

/// Given to a call of SQS that is on its way when the reading is to stop, and to each that gives messages back. It is longer
/// than a poll waits.
pub const LAST_ANSWER: Duration = Duration::from_millis(1_500);

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
    held: Vec<Held>,
    next_look: Instant,
    /// Messages by SQS's count before the first delete. Its counts lag up to a minute behind deletes.
    before_deletes: Option<u64>,
    quiet: u32,
    repeated: u32,
    looked: u32,
    missed: Option<Missed>,
}

/// Why a reading is not the whole queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missed {
    /// By SQS's count about so many messages are there that did not show themselves: somebody else has received them, or
    /// the count is behind.
    Hidden(u64),
    /// [`MOST_HELD`] messages are held, and more would not be shown.
    TooMany,
    /// What was held became visible again faster than SQS could be asked to keep it.
    TooSlow,
}

/// Whether a message is still hidden because of us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hold {
    /// It is.
    Ours,
    /// Its time was over, and somebody else has it or had it.
    Lost,
    /// SQS could not be asked, and why.
    Unknown(String),
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
            held: Vec::new(),
            next_look: Instant::now(),
            before_deletes: None,
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
    /// until they are deleted or given back; a stop in the middle of a receive gives them back.
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
                let unseen = tokio::select! {
                    unseen = self.unseen() => unseen?,
                    () = stopped(self.stop.clone()) => return Ok(None),
                };
                match unseen {
                    0 => return Ok(None),
                    _ if self.looked < LOOKS_FOR_UNSEEN => self.looked += 1,
                    unseen => {
                        self.missed = Some(Missed::Hidden(unseen));
                        return Ok(None);
                    }
                }
            }
            let Some(letters) = self.receive().await? else { return Ok(None) };
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

    /// Up to ten messages; `None` if the reading is to stop.
    async fn receive(&mut self) -> Result<Option<Vec<DeadLetter>>, SqsError> {
        let (sqs, dead) = (self.sqs.clone(), self.dead.clone());
        let receive = sqs.receive_dead_letters(&dead, WAIT, self.visibility);
        tokio::pin!(receive);
        tokio::select! {
            letters = &mut receive => return letters.map(Some),
            () = stopped(self.stop.clone()) => {}
        }
        // What SQS hides by it can only be given back if its answer is seen. What is held need not wait for that.
        let held = std::mem::take(&mut self.held);
        let (last, ()) = tokio::join!(timeout(LAST_ANSWER, receive), give_back(&sqs, &dead, &held));
        if let Ok(Ok(letters)) = last {
            self.hold(letters);
        }
        Ok(None)
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
            self.held.push(Held {
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

    /// About how many messages are in the queue, hidden or not, beside those that were seen: now, or before the first
    /// delete. What came since the first delete and was seen hides as many.
    async fn unseen(&self) -> Result<u64, SqsError> {
        let all = match self.before_deletes {
            Some(all) => all,
            None => self.sqs.depth(&self.dead).await?,
        };
        Ok(all.saturating_sub(self.seen.len() as u64))
    }

    /// Extends what has half of its time left, once; to be called between messages. What SQS does not extend is delivered
    /// again, and known. A stop ends it at once: everything is about to be given back.
    pub async fn keep(&mut self) {
        let now = Instant::now();
        if now < self.next_look {
            return;
        }
        self.next_look = now + self.visibility / LOOKS_FOR_DUE;
        let due_until = now + self.visibility / 2;
        let due: Vec<usize> = (0..self.held.len()).filter(|at| self.held[*at].until < due_until).collect();
        let (mut kept, mut refused, mut problem) = (Vec::new(), Vec::new(), None);
        {
            let mut batches =
                stream::iter(due.chunks(BATCH)).map(|batch| self.extend(batch)).buffer_unordered(BATCHES_AT_ONCE);
            let stopped = stopped(self.stop.clone());
            tokio::pin!(stopped);
            while let Some((batch, until, answers)) = tokio::select! {
                batch = batches.next() => batch,
                () = &mut stopped => None,
            } {
                match answers {
                    Ok(answers) => batch.iter().zip(answers).for_each(|(at, answer)| match answer {
                        Extension::Extended => kept.push((*at, until)),
                        // Such a receipt is of no use any more.
                        Extension::Refused(_) => refused.push(*at),
                        // It keeps its old time, and is due again at the next look.
                        Extension::Failed(_) => {}
                    }),
                    Err(error) => problem = problem.or(Some(error)),
                }
            }
        }
        for (at, until) in kept {
            self.held[at].until = until;
        }
        // The last first, so that the places of the others stay.
        refused.sort_unstable();
        for at in refused.into_iter().rev() {
            self.held.swap_remove(at);
        }
        if let Some(error) = problem {
            tracing::warn!(%error, "dead letters were not kept hidden; others may see them meanwhile");
        }
    }

    /// Asks SQS to hide these of what is held for their whole time once more; gives until when that would be.
    async fn extend<'a>(&self, batch: &'a [usize]) -> (&'a [usize], Instant, Result<Vec<Extension>, SqsError>) {
        let entries: Vec<_> = batch.iter().map(|at| (self.held[*at].receipt.clone(), self.visibility)).collect();
        let until = Instant::now() + self.visibility;
        (batch, until, self.sqs.change_visibility(&self.dead, &entries).await)
    }

    /// Asks SQS whether a message that was read is still ours, and hides it for its whole time once more. SQS answers the
    /// delete of a message that another has received since as if it had been done, and deletes nothing.
    pub async fn ask(&mut self, id: &str) -> Hold {
        let Some(at) = self.held.iter().position(|held| held.id == id) else { return Hold::Lost };
        let entry = [(self.held[at].receipt.clone(), self.visibility)];
        let asked_at = Instant::now();
        match self.sqs.change_visibility(&self.dead, &entry).await.map(|mut answers| answers.pop()) {
            Ok(Some(Extension::Extended)) => {
                self.held[at].until = asked_at + self.visibility;
                Hold::Ours
            }
            Ok(Some(Extension::Refused(_))) => {
                self.held.swap_remove(at);
                Hold::Lost
            }
            Ok(Some(Extension::Failed(why))) => Hold::Unknown(why),
            Ok(None) => Hold::Unknown("SQS did not answer".to_owned()),
            Err(error) => Hold::Unknown(error.to_string()),
        }
    }

    /// As [`ask`](Self::ask), but asks only about a message whose time is over.
    pub async fn hold_of(&mut self, id: &str) -> Hold {
        match self.held.iter().find(|held| held.id == id) {
            Some(held) if held.until > Instant::now() => Hold::Ours,
            _ => self.ask(id).await,
        }
    }

    /// Deletes a message that was read and is still ours; `false`: it is not, or SQS did not do it, and the message is still
    /// there or somebody else's.
    pub async fn delete(&mut self, id: &str) -> Result<bool, SqsError> {
        if !matches!(self.hold_of(id).await, Hold::Ours) {
            return Ok(false);
        }
        let Some(at) = self.held.iter().position(|held| held.id == id) else { return Ok(false) };
        if self.before_deletes.is_none() {
            self.before_deletes = Some(self.sqs.depth(&self.dead).await?);
        }
        let deleted = self.sqs.delete(&self.dead, &[self.held[at].receipt.clone()]).await? == 0;
        if deleted {
            self.held.swap_remove(at);
        }
        Ok(deleted)
    }

    /// Makes everything visible again that is still held. Where that fails, it becomes visible by itself within a minute.
    pub async fn give_back(self) {
        give_back(&self.sqs, &self.dead, &self.held).await;
    }
}

/// Makes messages visible again. A batch that fails is no reason to leave the others; silence is: each would wait as long.
async fn give_back(sqs: &Sqs, dead: &Queue, held: &[Held]) {
    let receipts: Vec<_> = held.iter().map(|held| (held.receipt.clone(), Duration::ZERO)).collect();
    let mut batches = stream::iter(receipts.chunks(BATCH))
        .map(|batch| timeout(LAST_ANSWER, sqs.change_visibility(dead, batch)))
        .buffer_unordered(BATCHES_AT_ONCE);
    let mut problem = None;
    while let Some(answer) = batches.next().await {
        match answer {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => problem = problem.or(Some(error.to_string())),
            Err(_) => {
                problem = Some(format!("no answer within {LAST_ANSWER:?}"));
                break;
            }
        }
    }
    if let Some(error) = problem {
        tracing::warn!(error, "dead letters were not given back; they are visible again within a minute");
    }
}

/// Waits until the reading is to stop.
pub async fn stopped(mut stop: watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        // Nobody is left who could say so.
        std::future::pending().await
    }
}
