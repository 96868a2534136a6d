//! `valuations.publish`: post-processing of a complete run. A page of valuations, all its records in parallel, then the
//! cursor. Pages overlap: the next one is sent while the cursor of one is written, and one more is read meanwhile; cursors are
//! written in order. Records that Kafka refuses for good are quarantined as the cursor passes them.

use std::collections::VecDeque;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesOrdered;
use futures::{FutureExt, StreamExt};
use serde::Deserialize;
use tokio::task::JoinSet;

use super::attempts::{quarantined, used};
use super::envelope::Event;
use super::gate::{PROBATION, Pass};
use super::valuations_refresh::{AFTER_LEASE, other_event};
use super::{Events, UNFINISHED_RUN_WAIT, optional};
use crate::db::publications::{OwnedPublication, PublicationClaim, PublishedRange, Quarantined};
use crate::db::{DbError, valuations};
use crate::fault;
use crate::kafka::{PublishError, Published, Records, Valuation};
use crate::queue::lease::{Role, StopReason};
use crate::queue::{Delivery, Outcome, Refusal};
use crate::task::{self, Stage, in_stage};

/// Kept of the time to stop for giving the run and the message back.
const HANDOVER: Duration = Duration::from_secs(1);

/// What a publish event asks for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Id of the refresh event.
    pub run_id: String,
}

/// Reads and checks the data of a publish event.
pub(super) fn decode(event: &Event<'_>) -> Result<Data, Refusal> {
    event.data()
}

enum Ended {
    AllPublished { rows: u64, quarantined: u64 },
    Stopped(StopReason),
    Failed(anyhow::Error),
}

/// Claims the publication, publishes, and ends it.
pub(super) async fn handle(
    events: &Events,
    event: &Event<'_>,
    data: &Data,
    delivery: &Delivery,
    pass: &mut Option<Pass>,
) -> Result<Outcome, Refusal> {
    let digest = event.digest()?;
    let run_id = data.run_id.as_str();
    let claimed = events
        .claim(
            delivery,
            (Role::Publisher, run_id),
            pass,
            |alone| {
                let lease = delivery.lease.run_lease();
                events.database.claim_publication(&event.id, &digest, run_id, delivery.attempt, lease, alone)
            },
            |claim| matches!(claim, PublicationClaim::Suspect),
        )
        .await;
    let claimed = match claimed {
        Ok(claimed) => claimed,
        Err(outcome) => return Ok(outcome),
    };
    let publication = match claimed {
        Ok(PublicationClaim::Owned(publication)) => *publication,
        Ok(PublicationClaim::Suspect) => {
            return Ok(Outcome::Retry(anyhow::anyhow!("a suspect publication was not let begin alone")));
        }
        Ok(PublicationClaim::Quarantined(deaths)) => {
            let mut refusal = quarantined(&format!("publication {} of run {run_id}", event.id), &deaths);
            refusal.reason += "; `write-api send publish` publishes the run anew";
            return Err(refusal);
        }
        Ok(PublicationClaim::Complete) => {
            return Ok(Outcome::Done { rows: 0, note: "the publication was complete already".into() });
        }
        Ok(PublicationClaim::Busy(left)) => {
            return Ok(Outcome::Defer(left + AFTER_LEASE, "the run has a publisher".into()));
        }
        Ok(PublicationClaim::RunUnfinished) => {
            let wait = UNFINISHED_RUN_WAIT.ceiling(delivery.message.receive_count);
            return Ok(Outcome::Defer(wait, "the run is not complete yet".into()));
        }
        Ok(PublicationClaim::RunUnknown) => {
            return Err(Refusal { code: "unknown_run", reason: format!("there is no run {run_id:?}") });
        }
        Ok(PublicationClaim::OtherEvent) => return Err(other_event(&event.id)),
        Err(error @ DbError::Refused { .. }) => {
            return Err(Refusal { code: "invalid_data", reason: error.to_string() });
        }
        Err(error @ DbError::Unavailable { .. }) => return Ok(Outcome::Retry(error.into())),
    };
    delivery.lease.hold_run(Role::Publisher, run_id, publication.token);
    fault::point("publication.claimed", &event.id);
    // From now on the publication's own record says that work has begun.
    events.forget(delivery).await;
    // The pass is let go with the first progress, or else at the end of all.
    let ended = publish(events, event, run_id, &publication, delivery, pass).await;
    Ok(end(events, event, run_id, &publication, delivery, ended).await)
}

/// Valuations that were read and not sent.
struct Page {
    after: i64,
    last: i64,
    valuations: Vec<valuations::Valuation>,
}

/// What the cursor was moved past, and how many pages those were.
type Advanced = Result<(PublishedRange, usize), Ended>;

/// One owner's publishing of a run. All that it does at the same time is polled in one place, or in a task of its own: what is begun
/// goes on, so that nothing holds a connection of the pool while it waits for something that needs one.
struct Publishing<'a> {
    events: &'a Events,
    event_id: &'a str,
    run_id: &'a str,
    publication: &'a OwnedPublication,
    delivery: &'a Delivery,
    pass: &'a mut Option<Pass>,
    records: &'a Records,
    read_to: i64,
    exhausted: bool,
    /// Read while those before it are on their way.
    ahead: Option<Page>,
    /// Pages whose records are out and whose cursor is not committed.
    in_flight: usize,
    rows: u64,
    quarantined: u64,
}

impl<'a> Publishing<'a> {
    /// Publishes all from the cursor on, or until told to stop.
    async fn run(mut self) -> Ended {
        let mut stopped = std::pin::pin!(self.delivery.lease.stopped());
        let mut probation = std::pin::pin!(tokio::time::sleep(PROBATION));
        // In a task of its own, so that a page is decoded on one processor while another's records are made on the other. Given up with
        // this.
        let mut reading: JoinSet<Result<Vec<valuations::Valuation>, DbError>> = JoinSet::new();
        let mut sending: FuturesOrdered<BoxFuture<'a, Result<PublishedRange, PublishError>>> = FuturesOrdered::new();
        let mut advancing: Option<BoxFuture<'a, Advanced>> = None;
        let mut outliving: Option<BoxFuture<'a, ()>> = None;
        // Kafka has the records of these pages, and the cursor before theirs is being written.
        let mut reported: VecDeque<PublishedRange> = VecDeque::new();
        // Why no more is begun; what is under way is finished all the same: its records are out, and a cursor that lags would
        // send them again.
        let (mut stop, mut failure) = (None, None);
        loop {
            if advancing.is_none() {
                // One cursor for all that are reported by now.
                let pages = reported.len();
                advancing = PublishedRange::joined(reported.drain(..)).map(|range| self.advance(range, pages));
            }
            let goes_on = stop.is_none() && failure.is_none();
            // Those that are being sent hold the most memory, librdkafka's copies of their records; the others wait for a cursor.
            let most = self.events.publish_pages_in_flight;
            if goes_on
                && self.in_flight < most
                && sending.len() < most.div_ceil(2)
                && let Some(page) = self.ahead.take()
            {
                self.in_flight += 1;
                sending.push_back(self.send(page));
            }
            if goes_on && reading.is_empty() && self.ahead.is_none() && !self.exhausted {
                task::spawn_in(&mut reading, "valuations", self.read());
            }
            if sending.is_empty() && advancing.is_none() && reading.is_empty() {
                let all = self.exhausted && self.ahead.is_none();
                return match (failure, stop) {
                    (Some(error), _) => Ended::Failed(error),
                    (None, Some(reason)) if !all => Ended::Stopped(reason),
                    _ => Ended::AllPublished { rows: self.rows, quarantined: self.quarantined },
                };
            }
            tokio::select! {
                biased;
                () = self.delivery.lease.lost() => return Ended::Stopped(StopReason::Lost),
                done = optional(&mut advancing) => {
                    advancing = None;
                    match done {
                        Ok((range, pages)) => self.advanced(&range, pages),
                        Err(ended) => return ended,
                    }
                }
                Some(sent) = sending.next(), if !sending.is_empty() => match sent {
                    Ok(range) => reported.push_back(range),
                    Err(error) => {
                        // Without its cursor none of those behind it can have theirs.
                        sending.clear();
                        failure = failure.or(Some(error.into()));
                    }
                },
                Some(page) = task::park(reading.join_next()), if !reading.is_empty() => match page {
                    Ok(Ok(valuations)) => self.page_read(valuations),
                    Ok(Err(error)) => failure = failure.or(Some(error.into())),
                    // As if it had panicked here: nobody else ends the task.
                    Err(ended) => std::panic::resume_unwind(ended.into_panic()),
                },
                // Where Kafka is away, what is under way can last for longer than a stop may.
                () = self.delivery.lease.nearly_over(HANDOVER) => return Ended::Stopped(StopReason::Shutdown),
                reason = &mut stopped, if stop.is_none() => stop = Some(reason),
                () = optional(&mut outliving) => {
                    outliving = None;
                    *self.pass = None;
                }
                // So long that its pass is given back; before that, what it was suspected of is forgotten.
                () = &mut probation, if self.pass.is_some() && outliving.is_none() => outliving = Some(self.outlive()),
            }
        }
    }

    fn read(&self) -> impl Future<Output = Result<Vec<valuations::Valuation>, DbError>> + 'static {
        let (database, run_id) = (self.events.database.clone(), self.run_id.to_owned());
        let (after, rows) = (self.read_to, self.events.publish_page_size);
        in_stage(Stage::Read, async move { database.read_valuations(&run_id, after, rows).await })
    }

    fn page_read(&mut self, valuations: Vec<valuations::Valuation>) {
        self.exhausted = valuations.len() < self.events.publish_page_size;
        if let Some(last) = valuations.last().map(|valuation| valuation.listing_id) {
            self.ahead = Some(Page { after: self.read_to, last, valuations });
            self.read_to = last;
        }
    }

    fn send(&self, page: Page) -> BoxFuture<'a, Result<PublishedRange, PublishError>> {
        let (events, event_id, records) = (self.events, self.event_id, self.records);
        let sent = async move {
            let Page { after, last, valuations } = page;
            fault::point("publish.before_send", event_id);
            let record = |valuation: &valuations::Valuation| records.record(&input(valuation));
            let published = events.publisher.publish_page(&valuations, record).await?;
            fault::point("publish.after_reports", event_id);
            let quarantined = quarantine(&published);
            Ok(PublishedRange { after, last, published: published.records as i64, quarantined })
        };
        in_stage(Stage::Publish, sent).boxed()
    }

    fn advance(&self, range: PublishedRange, pages: usize) -> BoxFuture<'a, Advanced> {
        let (events, event_id, run_id, publication) = (self.events, self.event_id, self.run_id, self.publication);
        let advance = async move {
            fault::point("publication.before_advance", event_id);
            let used = used(&publication.used);
            let advanced = events.database.advance_publication(event_id, publication.token, &range, &used).await;
            fault::point("publication.after_advance", event_id);
            match advanced {
                Ok(true) => {
                    tell(events, event_id, run_id, &range.quarantined);
                    Ok((range, pages))
                }
                Ok(false) => {
                    events.metrics.fenced.inc();
                    Err(Ended::Stopped(StopReason::Lost))
                }
                Err(error) => Err(Ended::Failed(error.into())),
            }
        };
        in_stage(Stage::Write, advance).boxed()
    }

    fn advanced(&mut self, range: &PublishedRange, pages: usize) {
        self.in_flight -= pages;
        self.rows += range.published as u64;
        self.quarantined += range.quarantined.len() as u64;
        // Let go with the first progress.
        *self.pass = None;
    }

    fn outlive(&self) -> BoxFuture<'a, ()> {
        let (events, event_id, publication) = (self.events, self.event_id, self.publication);
        let forget = events.database.outlive_publication(event_id, publication.token);
        events.outlive(event_id, publication.deaths, forget).boxed()
    }
}

async fn publish(
    events: &Events,
    event: &Event<'_>,
    run_id: &str,
    publication: &OwnedPublication,
    delivery: &Delivery,
    pass: &mut Option<Pass>,
) -> Ended {
    let records = Records::new(run_id, publication.completed_at, publication.traceparent.as_deref());
    let publishing = Publishing {
        events,
        event_id: &event.id,
        run_id,
        publication,
        delivery,
        pass,
        records: &records,
        read_to: publication.cursor,
        exhausted: false,
        ahead: None,
        in_flight: 0,
        rows: 0,
        quarantined: 0,
    };
    publishing.run().await
}

/// The refused records of a page as they are quarantined.
fn quarantine(published: &Published) -> Vec<Quarantined> {
    let refused = published.refused.iter();
    let quarantined = refused.map(|record| Quarantined {
        // A key is made from the listing's id, in `records`.
        listing_id: record.key.parse().expect("the key of a record is its listing's id"),
        code: format!("{:?}", record.code),
        reason: record.code.to_string(),
    });
    quarantined.collect()
}

/// Tells of records that were just quarantined; one line for a cursor, for all of them may have the same fault.
fn tell(events: &Events, event_id: &str, run_id: &str, quarantined: &[Quarantined]) {
    if let Some(Quarantined { listing_id, code, reason }) = quarantined.first() {
        let records = quarantined.len();
        events.metrics.kafka_quarantined.inc_by(records as u64);
        tracing::error!(
            event_id,
            run_id,
            records,
            first_listing_id = listing_id,
            code,
            reason,
            "Kafka refuses records for good; they are quarantined and the others go on"
        );
    }
}

fn input(valuation: &valuations::Valuation) -> Valuation {
    Valuation {
        listing_id: valuation.listing_id,
        zip_code: valuation.zip_code,
        list_price_cents: valuation.list_price_cents,
        valuation_cents: valuation.valuation_cents,
        confidence: valuation.confidence,
    }
}

/// Completes the publication or gives it back.
async fn end(
    events: &Events,
    event: &Event<'_>,
    run_id: &str,
    publication: &OwnedPublication,
    delivery: &Delivery,
    ended: Ended,
) -> Outcome {
    let (outcome, error) = match ended {
        Ended::AllPublished { rows, quarantined } => {
            // A completed one has no publisher: renewing it meanwhile would look like having lost it.
            delivery.lease.stop_renewing();
            fault::point("publication.before_complete", &event.id);
            let (token, used) = (publication.token, used(&publication.used));
            let completed = events.database.complete_publication(&event.id, run_id, token, &used).await;
            fault::point("publication.after_complete", &event.id);
            match completed {
                Ok(true) => {
                    delivery.lease.forget_run();
                    let note = match quarantined {
                        0 => "".into(),
                        _ => format!("{quarantined} records are quarantined").into(),
                    };
                    return Outcome::Done { rows, note };
                }
                Ok(false) => {
                    events.metrics.fenced.inc();
                    (Outcome::Lost, None)
                }
                Err(error) => (Outcome::Retry(error.into()), None),
            }
        }
        // Given back as well, by our own token: the attempt has ended and did not die.
        Ended::Stopped(StopReason::Lost) => (Outcome::Lost, None),
        Ended::Stopped(StopReason::Shutdown) => {
            (Outcome::Release("stopped before every page was published".into()), None)
        }
        // Only refreshes are cancelled: a complete run has no way back.
        Ended::Stopped(StopReason::ReceiveCap | StopReason::Cancelled) => {
            (Outcome::Release("handed over before SQS's 12 h are over".into()), None)
        }
        Ended::Failed(error) => {
            let shown = format!("{error:#}");
            (Outcome::Retry(error), Some(shown))
        }
    };
    events.release(delivery, error, Some(used(&publication.used))).await;
    outcome
}
