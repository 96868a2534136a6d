//! `valuations.publish`: post-processing of a complete run. A page of valuations, all its records in parallel, then the
//! cursor; the next page is read meanwhile, and sent while the cursor is written. Records that Kafka refuses for good are
//! quarantined as the cursor passes them.

use std::time::Duration;

use futures::TryFutureExt;
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

async fn publish(
    events: &Events,
    event: &Event<'_>,
    run_id: &str,
    publication: &OwnedPublication,
    delivery: &Delivery,
    pass: &mut Option<Pass>,
) -> Ended {
    let records = Records::new(run_id, publication.completed_at, publication.traceparent.as_deref());
    let limit = events.publish_page_size;
    let read = |cursor| in_stage(Stage::Read, events.database.read_valuations(run_id, cursor, limit));
    let advance = async |done: PublishedPage| {
        fault::point("publication.before_advance", &event.id);
        let advanced =
            in_stage(Stage::Write, events.database.advance_publication(&event.id, publication.token, &done)).await;
        fault::point("publication.after_advance", &event.id);
        match advanced {
            Ok(true) => {
                tell(events, &event.id, run_id, &done.quarantined);
                Ok(done)
            }
            Ok(false) => {
                events.metrics.fenced.inc();
                Err(Ended::Stopped(StopReason::Lost))
            }
            Err(error) => Err(Ended::Failed(error.into())),
        }
    };
    let mut stopped = std::pin::pin!(delivery.lease.stopped());
    let mut probation = std::pin::pin!(tokio::time::sleep(PROBATION));
    let (mut rows, mut quarantined) = (0, 0);
    let mut after = publication.cursor;
    let mut page = match read(publication.cursor).await {
        Ok(page) => page,
        Err(error) => return Ended::Failed(error.into()),
    };
    // Whose records Kafka has, and whose cursor is written while the next page is on its way.
    let mut before: Option<PublishedPage> = None;
    loop {
        let last = page.last().map(|valuation| valuation.listing_id);
        let next = async { if page.len() < limit { Ok(Vec::new()) } else { read(last.unwrap_or(after)).await } };
        let batch: Vec<Record> = page.iter().map(|valuation| records.record(&input(valuation))).collect();
        let sent = in_stage(Stage::Publish, async {
            if batch.is_empty() {
                return Ok(Published { records: 0, refused: Vec::new() });
            }
            fault::point("publish.before_send", &event.id);
            let published = events.publisher.publish_page(&batch).await;
            fault::point("publish.after_reports", &event.id);
            published
        });
        let on = async { tokio::try_join!(sent.map_err(anyhow::Error::from), next.map_err(anyhow::Error::from)) };
        let cursor = futures::future::OptionFuture::from(before.take().map(&advance));
        // Neither ends the other: what was sent is worth its cursor, and the other way round.
        let mut both = Box::pin(async { tokio::join!(on, cursor) });
        let (on, advanced) = loop {
            tokio::select! {
                // A page under way is finished: its records are out, and a cursor that lags would send them again.
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
        let (published, next_page) = match on {
            Ok(on) => on,
            Err(error) => return Ended::Failed(error),
        };
        let Some(last) = last else { return Ended::AllPublished { rows, quarantined } };
        before = Some(PublishedPage {
            after,
            last,
            published: published.records as i64,
            quarantined: quarantine(&published),
        });
        after = last;
        page = next_page;
        if !page.is_empty()
            && let Some(reason) = futures::FutureExt::now_or_never(&mut stopped)
        {
            let cursor = futures::future::OptionFuture::from(before.take().map(&advance));
            return match cursor.await {
                Some(Err(ended)) => ended,
                _ => Ended::Stopped(reason),
            };
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
