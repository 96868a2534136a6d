//! The keeper: keeping messages hidden while they are worked on, and runs owned.
//!
//! It is one thread with a runtime, an SQS client and a Postgres connection of its own, so that neither a busy service, nor
//! its full connection pools, nor a blocked worker thread can cost a lease. From the moment of receipt each message is
//! extended when half of its time is over, ten to a call. A slow event's run has a lease in Postgres too, measured by the
//! database's clock and always shorter than the message's: it is renewed first, so when the message becomes visible to
//! another worker, the run is free.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use futures::future::{join, select};
use futures::stream::{self, StreamExt};
use sqlx::ConnectOptions;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use tokio::sync::{Notify, OwnedMutexGuard, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior, timeout};
use uuid::Uuid;

use super::batch::BATCH;
use super::lease::{Held, Lease, Role, Shared, StopReason, margin, stop_first, tell_lost};
use super::sqs::{Extension, Queue, Sqs};
use crate::config;
use crate::fault;
use crate::health::Beat;
use crate::lifecycle::Stop;
use crate::metrics::Metrics;

/// Extension calls in flight.
const CALLS: usize = 16;

/// Renews run leases: given tokens by run, the ones that still hold theirs. A value, because SQL lives elsewhere.
pub type Renew = for<'a> fn(
    &'a mut PgConnection,
    &'a [String],
    &'a [Uuid],
    Duration,
) -> futures::future::BoxFuture<'a, sqlx::Result<Vec<Uuid>>>;

/// How the two roles of a run are renewed.
#[derive(Clone, Copy)]
pub struct Renewals {
    /// For those who refresh a run.
    pub owner: Renew,
    /// For those who publish one.
    pub publisher: Renew,
}

/// The thread that keeps leases.
pub struct Keeper {
    shared: Arc<Shared>,
    next: std::sync::atomic::AtomicU64,
    thread: Option<thread::JoinHandle<()>>,
}

/// What the keeper needs to start.
pub struct KeeperSettings {
    /// Where SQS is.
    pub aws: config::Aws,
    /// Visibility and bounds.
    pub queue: config::Queue,
    /// Where Postgres is.
    pub database: PgConnectOptions,
    /// The SQL.
    pub renewals: Renewals,
    /// Counts extensions.
    pub metrics: Arc<Metrics>,
    /// Touched after each pass over the messages without a run.
    pub message_beat: Beat,
    /// Touched after each pass over the runs and their messages.
    pub run_beat: Beat,
}

impl Keeper {
    /// Starts the thread.
    pub fn start(settings: KeeperSettings) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            held: Default::default(),
            ended: Notify::new(),
            visibility: settings.queue.visibility_timeout,
            receive_cap: settings.queue.receive_cap,
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let of_thread = shared.clone();
        let thread = thread::Builder::new().name("keeper".to_owned()).spawn(move || {
            runtime.block_on(async {
                let ended = std::pin::pin!(of_thread.ended.notified());
                let keeping = std::pin::pin!(keep(&of_thread, settings));
                select(ended, keeping).await;
            });
        })?;
        Ok(Keeper { shared, next: std::sync::atomic::AtomicU64::new(0), thread: Some(thread) })
    }

    /// Keeps a message hidden from now until the returned lease is dropped.
    pub fn hold(&self, queue: &Queue, receipt: &str, received_at: Instant, shutdown: Stop) -> Lease {
        let id = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (stop, stopped) = watch::channel(None);
        let hidden_until = received_at + self.shared.visibility;
        let held = Held {
            queue: queue.clone(),
            receipt: receipt.to_owned(),
            received_at,
            hidden_until,
            run: None,
            stop,
            call: Arc::default(),
        };
        self.shared.held().insert(id, held);
        Lease { id, shared: self.shared.clone(), stopped, shutdown }
    }

    /// How many messages are kept.
    pub fn len(&self) -> usize {
        self.shared.held().len()
    }

    /// Whether no message is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The runs that are being refreshed and were not told to stop: their ids and, in the same order, their tokens.
    pub fn owned_runs(&self) -> (Vec<String>, Vec<Uuid>) {
        let held = self.shared.held();
        let owned = held.values().filter(|held| held.stop.borrow().is_none()).filter_map(Held::renewed_run);
        owned.filter(|run| run.role == Role::Owner).map(|run| (run.run_id.clone(), run.token)).unzip()
    }

    /// Tells the work on the runs held with these tokens that they are cancelled.
    pub fn cancel_runs(&self, tokens: &[Uuid]) {
        for held in self.shared.held().values() {
            if held.renewed_run().is_some_and(|run| tokens.contains(&run.token)) {
                stop_first(&held.stop, StopReason::Cancelled);
            }
        }
    }

    /// Ends the thread. What is still held runs out by itself.
    pub fn stop(mut self) {
        self.shared.ended.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the keeper's thread panicked");
        }
    }
}

/// An entry whose time is half over.
struct Due {
    id: u64,
    queue: Queue,
    receipt: String,
    hidden_until: Instant,
    hide_for: Duration,
    run: Option<(Role, String, Uuid)>,
}

impl Shared {
    /// Those of a batch that are still held, and what says that a call for them is out.
    fn begin_calls(&self, batch: Vec<Due>) -> (Vec<Due>, Vec<OwnedMutexGuard<()>>) {
        let held = self.held();
        let begin = |due: Due| Some((held.get(&due.id)?.call.clone().try_lock_owned().ok()?, due));
        batch.into_iter().filter_map(begin).map(|(call, due)| (due, call)).unzip()
    }
}

/// Two loops, because they depend on different neighbours: a Postgres that hangs costs the runs their leases, and must not
/// cost messages without a run anything.
async fn keep(shared: &Shared, settings: KeeperSettings) {
    let KeeperSettings { aws, queue, database, renewals, metrics, message_beat, run_beat } = settings;
    let sqs = Sqs::new(&aws, &queue, metrics.clone()).await;
    let keeping = Keeping { shared, sqs, metrics };
    let mut leases =
        RunLeases { bound: (shared.visibility / 4).min(MOST_RENEWAL), database, connection: None, renewals };
    let messages = async {
        let mut ticks = ticks(shared.visibility);
        loop {
            ticks.tick().await;
            keeping.extend(keeping.due(|held| held.renewed_run().is_none())).await;
            message_beat.touch();
        }
    };
    let runs = async {
        let mut ticks = ticks(shared.visibility);
        loop {
            ticks.tick().await;
            let mut due = keeping.due(|held| held.renewed_run().is_some());
            keeping.renew_runs(&mut leases, &mut due, Role::Owner).await;
            keeping.renew_runs(&mut leases, &mut due, Role::Publisher).await;
            keeping.extend(due).await;
            run_beat.touch();
        }
    };
    join(messages, runs).await;
}

/// Often enough that half of a visibility timeout is noticed soon after it is over.
fn ticks(visibility: Duration) -> Interval {
    let mut ticks = tokio::time::interval((visibility / 20).clamp(Duration::from_millis(50), Duration::from_secs(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// The longest that a renewal may take, connecting included, so that a half-open connection is noticed soon however long
/// the visibility timeout is.
const MOST_RENEWAL: Duration = Duration::from_secs(15);

/// Renews run leases over a connection of its own.
struct RunLeases {
    bound: Duration,
    database: PgConnectOptions,
    connection: Option<PgConnection>,
    renewals: Renewals,
}

impl RunLeases {
    /// The tokens that still hold their runs; an error in words if that is not known.
    async fn renew(
        &mut self,
        role: Role,
        run_ids: &[String],
        tokens: &[Uuid],
        lease: Duration,
    ) -> Result<Vec<Uuid>, String> {
        let bound = self.bound;
        let failure = match timeout(bound, self.ask(role, run_ids, tokens, lease)).await {
            Ok(Ok(kept)) => return Ok(kept),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {bound:?}"),
        };
        // Whatever it was in the middle of, the connection is of no use any more.
        self.connection = None;
        Err(failure)
    }

    async fn ask(
        &mut self,
        role: Role,
        run_ids: &[String],
        tokens: &[Uuid],
        lease: Duration,
    ) -> sqlx::Result<Vec<Uuid>> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(self.database.connect().await?),
        };
        let renew = match role {
            Role::Owner => self.renewals.owner,
            Role::Publisher => self.renewals.publisher,
        };
        renew(connection, run_ids, tokens, lease).await
    }
}

struct Keeping<'a> {
    shared: &'a Shared,
    sqs: Sqs,
    metrics: Arc<Metrics>,
}

impl Keeping<'_> {
    /// Of the messages `wanted`: ends what ran out, tells what nears its cap, and collects what is due, per queue in the
    /// order of urgency, and filled up to whole batches with what is due next.
    fn due(&self, wanted: impl Fn(&Held) -> bool) -> Vec<Due> {
        let now = Instant::now();
        let visibility = self.shared.visibility;
        let mut by_queue: HashMap<Arc<str>, Vec<Due>> = HashMap::new();
        let held = self.shared.held();
        for (id, held) in held.iter().filter(|(_, held)| wanted(held)) {
            if *held.stop.borrow() == Some(StopReason::Lost) {
                continue;
            }
            let age = now.saturating_duration_since(held.received_at);
            if held.hidden_until <= now {
                tracing::warn!(queue = %held.queue.name, ?age, "a message's visibility ran out before it was extended");
                self.metrics.extensions.with_label_values(&["late"]).inc();
                tell_lost(&held.stop);
                continue;
            }
            if age >= self.shared.receive_cap {
                stop_first(&held.stop, StopReason::ReceiveCap);
            }
            // Beyond 12 h SQS refuses, so the last extension is for what is left of them.
            let left = MOST_PER_RECEIVE.saturating_sub(age);
            if left.is_zero() {
                // To hide it for no time at all would give it to others: it stays hidden for what it was granted.
                continue;
            }
            by_queue.entry(held.queue.name.clone()).or_default().push(Due {
                id: *id,
                queue: held.queue.clone(),
                receipt: held.receipt.clone(),
                hidden_until: held.hidden_until,
                hide_for: visibility.min(left),
                run: held.renewed_run().map(|run| (run.role, run.run_id.clone(), run.token)),
            });
        }
        drop(held);
        let mut due = Vec::new();
        for (_, mut entries) in by_queue {
            entries.sort_by_key(|entry| entry.hidden_until);
            let half = entries.partition_point(|entry| entry.hidden_until <= now + visibility / 2);
            // Company costs nothing only if it is nearly due itself.
            let nearly = entries.partition_point(|entry| entry.hidden_until <= now + visibility * 3 / 4);
            entries.truncate(half.next_multiple_of(BATCH).min(nearly.max(half)));
            due.append(&mut entries);
        }
        due
    }

    /// Renews the runs of one role among `due`. Lost ones are stopped; if Postgres does not answer, theirs are left for
    /// the next pass, because a message must not outlive its run's lease.
    async fn renew_runs(&self, leases: &mut RunLeases, due: &mut Vec<Due>, role: Role) {
        let (run_ids, tokens): (Vec<String>, Vec<Uuid>) = due
            .iter()
            .filter_map(|entry| entry.run.as_ref())
            .filter(|(of, _, _)| *of == role)
            .map(|(_, run_id, token)| (run_id.clone(), *token))
            .unzip();
        if tokens.is_empty() {
            return;
        }
        // The message is extended right after this, for the whole visibility from then on.
        let lease = self.shared.visibility - margin(self.shared.visibility);
        match leases.renew(role, &run_ids, &tokens, lease).await {
            Ok(kept) => due.retain(|entry| match &entry.run {
                Some((of, run_id, token)) if *of == role && !kept.contains(token) => {
                    self.lose(entry.id, *token, run_id);
                    false
                }
                _ => true,
            }),
            Err(error) => {
                tracing::warn!(error, runs = tokens.len(), "run leases could not be renewed; trying again");
                due.retain(|entry| entry.run.as_ref().is_none_or(|(of, _, _)| *of != role));
            }
        }
    }

    /// Stops the work on a run that is no longer ours, unless it was given back while we asked.
    fn lose(&self, id: u64, token: Uuid, run_id: &str) {
        if let Some(held) = self.shared.held().get_mut(&id)
            && held.renewed_run().is_some_and(|run| run.token == token)
        {
            tracing::warn!(run_id, "the run has another owner; work on it stops");
            tell_lost(&held.stop);
        }
    }

    async fn extend(&self, due: Vec<Due>) {
        if fault::planted("visibility-never-extended") {
            return;
        }
        let mut by_queue: HashMap<Arc<str>, Vec<Due>> = HashMap::new();
        for entry in due {
            by_queue.entry(entry.queue.name.clone()).or_default().push(entry);
        }
        let mut calls = Vec::new();
        for (_, entries) in by_queue {
            let mut entries = entries.into_iter().peekable();
            while entries.peek().is_some() {
                calls.push(self.extend_batch(entries.by_ref().take(BATCH).collect()));
            }
        }
        stream::iter(calls).buffer_unordered(CALLS).for_each(|()| async {}).await;
    }

    async fn extend_batch(&self, batch: Vec<Due>) {
        let (batch, _calls) = self.shared.begin_calls(batch);
        if batch.is_empty() {
            return;
        }
        let asked_at = Instant::now();
        let entries: Vec<(String, Duration)> =
            batch.iter().map(|entry| (entry.receipt.clone(), entry.hide_for)).collect();
        let results = match self.sqs.change_visibility(&batch[0].queue, &entries).await {
            Ok(results) => results,
            Err(error) => {
                tracing::warn!(%error, messages = batch.len(), "visibility was not extended; trying again");
                self.metrics.extensions.with_label_values(&["error"]).inc_by(batch.len() as u64);
                return;
            }
        };
        let mut held = self.shared.held();
        for (entry, result) in batch.iter().zip(results) {
            // Finished meanwhile: whatever SQS said is about a message that is deleted or given back.
            let Some(held) = held.get_mut(&entry.id) else { continue };
            let label = match result {
                Extension::Extended => {
                    held.hidden_until = asked_at + entry.hide_for;
                    "ok"
                }
                Extension::Refused(reason) => {
                    tracing::warn!(queue = %entry.queue.name, reason, "SQS refused to extend a message; its work stops");
                    tell_lost(&held.stop);
                    "refused"
                }
                Extension::Failed(reason) => {
                    tracing::warn!(queue = %entry.queue.name, reason, "visibility was not extended; trying again");
                    "error"
                }
            };
            self.metrics.extensions.with_label_values(&[label]).inc();
        }
    }
}

/// SQS hides a message at most this long from its receive, however often it is extended (SQS developer guide).
const MOST_PER_RECEIVE: Duration = Duration::from_secs(12 * 3600);

#[cfg(test)]
mod tests {
    use super::super::lease::CALL_WAIT;
    use super::*;
    use crate::config::Config;
    use crate::lifecycle::StopSource;

    const VISIBILITY: Duration = Duration::from_secs(60);
    const CAP: Duration = Duration::from_secs(3600);

    /// A keeper without its thread.
    fn keeper() -> Keeper {
        let shared =
            Shared { held: Default::default(), ended: Notify::new(), visibility: VISIBILITY, receive_cap: CAP };
        Keeper { shared: Arc::new(shared), next: Default::default(), thread: None }
    }

    /// What the keeper's thread does its passes with; nothing is called.
    async fn keeping(keeper: &Keeper) -> Keeping<'_> {
        let config = Config::load(None, std::iter::empty(), &[]).expect("the defaults");
        let metrics = Arc::new(Metrics::new());
        Keeping { shared: &keeper.shared, sqs: Sqs::new(&config.aws, &config.queue, metrics.clone()).await, metrics }
    }

    fn hold(keeper: &Keeper, received_at: Instant) -> Lease {
        let queue = Queue { name: "q".into(), url: "http://localhost/q".into() };
        keeper.hold(&queue, "receipt", received_at, StopSource::new().1)
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_is_let_go_only_when_no_call_for_it_is_out() {
        let keeper = keeper();
        let keeping = keeping(&keeper).await;
        let (lease, other) = (hold(&keeper, Instant::now()), hold(&keeper, Instant::now()));
        tokio::time::advance(VISIBILITY / 2).await;
        let (batch, calls) = keeper.shared.begin_calls(keeping.due(|_| true));
        assert_eq!(batch.len(), 2);
        let mut letting_go = tokio::spawn(lease.let_go());
        timeout(CALL_WAIT / 2, &mut letting_go).await.expect_err("a call is out");
        drop(calls);
        timeout(CALL_WAIT / 4, letting_go).await.expect("no call is out").expect("no panic");

        // What was let go between being found due and the call is not extended any more.
        let due = keeping.due(|_| true);
        assert_eq!(due.len(), 1);
        timeout(CALL_WAIT / 4, other.let_go()).await.expect("no call is out");
        assert!(keeper.shared.begin_calls(due).0.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_hangs_holds_up_nobody_for_long() {
        let keeper = keeper();
        let lease = hold(&keeper, Instant::now());
        let due = keeping(&keeper).await.due(|_| true);
        let (_, _calls) = keeper.shared.begin_calls(due);
        timeout(CALL_WAIT * 2, lease.let_go()).await.expect("bounded");
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancel_is_not_forgotten_at_the_receive_cap() {
        let keeper = keeper();
        let begin = Instant::now();
        tokio::time::advance(CAP).await;
        let lease = hold(&keeper, begin);
        lease.hold_run(Role::Owner, "run", Uuid::nil());
        for held in keeper.shared.held().values_mut() {
            held.hidden_until = Instant::now() + VISIBILITY;
        }
        keeper.cancel_runs(&[Uuid::nil()]);
        keeping(&keeper).await.due(|_| true);
        assert_eq!(*lease.stopped.borrow(), Some(StopReason::Cancelled));
    }
}
