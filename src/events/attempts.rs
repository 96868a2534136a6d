//! Attempts: whether work on a delivery may begin, and what is remembered of it until it ends.
//!
//! Work that was begun and not ended died. A message that was received before is therefore recorded before anything is
//! done with it, the decoding included; one that comes for the first time is not, so fast events write nothing before their
//! result. If Postgres does not answer, nothing begins: an event without its record could kill one process after another.

use std::time::Duration;

use tokio::time::sleep;

use super::Events;
use super::ended::{End, Of};
use super::gate::Pass;
use crate::config::Backoff;
use crate::db::DbError;
use crate::db::deliveries::{Begin, Deaths};
use crate::db::ledger::WorkLedger;
use crate::fault;
use crate::queue::lease::{Role, StopReason};
use crate::queue::{Delivery, Outcome, Refusal};
use crate::task;

/// How long a suspect is put off that could not be alone. Each time costs a receive, so the wait grows.
const NOT_ALONE: Backoff = Backoff { base: Duration::from_secs(2), cap: Duration::from_secs(60) };

/// How long a message waits for Postgres to take the end of its attempt.
const TO_END: Duration = Duration::from_secs(2);

/// How long it waits once the service is told to stop.
const WHILE_STOPPING: Duration = Duration::from_secs(1);

/// The refusal of what is not begun again; `what` names it.
pub(super) fn quarantined(what: &str, deaths: &Deaths) -> Refusal {
    Refusal { code: "quarantined", reason: format!("{what} is not begun again: {deaths}") }
}

/// What the attempts at a run or publication have used, this one included so far; `before` is what the others have.
pub(super) fn used(before: &WorkLedger) -> WorkLedger {
    let ours = task::ledger().map(|ledger| ledger.read()).unwrap_or_default();
    before.with(&ours)
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
    pub(super) async fn begin(&self, delivery: &Delivery) -> Result<Pass, Outcome> {
        let pass = tokio::select! {
            biased;
            pass = self.gate.enter() => pass,
            reason = delivery.lease.stopped() => return Err(not_begun(reason)),
        };
        if delivery.message.receive_count < 2 {
            return Ok(pass);
        }
        // Boxed, as are other ways that events seldom go: a task is as large as the largest of its ways.
        Box::pin(self.begin_again(delivery, pass)).await
    }

    /// Lets a delivery in of which there may have been others.
    async fn begin_again(&self, delivery: &Delivery, pass: Pass) -> Result<Pass, Outcome> {
        if self.record(delivery, false).await? {
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
    async fn begin_alone(&self, delivery: &Delivery) -> Result<Pass, Outcome> {
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
            self.ended.write_of(&self.database, message_id).await?;
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

    /// Claims the run that a delivery asks for work on in `role`, with the delivery's own token; `claim` is told whether it is alone.
    /// What is suspect is claimed once more when it is. `Err`: it does not begin, and this is the end of the matter.
    pub(super) async fn claim<C, F>(
        &self,
        delivery: &Delivery,
        (role, run_id): (Role, &str),
        pass: &mut Option<Pass>,
        claim: impl Fn(bool) -> F,
        is_suspect: fn(&C) -> bool,
    ) -> Result<Result<C, DbError>, Outcome>
    where
        F: Future<Output = Result<C, DbError>>,
    {
        if let Err(error) = self.ended.write_of(&self.database, run_id).await {
            return Err(Outcome::Retry(error.into()));
        }
        let claim = async |alone| {
            delivery.lease.may_hold_run(role, run_id, delivery.attempt);
            let claimed = claim(alone).await;
            // Without an answer it may be ours. It is remembered, so that the end of this attempt gives it back.
            if !matches!(claimed, Err(DbError::Unavailable { .. })) {
                delivery.lease.forget_run();
            }
            claimed
        };
        let mut claimed = claim(pass.as_ref().is_some_and(Pass::is_alone)).await;
        if claimed.as_ref().is_ok_and(is_suspect) {
            // While it waits it is not begun: what dies meanwhile is not its doing.
            self.forget(delivery).await;
            *pass = None;
            *pass = Some(self.begin_alone(delivery).await?);
            claimed = claim(true).await;
        }
        Ok(claimed)
    }

    /// Work has lived for so long without progress that its pass is given back; before that, what it was suspected of is
    /// forgotten, by `forget`.
    pub(super) async fn outlive(&self, event_id: &str, deaths: i32, forget: impl Future<Output = Result<(), DbError>>) {
        if deaths > 0
            && let Err(error) = forget.await
        {
            tracing::debug!(event_id, %error, "the deaths of an event are still counted");
        }
    }

    /// The delivery's attempt has ended in order, or is told from now on by the record of what it works on.
    pub(super) async fn forget(&self, delivery: &Delivery) {
        self.end(delivery, recorded(delivery).into_iter().collect()).await;
    }

    /// Gives back the run that the delivery holds, so that the next delivery need not wait for the lease. `error` is shown
    /// to operators, and so is what was `used`.
    pub(super) async fn release(&self, delivery: &Delivery, error: Option<String>, used: Option<WorkLedger>) {
        self.end(delivery, held(delivery, error, used).into_iter().collect()).await;
    }

    /// Ends what a handling that ended in order has left behind. It still holds its run where it was cut short in the middle:
    /// without this, whoever comes next would find a death.
    pub(super) async fn conclude_attempt(&self, delivery: &Delivery) {
        self.end(delivery, held(delivery, None, None).into_iter().chain(recorded(delivery)).collect()).await;
    }

    /// Tells Postgres of these ends. They are kept first, so whatever happens to the write, they are not forgotten; what it
    /// does not take in time is written later, and does not hold up the message.
    async fn end(&self, delivery: &Delivery, ends: Vec<End>) {
        if !ends.is_empty() {
            Box::pin(self.end_all(delivery, ends)).await;
        }
    }

    async fn end_all(&self, delivery: &Delivery, ends: Vec<End>) {
        self.ended.keep(&ends);
        if ends.iter().any(|end| end.of != Of::Delivery) {
            // To renew it from now on would look like having lost it.
            delivery.lease.forget_run();
        }
        let message_id = delivery.message.id.as_str();
        fault::point("delivery.before_forget", message_id);
        // A stop that begins meanwhile bounds it as well.
        let stopping = async {
            delivery.lease.draining().await;
            sleep(WHILE_STOPPING).await;
        };
        let problem = tokio::select! {
            biased;
            written = self.ended.write(&self.database, &ends) => written.err().map(|error| error.to_string()),
            () = sleep(TO_END) => Some(format!("no answer within {TO_END:?}")),
            () = stopping => Some("the service is stopping".to_owned()),
        };
        if let Some(error) = problem {
            tracing::warn!(message_id, error, "Postgres did not take the end of an attempt; it is written later");
        }
        fault::point("delivery.after_forget", message_id);
    }
}

/// The end of the delivery's record, if it has one.
fn recorded(delivery: &Delivery) -> Option<End> {
    let has_record = delivery.message.receive_count >= 2;
    has_record.then(|| {
        let id = delivery.message.id.clone();
        End { of: Of::Delivery, id, token: delivery.attempt, error: None, used: None }
    })
}

/// The end of the work on the run that the delivery holds, if it holds one.
fn held(delivery: &Delivery, error: Option<String>, used: Option<WorkLedger>) -> Option<End> {
    let (role, id, token) = delivery.lease.held_run()?;
    let of = match role {
        Role::Owner => Of::Owner,
        Role::Publisher => Of::Publisher,
    };
    Some(End { of, id, token, error, used })
}
