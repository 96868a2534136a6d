//! What the partner can bear: calls in flight, sends a second, and the pauses it asks for. One budget for the process.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus::IntGauge;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::{Instant, Sleep, sleep_until};

use super::window::Window;
use crate::task::{For, wait};

/// How much lateness of its own the pace makes up for, by sends closer together. A timer of tokio wakes up to a
/// millisecond late, a busy runtime some more.
const TOLERANCE: Duration = Duration::from_millis(12);
/// Calls that prepare their send at once, at most: each opens a connection if none is idle. A thousand handshakes in one
/// instant would stall the partner, and its count of requests with it.
const MAX_PREPARING: usize = 100;
/// With a pace, a tenth of a second's sends prepare: enough to hide the opening of connections, and no more of them are
/// opened than the pace needs.
const PREPARING_SHARE: usize = 10;
/// Left unused in each second, for what happens between this side's write and the partner's count: a partner that is busy
/// for a moment finds the calls of that moment in a bunch.
const SLACK: Duration = Duration::from_millis(28);

/// A place among the calls in flight. Dropping it gives the place back.
#[must_use = "the place is given back when the permit is dropped"]
pub struct Permit {
    _place: OwnedSemaphorePermit,
}

/// The process-wide budget.
pub(super) struct Budget {
    places: Arc<Semaphore>,
    /// How many of those with a place may be out.
    pub(super) window: Window,
    preparing: Semaphore,
    /// `None` without a limit of sends a second.
    pace: Option<Pace>,
    /// Nobody sends before this, in nanoseconds after `origin`; only ever moves on.
    not_before: AtomicU64,
    origin: Instant,
}

impl Budget {
    /// At most `in_flight` permits at once; at most `rate_per_second` grants in any second, if there is such a limit.
    /// `window` shows how many calls may be out.
    pub(super) fn new(in_flight: usize, rate_per_second: Option<u32>, window: IntGauge) -> Self {
        let origin = Instant::now();
        let preparing = rate_per_second.map_or(MAX_PREPARING, |rate| rate as usize / PREPARING_SHARE);
        Budget {
            places: Arc::new(Semaphore::new(in_flight)),
            window: Window::new(in_flight, window),
            preparing: Semaphore::new(preparing.clamp(2, MAX_PREPARING)),
            pace: rate_per_second.map(Pace::new),
            not_before: AtomicU64::new(0),
            origin,
        }
    }

    /// Waits for a place among the calls in flight, first come, first served.
    pub(super) async fn permit(&self) -> Permit {
        let place = wait(For::Permit, Arc::clone(&self.places).acquire_owned()).await;
        Permit { _place: place.expect("the semaphore is never closed") }
    }

    /// Waits to be among those that prepare their send, first come, first served, and for the end of a pause: a connection
    /// that is opened during one may be closed for its idleness before the pause ends. To be held until the send.
    pub(super) async fn prepare(&self) -> SemaphorePermit<'_> {
        let preparing = wait(For::Permit, self.preparing.acquire()).await.expect("the semaphore is never closed");
        self.pause_over().await;
        preparing
    }

    /// Waits for the moment of one send, first come, first served. The send must be made in the poll that returns.
    pub(super) async fn grant(&self) {
        let granted = async {
            match &self.pace {
                Some(pace) => pace.grant(self).await,
                None => self.pause_over().await,
            }
        };
        wait(For::Pacing, granted).await;
    }

    async fn pause_over(&self) {
        while let Some(end) = self.pause_end() {
            sleep_until(end).await;
        }
    }

    /// Holds everyone's sends back for `wait` from now, if it is not zero. Returns whether this begins a pause; a pause
    /// that is under way becomes longer, never shorter.
    pub(super) fn pause(&self, wait: Duration) -> bool {
        if wait.is_zero() {
            return false;
        }
        let now = self.origin.elapsed();
        let end = u64::try_from((now + wait).as_nanos()).unwrap_or(u64::MAX);
        let before = self.not_before.fetch_max(end, Ordering::Relaxed);
        u128::from(before) <= now.as_nanos()
    }

    /// The end of the pause under way, if there is one.
    pub(super) fn pause_end(&self) -> Option<Instant> {
        let end = self.origin + Duration::from_nanos(self.not_before.load(Ordering::Relaxed));
        (end > Instant::now()).then_some(end)
    }
}

/// The generic cell rate algorithm, with a queue in front of it.
///
/// R sends are spread over one second plus [`TOLERANCE`] plus [`SLACK`]. As only [`TOLERANCE`] of lateness is ever made
/// up, any second sees at most R sends, however the runtime stalls: of n sends the last comes no earlier than
/// (n - 1) x interval - tolerance after the first. Time in which nobody waited earns nothing, so every burst of callers
/// starts evenly.
struct Pace {
    interval: Duration,
    /// Held by whoever is next. The lock is fair, which makes it the queue; those behind the first have no timer.
    turn: Mutex<Turn>,
}

struct Turn {
    /// The next send is due.
    due: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Pace {
    fn new(rate_per_second: u32) -> Self {
        let spread = Duration::from_secs(1) + TOLERANCE + SLACK;
        let now = Instant::now();
        Pace {
            interval: spread / rate_per_second,
            turn: Mutex::new(Turn { due: now, timer: Box::pin(sleep_until(now)) }),
        }
    }

    async fn grant(&self, budget: &Budget) {
        let (mut turn, queued) = match self.turn.try_lock() {
            Ok(turn) => (turn, false),
            Err(_) => (self.turn.lock().await, true),
        };
        if !queued {
            turn.due = turn.due.max(Instant::now());
        }
        let now = loop {
            if let Some(end) = budget.pause_end() {
                turn.due = turn.due.max(end);
            }
            let (now, due) = (Instant::now(), turn.due);
            if now >= due {
                break now;
            }
            turn.timer.as_mut().reset(due);
            turn.timer.as_mut().await;
        };
        turn.due = turn.due.max(now.checked_sub(TOLERANCE).unwrap_or(now)) + self.interval;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(in_flight: usize, rate_per_second: Option<u32>) -> Budget {
        Budget::new(in_flight, rate_per_second, IntGauge::new("window", "window").expect("a name"))
    }

    /// The most instants within any second, its end excluded.
    fn most_in_a_second(sends: &[Instant]) -> usize {
        let mut most = 0;
        let mut first = 0;
        for (last, send) in sends.iter().enumerate() {
            while *send - sends[first] >= Duration::from_secs(1) {
                first += 1;
            }
            most = most.max(last - first + 1);
        }
        most
    }

    /// The instants of `count` grants to this many callers at once; each caller does `work` with its grants' numbers.
    async fn record(rate: u32, callers: usize, count: usize, work: impl Fn(usize)) -> Vec<Instant> {
        let budget = budget(callers, Some(rate));
        let asked = std::cell::Cell::new(0);
        let sends = std::cell::RefCell::new(Vec::new());
        let callers = (0..callers).map(|_| async {
            while asked.get() < count {
                asked.set(asked.get() + 1);
                budget.grant().await;
                sends.borrow_mut().push(Instant::now());
                work(sends.borrow().len());
            }
        });
        futures::future::join_all(callers).await;
        sends.into_inner()
    }

    // By a clock that stands still while anything else goes on: what a busy machine adds is not the pace.
    #[tokio::test(start_paused = true)]
    async fn a_slow_pace_is_even_from_the_first_send() {
        for (rate, count) in [(5, 7), (49, 60)] {
            let sends = record(rate, 3, count, |_| ()).await;
            let most = most_in_a_second(&sends);
            assert!(most <= rate as usize, "{most} in a second that allows {rate}");
            let mean = (sends[count - 1] - sends[0]) / (count as u32 - 1);
            let ideal = Duration::from_secs(1) / rate;
            assert!(mean <= ideal.mul_f64(1.05), "{rate}: one send in {mean:?}");
        }
    }

    #[tokio::test]
    async fn no_second_sees_more_sends_than_the_rate_though_the_runtime_stalls() {
        const STALL: Duration = Duration::from_millis(60);
        let stall = |number: usize| {
            if number.is_multiple_of(400) {
                std::thread::sleep(STALL);
            }
        };
        let sends = record(1000, 1000, 2500, stall).await;
        let most = most_in_a_second(&sends);
        assert!(most <= 1000, "{most}");
        // No second has more than three stalls, and each costs no more than what is not made up.
        let lost = (STALL - TOLERANCE).as_secs_f64() * 3.0;
        let least = 1000.0 * (1.0 - lost) / (Duration::from_secs(1) + TOLERANCE + SLACK).as_secs_f64();
        assert!(most as f64 > least, "only {most} in the best second, {least} are possible");
    }

    #[tokio::test]
    async fn idle_time_earns_no_burst() {
        let budget = budget(100, Some(100));
        tokio::time::sleep(Duration::from_millis(200)).await;
        let start = Instant::now();
        futures::future::join_all((0..5).map(|_| budget.grant())).await;
        assert!(start.elapsed() >= Duration::from_millis(40), "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn a_pause_holds_everyone_and_ends_evenly() {
        for rate in [Some(100), None] {
            let budget = budget(10, rate);
            let start = Instant::now();
            assert!(budget.pause(Duration::from_millis(300)));
            assert!(!budget.pause(Duration::from_millis(100)), "a pause was under way");
            futures::future::join_all((0..10).map(|_| budget.grant())).await;
            // Ten sends at this rate take nine intervals.
            let end = Duration::from_millis(if rate.is_some() { 392 } else { 300 });
            let took = start.elapsed();
            assert!(took >= end && took < end + Duration::from_millis(60), "{rate:?}: {took:?}");
        }
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_holds_nobody_up() {
        let budget = budget(1, Some(10));
        budget.grant().await;
        let permit = budget.permit().await;
        {
            // Both are first in their queue, and then gone.
            let mut grant = std::pin::pin!(budget.grant());
            let mut next_permit = std::pin::pin!(budget.permit());
            assert!(futures::poll!(grant.as_mut()).is_pending());
            assert!(futures::poll!(next_permit.as_mut()).is_pending());
        }
        drop(permit);
        let _permit = budget.permit().await;
        tokio::time::timeout(Duration::from_millis(200), budget.grant()).await.expect("the turn is free");
    }
}
