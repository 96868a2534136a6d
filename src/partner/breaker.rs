//! Suspends all calls while the partner as a whole is at fault, and finds out when it no longer is.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use prometheus::IntGauge;
use tokio::time::{Instant, sleep_until};

use crate::config::Backoff;

/// Tries that are judged together, those started one after the other; the breaker opens once half of them failed. So many
/// that a partner which fails four in ten does not open it by chance.
const COHORT: u32 = 200;
/// Failures in a row that open it too: where few calls are in flight, a listing would use up its tries before half of a
/// cohort had failed.
const FAILED_IN_A_ROW: u32 = 10;
/// Connections refused in a row that do: a failure to connect says nothing of any listing.
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
    /// Once the try has begun while the breaker was closed.
    started: Option<Started>,
    /// Held by the one call that probes an open breaker.
    probe: Option<tokio::sync::MutexGuard<'a, ()>>,
}

impl Pass<'_> {
    /// Whether the try probes an open breaker.
    pub(super) fn is_probe(&self) -> bool {
        self.probe.is_some()
    }
}

/// A try that has begun. It counts as out until it is dropped, by whomever.
struct Started {
    cohort: Arc<AtomicU32>,
    _out: Arc<()>,
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
    Closed(Tries),
    Open { since: SystemTime, opened: Instant, reason: String, probes: u32, next_probe: Instant },
}

/// The tries since the breaker closed.
///
/// Failures may come at once and good answers after a second, so that results in the order of their arrival show a healthy
/// partner as one that only fails. Therefore a try that is still out counts as one that works.
#[derive(Default)]
struct Tries {
    /// Of the cohort that is being started, its failures. Each try keeps the counter of its own.
    cohort: Arc<AtomicU32>,
    /// Tries in that cohort so far.
    started: u32,
    /// As many clones as tries are out.
    out: Arc<()>,
    failed_in_a_row: u32,
    refused_in_a_row: u32,
}

impl Tries {
    fn start(&mut self) -> Started {
        if self.started == COHORT {
            self.started = 0;
            self.cohort = Arc::default();
        }
        self.started += 1;
        Started { cohort: Arc::clone(&self.cohort), _out: Arc::clone(&self.out) }
    }

    fn worked(&mut self) {
        self.failed_in_a_row = 0;
        self.refused_in_a_row = 0;
    }

    /// Takes note of a failure. Returns why the breaker must open, if it must.
    fn failed(&mut self, try_: Option<&Started>, sign: Sign, cause: &dyn fmt::Display) -> Option<String> {
        self.failed_in_a_row += 1;
        self.refused_in_a_row = if sign == Sign::Unconnected { self.refused_in_a_row + 1 } else { 0 };
        let failed = try_.map_or(0, |started| started.cohort.fetch_add(1, Ordering::Relaxed) + 1);
        // Without the tries' own counter and without this one, which is no longer out.
        let out = Arc::strong_count(&self.out) - 1 - usize::from(try_.is_some());
        // A row says something only if it is long against what is out, some of which may still bring good answers.
        let is_long = |row: u32, limit: u32| row >= limit && row as usize >= 2 * out;
        if sign == Sign::Fault || is_long(self.refused_in_a_row, REFUSED_CONNECTIONS) {
            Some(cause.to_string())
        } else if is_long(self.failed_in_a_row, FAILED_IN_A_ROW) {
            Some(format!("{} tries in a row failed, the last of them: {cause}", self.failed_in_a_row))
        } else if failed >= COHORT / 2 {
            Some(format!("half of {COHORT} tries failed, the last of them: {cause}"))
        } else {
            None
        }
    }
}

impl Breaker {
    /// A closed one; `gauge` shows 1 while it is open.
    pub(super) fn new(gauge: IntGauge) -> Self {
        gauge.set(0);
        let inner = Inner { state: State::Closed(Tries::default()), generation: 0 };
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
                    State::Closed(_) => return Pass { generation: inner.generation, started: None, probe: None },
                    State::Open { next_probe, .. } if next_probe <= Instant::now() => {
                        return Pass { generation: inner.generation, started: None, probe: Some(probe) };
                    }
                    State::Open { next_probe, .. } => next_probe,
                }
            };
            sleep_until(next_probe).await;
        }
    }

    /// Begins the try that the pass is for, unless it has begun. Returns whether the breaker is as it was when it gave the
    /// pass.
    pub(super) fn start(&self, pass: &mut Pass<'_>) -> bool {
        let mut inner = self.lock();
        if inner.generation != pass.generation {
            return false;
        }
        if let State::Closed(tries) = &mut inner.state {
            pass.started.get_or_insert_with(|| tries.start());
        }
        true
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
            State::Closed(tries) => {
                let reason = match sign {
                    Sign::Working => {
                        tries.worked();
                        None
                    }
                    Sign::Failed | Sign::Unconnected | Sign::Fault => tries.failed(pass.started.as_ref(), sign, cause),
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
            State::Closed(_) => BreakerState::Closed,
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
        inner.state = State::Closed(Tries::default());
        inner.generation += 1;
        self.gauge.set(0);
    }

    fn closed_pass(&self) -> Option<Pass<'static>> {
        let inner = self.lock();
        let pass = Pass { generation: inner.generation, started: None, probe: None };
        matches!(inner.state, State::Closed(_)).then_some(pass)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics half-way through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// A pass whose try has begun.
    async fn started(breaker: &Breaker) -> Pass<'_> {
        let mut pass = breaker.admit().await;
        assert!(breaker.start(&mut pass), "it is closed");
        pass
    }

    fn is_closed(breaker: &Breaker) -> bool {
        breaker.state() == BreakerState::Closed
    }

    #[tokio::test]
    async fn failures_that_come_before_good_answers_do_not_open_it() {
        // Of a hundred tries this many fail at once; the others work and take as long as a thousand other tries.
        for (failures, in_flight) in [(6, 1000), (40, 1000), (40, 30), (6, 6)] {
            let breaker = breaker();
            let mut out = std::collections::VecDeque::new();
            for number in 0..10_000 {
                let pass = started(&breaker).await;
                // 37 and 100 have no common divisor: the failures are spread out.
                if number * 37 % 100 < failures {
                    breaker.record(&pass, Sign::Failed, &"partner answered 503");
                    assert!(is_closed(&breaker), "{failures} % at try {number}, {} out", out.len());
                    continue;
                }
                out.push_back(pass);
                if out.len() == in_flight {
                    breaker.record(&out.pop_front().expect("pushed"), Sign::Working, &"");
                }
            }
        }
    }

    #[tokio::test]
    async fn it_opens_soon_when_every_try_fails_however_many_are_in_flight() {
        for (in_flight, most) in [(1, 10), (3, 10), (6, 10), (1000, COHORT / 2)] {
            let breaker = breaker();
            // The partner was well before.
            for _ in 0..COHORT / 2 {
                breaker.record(&started(&breaker).await, Sign::Working, &"");
            }
            let mut out = std::collections::VecDeque::new();
            for _ in 0..in_flight {
                out.push_back(started(&breaker).await);
            }
            let mut failures = 0;
            while let Some(pass) = out.pop_front() {
                breaker.record(&pass, Sign::Failed, &"no whole answer from the partner within 10s");
                drop(pass);
                failures += 1;
                if !is_closed(&breaker) {
                    break;
                }
                // Tried again, or the next listing.
                out.push_back(started(&breaker).await);
            }
            // A cohort that began before the outage is judged with its good answers.
            assert!(failures <= most + COHORT / 2, "{in_flight} in flight: {failures}");
            assert!(in_flight > 6 || failures == most, "{in_flight} in flight: {failures}");
        }
    }

    #[tokio::test]
    async fn what_hangs_does_not_hide_that_all_else_fails() {
        let breaker = breaker();
        let mut hanging = Vec::new();
        for _ in 0..500 {
            hanging.push(started(&breaker).await);
        }
        let mut failures = 0;
        while is_closed(&breaker) {
            breaker.record(&started(&breaker).await, Sign::Failed, &"partner answered 500");
            failures += 1;
        }
        assert!(failures <= COHORT, "{failures}");
    }

    #[tokio::test]
    async fn a_try_that_was_given_up_is_no_longer_out() {
        let breaker = breaker();
        for _ in 0..100 {
            drop(started(&breaker).await);
        }
        for _ in 0..FAILED_IN_A_ROW {
            assert!(is_closed(&breaker));
            breaker.record(&started(&breaker).await, Sign::Failed, &"partner answered 500");
        }
        assert!(!is_closed(&breaker));
    }

    #[tokio::test]
    async fn it_opens_when_half_of_the_recent_tries_failed_and_not_before() {
        let breaker = breaker();
        for number in 1..=200 {
            let pass = started(&breaker).await;
            let sign = if number % 5 < 2 { Sign::Failed } else { Sign::Working };
            breaker.record(&pass, sign, &"partner answered 500");
        }
        assert_eq!(breaker.state(), BreakerState::Closed, "two in five failed");
        let mut failures = 0;
        while breaker.state() == BreakerState::Closed {
            let pass = started(&breaker).await;
            breaker.record(&pass, Sign::Failed, &"partner answered 500");
            failures += 1;
        }
        assert!((5..=25).contains(&failures), "{failures}");
    }
}
