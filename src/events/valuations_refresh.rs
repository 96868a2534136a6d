//! `valuations.refresh`: the slow event. Pages of listings in, one partner call each, batches of answers out.
//!
//! The run is claimed, worked on, and ended; what happens in between is [`Work`], one task that does four things at
//! once: it reads the next page while calls are out, starts calls as permits allow, collects answers, and commits them
//! in batches. Its memory is bounded by permits and pages, whatever the number of listings: a call's future exists only
//! once it has its permit, and a page only while the process-wide budget of pages has room.

mod progress;
mod work;

use std::time::Duration;

use serde::Deserialize;
use time::OffsetDateTime;

use self::work::{Ended, Work};
use super::attempts::{quarantined, used};
use super::envelope::Event;
use super::gate::Pass;
use super::outgoing;
use super::{Events, lane};
use crate::db::DbError;
use crate::db::runs::{Completion, OwnedRun, RunClaim, RunRequest};
use crate::fault;
use crate::queue::lease::{Role, StopReason};
use crate::queue::{Delivery, Outcome, Refusal};

/// A second delivery of a live run goes back until its lease has ended, and this much longer.
pub(super) const AFTER_LEASE: Duration = Duration::from_secs(1);

/// The most zip codes of one event; there are fewer than 42,000 in use.
const MAX_ZIP_CODES: usize = 50_000;

/// What a refresh event asks for. A misspelt filter must not select everything, so unknown fields are refused.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    zip_codes: Option<Vec<i32>>,
    limit: Option<i64>,
}

/// What a refresh event asks for, checked.
#[derive(Debug)]
pub struct Data {
    /// Only listings of these, sorted and without repeats; `None` means all.
    pub zip_codes: Option<Vec<i32>>,
    /// At most this many listings, in the order of their ids; `None` means all.
    pub limit: Option<i64>,
}

/// Reads and checks the data of a refresh event.
pub(super) fn decode(event: &Event<'_>) -> Result<Data, Refusal> {
    let Wire { zip_codes, limit } = event.data()?;
    let refuse = |reason| Err(Refusal { code: "invalid_data", reason });
    if let Some(limit) = limit.filter(|limit| *limit < 0) {
        return refuse(format!("limit {limit} must not be negative; null means all"));
    }
    let zip_codes = match zip_codes {
        Some(mut zip_codes) => {
            if zip_codes.len() > MAX_ZIP_CODES {
                return refuse(format!("zip_codes has {} entries, at most {MAX_ZIP_CODES}", zip_codes.len()));
            }
            // Sorted and without repeats, so that no listing is selected twice.
            zip_codes.sort_unstable();
            zip_codes.dedup();
            Some(zip_codes)
        }
        None => None,
    };
    Ok(Data { zip_codes, limit })
}

/// Claims the run, works on it, and ends it.
pub(super) async fn handle(
    events: &Events,
    event: &Event<'_>,
    data: &Data,
    delivery: &Delivery,
    pass: &mut Option<Pass>,
) -> Result<Outcome, Refusal> {
    let run = match claim(events, event, data, delivery, pass).await? {
        Ok(claimed) => claimed,
        Err(outcome) => return Ok(outcome),
    };
    if run.attempts > 1 {
        tracing::info!(
            event_id = run.set.run_id,
            cursor = run.cursor,
            done = run.valued + run.failed,
            selected = run.selected,
            attempt = run.attempts,
            deaths = run.deaths,
            "run resumed"
        );
    }
    // The pass is let go with the first progress, or else at the end of all.
    let (ended, unanswered) = Work::new(events, &run, delivery, pass).run().await;
    Ok(end(events, event, &run, delivery, ended, unanswered).await)
}

async fn claim(
    events: &Events,
    event: &Event<'_>,
    data: &Data,
    delivery: &Delivery,
    pass: &mut Option<Pass>,
) -> Result<Result<OwnedRun, Outcome>, Refusal> {
    let request = RunRequest {
        run_id: &event.id,
        digest: event.digest()?,
        source: &event.source,
        event_time: event.time,
        traceparent: event.traceparent.as_deref(),
        zip_codes: data.zip_codes.as_deref(),
        limit: data.limit,
        data: event.data_text(),
    };
    let claim = events
        .claim(
            delivery,
            (Role::Owner, &event.id),
            pass,
            |alone| events.database.claim_run(&request, delivery.attempt, delivery.lease.run_lease(), alone),
            |claim| matches!(claim, RunClaim::Suspect),
        )
        .await;
    let claim = match claim {
        Ok(claimed) => claimed,
        Err(outcome) => return Ok(Err(outcome)),
    };
    Ok(match claim {
        Ok(RunClaim::Owned(run)) => {
            delivery.lease.hold_run(Role::Owner, &run.set.run_id, run.token);
            fault::point("run.claimed", &event.id);
            // From now on the run's own record says that work has begun.
            events.forget(delivery).await;
            Ok(*run)
        }
        Ok(RunClaim::Busy(left)) => Err(Outcome::Defer(left + AFTER_LEASE, "another attempt works on the run".into())),
        Ok(RunClaim::Suspect) => Err(Outcome::Retry(anyhow::anyhow!("a suspect run was not let begin alone"))),
        Ok(RunClaim::Quarantined(deaths)) => {
            let mut refusal = quarantined(&format!("run {}", event.id), &deaths);
            refusal.reason += "; `write-api retry` lets it go on";
            return Err(refusal);
        }
        Ok(RunClaim::Complete) => Err(Outcome::Done { rows: 0, note: "the run was complete already".into() }),
        Ok(RunClaim::Cancelled) => {
            let note = "the run is cancelled and is left as it is; `write-api retry` lets it go on";
            Err(Outcome::Done { rows: 0, note: note.into() })
        }
        Ok(RunClaim::OtherEvent) => return Err(other_event(&event.id)),
        Err(DbError::Refused { what, source }) => {
            let reason = format!("Postgres refused {what}: {source}");
            return Err(Refusal { code: "invalid_data", reason });
        }
        Err(error @ DbError::Unavailable { .. }) => Err(Outcome::Retry(error.into())),
    })
}

/// The refusal of an event whose id was used for another one.
pub(super) fn other_event(id: &str) -> Refusal {
    let reason = format!("another event with id {id:?} but different source, type or data came first");
    Refusal { code: "id_reused", reason }
}

/// Completes the run, closes it as cancelled, or gives it back.
async fn end(
    events: &Events,
    event: &Event<'_>,
    run: &OwnedRun,
    delivery: &Delivery,
    ended: Ended,
    unanswered: usize,
) -> Outcome {
    let run_id = run.set.run_id.as_str();
    let (outcome, error) = match ended {
        Ended::AllTerminal { rows, terminal } => match complete(events, event, run, delivery).await {
            Ok(Completion::Complete) => {
                if terminal != run.selected {
                    // A listing whose insert was committed in the very moment of the opening may be read and not counted.
                    tracing::warn!(
                        event_id = run_id,
                        selected = run.selected,
                        terminal,
                        "the run has not as many listings as were counted at its opening"
                    );
                }
                let note = if rows == 0 && run.selected == 0 { "no listing matches" } else { "" };
                return Outcome::Done { rows, note: note.into() };
            }
            Ok(Completion::CancelRequested) => match cancel(events, run, delivery, rows, 0).await {
                Ok(outcome) => return outcome,
                Err(error) => (None, Some(error.into())),
            },
            Ok(Completion::Lost) => return Outcome::Lost,
            Err(error) => (None, Some(error.into())),
        },
        Ended::Stopped { reason: StopReason::Cancelled, rows } => {
            match cancel(events, run, delivery, rows, unanswered).await {
                Ok(outcome) => return outcome,
                Err(error) => (None, Some(error.into())),
            }
        }
        // Given back as well, by our own token: the attempt has ended and did not die. If somebody else has the run, that
        // changes nothing.
        Ended::Stopped { reason: StopReason::Lost, .. } => (Some(Outcome::Lost), None),
        Ended::Stopped { reason: StopReason::Shutdown, .. } => {
            (Some(Outcome::Release(format!("stopped with {unanswered} listings begun and unanswered").into())), None)
        }
        Ended::Stopped { reason: StopReason::ReceiveCap, .. } => {
            (Some(Outcome::Release("handed over before SQS's 12 h are over".into())), None)
        }
        Ended::Failed(error) => (None, Some(error)),
    };
    let shown = error.as_ref().map(|error: &anyhow::Error| format!("{error:#}"));
    events.release(delivery, shown, Some(used(&run.used))).await;
    match (outcome, error) {
        (Some(outcome), _) => outcome,
        (None, error) => Outcome::Retry(error.unwrap_or_else(|| anyhow::anyhow!("the run ended without a result"))),
    }
}

async fn complete(
    events: &Events,
    event: &Event<'_>,
    run: &OwnedRun,
    delivery: &Delivery,
) -> Result<Completion, DbError> {
    let run_id = run.set.run_id.as_str();
    let (publish_id, body) = outgoing::publish_event(run_id, OffsetDateTime::now_utc(), event.traceparent.as_deref());
    // A completed run has no owner: renewing it meanwhile would look like having lost it.
    delivery.lease.stop_renewing();
    fault::point("run.before_complete", run_id);
    let (lane, used) = (lane::POST_PROCESSING, used(&run.used));
    let done = events.database.complete_run(run_id, run.token, lane, publish_id, &body, &used).await?;
    fault::point("run.after_complete", run_id);
    match done {
        Completion::Complete => {
            delivery.lease.forget_run();
            events.outbox.notify_one();
        }
        Completion::CancelRequested => {}
        Completion::Lost => events.metrics.fenced.inc(),
    }
    Ok(done)
}

/// Closes the run as an operator asked.
async fn cancel(
    events: &Events,
    run: &OwnedRun,
    delivery: &Delivery,
    rows: u64,
    unanswered: usize,
) -> Result<Outcome, DbError> {
    delivery.lease.stop_renewing();
    if events.database.cancel_owned_run(&run.set.run_id, run.token, &used(&run.used)).await? {
        delivery.lease.forget_run();
        let note =
            format!("stopped with {unanswered} listings begun and unanswered; `write-api retry` lets the run go on");
        return Ok(Outcome::Cancelled { rows, note: note.into() });
    }
    events.metrics.fenced.inc();
    Ok(Outcome::Lost)
}
