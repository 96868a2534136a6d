//! What events mean: decoding, and one file for each kind.
//!
//! [`Events`] is the handler that the consumers are given. It decodes a delivery, sends a slow event that came in on the
//! common lane to its own, and runs the rest where it is.

mod attempts;
pub mod cancels;
pub mod ended;
pub mod envelope;
mod gate;
mod group_commit;
mod listing_upsert;
pub mod outgoing;
#[cfg(feature = "fault-injection")]
mod planted;
pub mod recorder;
pub mod relay;
pub mod request;
pub mod retention;
mod valuations_publish;
mod valuations_refresh;

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, future};
use tokio::sync::{Notify, OnceCell, Semaphore};

use crate::config::{self, Backoff};
use crate::db::Database;
use crate::fault;
use crate::kafka::Publisher;
use crate::metrics::Metrics;
use crate::partner::Partner;
use crate::queue::sqs::{Queue, Sqs, SqsError};
use crate::queue::{Delivery, Handler, Outcome, Refusal};
use crate::task::{self, Kind};
pub use ended::Ended;
use envelope::Event;
pub use gate::Gate;
use gate::Pass;
pub use group_commit::GroupCommit;
use recorder::Recorder;
use request::Request;

/// Names of the lanes, in logs, metrics and the outbox.
pub mod lane {
    /// What producers send to.
    pub const EVENTS: &str = "events";
    /// `valuations.refresh`.
    pub const VALUATIONS: &str = "valuations";
    /// `valuations.publish`.
    pub const POST_PROCESSING: &str = "post_processing";
}

/// How long a deferred publish event waits for its run when there is no lease to go by. Each time costs a receive, of
/// which there are [`MAX_RECEIVE_COUNT`](crate::queue::attributes::MAX_RECEIVE_COUNT), so the wait grows with their number.
const UNFINISHED_RUN_WAIT: Backoff = Backoff { base: Duration::from_secs(30), cap: Duration::from_secs(15 * 60) };

/// The lanes that events are sent to, looked up when first needed: the service starts without SQS.
pub struct LaneQueues {
    sqs: Sqs,
    valuations: (String, OnceCell<Queue>),
    post_processing: (String, OnceCell<Queue>),
}

impl LaneQueues {
    /// Lanes by the queue names of `lanes`.
    pub fn new(sqs: Sqs, lanes: &config::Lanes) -> Self {
        LaneQueues {
            sqs,
            valuations: (lanes.valuations.queue.clone(), OnceCell::new()),
            post_processing: (lanes.post_processing.queue.clone(), OnceCell::new()),
        }
    }

    /// The queue of a lane, by the lane's name in the outbox. Only slow lanes are ever sent to.
    async fn queue(&self, lane: &str) -> Result<&Queue, SqsError> {
        let (name, cell) = if lane == lane::VALUATIONS { &self.valuations } else { &self.post_processing };
        cell.get_or_try_init(|| self.sqs.queue(name)).await
    }
}

/// Everything that events need, and their handler.
pub struct Events {
    /// Postgres.
    pub database: Database,
    /// The partner's API.
    pub partner: Partner,
    /// Kafka.
    pub publisher: Publisher,
    /// Client for forwarding.
    pub sqs: Sqs,
    /// Where to forward to.
    pub lanes: Arc<LaneQueues>,
    /// Page and batch sizes of the slow event.
    pub refresh: config::Refresh,
    /// Pages that may be in memory, over all runs of the process.
    pub pages: Arc<Semaphore>,
    /// Valuations a page of post-processing.
    pub publish_page_size: usize,
    /// Pages of a publication whose records are out and whose cursor is not written; at most half of them, rounded up, are being
    /// sent.
    pub publish_pages_in_flight: usize,
    /// Writes listings of several events together.
    pub upserts: GroupCommit,
    /// Wakes the relay after a commit.
    pub outbox: Arc<Notify>,
    /// Lets suspects work alone.
    pub gate: Arc<Gate>,
    /// Ends of attempts that Postgres has not taken yet.
    pub ended: Ended,
    /// Keeps what was consumed from the common lane, where that was asked for.
    pub recorder: Option<Recorder>,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

impl Handler for Events {
    fn handle<'a>(&'a self, delivery: &'a Delivery) -> BoxFuture<'a, Outcome> {
        async move {
            let outcome = match self.begin(delivery).await {
                Ok(pass) => {
                    let mut pass = Some(pass);
                    let outcome = self.dispatch(delivery, &mut pass).await.unwrap_or_else(Outcome::Refuse);
                    // It can be charged for a death until its end is written, so nobody who waits to be alone begins before.
                    delivery.keep_until_concluded(pass);
                    outcome
                }
                Err(outcome) => outcome,
            };
            if let (Some(recorder), true) = (&self.recorder, delivery.lane == lane::EVENTS)
                && matches!(outcome, Outcome::Done { .. } | Outcome::Forwarded(_))
            {
                recorder.record(&delivery.message);
            }
            outcome
        }
        .boxed()
    }

    fn conclude<'a>(&'a self, delivery: &'a Delivery) -> BoxFuture<'a, ()> {
        self.conclude_attempt(delivery).boxed()
    }
}

impl Events {
    async fn dispatch(&self, delivery: &Delivery, pass: &mut Option<Pass>) -> Result<Outcome, Refusal> {
        fault::point("events.decode", &delivery.message.id);
        if fault::planted("attempt-by-receive") && delivery.message.receive_count > 3 {
            let reason = format!("received {} times", delivery.message.receive_count);
            return Err(Refusal { code: "too_many_attempts", reason });
        }
        let event = Event::decode(&delivery.message.body)?;
        #[cfg(feature = "fault-injection")]
        if let Some(outcome) = planted::handle(&event, delivery) {
            return Ok(outcome);
        }
        let kind = request::kind(&event)?;
        delivery.identify(kind, &event.id);
        let request = Request::decode(&event);
        let elsewhere = request.as_ref().ok().and_then(Request::own_lane).filter(|lane| *lane != delivery.lane);
        match elsewhere {
            // The work on it does not begin here.
            Some(_) => task::label(Kind::named(kind)),
            None => task::identify(Kind::named(kind), &event.id),
        }
        fault::point("events.begin", &event.id);
        let request = request?;
        if let Some(lane) = elsewhere {
            return Ok(Box::pin(self.forward(delivery, lane)).await);
        }
        match request {
            Request::Upsert(listing) => listing_upsert::handle(self, &event, *listing).await,
            // Boxed, so that the task of a fast event has not the size of a slow one's.
            Request::Refresh(data) => Box::pin(valuations_refresh::handle(self, &event, &data, delivery, pass)).await,
            Request::Publish(data) => Box::pin(valuations_publish::handle(self, &event, &data, delivery, pass)).await,
        }
    }

    /// Sends the body unchanged to its lane. If the delete afterwards is lost, the event arrives there twice, and its id
    /// absorbs the second.
    async fn forward(&self, delivery: &Delivery, to: &'static str) -> Outcome {
        let sent = async {
            let queue = self.lanes.queue(to).await?;
            fault::point("forward.before_send", delivery.fault_key());
            self.sqs.send_redriven(queue, &delivery.message.body, delivery.message.redrives).await
        };
        match sent.await {
            Ok(()) => {
                fault::point("forward.after_send", delivery.fault_key());
                Outcome::Forwarded(to)
            }
            Err(error) => Outcome::Retry(error.into()),
        }
    }
}

/// The future in `slot`, or one that never ends.
async fn optional<T>(slot: &mut Option<BoxFuture<'_, T>>) -> T {
    match slot {
        Some(future) => future.await,
        None => future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::attributes::MAX_RECEIVE_COUNT;

    #[test]
    fn a_publish_event_can_wait_for_its_run_for_days() {
        let waits = (1..=MAX_RECEIVE_COUNT).map(|receive_count| UNFINISHED_RUN_WAIT.ceiling(receive_count));
        let first: Vec<u64> = waits.clone().take(7).map(|wait| wait.as_secs()).collect();
        assert_eq!(first, [30, 60, 120, 240, 480, 900, 900]);
        assert!(waits.sum::<Duration>() > Duration::from_secs(10 * 24 * 3600));
    }
}
