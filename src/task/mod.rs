//! What runs, whose work it is, and what it uses: the facts that profiles, metrics and log lines are made of.
//!
//! Every task of the service is spawned here ([`spawn`], [`spawn_event`]). While it is polled, its thread is marked with the
//! kind of event that it works for (`mark`), which samples of memory and of CPU time take as their label; its memory, time and
//! waits are charged to its event (`usage`); it is listed with where it was spawned and where it waits (`registry`).

pub mod contention;
pub mod cost;
pub mod mark;
pub mod places;
pub mod registry;
pub mod trace;
pub mod usage;
pub mod waits;

use std::future::poll_fn;
use std::panic::Location;
use std::task::Poll;

use tokio::task::{AbortHandle, JoinHandle, JoinSet};

pub use mark::{Kind, Mark, Stage, in_stage, stage};
pub use places::For;
pub use registry::{identify, label, ledger};
pub use waits::{lock, park, wait};

use registry::Tracked;

/// Spawns a task that does the work of whoever spawns it: what it uses is charged to the same event.
#[track_caller]
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    tokio::spawn(Tracked::inherit(name, Location::caller(), future))
}

/// Spawns a task for an event, whose kind is not known yet (see [`identify`]). What it uses is counted from zero.
#[track_caller]
pub fn spawn_event<F>(name: &'static str, future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    tokio::spawn(Tracked::fresh(name, Location::caller(), future))
}

/// Spawns a task for work of a kind that is no single event's: what it uses is charged to the kind alone.
#[track_caller]
pub fn spawn_apart<F>(kind: Kind, name: &'static str, future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    tokio::spawn(Tracked::apart(kind, name, Location::caller(), future))
}

/// As [`spawn`], into a set.
#[track_caller]
pub fn spawn_in<F>(set: &mut JoinSet<F::Output>, name: &'static str, future: F) -> AbortHandle
where
    F: Future<Output: Send> + Send + 'static,
{
    set.spawn(Tracked::inherit(name, Location::caller(), future))
}

/// Lets those run first that are ready now, so that what they bring can be taken together. Unlike [`tokio::task::yield_now`], which
/// has a task wait until its own thread has nothing else to do, this puts it at the end of the queue, where any thread of the
/// runtime may take it.
pub async fn after_those_ready() {
    let mut waited = false;
    let turn = poll_fn(|context| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    });
    turn.await;
}

/// Runs `work` on a thread for what blocks, with the mark of whoever asks.
#[track_caller]
pub fn spawn_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let mark = mark::current();
    tokio::task::spawn_blocking(move || mark::under(mark, work))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[tokio::test]
    async fn those_that_are_ready_run_before_the_task_that_lets_them() {
        let order = Arc::new(Mutex::new(Vec::new()));
        let note = |what| {
            let order = Arc::clone(&order);
            move || order.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(what)
        };
        let (before, after, other) = (note("before"), note("after"), note("other"));
        let patient = spawn("patient", async move {
            before();
            after_those_ready().await;
            after();
        });
        let ready = spawn("ready", async move { other() });
        patient.await.unwrap();
        ready.await.unwrap();
        assert_eq!(*order.lock().unwrap(), ["before", "other", "after"]);
    }
}
