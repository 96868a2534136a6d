//! Waits that are counted: by place, by event, and with stacks where they are long.

use std::panic::Location;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use pin_project_lite::pin_project;

use super::mark::{self, Mark};
use super::places::{For, Waiting};
use super::{contention, registry, usage};

/// A wait under way. Dropping it ends it and counts it, also where nobody waits any longer.
struct Counted {
    waiting: Waiting,
    reason: For,
    mark: Mark,
    since: Instant,
}

impl Counted {
    fn begin(place: &'static Location<'static>, reason: For) -> Self {
        let mark = mark::current();
        Counted { waiting: Waiting::begin(place, reason, mark.kind), reason, mark, since: now(reason) }
    }
}

/// The time by which waits of that reason are measured. A lock is waited for within a poll, everything else from one to another.
fn now(reason: For) -> Instant {
    if reason == For::Lock { Instant::now() } else { usage::poll_began() }
}

/// Does for a wait that is over at once all that is done for one, for a trial of what it costs. Of the tables it leaves only its
/// time, with that of the reason, where some microseconds should be nothing.
pub(super) fn trial(reason: For) {
    let (place, mark, since) = (Location::caller(), mark::current(), now(reason));
    let waiting = Waiting::nowhere(place);
    registry::waits_at(place, true);
    // Not zero, which would be added to nothing.
    let took = now(reason).saturating_duration_since(since).max(Duration::from_nanos(1));
    waiting.ended(took);
    usage::waited(mark, reason, took);
    let _ = std::hint::black_box(contention::draw(reason, took));
    registry::waited();
}

impl Drop for Counted {
    fn drop(&mut self) {
        let took = now(self.reason).saturating_duration_since(self.since);
        self.waiting.ended(took);
        usage::waited(self.mark, self.reason, took);
        contention::sample(self.reason, self.mark, took);
        if self.reason != For::Lock {
            // Here, so that the place goes as well where the wait is given up.
            registry::waited();
        }
    }
}

pin_project! {
    /// A future whose time is counted as waiting from its first poll that does not finish it.
    #[must_use = "futures do nothing unless polled"]
    pub struct Wait<F> {
        #[pin]
        future: F,
        place: &'static Location<'static>,
        reason: For,
        counted: Option<Counted>,
    }
}

impl<F: Future> Future for Wait<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let polled = this.future.poll(context);
        if polled.is_pending() {
            let begins = this.counted.is_none();
            this.counted.get_or_insert_with(|| Counted::begin(this.place, *this.reason));
            registry::waits_at(this.place, begins);
        } else {
            *this.counted = None;
        }
        polled
    }
}

/// Counts the time for which `future` is not ready as waiting, at the place of the call.
#[track_caller]
pub fn wait<F: Future>(reason: For, future: F) -> Wait<F> {
    Wait { future, place: Location::caller(), reason, counted: None }
}

pin_project! {
    /// A future whose place is shown as that where its task waits.
    #[must_use = "futures do nothing unless polled"]
    pub struct Parked<F> {
        #[pin]
        future: F,
        place: &'static Location<'static>,
        waits: bool,
    }

    impl<F> PinnedDrop for Parked<F> {
        fn drop(this: Pin<&mut Self>) {
            // One of several that the task waited for: another was ready first.
            if this.waits {
                registry::waited();
            }
        }
    }
}

impl<F: Future> Future for Parked<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let polled = this.future.poll(context);
        if polled.is_pending() {
            registry::waits_at(this.place, !std::mem::replace(this.waits, true));
        } else if std::mem::take(this.waits) {
            registry::waited();
        }
        polled
    }
}

/// For a task that has nothing to do until `future` is ready: the list of tasks shows that it waits at the place of the call. It
/// is no wait that anything is charged for, and in no profile of those.
#[track_caller]
pub fn park<F: Future>(future: F) -> Parked<F> {
    Parked { future, place: Location::caller(), waits: false }
}

/// Locks `mutex`, poisoned or not, and counts the wait where another thread holds it.
#[track_caller]
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    match mutex.try_lock() {
        Ok(guard) => guard,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => {
            let _counted = Counted::begin(Location::caller(), For::Lock);
            mutex.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::task::places::{self, Waited};
    use crate::task::{spawn_event, usage::Used};

    fn waited(line: u32) -> Waited {
        let here = |place: &'static Location<'static>| place.file() == file!() && place.line() == line;
        let rows = places::rows().into_iter().filter(|row| row.place.is_some_and(here));
        rows.map(|row| row.waited).next().unwrap_or_default()
    }

    #[tokio::test]
    async fn a_wait_is_counted_at_its_place_and_for_its_event() {
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let line = line!() + 2;
        let event = spawn_event("waits", async move {
            wait(For::Database, gone).await.unwrap();
            // What is ready at once has not waited.
            wait(For::Kafka, async {}).await;
            registry::ledger().unwrap().read()
        });
        while waited(line).now == 0 {
            tokio::task::yield_now().await;
        }
        let place = registry::live().into_iter().find(|task| task.name == "waits").unwrap().waits_at.unwrap();
        assert_eq!(place.line(), line);
        tokio::time::sleep(Duration::from_millis(20)).await;
        go.send(()).unwrap();
        let used: Used = event.await.unwrap();
        assert!(used.waited(For::Database) >= Duration::from_millis(20), "{used:?}");
        assert_eq!(used.waited(For::Kafka), Duration::ZERO);
        let Waited { now, count, total } = waited(line);
        assert!((now, count) == (0, 1) && total >= Duration::from_millis(20), "{now} {count} {total:?}");
    }

    #[tokio::test]
    async fn a_wait_that_is_given_up_is_counted_as_well() {
        let line = line!() + 1;
        let given_up = wait(For::Permit, std::future::pending::<()>());
        assert!(tokio::time::timeout(Duration::from_millis(10), given_up).await.is_err());
        let Waited { now, count, total } = waited(line);
        assert!((now, count) == (0, 1) && total >= Duration::from_millis(10), "{now} {count} {total:?}");
    }

    /// Of a thousand calls in one task one ends: the others still wait at their place.
    #[tokio::test]
    async fn a_task_is_shown_at_its_place_until_the_last_of_its_waits_is_over() {
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let (go_on, gone_on) = tokio::sync::oneshot::channel::<()>();
        let event = spawn_event("waits twice", async move {
            let mut calls: futures::stream::FuturesUnordered<_> =
                [gone, gone_on].into_iter().map(|each| wait(For::Partner, each)).collect();
            while futures::StreamExt::next(&mut calls).await.is_some() {}
            std::future::pending::<()>().await;
        });
        let seen = || registry::live().into_iter().find(|task| task.name == "waits twice").unwrap();
        let turn = async |polls: u64| {
            while seen().polls < polls || seen().running {
                tokio::task::yield_now().await;
            }
        };
        turn(1).await;
        assert!(seen().waits_at.is_some());
        go.send(()).unwrap();
        turn(2).await;
        assert!(seen().waits_at.is_some());
        go_on.send(()).unwrap();
        turn(3).await;
        assert!(seen().waits_at.is_none());
        event.abort();
    }

    #[test]
    fn only_a_lock_that_is_held_is_waited_for() {
        let mutex = Arc::new(Mutex::new(()));
        let line = line!() + 1;
        let locked = |mutex: &Mutex<()>| drop(lock(mutex));
        locked(&mutex);
        assert_eq!(waited(line).count, 0);
        let held = mutex.lock().unwrap();
        let other = std::thread::spawn({
            let mutex = Arc::clone(&mutex);
            move || locked(&mutex)
        });
        while waited(line).now == 0 {
            std::thread::yield_now();
        }
        drop(held);
        other.join().unwrap();
        assert_eq!((waited(line).now, waited(line).count), (0, 1));
    }
}
