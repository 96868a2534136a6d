//! Attempts: whether work on a delivery may begin, and what is remembered of it until it ends.
//!
//! Work that was begun and not ended died. A message that was received before is therefore recorded before anything is
//! done with it, the decoding included; one that comes for the first time is not, so fast events write nothing before their
//! result. If Postgres does not answer, nothing begins: an event without its record could kill one process after another.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::Events;
use super::gate::Pass;
use crate::config::Backoff;
use crate::db::DbError;
use crate::db::deliveries::{Begin, Deaths};
use crate::fault;
use crate::queue::lease::{Role, StopReason};
use crate::queue::{Delivery, Outcome, Refusal};

/// How long a suspect is put off that could not be alone. Each time costs a receive, so the wait grows.
const NOT_ALONE: Backoff = Backoff { base: Duration::from_secs(2), cap: Duration::from_secs(60) };

/// How long a message waits for the removal of its record.
const TO_FORGET: Duration = Duration::from_secs(2);

/// How long the end of an attempt may take while the service stops.
const WHILE_STOPPING: Duration = Duration::from_secs(1);

/// The most ends that are kept for later while Postgres does not take them.
const MOST_KEPT: usize = 10_000;

/// Ended attempts whose record is still there, because Postgres did not take its removal: the next visit removes it, so
/// that no end counts as a death.
#[derive(Debug, Default)]
pub struct Ended(Mutex<Vec<(String, Uuid)>>);

impl Ended {
    fn take(&self) -> Vec<(String, Uuid)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn keep(&self, ended: Vec<(String, Uuid)>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(ended);
        let too_many = kept.len().saturating_sub(MOST_KEPT);
        kept.drain(..too_many);
    }
}

/// The refusal of what is not begun again; `what` names it.
pub(super) fn quarantined(what: &str, deaths: &Deaths) -> Refusal {
    Refusal { code: "quarantined", reason: format!("{what} is not begun again: {deaths}") }
}

/// The end of what was told to stop while it waited at the gate.
fn not_begun(reason: StopReason) -> Outcome {
    match reason {
        StopReason::Lost => Outcome::Lost,
        _ => Outcome::Release("stopped before it was begun".into()),
    }
}

impl Events {
    /// Lets a delivery in and records that it begins; `Err`: it does not, and this is the end of the matter.
    pub(super) async fn begin(&self, delivery: &Delivery) -> Result<Pass<'_>, Outcome> {
        let pass = tokio::select! {
            biased;
            pass = self.gate.enter() => pass,
            reason = delivery.lease.stopped() => return Err(not_begun(reason)),
        };
        if delivery.message.receive_count < 2 || self.record(delivery, false).await? {
            return Ok(pass);
        }
        drop(pass);
        let alone = self.begin_alone(delivery).await?;
        match self.record(delivery, true).await? {
            true => Ok(alone),
            false => Err(Outcome::Retry(anyhow::anyhow!("a suspect that is alone was not let begin"))),
        }
    }

    /// Lets a suspect in when nobody else is at work in this process.
    pub(super) async fn begin_alone(&self, delivery: &Delivery) -> Result<Pass<'_>, Outcome> {
        let alone = tokio::select! {
            biased;
            alone = self.gate.enter_alone() => alone,
            reason = delivery.lease.stopped() => return Err(not_begun(reason)),
        };
        alone.ok_or_else(|| {
            let wait = NOT_ALONE.ceiling(delivery.message.receive_count);
            Outcome::Defer(wait, "work on it died before: it is begun only alone, and others are at work".into())
        })
    }

    /// Whether the delivery may begin, by its record, which then says that it has.
    async fn record(&self, delivery: &Delivery, alone: bool) -> Result<bool, Outcome> {
        let message_id = delivery.message.id.as_str();
        fault::point("delivery.before_record", message_id);
        let begun = async {
            self.end_kept().await?;
            self.database.begin_delivery(message_id, delivery.lane, delivery.attempt, alone).await
        };
        let begun = begun.await;
        fault::point("delivery.after_record", message_id);
        match begun {
            Ok(Begin::Begun) => Ok(true),
            Ok(Begin::Suspect) => Ok(false),
            Ok(Begin::Quarantined(deaths)) => Err(Outcome::Refuse(quarantined("the message", &deaths))),
            Err(error) => Err(Outcome::Retry(error.into())),
        }
    }

    /// The delivery's attempt has ended in order, or is told from now on by the record of what it works on.
    pub(super) async fn forget(&self, delivery: &Delivery) {
        if delivery.message.receive_count < 2 {
            return;
        }
        let message_id = delivery.message.id.as_str();
        fault::point("delivery.before_forget", message_id);
        self.ended.keep(vec![(message_id.to_owned(), delivery.attempt)]);
        // What is kept is not lost, so a Postgres that is away does not hold up the message as well.
        let problem = match timeout(TO_FORGET, self.end_kept()).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("no answer within {TO_FORGET:?}")),
        };
        if let Some(error) = problem {
            tracing::warn!(
                message_id,
                error,
                "the record of a delivery was not removed; it is removed with the next one"
            );
        }
        fault::point("delivery.after_forget", message_id);
    }

    /// Removes the records of ended attempts, this one and those that Postgres did not take before.
    async fn end_kept(&self) -> Result<(), DbError> {
        let ended = self.ended.take();
        if ended.is_empty() {
            return Ok(());
        }
        // Put back also where this is dropped while Postgres does not answer.
        let mut kept = Kept { of: &self.ended, ended };
        let (message_ids, tokens): (Vec<String>, Vec<Uuid>) = kept.ended.iter().cloned().unzip();
        self.database.end_deliveries(&message_ids, &tokens).await?;
        kept.ended.clear();
        Ok(())
    }

    /// Ends what a handling that ended in order has left behind.
    pub(super) async fn conclude_attempt(&self, delivery: &Delivery) {
        let end = async {
            // Cut short in the middle: without this, whoever comes next would find a death.
            if let Some((role, id, token)) = delivery.lease.held_run() {
                delivery.lease.forget_run();
                let released = match role {
                    Role::Owner => self.database.release_run(&id, token, None).await,
                    Role::Publisher => self.database.end_publisher(&id, token).await,
                };
                if let Err(error) = released {
                    tracing::warn!(event_id = id, %error, "the run could not be given back; its lease has to run out");
                }
            }
            self.forget(delivery).await;
        };
        // A stop that begins meanwhile bounds it as well.
        let too_late = async {
            delivery.lease.draining().await;
            sleep(WHILE_STOPPING).await;
        };
        tokio::select! {
            biased;
            () = end => {}
            () = too_late => {
                let message_id = delivery.message.id.as_str();
                tracing::warn!(message_id, "Postgres did not take the end of an attempt in time; it counts as a death");
            }
        }
    }
}

/// Ends on their way to Postgres.
struct Kept<'a> {
    of: &'a Ended,
    ended: Vec<(String, Uuid)>,
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        if !self.ended.is_empty() {
            self.of.keep(std::mem::take(&mut self.ended));
        }
    }
}
