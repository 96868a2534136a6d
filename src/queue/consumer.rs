//! One lane's loop: permits, long polls, and a task per event.
//!
//! Permits come before the receive, so the service never holds a message that it cannot work on, and a permit travels
//! with its task: neither an error nor a panic can leak it. An idle lane has one poll in flight; while polls come back
//! full there are up to `queue.max_polls`, of which all but one ask for whole batches only: a call for one message costs as
//! much as one for ten.

mod ending;

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::attributes::dead_letter_queue;
use super::batch::BATCH;
use super::deleter::Deleter;
use super::keeper::Keeper;
use super::sqs::{self, Queue, Sqs};
use super::{Delivery, Handler, Message, Outcome};
use crate::config::{self, Backoff};
use crate::fault;
use crate::health::{Beat, Dependency};
use crate::lifecycle::{Company, Stop};
use crate::metrics::Metrics;
use crate::task::{self, For, wait};

/// How often a loop that waits for permits says that it is alive.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);

/// Long poll of the additional loops: short, so that they end soon after the load does.
const EXTRA_WAIT: Duration = Duration::from_secs(1);

/// How long a poll of a lane with much to do waits for the permits of a whole batch.
const BATCH_WAIT: Duration = Duration::from_millis(10);

/// How long parked polls may still bring something when all work is done: what was given back while draining, or what was
/// sent as the stop began.
const ECHO: Duration = Duration::from_secs(1);

/// Waits after a poll that failed.
const POLL_RETRY: Backoff = Backoff { base: Duration::from_millis(200), cap: Duration::from_secs(5) };

/// What a consumer is made of.
pub struct ConsumerParts {
    /// The lane's name in metrics and logs.
    pub lane: &'static str,
    /// Queue name and limit.
    pub settings: config::Lane,
    /// Polling, retry and visibility.
    pub queue: config::Queue,
    /// Client for everything but extensions.
    pub sqs: Sqs,
    /// Keeps messages hidden.
    pub keeper: Arc<Keeper>,
    /// Turns deliveries into results.
    pub handler: Arc<dyn Handler>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Whether messages can be worked on: until then none is received, since a receive that comes to nothing counts.
    pub begin: watch::Receiver<bool>,
    /// Ends the loops.
    pub stop: Stop,
    /// Touched at each poll.
    pub beat: Beat,
    /// Whether SQS answers.
    pub dependency: Dependency,
}

struct Consumer {
    parts: ConsumerParts,
    source: Queue,
    dead: Queue,
    permits: Arc<Semaphore>,
    /// Told when the permits of a whole batch are free.
    room: Notify,
    deleter: Deleter,
    /// How many loops should poll: one when idle.
    wanted: watch::Sender<usize>,
    /// Messages that this process has of the lane.
    at_work: AtomicUsize,
    /// Cuts the polls that are still parked when everything else is done.
    cut: watch::Sender<bool>,
}

/// Consumes a lane until it is stopped; returns when every message is ended and deletes are flushed.
/// `company` is that of all lanes.
pub async fn consume(parts: ConsumerParts, company: Company) {
    let Some((source, dead)) = find_queues(&parts).await else { return };
    parts.dependency.up();
    if !may_begin(&parts).await {
        return;
    }
    let limit = parts.settings.in_flight;
    let polls = parts.queue.max_polls;
    let stop = parts.stop.clone();
    let consumer = Arc::new(Consumer {
        deleter: Deleter::start(parts.sqs.clone(), source.clone(), parts.queue.delete_linger),
        parts,
        source,
        dead,
        permits: Arc::new(Semaphore::new(limit)),
        room: Notify::new(),
        wanted: watch::Sender::new(1),
        at_work: AtomicUsize::new(0),
        cut: watch::Sender::new(false),
    });
    let mut loops = JoinSet::new();
    for number in 0..polls {
        task::spawn_in(&mut loops, "poll", consumer.clone().poll_loop(number));
    }
    task::park(stop.draining()).await;
    // All permits back: every task has ended its message. Tasks hear of the end of draining themselves.
    let _ = task::park(consumer.permits.acquire_many(limit as u32)).await;
    tokio::select! {
        () = task::park(company.done()) => {}
        () = stop.ended() => {}
    }
    stop_loops(loops, consumer).await;
}

/// A message goes to whoever polls, and that may be our own parked poll: one that was just given back, or one that was
/// just sent. To cut a poll whose answer is on its way would hide the message for a whole visibility timeout. So parked
/// polls, which give back what they bring and end, stay for as long as the process has work on any lane, and a moment
/// longer.
async fn stop_loops(mut loops: JoinSet<()>, consumer: Arc<Consumer>) {
    let all_ended = async |loops: &mut JoinSet<()>| while loops.join_next().await.is_some() {};
    let _ = task::park(timeout(ECHO, all_ended(&mut loops))).await;
    consumer.cut.send_replace(true);
    all_ended(&mut loops).await;
    match Arc::try_unwrap(consumer) {
        Ok(consumer) => {
            consumer.deleter.flush().await;
            consumer.parts.beat.retire();
        }
        Err(_) => tracing::error!("a task outlived its lane; its message will be delivered again"),
    }
}

/// Looks the queues up, for as long as it takes: the service starts without SQS and says so in `/readyz`.
async fn find_queues(parts: &ConsumerParts) -> Option<(Queue, Queue)> {
    let name = &parts.settings.queue;
    let dead = dead_letter_queue(name);
    let mut attempt = 1;
    loop {
        let found = async { Ok::<_, sqs::SqsError>((parts.sqs.queue(name).await?, parts.sqs.queue(&dead).await?)) };
        let error = tokio::select! {
            () = parts.stop.draining() => return None,
            found = found => match found {
                Ok(found) => return Some(found),
                Err(error) => error,
            },
        };
        let hint = if error.is_missing_queue() { "; create it with `write-api setup`" } else { "" };
        let error = format!("{error}{hint}");
        tracing::warn!(lane = parts.lane, attempt, error, "a queue of the lane was not found; looking again");
        parts.dependency.down(error);
        parts.beat.touch();
        tokio::select! {
            () = parts.stop.draining() => return None,
            () = task::park(tokio::time::sleep(POLL_RETRY.ceiling(attempt))) => attempt += 1,
        }
    }
}

/// Waits until messages may be received; `false`: the lane is to stop.
async fn may_begin(parts: &ConsumerParts) -> bool {
    let mut begin = parts.begin.clone();
    loop {
        tokio::select! {
            biased;
            () = parts.stop.draining() => return false,
            begun = task::park(timeout(SIGN_OF_LIFE, begin.wait_for(|begin| *begin))) => match begun {
                Ok(begun) => return begun.is_ok(),
                Err(_) => parts.beat.touch(),
            }
        }
    }
}

impl Consumer {
    async fn poll_loop(self: Arc<Self>, number: usize) {
        let stop = self.parts.stop.clone();
        let mut wanted = self.wanted.subscribe();
        let mut failures = 0;
        loop {
            tokio::select! {
                biased;
                () = stop.draining() => return,
                _ = task::park(wanted.wait_for(|loops| number < *loops)) => {}
            }
            let Some(permits) = self.take_permits(number).await else { return };
            let wait = self.wait_time(number);
            let polled = self.poll(permits, wait).await;
            // Those of messages that did not come are free again.
            self.tell_of_room();
            match polled {
                Poll::Received { full, any } => {
                    failures = 0;
                    if full {
                        let most = self.parts.queue.max_polls;
                        self.wanted.send_if_modified(|loops| {
                            let more = (*loops * 2).min(most);
                            std::mem::replace(loops, more) != more
                        });
                    } else if !any {
                        self.wanted.send_if_modified(|loops| std::mem::replace(loops, 1) != 1);
                    }
                }
                Poll::Failed => {
                    failures += 1;
                    tokio::select! {
                        () = stop.draining() => return,
                        () = task::park(tokio::time::sleep(POLL_RETRY.ceiling(failures))) => {}
                    }
                }
                Poll::Stopped => return,
            }
        }
    }

    /// How long a poll may be parked. SQS does not always notice that the process behind a parked poll was killed, and
    /// hands it the very message that the process was working on as soon as that is visible: hidden for one more
    /// visibility timeout. So while there is work, polls are over before what we hold can become visible, which is half a
    /// timeout away at least.
    fn wait_time(&self, number: usize) -> Duration {
        let settings = &self.parts.queue;
        if number > 0 {
            EXTRA_WAIT
        } else if self.at_work.load(Ordering::Relaxed) > 0 {
            settings.wait_time.min(settings.visibility_timeout / 4).max(EXTRA_WAIT)
        } else {
            settings.wait_time
        }
    }

    /// The permits of a poll. `None`: the lane is stopping.
    async fn take_permits(&self, number: usize) -> Option<OwnedSemaphorePermit> {
        tokio::select! {
            biased;
            () = self.parts.stop.draining() => None,
            permits = async { if number == 0 { self.some_permits().await } else { self.whole_batch().await } } => Some(permits),
        }
    }

    /// Waits for one permit and takes up to nine more that are free. Where there is much to do, it waits a moment for them.
    async fn some_permits(&self) -> OwnedSemaphorePermit {
        let mut permits = loop {
            // All permits are at work, perhaps for hours: the loop is alive and rightly does not poll.
            match wait(For::Permit, timeout(SIGN_OF_LIFE, self.permits.clone().acquire_owned())).await {
                Ok(permit) => break permit.expect("the semaphore is never closed"),
                Err(_) => self.parts.beat.touch(),
            }
        };
        let others = BATCH.min(self.parts.settings.in_flight) - 1;
        if *self.wanted.borrow() > 1
            && let Ok(Ok(others)) =
                wait(For::Permit, timeout(BATCH_WAIT, self.permits.clone().acquire_many_owned(others as u32))).await
        {
            permits.merge(others);
        }
        while permits.num_permits() < BATCH
            && let Ok(other) = self.permits.clone().try_acquire_owned()
        {
            permits.merge(other);
        }
        permits
    }

    /// Waits until the permits of a whole batch are free, and holds none meanwhile: what becomes free is the first loop's, or
    /// a batch would form at none of them.
    async fn whole_batch(&self) -> OwnedSemaphorePermit {
        loop {
            if let Ok(permits) = self.permits.clone().try_acquire_many_owned(self.batch() as u32) {
                self.tell_of_room();
                return permits;
            }
            wait(For::Permit, self.room.notified()).await;
        }
    }

    /// What a whole batch is: of a lane that has few permits, at most half of them, so that several polls can be in flight.
    fn batch(&self) -> usize {
        BATCH.min((self.parts.settings.in_flight / 2).max(1))
    }

    /// Wakes a loop that waits for a whole batch, if there is one for it.
    fn tell_of_room(&self) {
        if self.permits.available_permits() >= self.batch() {
            self.room.notify_one();
        }
    }

    async fn poll(self: &Arc<Self>, mut permits: OwnedSemaphorePermit, wait: Duration) -> Poll {
        let asked = permits.num_permits();
        let visibility = self.parts.queue.visibility_timeout;
        let mut receive = std::pin::pin!(self.parts.sqs.receive(&self.source, asked, wait, visibility));
        let result = tokio::select! {
            biased;
            result = &mut receive => result,
            () = self.parts.stop.draining() => {
                // The request is out; what it still brings goes straight back. It holds up nobody.
                drop(permits);
                let mut cut = self.cut.subscribe();
                tokio::select! {
                    late = receive => self.give_back(late.unwrap_or_default()).await,
                    () = cut.wait_for(|cut| *cut).map(drop) => {}
                }
                return Poll::Stopped;
            }
        };
        self.parts.beat.touch();
        match result {
            Ok(messages) => {
                self.parts.dependency.up();
                let outcome = Poll::Received { full: messages.len() == asked, any: !messages.is_empty() };
                for message in messages {
                    fault::point("queue.received", &message.id);
                    let permit = permits.split(1).expect("SQS never delivers more than was asked for");
                    let lease = self.parts.keeper.hold(
                        &self.source,
                        &message.receipt,
                        message.received_at,
                        self.parts.stop.clone(),
                    );
                    let delivery = Delivery::new(message, self.parts.lane, lease);
                    self.at_work.fetch_add(1, Ordering::Relaxed);
                    task::spawn_event("event", self.clone().work(delivery, permit));
                }
                outcome
            }
            Err(error) => {
                tracing::warn!(lane = self.parts.lane, %error, "poll failed");
                self.parts.dependency.down(error.to_string());
                Poll::Failed
            }
        }
    }

    async fn give_back(&self, messages: Vec<Message>) {
        let entries: Vec<(String, Duration)> =
            messages.into_iter().map(|message| (message.receipt, Duration::ZERO)).collect();
        if entries.is_empty() {
            return;
        }
        if let Err(error) = self.parts.sqs.change_visibility(&self.source, &entries).await {
            tracing::warn!(%error, "late messages were not given back; they come again after their visibility timeout");
        }
    }

    /// One event, from its first line to the end of its message.
    async fn work(self: Arc<Self>, delivery: Delivery, permit: OwnedSemaphorePermit) {
        let in_flight = self.parts.metrics.events_in_flight.with_label_values(&[self.parts.lane]);
        in_flight.inc();
        let started = Instant::now();
        if fault::planted("delete-before-commit") {
            let receipt = std::slice::from_ref(&delivery.message.receipt);
            let _ = Box::pin(self.parts.sqs.delete(&self.source, receipt)).await;
        }
        let handling = AssertUnwindSafe(self.parts.handler.handle(&delivery)).catch_unwind();
        let (outcome, in_order) = tokio::select! {
            biased;
            outcome = handling => match outcome {
                Ok(outcome) => (outcome, true),
                Err(panic) => {
                    let error = anyhow::anyhow!("the handler panicked: {}", panic_message(&*panic));
                    (Outcome::Retry(error), false)
                }
            },
            () = self.parts.stop.ended() => (Outcome::Release("the time to stop ran out".into()), true),
        };
        // A refusal ends when the dead-letter queue has it: see `settle`.
        if in_order && !matches!(outcome, Outcome::Refuse(_)) {
            self.conclude(&delivery).await;
        }
        self.report(&delivery, &outcome, started.elapsed());
        let leaks = fault::planted("permit-leak") && matches!(outcome, Outcome::Refuse(_));
        self.settle(delivery, outcome).await;
        in_flight.dec();
        self.at_work.fetch_sub(1, Ordering::Relaxed);
        match leaks {
            true => permit.forget(),
            false => drop(permit),
        }
        self.tell_of_room();
    }
}

enum Poll {
    Received { full: bool, any: bool },
    Failed,
    Stopped,
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    if let Some(text) = panic.downcast_ref::<&str>() {
        text
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text
    } else {
        "(no message)"
    }
}
