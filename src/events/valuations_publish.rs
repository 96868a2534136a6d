//! `valuations.publish`: post-processing of a complete run. A page of valuations, all its records in parallel, then the
//! cursor. Pages overlap: one more is read and sent while the reports of the one before come in, and the cursor is written
//! meanwhile, in their order. Records that Kafka refuses for good are quarantined as the cursor passes them.

use std::time::Duration;

use futures::future::{BoxFuture, OptionFuture};
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt, TryStreamExt};
use serde::Deserialize;

use super::attempts::quarantined;
use super::envelope::Event;
use super::gate::{PROBATION, Pass};
use super::valuations_refresh::{AFTER_LEASE, other_event};
use super::{Events, UNFINISHED_RUN_WAIT};
use crate::db::publications::{OwnedPublication, PublicationClaim, PublishedPage, Quarantined};
use crate::db::{DbError, valuations};
use crate::fault;
use crate::kafka::{Published, Record, Records, Valuation};
use crate::queue::lease::{Role, StopReason};
use crate::queue::{Delivery, Outcome, Refusal};
use crate::task::{Stage, in_stage};

/// Pages whose records are on their way to Kafka at the same time: while the last reports of one come in, the next one is
/// sent. A publisher that dies sends so many again, with the same `ce_id`s.
const PAGES_UNDER_WAY: usize = 2;

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

/// What comes next of a run's valuations.
enum Next {
    Page { after: i64, last: i64, page: Vec<valuations::Valuation> },
    Stop(StopReason),
}

enum Sent {
    Page(PublishedPage),
    Stopped(StopReason),
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
            run_id,
            pass,
            |alone| {
                let lease = delivery.lease.run_lease();
                events.database.claim_publication(&event.id, &digest, run_id, lease, alone)
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

/// One owner's publishing of a run.
struct Publishing<'a> {
    events: &'a Events,
    event_id: &'a str,
    run_id: &'a str,
    publication: &'a OwnedPublication,
    records: Records,
}

/// After which listing the next page begins, unless there is none, and the order to stop.
type Ahead<'a> = (Option<i64>, BoxFuture<'a, StopReason>);

impl<'a> Publishing<'a> {
    /// The pages from the cursor on, in their order, each when Kafka has its records.
    fn sent<'s>(&'s self, stopped: BoxFuture<'s, StopReason>) -> BoxStream<'s, anyhow::Result<Sent>>
    where
        'a: 's,
    {
        stream::try_unfold((Some(self.publication.cursor), stopped), |ahead| self.read(ahead))
            .map_ok(|next| in_stage(Stage::Publish, self.send(next)))
            .try_buffered(PAGES_UNDER_WAY)
            .boxed()
    }

    async fn read<'s>(&self, (after, mut stopped): Ahead<'s>) -> anyhow::Result<Option<(Next, Ahead<'s>)>> {
        let Some(after) = after else { return Ok(None) };
        let limit = self.events.publish_page_size;
        let read = self.events.database.read_valuations(self.run_id, after, limit);
        let page = in_stage(Stage::Read, read).await?;
        let Some(last) = page.last().map(|valuation| valuation.listing_id) else { return Ok(None) };
        if let Some(reason) = stopped.as_mut().now_or_never() {
            return Ok(Some((Next::Stop(reason), (None, stopped))));
        }
        let then = (page.len() == limit).then_some(last);
        Ok(Some((Next::Page { after, last, page }, (then, stopped))))
    }

    async fn send(&self, next: Next) -> anyhow::Result<Sent> {
        let (after, last, page) = match next {
            Next::Page { after, last, page } => (after, last, page),
            Next::Stop(reason) => return Ok(Sent::Stopped(reason)),
        };
        let batch: Vec<Record> = page.iter().map(|valuation| self.records.record(&input(valuation))).collect();
        drop(page);
        fault::point("publish.before_send", self.event_id);
        let published = self.events.publisher.publish_page(&batch).await?;
        fault::point("publish.after_reports", self.event_id);
        let quarantined = quarantine(&published);
        Ok(Sent::Page(PublishedPage { after, last, published: published.records as i64, quarantined }))
    }

    async fn advance(&self, done: PublishedPage) -> Result<PublishedPage, Ended> {
        fault::point("publication.before_advance", self.event_id);
        let advance = self.events.database.advance_publication(self.event_id, self.publication.token, &done);
        let advanced = in_stage(Stage::Write, advance).await;
        fault::point("publication.after_advance", self.event_id);
        match advanced {
            Ok(true) => {
                tell(self.events, self.event_id, self.run_id, &done.quarantined);
                Ok(done)
            }
            Ok(false) => {
                self.events.metrics.fenced.inc();
                Err(Ended::Stopped(StopReason::Lost))
            }
            Err(error) => Err(Ended::Failed(error.into())),
        }
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
    let publishing = Publishing { events, event_id: &event.id, run_id, publication, records };
    let mut sent = publishing.sent(delivery.lease.stopped().boxed());
    let mut probation = std::pin::pin!(tokio::time::sleep(PROBATION));
    let (mut rows, mut quarantined) = (0, 0);
    // Whose records Kafka has, and whose cursor is written while the next pages are on their way.
    let mut before: Option<PublishedPage> = None;
    loop {
        let cursor = OptionFuture::from(before.take().map(|page| publishing.advance(page)));
        // Neither ends the other: what was sent is worth its cursor, and the other way round.
        let mut both = Box::pin(async { tokio::join!(sent.try_next(), cursor) });
        let (next, advanced) = loop {
            tokio::select! {
                // Pages under way are finished: their records are out, and a cursor that lags would send them again.
                biased;
                both = &mut both => break both,
                () = delivery.lease.lost() => return Ended::Stopped(StopReason::Lost),
                // Where Kafka is away, that can last for longer than a stop may.
                () = delivery.lease.nearly_over(HANDOVER) => return Ended::Stopped(StopReason::Shutdown),
                // So long that its pass is given back; before that, what it was suspected of is forgotten.
                () = &mut probation, if pass.is_some() => {
                    let forget = events.database.outlive_publication(&event.id, publication.token);
                    events.outlive(&event.id, publication.deaths, forget).await;
                    *pass = None;
                }
            }
        };
        drop(both);
        match advanced {
            Some(Ok(done)) => {
                rows += done.published as u64;
                quarantined += done.quarantined.len() as u64;
                *pass = None;
            }
            Some(Err(ended)) => return ended,
            None => {}
        }
        match next {
            Ok(Some(Sent::Page(page))) => before = Some(page),
            Ok(Some(Sent::Stopped(reason))) => return Ended::Stopped(reason),
            Ok(None) => return Ended::AllPublished { rows, quarantined },
            Err(error) => return Ended::Failed(error),
        }
    }
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

/// Tells of records that were just quarantined; one line a page, for all of them may have the same fault.
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
            let completed = events.database.complete_publication(&event.id, run_id, publication.token).await;
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
    events.release(delivery, error, None).await;
    outcome
}
