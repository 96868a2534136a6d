//! What went through the proxy: each call that was about messages, and what became of it on both sides.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::protocol::Call;

/// What a call did with its messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It received them.
    Receive,
    /// It sent them.
    Send,
    /// It was to delete them.
    Delete,
    /// It was to change how long they stay hidden.
    Change,
}

/// Whether the emulator did what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// It was not asked, or refused.
    No,
    /// It was asked, and its answer is not known.
    Perhaps,
    /// It said so.
    Yes,
}

/// A message of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchedMessage {
    /// The emulator's own receipt; empty for a send.
    pub receipt: String,
    /// The emulator's id of the message; only for a receive.
    pub id: String,
    /// Only for a receive and a send.
    pub body: String,
    /// What the emulator did.
    pub done: Done,
    entry: String,
}

/// A call that was about messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchedCall {
    /// What it was for.
    pub action: Action,
    /// When it came.
    pub at: Instant,
    /// How long its client waited for the answer, if it waited until it came.
    pub answered_after: Option<Duration>,
    /// Its messages.
    pub messages: Vec<WatchedMessage>,
}

impl WatchedMessage {
    /// A message of a call that was seen.
    #[must_use]
    pub fn new(receipt: &str, id: &str, body: &str, done: Done) -> Self {
        let [receipt, id, body] = [receipt, id, body].map(str::to_owned);
        Self { receipt, id, body, done, entry: String::new() }
    }
}

/// Keeps the calls.
#[derive(Debug, Default)]
pub(super) struct Witness(Mutex<Book>);

#[derive(Debug, Default)]
struct Book {
    /// Of all calls, by the name of their action.
    counts: BTreeMap<String, u64>,
    /// Those that are about messages.
    calls: Vec<WatchedCall>,
    /// Messages that were deleted.
    deleted: u64,
    /// How long the emulator took for each answer, long polls without the time that they may be parked.
    took: Vec<Duration>,
}

/// A call under way. Dropped without an [`answer`](Self::answered), its client has got none.
#[derive(Debug)]
pub(super) struct Watched<'a> {
    witness: &'a Witness,
    /// Where it is in the book; calls that are about no message are not there.
    place: Option<usize>,
    begun: Instant,
}

impl Witness {
    /// A call has come.
    pub(super) fn begin(&self, call: &Call) -> Watched<'_> {
        let begun = Instant::now();
        let action = match () {
            () if call.is_receive() => Some(Action::Receive),
            () if call.is_send() => Some(Action::Send),
            () if call.is_delete() => Some(Action::Delete),
            () if call.is_change() => Some(Action::Change),
            () => None,
        };
        let mut book = self.book();
        *book.counts.entry(call.action.clone()).or_default() += 1;
        let place = action.map(|action| {
            let messages = match action {
                Action::Receive => Vec::new(),
                _ if call.entries().is_empty() => vec![asked(&call.body)],
                _ => call.entries().iter().map(asked).collect(),
            };
            book.calls.push(WatchedCall { action, at: begun, answered_after: None, messages });
            book.calls.len() - 1
        });
        Watched { witness: self, place, begun }
    }

    /// The calls so far that were about messages.
    pub(super) fn calls(&self) -> Vec<WatchedCall> {
        self.book().calls.iter().filter(|call| !call.messages.is_empty()).cloned().collect()
    }

    /// How many calls there were so far, by the name of their action.
    pub(super) fn calls_by_action(&self) -> BTreeMap<String, u64> {
        self.book().counts.clone()
    }

    /// How many messages the emulator has deleted, as it says.
    pub(super) fn deleted(&self) -> u64 {
        self.book().deleted
    }

    /// The emulator has answered.
    pub(super) fn took(&self, time: Duration) {
        self.book().took.push(time);
    }

    /// How many of the emulator's answers took longer than `limit`, and the longest of all.
    pub(super) fn later_than(&self, limit: Duration) -> (usize, Duration) {
        let book = self.book();
        (book.took.iter().filter(|time| **time > limit).count(), book.took.iter().max().copied().unwrap_or_default())
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched<'_> {
    /// These entries, all if there are none, are on their way to the emulator.
    pub(super) fn forwarded(&self, body: &Value) {
        self.set(body["Entries"].as_array().map(Vec::as_slice), Done::Perhaps);
    }

    /// What the emulator said of them.
    pub(super) fn carried_out(&self, asked: &Value, answer: Option<&Value>) {
        let Some(answer) = answer else { return self.set(asked["Entries"].as_array().map(Vec::as_slice), Done::No) };
        match asked["Entries"].as_array() {
            None => self.set(None, Done::Yes),
            Some(all) => {
                self.set(Some(all), Done::No);
                self.set(Some(answer["Successful"].as_array().map_or(&[], Vec::as_slice)), Done::Yes);
            }
        }
        let Some(place) = self.place else { return };
        let book = &mut *self.witness.book();
        let call = &book.calls[place];
        if call.action == Action::Delete {
            book.deleted += call.messages.iter().filter(|message| message.done == Done::Yes).count() as u64;
        }
    }

    /// What a receive brought, with the emulator's own receipts.
    pub(super) fn received(&self, messages: impl Iterator<Item = WatchedMessage>) {
        if let Some(place) = self.place {
            self.witness.book().calls[place].messages = messages.collect();
        }
    }

    /// The client gets an answer.
    pub(super) fn answered(self) {
        if let Some(place) = self.place {
            self.witness.book().calls[place].answered_after = Some(self.begun.elapsed());
        }
    }

    fn set(&self, entries: Option<&[Value]>, done: Done) {
        let Some(place) = self.place else { return };
        let mut book = self.witness.book();
        let messages = &mut book.calls[place].messages;
        let is_meant = |message: &WatchedMessage| {
            entries.is_none_or(|entries| entries.iter().any(|entry| entry["Id"] == message.entry.as_str()))
        };
        messages.iter_mut().filter(|message| is_meant(message)).for_each(|message| message.done = done);
    }
}

/// A message of a batch, or of a call for one.
fn asked(entry: &Value) -> WatchedMessage {
    let text = |name: &str| entry[name].as_str().unwrap_or_default();
    let message = WatchedMessage::new(text("ReceiptHandle"), "", text("MessageBody"), Done::No);
    WatchedMessage { entry: text("Id").to_owned(), ..message }
}
