//! Queues: receiving messages, keeping them while they are worked on, and ending them.
//!
//! A message goes one way: received ([`consumer`]) → leased ([`lease`]; the [`keeper`] hides it from others) → handled by
//! whatever [`Handler`] the consumer was given → ended as its [`Outcome`] says. This room knows nothing of what events
//! mean. [`sqs`] is the only file of the service that names AWS types.

pub mod attributes;
pub mod batch;
pub mod consumer;
pub mod dead_letters;
pub mod deleter;
pub mod keeper;
pub mod lease;
mod reason;
pub mod sqs;

use std::borrow::Cow;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::Instant;
use uuid::Uuid;

use lease::Lease;

/// A message as it was received: the raw material of an event.
#[derive(Debug, Clone)]
pub struct Message {
    /// SQS's id of the message, the same at every delivery.
    pub id: String,
    /// What the producer sent, unchanged.
    pub body: String,
    /// The handle of this one delivery, by which the message is extended, released and deleted.
    pub receipt: String,
    /// How often the message was received, this time included. It grows with throttles and deploys too, so it says
    /// nothing about how often work was begun.
    pub receive_count: u32,
    /// How often an operator sent it again from its dead-letter queue.
    pub redrives: u32,
    /// When this delivery arrived.
    pub received_at: Instant,
}

/// One delivery of a message, in the hands of a handler.
pub struct Delivery {
    /// The message.
    pub message: Message,
    /// The lane it came from, as named in metrics and in the outbox.
    pub lane: &'static str,
    /// Keeps the message hidden; says when the work must stop.
    pub lease: Lease,
    /// Tells this handling of the message from all others.
    pub attempt: Uuid,
    identity: OnceLock<Identity>,
    /// Dropped when the handling was concluded.
    kept: Mutex<Option<Box<dyn Send>>>,
}

/// What a handler found out about a delivery, for the log line and the metrics.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The kind of event; one of a few names.
    pub kind: &'static str,
    /// The event's id.
    pub event_id: String,
}

impl Delivery {
    /// What faults are ordered for: the event's id, or the message's where that is not known.
    pub fn fault_key(&self) -> &str {
        self.identity().map_or(&self.message.id, |identity| &identity.event_id)
    }

    /// A delivery of `message` on `lane`.
    pub fn new(message: Message, lane: &'static str, lease: Lease) -> Self {
        Delivery { message, lane, lease, attempt: Uuid::new_v4(), identity: OnceLock::new(), kept: Mutex::default() }
    }

    /// Tells what the delivery is, as soon as that is known; a panic later on is then reported with it.
    pub fn identify(&self, kind: &'static str, event_id: &str) {
        let _ = self.identity.set(Identity { kind, event_id: event_id.to_owned() });
    }

    /// Keeps something until the handling of the delivery has been concluded, or the delivery is dropped.
    pub fn keep_until_concluded(&self, what: impl Send + 'static) {
        self.set_kept(Some(Box::new(what)));
    }

    fn concluded(&self) {
        self.set_kept(None);
    }

    fn set_kept(&self, what: Option<Box<dyn Send>>) {
        let before = std::mem::replace(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner), what);
        drop(before);
    }

    /// What the delivery is, if that was found out.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.get()
    }
}

/// How the handling of a delivery ended.
#[derive(Debug)]
pub enum Outcome {
    /// The result is committed: the message is deleted.
    Done {
        /// Listings or records that the event touched, for the log.
        rows: u64,
        /// What there is to say beyond success, for the log.
        note: Cow<'static, str>,
    },
    /// An operator cancelled the work, and that is committed: the message is deleted.
    Cancelled {
        /// Listings that this delivery still finished, for the log.
        rows: u64,
        /// What became of the rest, for the log.
        note: Cow<'static, str>,
    },
    /// It was handed to another lane: the message is deleted.
    Forwarded(&'static str),
    /// It failed in a way that may pass: visible again after a backoff.
    Retry(anyhow::Error),
    /// Not its time yet, through no fault of its own: visible again after the given time.
    Defer(Duration, Cow<'static, str>),
    /// The work was stopped, not failed: visible again at once.
    Release(Cow<'static, str>),
    /// Somebody else may have it: nothing is done to the message.
    Lost,
    /// It will never succeed: to the dead-letter queue, with the reason.
    Refuse(Refusal),
}

impl Outcome {
    /// A word for metrics and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::Done { .. } => "done",
            Outcome::Cancelled { .. } => "cancelled",
            Outcome::Forwarded(_) => "forwarded",
            Outcome::Retry(_) => "retried",
            Outcome::Defer(..) => "deferred",
            Outcome::Release(_) => "released",
            Outcome::Lost => "lost",
            Outcome::Refuse(_) => "dead_lettered",
        }
    }
}

/// Why a message went to the dead-letter queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// A fixed word to filter by, such as `invalid_json`.
    pub code: &'static str,
    /// A sentence naming the thing and the value.
    pub reason: String,
}

/// What turns a delivery into a result. The consumer is given one and knows no more about events.
pub trait Handler: Send + Sync + 'static {
    /// Handles one delivery. A panic counts as a death of this delivery and touches no other.
    fn handle<'a>(&'a self, delivery: &'a Delivery) -> BoxFuture<'a, Outcome>;

    /// Called after each handling that ended in order, cut short by a stop included: before its message is given back, for
    /// others would find the work begun, and before it is deleted, for what is done may be done again; but after a refused
    /// one was sent to the dead-letter queue, for that is still part of the work. Not after a panic: that counts as the death
    /// of the work.
    fn conclude<'a>(&'a self, delivery: &'a Delivery) -> BoxFuture<'a, ()>;
}
