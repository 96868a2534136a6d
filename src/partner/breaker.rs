//! Suspends all calls while the partner as a whole is at fault, and finds out when it no longer is.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use prometheus::IntGauge;
use tokio::time::{Instant, sleep_until};

use crate::config::Backoff;

/// The last tries that are looked at; the breaker opens once half of them failed.
const RECENT_TRIES: u32 = 50;
/// Connections refused in a row that open it too. A failure to connect says nothing of any listing, and where few calls
/// are in flight a listing would use up its tries before half of the recent ones had failed.
const REFUSED_CONNECTIONS: u32 = 5;
/// Between probes.
const PROBES: Backoff = Backoff { base: Duration::from_secs(1), cap: Duration::from_secs(60) };

/// Whether calls are made, for people and for the readiness of the service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BreakerState {
    /// Calls are made.
    Closed,
    /// All calls wait, except one at a time that probes.
    Open {
        /// When it opened.
        since: SystemTime,
        /// What opened it and what to do about it.
        reason: String,
    },
}

/// What a try says of the partner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sign {
    /// It works: it gave a valuation, or a verdict on the listing.
    Working,
    /// The try failed.
    Failed,
    /// No connection came about.
    Unconnected,
    /// It refuses us, whatever the listing.
    Fault,
}

/// The right to make one try.
pub(super) struct Pass<'a> {
    generation: u64,
    /// Held by the one call that probes an open breaker.
    _probe: Option<tokio::sync::MutexGuard<'a, ()>>,
}

/// The breaker.
pub(super) struct Breaker {
    inner: Mutex<Inner>,
    /// The queue for the probe, and while the breaker is open for everyone. The lock is fair: a probe that failed goes to
    /// the end of the queue, so that one bad listing cannot keep the breaker open by being the only one to probe.
    probe: tokio::sync::Mutex<()>,
    gauge: IntGauge,
}

struct Inner {
    state: State,
    /// Grows when the breaker opens and when it closes. A try counts only in the generation that admitted it: what was
    /// sent before an outage became known is charged to nobody and cannot open the breaker again.
    generation: u64,
}

enum State {
    Closed { recent: Recent, refused: u32 },
    Open { since: SystemTime, opened: Instant, reason: String, probes: u32, next_probe: Instant },
}

/// The results of the last tries, a bit each; 1 is a failure.
#[derive(Default)]
struct Recent {
    bits: u64,
    count: u32,
}

impl Recent {
    fn push(&mut self, failed: bool) {
        self.bits = (self.bits << 1 | u64::from(failed)) & ((1 << RECENT_TRIES) - 1);
        self.count = (self.count + 1).min(RECENT_TRIES);
    }

    fn mostly_failed(&self) -> bool {
        self.count == RECENT_TRIES && self.bits.count_ones() >= RECENT_TRIES / 2
    }
}

impl Breaker {
    /// A closed one; `gauge` shows 1 while it is open.
    pub(super) fn new(gauge: IntGauge) -> Self {
        gauge.set(0);
        let inner = Inner { state: State::closed(), generation: 0 };
        Breaker { inner: Mutex::new(inner), probe: tokio::sync::Mutex::new(()), gauge }
    }

    /// Waits until a try may be made: at once while the breaker is closed.
    pub(super) async fn admit(&self) -> Pass<'_> {
        if let Some(pass) = self.closed_pass() {
            return pass;
        }
        let probe = self.probe.lock().await;
        loop {
            let next_probe = {
                let inner = self.lock();
                match inner.state {
                    State::Closed { .. } => return Pass { generation: inner.generation, _probe: None },
                    State::Open { next_probe, .. } if next_probe <= Instant::now() => {
                        return Pass { generation: inner.generation, _probe: Some(probe) };
                    }
                    State::Open { next_probe, .. } => next_probe,
                }
            };
            sleep_until(next_probe).await;
        }
    }

    /// Whether the breaker is as it was when it gave this pass.
    pub(super) fn honours(&self, pass: &Pass<'_>) -> bool {
        self.lock().generation == pass.generation
    }

    /// Takes note of a try. `cause` is what happened and what to do about it; it is read if the breaker opens. Returns
    /// whether it is a failure to be charged to its listing: only if the breaker was closed from the beginning of the try
    /// to its end. The failure that opens it is charged, a fault never.
    pub(super) fn record(&self, pass: &Pass<'_>, sign: Sign, cause: &dyn fmt::Display) -> bool {
        let mut inner = self.lock();
        if inner.generation != pass.generation {
            return false;
        }
        match &mut inner.state {
            State::Closed { recent, refused } => {
                recent.push(sign != Sign::Working);
                *refused = if sign == Sign::Unconnected { *refused + 1 } else { 0 };
                let reason = match sign {
                    Sign::Working => None,
                    Sign::Fault => Some(cause.to_string()),
                    _ if *refused >= REFUSED_CONNECTIONS => Some(cause.to_string()),
                    _ if recent.mostly_failed() => {
                        Some(format!("half of the last {RECENT_TRIES} tries failed, the last of them: {cause}"))
                    }
                    _ => None,
                };
                if let Some(reason) = reason {
                    self.open(inner, reason);
                }
                matches!(sign, Sign::Failed | Sign::Unconnected)
            }
            State::Open { probes, next_probe, .. } => {
                if sign == Sign::Working {
                    self.close(inner);
                } else {
                    *probes += 1;
                    *next_probe = Instant::now() + probe_wait(*probes);
                }
                false
            }
        }
    }

    /// For people.
    pub(super) fn state(&self) -> BreakerState {
        match &self.lock().state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { since, reason, .. } => BreakerState::Open { since: *since, reason: reason.clone() },
        }
    }

    fn open(&self, mut inner: MutexGuard<'_, Inner>, reason: String) {
        let opened = Instant::now();
        tracing::error!(reason, "the partner's breaker opened, calls are suspended and no listing fails: {reason}");
        let next_probe = opened + probe_wait(1);
        inner.state = State::Open { since: SystemTime::now(), opened, reason, probes: 1, next_probe };
        inner.generation += 1;
        self.gauge.set(1);
    }

    fn close(&self, mut inner: MutexGuard<'_, Inner>) {
        if let State::Open { opened, .. } = inner.state {
            let open_seconds = opened.elapsed().as_secs_f64();
            tracing::info!(open_seconds, "the partner's breaker closed, calls go on");
        }
        inner.state = State::closed();
        inner.generation += 1;
        self.gauge.set(0);
    }

    fn closed_pass(&self) -> Option<Pass<'static>> {
        let inner = self.lock();
        matches!(inner.state, State::Closed { .. }).then_some(Pass { generation: inner.generation, _probe: None })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics half-way through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn closed() -> State {
        State::Closed { recent: Recent::default(), refused: 0 }
    }
}

/// Between half of the ceiling and all of it: never at once, and replicas drift apart.
fn probe_wait(probes: u32) -> Duration {
    PROBES.ceiling(probes).mul_f64(0.5 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use futures::poll;

    use super::*;

    fn breaker() -> Breaker {
        Breaker::new(IntGauge::new("open", "open").expect("a name"))
    }

    #[tokio::test]
    async fn what_was_sent_before_it_opened_is_charged_to_nobody() {
        let breaker = breaker();
        let (first, late, later) = (breaker.admit().await, breaker.admit().await, breaker.admit().await);
        assert!(!breaker.record(&first, Sign::Fault, &"partner answered 403"), "a fault is no listing's");
        assert!(!breaker.record(&late, Sign::Failed, &"late"));
        assert!(!breaker.honours(&late));
        let probe = breaker.admit().await;
        assert!(!breaker.record(&probe, Sign::Working, &""));
        assert_eq!(breaker.state(), BreakerState::Closed);
        assert!(!breaker.record(&later, Sign::Fault, &"later still"));
        assert_eq!(breaker.state(), BreakerState::Closed, "old news");
        let fresh = breaker.admit().await;
        assert!(breaker.record(&fresh, Sign::Failed, &"now"));
    }

    #[tokio::test]
    async fn one_at_a_time_probes_and_then_it_is_the_next_ones_turn() {
        let breaker = breaker();
        let pass = breaker.admit().await;
        breaker.record(&pass, Sign::Fault, &"partner answered 403");
        let opened = Instant::now();
        let mut first = std::pin::pin!(breaker.admit());
        let mut second = std::pin::pin!(breaker.admit());
        assert!(poll!(first.as_mut()).is_pending());
        assert!(poll!(second.as_mut()).is_pending());
        let probe = first.await;
        assert!(opened.elapsed() >= PROBES.base / 2);
        assert!(poll!(second.as_mut()).is_pending(), "one is probing");
        breaker.record(&probe, Sign::Failed, &"partner answered 500");
        drop(probe);
        let mut third = std::pin::pin!(breaker.admit());
        assert!(poll!(third.as_mut()).is_pending());
        let failed_at = Instant::now();
        let probe = second.await;
        assert!(failed_at.elapsed() >= PROBES.base, "the second wait is twice the first");
        breaker.record(&probe, Sign::Working, &"");
        drop(probe);
        assert!(poll!(third.as_mut()).is_ready());
    }

    #[tokio::test]
    async fn it_opens_when_half_of_the_recent_tries_failed_and_not_before() {
        let breaker = breaker();
        for number in 1..=200 {
            let pass = breaker.admit().await;
            let sign = if number % 5 < 2 { Sign::Failed } else { Sign::Working };
            breaker.record(&pass, sign, &"partner answered 500");
        }
        assert_eq!(breaker.state(), BreakerState::Closed, "two in five failed");
        let mut failures = 0;
        while breaker.state() == BreakerState::Closed {
            let pass = breaker.admit().await;
            breaker.record(&pass, Sign::Failed, &"partner answered 500");
            failures += 1;
        }
        assert!((5..=25).contains(&failures), "{failures}");
    }
}
