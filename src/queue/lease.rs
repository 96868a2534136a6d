//! Leases: what the work on a delivery holds, and is told.
//!
//! A lease keeps one message hidden, and the run that it works on owned, for as long as it exists; the [keeper](super::keeper)
//! does it. A refused extension, a lost run or a deadline that passed means that somebody else may be working on the event:
//! the work is told to stop by [`Lease::stopped`]. Fencing in the database covers the moment in between.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex, Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};
use uuid::Uuid;

use super::sqs::Queue;
use crate::fault;
use crate::lifecycle::Stop;

/// How long the end of a message waits for a call that extends it. One takes milliseconds; one that hangs may not hold up
/// a stop.
pub(super) const CALL_WAIT: Duration = Duration::from_millis(500);

/// In which role a run is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Refreshing it.
    Owner,
    /// Publishing it.
    Publisher,
}

/// Why work on a delivery must stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The service is stopping: finish what is under way, give the rest back.
    Shutdown,
    /// The delivery nears the longest time that SQS grants one receive: give it back at the cursor.
    ReceiveCap,
    /// An operator cancelled the run: finish what is under way, give nothing back.
    Cancelled,
    /// Somebody else may have it: stop at once, write nothing.
    Lost,
}

pub(super) struct RunHold {
    pub(super) role: Role,
    pub(super) run_id: String,
    pub(super) token: Uuid,
    /// The keeper renews its lease.
    is_renewed: bool,
}

/// A message that is kept hidden.
pub(super) struct Held {
    pub(super) queue: Queue,
    pub(super) receipt: String,
    pub(super) received_at: Instant,
    pub(super) hidden_until: Instant,
    pub(super) run: Option<RunHold>,
    pub(super) stop: watch::Sender<Option<StopReason>>,
    /// Locked while a call that extends the message is out.
    pub(super) call: Arc<Mutex<()>>,
}

/// What leases and the keeper's thread share.
pub(super) struct Shared {
    pub(super) held: std::sync::Mutex<HashMap<u64, Held>>,
    pub(super) ended: Notify,
    pub(super) visibility: Duration,
    pub(super) receive_cap: Duration,
}

impl Held {
    /// The run whose lease is renewed before the message is extended.
    pub(super) fn renewed_run(&self) -> Option<&RunHold> {
        self.run.as_ref().filter(|run| run.is_renewed)
    }
}

impl Shared {
    pub(super) fn held(&self) -> MutexGuard<'_, HashMap<u64, Held>> {
        // A panic while the map is locked leaves it whole: each change is one insert, remove or field.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the work to stop, unless it was told already: its first reason stands, and only a loss goes before it.
pub(super) fn stop_first(stop: &watch::Sender<Option<StopReason>>, reason: StopReason) {
    stop.send_if_modified(|current| {
        let first = current.is_none();
        current.get_or_insert(reason);
        first
    });
}

/// Tells the work that somebody else may have the message: this goes before any other reason.
pub(super) fn tell_lost(stop: &watch::Sender<Option<StopReason>>) {
    // Without the fence in the database, a late owner is not stopped by anything else either.
    if !fault::planted("no-owner-check") {
        stop.send_replace(Some(StopReason::Lost));
    }
}

/// How long a run's lease is shorter than the visibility of its message: 5 s, or a fifth where that is less.
pub fn margin(visibility: Duration) -> Duration {
    Duration::from_secs(5).min(visibility / 5)
}

/// Keeps one message hidden while it exists.
pub struct Lease {
    pub(super) id: u64,
    pub(super) shared: Arc<Shared>,
    pub(super) stopped: watch::Receiver<Option<StopReason>>,
    pub(super) shutdown: Stop,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.shared.held().remove(&self.id);
    }
}

impl Lease {
    /// For how long a run may be taken now, so that its lease ends before the message becomes visible again.
    pub fn run_lease(&self) -> Duration {
        let visibility = self.shared.visibility;
        let left = match self.shared.held().get(&self.id) {
            Some(held) => held.hidden_until.saturating_duration_since(Instant::now()),
            None => visibility,
        };
        left.saturating_sub(margin(visibility)).max(Duration::from_secs(1).min(visibility / 2))
    }

    /// The run may be held from now on, or may not: its claim is out. If nothing more is heard of that, what is held is remembered.
    pub fn may_hold_run(&self, role: Role, run_id: &str, token: Uuid) {
        self.set_run(role, run_id, token, false);
    }

    /// From now on the keeper renews the run's lease before the message's.
    pub fn hold_run(&self, role: Role, run_id: &str, token: Uuid) {
        self.set_run(role, run_id, token, true);
    }

    fn set_run(&self, role: Role, run_id: &str, token: Uuid, is_renewed: bool) {
        if let Some(held) = self.shared.held().get_mut(&self.id) {
            held.run = Some(RunHold { role, run_id: run_id.to_owned(), token, is_renewed });
        }
    }

    /// The run is being ended: its lease is renewed no more, and what is held is remembered until that has come about.
    pub fn stop_renewing(&self) {
        if let Some(run) = self.shared.held().get_mut(&self.id).and_then(|held| held.run.as_mut()) {
            run.is_renewed = false;
        }
    }

    /// The run is complete, or its end is remembered elsewhere: only the message is kept from now on.
    pub fn forget_run(&self) {
        if let Some(held) = self.shared.held().get_mut(&self.id) {
            held.run = None;
        }
    }

    /// The run that is held: in which role, its id and the token.
    pub fn held_run(&self) -> Option<(Role, String, Uuid)> {
        let held = self.shared.held();
        held.get(&self.id)?.run.as_ref().map(|run| (run.role, run.run_id.clone(), run.token))
    }

    /// Waits until the work must stop, and says why.
    pub async fn stopped(&self) -> StopReason {
        let mut stopped = self.stopped.clone();
        let own = async {
            match stopped.wait_for(Option::is_some).await {
                Ok(reason) => reason.expect("waited for"),
                // The keeper is gone, and with it all protection.
                Err(_) => StopReason::Lost,
            }
        };
        tokio::select! {
            biased;
            reason = own => reason,
            () = self.shutdown.draining() => StopReason::Shutdown,
        }
    }

    /// Waits until somebody else may have the message.
    pub async fn lost(&self) {
        // A keeper that is gone protects nothing, so that counts as lost too.
        let _ = self.stopped.clone().wait_for(|reason| *reason == Some(StopReason::Lost)).await;
    }

    /// Lets the message go before it is given back. A call that extends it may be out: arriving second, it would hide for a
    /// whole visibility timeout what others should have, so its end is waited for.
    pub async fn let_go(self) {
        let call = self.shared.held().get(&self.id).map(|held| held.call.clone());
        drop(self);
        if let Some(call) = call {
            let _ = timeout(CALL_WAIT, call.lock()).await;
        }
    }

    /// Waits until the service stops.
    pub async fn draining(&self) {
        self.shutdown.draining().await;
    }

    /// Waits until a stop leaves work under way no more than `margin`.
    pub async fn nearly_over(&self, margin: Duration) {
        self.shutdown.draining().await;
        if let Some(deadline) = self.shutdown.deadline() {
            sleep_until(deadline.checked_sub(margin).unwrap_or(deadline)).await;
        }
    }

    /// Until when work under way may finish after [`StopReason::Shutdown`].
    pub fn drain_deadline(&self) -> Option<Instant> {
        self.shutdown.deadline()
    }
}
