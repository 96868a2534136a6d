//! How often profiles may be asked for.
//!
//! A token bucket for the whole listener. It is filled for fifty requests, so that any fifty in a minute pass, however bunched: a
//! dashboard that takes every profile, somebody at work with `go tool pprof`, and a script beside them. What goes on asking gets one
//! a second. It is against loops that went wrong; that one profile does not hurt is for the places below it to see to.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Requests that may come at once.
const BURST: u32 = 50;

/// One more may come each time that this has passed.
const REFILL: Duration = Duration::from_secs(1);

/// The bucket, as the time at which it will be full: each request moves it by one refill.
pub(super) struct RateLimit {
    begin: Instant,
    full_at: Mutex<Duration>,
}

impl RateLimit {
    /// A full one.
    pub fn new() -> Self {
        RateLimit { begin: Instant::now(), full_at: Mutex::new(Duration::ZERO) }
    }

    /// Takes a token; else tells how long it takes until there is one.
    pub fn take(&self) -> Result<(), Duration> {
        self.take_at(self.begin.elapsed())
    }

    fn take_at(&self, now: Duration) -> Result<(), Duration> {
        let mut full_at = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
        let next = (*full_at).max(now) + REFILL;
        match next.checked_sub(now + REFILL * BURST) {
            None | Some(Duration::ZERO) => {
                *full_at = next;
                Ok(())
            }
            Some(missing) => Err(missing),
        }
    }
}

/// What a request is told that comes too soon.
pub(super) fn told(wait: Duration) -> (u64, String) {
    let seconds = wait.as_millis().div_ceil(1000) as u64;
    (
        seconds,
        format!(
            "too many profiles were asked for: at most {BURST} at once, then one a second; ask again in {seconds} s, and less often"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_burst_passes_and_then_one_for_each_refill() {
        let limit = RateLimit::new();
        let pass = |now: Duration| (0..200).take_while(|_| limit.take_at(now).is_ok()).count();
        assert_eq!(pass(SECOND), 50);
        assert_eq!(limit.take_at(SECOND), Err(SECOND));
        assert_eq!(limit.take_at(SECOND + SECOND / 4), Err(SECOND * 3 / 4));
        // What was refused cost nothing.
        assert_eq!(pass(SECOND * 2), 1);
        assert_eq!(pass(SECOND * 12), 10);
        // It holds no more than a burst, however long nobody asks.
        assert_eq!(pass(SECOND * 3600), 50);
    }

    #[test]
    fn fifty_a_minute_pass_for_ever_however_they_come() {
        let limit = RateLimit::new();
        for minute in 0..100 {
            for request in 0..50 {
                // All at once, or spread.
                let within = if minute % 2 == 0 { Duration::ZERO } else { SECOND * request };
                assert_eq!(limit.take_at(SECOND * 60 * minute + within), Ok(()), "{minute}, {request}");
            }
        }
    }

    #[test]
    fn the_wait_is_told_in_whole_seconds() {
        assert_eq!(told(Duration::from_millis(1)).0, 1);
        assert_eq!(told(SECOND).0, 1);
        let (seconds, text) = told(Duration::from_millis(1001));
        assert!(seconds == 2 && text.contains("ask again in 2 s"), "{text}");
    }
}
