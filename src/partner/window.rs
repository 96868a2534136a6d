//! How many calls may be out at once: a window that falls when the partner shows overload and grows while it is well.
//!
//! Additive increase, multiplicative decrease, as TCP's congestion window: whoever shares the partner ends with a fair
//! part of it, and nobody has to be told the limit. Two things differ. The window grows with the time for which answers
//! were good and not with their number, so that it takes the same time with a partner that answers in 10 ms and with one
//! that takes a second. And it starts full: `partner.in_flight` is what the partner agreed to bear, so a partner that is
//! well sees all of it from the first moment.
//!
//! It bounds calls, not listings: a place is taken before the connection is looked for and given back after the last byte
//! of the answer. A listing in backoff has none, though it keeps its permit.

use std::fmt;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use prometheus::IntGauge;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use crate::task::{For, lock, wait};

/// What a cut leaves of the window: as CUBIC (RFC 9438) does, and the adaptive retries of AWS's SDKs.
const CUT: f64 = 0.7;
/// Time of good answers that brings the window from nothing to its full size. A call takes 10 s at the most by default, so
/// that what was cut for a reason is given back over a few of them.
const RECOVERY: Duration = Duration::from_secs(25);
/// A good answer vouches for the time that it took, and at least for this long: where a call is rarely made, or answered
/// within a millisecond, the time between two of them counts too. Hours without a call do not.
const VOUCHED: Duration = Duration::from_secs(1);
/// The window never falls below this part of its full size...
const FLOOR_PART: f64 = 0.01;
/// ...nor below this many calls: a few that hang until their timeout do not keep the others from finding out that the
/// partner is well.
const FLOOR_CALLS: f64 = 4.0;
/// The share of recent answers below which a 503 or a timeout is taken for chance. If each of them cut, a partner that
/// fails one call in two hundred would be left with a tenth of its window, for no use to anybody.
const CHANCE: f64 = 0.1;
/// How many answers are recent, by an exponentially weighted mean.
const RECENT: f64 = 100.0;

/// How sure an overload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Overload {
    /// The partner says that it is called too much.
    Said,
    /// It looks like it: unavailable, or no answer in time. One alone may be chance.
    Suspected,
}

/// The process-wide window.
pub(super) struct Window {
    places: Semaphore,
    inner: Mutex<Inner>,
    gauge: IntGauge,
}

struct Inner {
    size: Size,
    /// Places that exist, taken or free. More than the size until those that are too many come back after a cut.
    places: usize,
}

/// A place in the window, for one try. Dropping it gives the place back.
#[must_use = "the place is given back when it is dropped"]
pub(super) struct Place<'a> {
    window: &'a Window,
    /// `None` only while it is being dropped.
    permit: Option<SemaphorePermit<'a>>,
    /// Cuts when the try began.
    cuts: u64,
}

impl Window {
    /// A full one; `gauge` shows its size.
    pub(super) fn new(full: usize, gauge: IntGauge) -> Self {
        let window = Window {
            places: Semaphore::new(full),
            inner: Mutex::new(Inner { size: Size::new(full, Instant::now()), places: full }),
            gauge,
        };
        window.gauge.set(full as i64);
        window
    }

    /// Waits for a place, first come, first served.
    pub(super) async fn enter(&self) -> Place<'_> {
        let permit = wait(For::Permit, self.places.acquire()).await.expect("the semaphore is never closed");
        Place { window: self, permit: Some(permit), cuts: self.lock().size.cuts }
    }

    /// Makes the places as many as the size says, as far as they are free.
    fn resize(&self, inner: &mut Inner) {
        let limit = inner.size.limit();
        if inner.places < limit {
            self.places.add_permits(limit - inner.places);
            inner.places = limit;
        } else {
            inner.places -= self.places.forget_permits(inner.places - limit);
        }
        self.gauge.set(limit as i64);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics half-way through a change.
        lock(&self.inner)
    }
}

impl Place<'_> {
    /// Takes note of a good answer after `took`.
    pub(super) fn worked(&self, took: Duration) {
        let mut inner = self.window.lock();
        if !inner.size.worked(Instant::now(), took) {
            return;
        }
        self.window.resize(&mut inner);
        if inner.size.is_full() {
            tracing::info!(
                limit = inner.size.limit(),
                "the partner is well, calls in flight are as many as configured"
            );
        }
    }

    /// Takes note of an overload; `cause` is what happened.
    pub(super) fn overloaded(&self, overload: Overload, cause: &dyn fmt::Display) {
        let mut inner = self.window.lock();
        let was_full = inner.size.is_full();
        if !inner.size.overloaded(Instant::now(), overload, self.cuts) {
            return;
        }
        self.window.resize(&mut inner);
        if was_full {
            tracing::warn!(
                limit = inner.size.limit(),
                "the partner shows overload, fewer calls are in flight until it is well: {cause}"
            );
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        // Under the lock to the end, so that no cut comes between the count and the return.
        let mut inner = self.window.lock();
        if let Some(permit) = self.permit.take() {
            if inner.places > inner.size.limit() {
                inner.places -= 1;
                permit.forget();
            } else {
                drop(permit);
            }
        }
    }
}

/// The arithmetic of the window.
struct Size {
    full: f64,
    floor: f64,
    current: f64,
    /// Grows with each cut. Only a try that began after the last one can make the next: one round trip, one cut, however
    /// many calls were out.
    cuts: u64,
    /// Good answers up to here are in `current`.
    grown: Instant,
    /// Share of overloads among recent answers.
    overloads: f64,
}

impl Size {
    fn new(full: usize, now: Instant) -> Self {
        let full = full as f64;
        let floor = (full * FLOOR_PART).max(FLOOR_CALLS).min(full);
        Size { full, floor, current: full, cuts: 0, grown: now, overloads: 0.0 }
    }

    /// Calls that may be out; at least one.
    fn limit(&self) -> usize {
        self.current.round() as usize
    }

    fn is_full(&self) -> bool {
        self.current >= self.full
    }

    /// Returns whether the window has grown.
    fn worked(&mut self, now: Instant, took: Duration) -> bool {
        self.overloads -= self.overloads / RECENT;
        if self.is_full() {
            return false;
        }
        let vouched = now.saturating_duration_since(self.grown).min(took.max(VOUCHED));
        self.grown = now;
        let growth = self.full * vouched.as_secs_f64() / RECOVERY.as_secs_f64();
        self.current = (self.current + growth).min(self.full);
        true
    }

    /// Returns whether the window was cut. `cuts` is what they were when the try began.
    fn overloaded(&mut self, now: Instant, overload: Overload, cuts: u64) -> bool {
        self.overloads += (1.0 - self.overloads) / RECENT;
        let is_sure = overload == Overload::Said || self.overloads >= CHANCE;
        if !is_sure || cuts != self.cuts {
            return false;
        }
        self.current = (self.current * CUT).max(self.floor);
        self.cuts += 1;
        self.grown = now;
        true
    }
}

#[cfg(test)]
mod tests {
    use futures::poll;
    use tokio::task::unconstrained;

    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const SECOND: Duration = Duration::from_secs(1);

    fn cut(size: &mut Size, now: Instant) {
        let cuts = size.cuts;
        assert!(size.overloaded(now, Overload::Said, cuts));
    }

    /// Seconds of good answers, one each `interval` that took `took`, until the window is full again.
    fn recovery(size: &mut Size, start: Instant, interval: Duration, took: Duration) -> f64 {
        let mut now = start;
        while !size.is_full() {
            now += interval;
            size.worked(now, took);
        }
        (now - start).as_secs_f64()
    }

    #[test]
    fn a_round_trip_cuts_once_however_many_tries_it_had() {
        let now = Instant::now();
        let mut size = Size::new(1000, now);
        let cuts = size.cuts;
        let number = (0..1000).filter(|_| size.overloaded(now, Overload::Said, cuts)).count();
        assert_eq!((number, size.limit()), (1, 700));
        // Those that began after it.
        let cuts = size.cuts;
        let number = (0..700).filter(|_| size.overloaded(now, Overload::Said, cuts)).count();
        assert_eq!((number, size.limit()), (1, 490));
    }

    #[test]
    fn it_never_falls_below_its_floor() {
        for (full, floor) in [(100_000, 1000), (1000, 10), (100, 4), (5, 4), (3, 3), (1, 1)] {
            let now = Instant::now();
            let mut size = Size::new(full, now);
            for _ in 0..100 {
                cut(&mut size, now);
            }
            assert_eq!(size.limit(), floor, "of {full}");
        }
    }

    #[test]
    fn it_is_full_again_after_25_s_of_good_answers_whatever_they_take() {
        for (interval, took) in [
            (MS / 10, MS),
            (MS, MS * 500),
            // One call at a time of ten seconds.
            (SECOND * 10, SECOND * 10),
            // One call a second.
            (SECOND, MS),
        ] {
            let start = Instant::now();
            let mut size = Size::new(1000, start);
            for _ in 0..100 {
                cut(&mut size, start);
            }
            let seconds = recovery(&mut size, start, interval, took);
            assert!((24.7..=30.0).contains(&seconds), "{seconds} s at {took:?}");
            assert_eq!(size.limit(), 1000);
            // A third of it is back in a third of the time.
            cut(&mut size, start);
            let seconds = recovery(&mut size, start + SECOND * 60, interval, took);
            assert!((5.0..=10.0).contains(&seconds), "{seconds} s at {took:?}");
        }
    }

    #[test]
    fn time_without_calls_earns_nothing() {
        let start = Instant::now();
        let mut size = Size::new(1000, start);
        cut(&mut size, start);
        size.worked(start + SECOND * 3600, MS);
        assert_eq!(size.limit(), 740, "one second's worth");
    }

    #[test]
    fn a_few_failures_are_chance_and_many_are_not() {
        let now = Instant::now();
        // Of a hundred answers this many are a 503; 37 and 100 have no common divisor, so they are spread out.
        let cuts_of = |failures: u32| {
            let mut size = Size::new(1000, now);
            for number in 0..10_000 {
                let cuts = size.cuts;
                if number * 37 % 100 < failures {
                    size.overloaded(now, Overload::Suspected, cuts);
                } else {
                    size.worked(now, MS);
                }
            }
            size.cuts
        };
        assert_eq!(cuts_of(5), 0);
        assert!(cuts_of(15) > 100, "{}", cuts_of(15));
    }

    #[test]
    fn when_all_fail_the_first_dozen_are_enough() {
        let now = Instant::now();
        let mut size = Size::new(1000, now);
        let failures = (1..).find(|_| size.overloaded(now, Overload::Suspected, 0)).expect("a cut");
        assert!((10..=12).contains(&failures), "{failures}");
    }

    fn window(full: usize) -> Window {
        Window::new(full, IntGauge::new("limit", "limit").expect("a name"))
    }

    /// As many places as there are at this moment.
    async fn enter_all(window: &Window) -> Vec<Place<'_>> {
        let mut places = Vec::new();
        // Without tokio's bound on what a task does at once, which would look like a full window.
        while let std::task::Poll::Ready(place) = poll!(std::pin::pin!(unconstrained(window.enter()))) {
            places.push(place);
        }
        places
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_cut_places_come_back_only_below_the_new_size() {
        let window = window(100);
        let mut out = enter_all(&window).await;
        assert_eq!(out.len(), 100);
        out[0].overloaded(Overload::Said, &"partner answered 429");
        out[1].overloaded(Overload::Said, &"partner answered 429");
        assert_eq!(window.gauge.get(), 70, "one round trip");
        for _ in 0..30 {
            out.pop();
            assert!(poll!(std::pin::pin!(window.enter())).is_pending(), "{} are out", out.len());
        }
        out.pop();
        out.push(window.enter().await);
        assert!(poll!(std::pin::pin!(window.enter())).is_pending());
        // It began after the cut.
        out.last().expect("entered").overloaded(Overload::Said, &"partner answered 429");
        assert_eq!(window.gauge.get(), 49);
        drop(out);
        assert_eq!(enter_all(&window).await.len(), 49);
    }

    #[tokio::test(start_paused = true)]
    async fn free_places_are_cut_too_and_growth_lets_those_in_who_wait() {
        let window = window(100);
        window.enter().await.overloaded(Overload::Said, &"partner answered 429");
        let out = enter_all(&window).await;
        assert_eq!(out.len(), 70);
        let mut waiting = std::pin::pin!(window.enter());
        assert!(poll!(waiting.as_mut()).is_pending());
        tokio::time::advance(SECOND).await;
        out[0].worked(SECOND);
        assert_eq!(window.gauge.get(), 74);
        assert!(poll!(waiting.as_mut()).is_ready());
        for _ in 0..10 {
            tokio::time::advance(SECOND).await;
            out[0].worked(SECOND);
        }
        assert_eq!(window.gauge.get(), 100);
        drop(out);
        assert_eq!(enter_all(&window).await.len(), 100);
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_holds_nobody_up() {
        let window = window(1);
        let place = window.enter().await;
        {
            let mut gone = std::pin::pin!(window.enter());
            assert!(poll!(gone.as_mut()).is_pending());
        }
        drop(place);
        assert_eq!(enter_all(&window).await.len(), 1);
    }
}
