//! How many repeats there may be: a share of the fresh calls, and a few a second besides.
//!
//! Backoff spreads the repeats of one listing, but a partner that fails half of all calls is then called twice as often
//! as one that is well, just when it can bear it least. So a repeat, a try of a listing that was tried before, is paid
//! for from one bucket of the process, which fresh calls fill. The constants are those of Finagle's `RetryBudget`: 20 % of
//! the calls and 10 a second, kept for 10 s.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::{IntCounter, IntGauge};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

/// What a fresh call earns, in repeats.
const EARNED: f64 = 0.2;
/// Repeats a second that nobody has to earn. Without them the last listings of a run would never be repeated, as no fresh
/// call comes after them.
const FLOOR_PER_SECOND: f64 = 10.0;
/// The most repeats that are kept for later, and how many there are at the start: ten seconds of the floor. More would let
/// a storm loose after a long time without a failure.
const CAPACITY: f64 = 100.0;

/// The process-wide bucket.
pub(super) struct RetryBudget {
    bucket: Mutex<Bucket>,
    /// Held by whoever is next. The lock is fair, which makes it the queue; those behind the first have no timer.
    turn: tokio::sync::Mutex<()>,
    /// Wakes the first in the queue before the floor alone would have paid for it.
    earned: Notify,
    repeats: IntCounter,
    waiting: IntGauge,
}

struct Bucket {
    /// Repeats that are paid for.
    credit: f64,
    /// The floor is in `credit` up to here.
    filled: Instant,
}

impl Bucket {
    /// Takes one repeat out; if there is none, how long the floor takes to pay for it.
    fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let since = now.saturating_duration_since(self.filled).as_secs_f64();
        self.add(since * FLOOR_PER_SECOND);
        self.filled = now;
        if self.credit >= 1.0 {
            self.credit -= 1.0;
            return Ok(());
        }
        // A timer has milliseconds: with the next one there is enough.
        Err(Duration::from_secs_f64((1.0 - self.credit) / FLOOR_PER_SECOND) + Duration::from_millis(1))
    }

    fn add(&mut self, credit: f64) {
        self.credit = (self.credit + credit).min(CAPACITY);
    }
}

impl RetryBudget {
    /// A full one. `repeats` counts those that are made, `waiting` shows how many wait because the bucket is empty.
    pub(super) fn new(repeats: IntCounter, waiting: IntGauge) -> Self {
        RetryBudget {
            bucket: Mutex::new(Bucket { credit: CAPACITY, filled: Instant::now() }),
            turn: tokio::sync::Mutex::default(),
            earned: Notify::new(),
            repeats,
            waiting,
        }
    }

    /// Takes note of a fresh call.
    pub(super) fn earn(&self) {
        let mut bucket = self.lock();
        let before = bucket.credit;
        bucket.add(EARNED);
        if before < 1.0 && bucket.credit >= 1.0 {
            self.earned.notify_one();
        }
    }

    /// Waits until a repeat is paid for, first come, first served. Then [`made`](Self::made) or [`refund`](Self::refund) is
    /// to follow; a caller that goes away in between has made it, as far as can be known.
    pub(super) async fn spend(&self) {
        // Nobody may overtake those who wait.
        let at_once = self.turn.try_lock().is_ok_and(|_turn| self.lock().take(Instant::now()).is_ok());
        if !at_once {
            let _waiting = Waiting::new(&self.waiting);
            let _turn = self.turn.lock().await;
            while let Err(wait) = { self.lock().take(Instant::now()) } {
                tokio::select! {
                    () = sleep(wait) => {}
                    () = self.earned.notified() => {}
                }
            }
        }
    }

    /// Takes note of a repeat that was made.
    pub(super) fn made(&self) {
        self.repeats.inc();
    }

    /// Gives back what was spent on a repeat that was not made.
    pub(super) fn refund(&self) {
        self.lock().add(1.0);
        self.earned.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        // Nothing in here panics half-way through a change.
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Shows a repeat as waiting while it lives, dropped futures included.
struct Waiting<'a>(&'a IntGauge);

impl<'a> Waiting<'a> {
    fn new(gauge: &'a IntGauge) -> Self {
        gauge.inc();
        Waiting(gauge)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use futures::poll;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn full() -> RetryBudget {
        RetryBudget::new(
            IntCounter::new("repeats", "repeats").expect("a name"),
            IntGauge::new("waiting", "waiting").expect("a name"),
        )
    }

    async fn empty() -> RetryBudget {
        let budget = full();
        let start = Instant::now();
        for _ in 0..100 {
            budget.spend().await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO, "a full bucket has a hundred");
        budget
    }

    #[tokio::test(start_paused = true)]
    async fn without_fresh_calls_there_are_ten_a_second() {
        let budget = empty().await;
        let start = Instant::now();
        for _ in 0..50 {
            budget.spend().await;
        }
        let took = start.elapsed();
        assert!(took >= MS * 4990 && took < MS * 5100, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn five_fresh_calls_pay_for_a_repeat_at_once() {
        let budget = empty().await;
        let mut repeat = std::pin::pin!(budget.spend());
        for _ in 0..5 {
            assert!(poll!(repeat.as_mut()).is_pending());
            assert_eq!(budget.waiting.get(), 1);
            budget.earn();
        }
        assert!(poll!(repeat.as_mut()).is_ready());
        assert_eq!(budget.waiting.get(), 0);
        let mut next = std::pin::pin!(budget.spend());
        assert!(poll!(next.as_mut()).is_pending(), "they paid for one");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_kept_is_bounded() {
        let budget = full();
        tokio::time::advance(Duration::from_secs(3600)).await;
        for _ in 0..10_000 {
            budget.earn();
        }
        budget.refund();
        for _ in 0..100 {
            budget.spend().await;
        }
        assert!(poll!(std::pin::pin!(budget.spend())).is_pending());
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_to_wait_is_the_first_to_go_and_who_goes_away_holds_nobody_up() {
        let budget = empty().await;
        let mut first = Box::pin(budget.spend());
        let mut gone = Box::pin(budget.spend());
        let mut second = Box::pin(budget.spend());
        assert!(poll!(first.as_mut()).is_pending());
        assert!(poll!(gone.as_mut()).is_pending());
        assert!(poll!(second.as_mut()).is_pending());
        drop(gone);
        budget.refund();
        let mut third = Box::pin(budget.spend());
        assert!(poll!(third.as_mut()).is_pending(), "there is credit, and others came before");
        assert!(poll!(second.as_mut()).is_pending());
        assert!(poll!(first.as_mut()).is_ready());
        let start = Instant::now();
        second.await;
        third.await;
        assert!(start.elapsed() >= MS * 195 && start.elapsed() < MS * 250, "{:?}", start.elapsed());
        assert_eq!(budget.waiting.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn over_time_repeats_are_a_fifth_of_the_fresh_calls_and_the_floor() {
        let budget = full();
        let start = Instant::now();
        // As many as are paid for, beside 100 fresh calls a second.
        let repeats = async {
            loop {
                budget.spend().await;
                budget.made();
            }
        };
        let fresh = async {
            for _ in 0..100 {
                for _ in 0..100 {
                    budget.earn();
                    tokio::time::sleep(MS * 10).await;
                }
                let most = 100.0 + 10.0 * start.elapsed().as_secs_f64() + 0.2 * 100.0 * start.elapsed().as_secs_f64();
                let repeats = budget.repeats.get() as f64;
                assert!(repeats <= most + 1.0 && repeats >= most - 5.0, "{repeats} of {most}");
            }
        };
        tokio::select! {
            () = repeats => unreachable!(),
            () = fresh => {}
        }
    }
}
