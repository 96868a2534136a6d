//! What a world looks like when all work is done, as read from its database, its queues, its topic, its partner and its
//! processes.

use std::time::Instant;

use local_stack::partner::Stats;
use local_stack::{TapRecord, WatchedCall};
use sqlx::FromRow;
use time::OffsetDateTime;

use crate::workload::Lane;

/// Everything that is looked at.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Table `runs`.
    pub runs: Vec<Run>,
    /// Table `valuations`.
    pub valuations: Vec<Valuation>,
    /// Table `listing_valuations`.
    pub current: Vec<Current>,
    /// Table `listings`.
    pub listings: Vec<Listing>,
    /// Table `outbox`.
    pub outbox: Vec<Sent>,
    /// Table `publications`.
    pub publications: Vec<Publication>,
    /// All records of the topic.
    pub records: Vec<TapRecord>,
    /// Records that the broker dropped before they were read.
    pub records_missed: u64,
    /// All dead-letter queues.
    pub letters: Vec<Letter>,
    /// What the processes did with their messages, as the proxy before SQS saw it.
    pub sqs_calls: Vec<WatchedCall>,
    /// When a process was cut off from what it had in hand: between these times.
    pub interruptions: Vec<(Instant, Instant)>,
    /// Messages left in each lane's queue, visible and hidden.
    pub left: Vec<(Lane, u64, u64)>,
    /// What the partner saw.
    pub partner: Stats,
    /// Writes to runs by others than their owners, in words.
    pub strangers: Vec<String>,
    /// The processes, after some idle time.
    pub replicas: Vec<Figures>,
    /// Connections to the database, the campaign's own left out.
    pub connections: i64,
}

/// A row of `runs`.
#[derive(Clone, Debug, FromRow)]
pub struct Run {
    /// Id of the refresh event.
    pub run_id: String,
    /// State.
    pub state: String,
    /// Counted at the opening.
    pub selected: i64,
    /// With a valuation.
    pub valued: i64,
    /// Refused by the partner.
    pub failed: i64,
    /// How often work was begun.
    pub attempts: i32,
    /// Somebody owns it, or publishes it, or has a lease on it.
    pub held: bool,
    /// Time of its event.
    pub event_time: OffsetDateTime,
    /// The event's data as JSON text.
    pub event_data: Option<String>,
    /// When it was completed.
    pub completed_at: Option<OffsetDateTime>,
    /// Deaths charged to it; null where the schema has no such column.
    pub deaths: Option<i32>,
}

/// A row of `valuations`.
#[derive(Clone, Debug, FromRow)]
pub struct Valuation {
    /// The run.
    pub run_id: String,
    /// The listing.
    pub listing_id: i64,
    /// What the partner was asked about.
    pub zip_code: i32,
    /// What the partner was asked about.
    pub list_price_cents: i64,
    /// Null if it failed.
    pub valuation_cents: Option<i64>,
    /// Null if it failed.
    pub confidence: Option<f64>,
    /// Null unless it failed.
    pub failure: Option<String>,
}

/// A row of `listing_valuations`.
#[derive(Clone, Debug, FromRow)]
pub struct Current {
    /// The listing.
    pub listing_id: i64,
    /// The run that won.
    pub run_id: String,
    /// Its valuation.
    pub valuation_cents: i64,
    /// Its confidence.
    pub confidence: f64,
}

/// A row of `listings`.
#[derive(Clone, Debug, FromRow)]
pub struct Listing {
    /// The listing.
    pub listing_id: i64,
    /// Its zip code.
    pub zip_code: i32,
    /// Its price.
    pub list_price_cents: i64,
    /// The event that won.
    pub event_id: String,
    /// Its time.
    pub event_time: OffsetDateTime,
}

/// A row of `outbox`.
#[derive(Clone, Debug, FromRow)]
pub struct Sent {
    /// Its id.
    pub event_id: String,
    /// The lane that it goes to.
    pub lane: String,
    /// Whether SQS took it.
    pub sent: bool,
}

/// A row of `publications`.
#[derive(Clone, Debug, FromRow)]
pub struct Publication {
    /// Id of the publish event.
    pub event_id: String,
    /// The run.
    pub run_id: String,
    /// State.
    pub state: String,
    /// Records with a delivery report.
    pub published: i64,
    /// How often work was begun.
    pub attempts: i32,
}

/// A message in a dead-letter queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letter {
    /// The lane whose dead-letter queue it is in.
    pub lane: Lane,
    /// Its body.
    pub body: String,
    /// The message attribute `reason`.
    pub reason: String,
}

/// A process at rest, beside itself when it had just become ready.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Name of the replica.
    pub name: String,
    /// Samples of gauges that must be 0 at rest and are not.
    pub not_at_rest: Vec<String>,
    /// Open file descriptors, at first and now.
    pub descriptors: (u64, u64),
    /// Threads, at first and now.
    pub threads: (u64, u64),
    /// Resident memory in bytes, at first and now.
    pub resident: (u64, u64),
}
