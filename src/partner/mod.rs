//! The partner: another team's HTTP API that values one listing a call.
//!
//! A caller waits for a [`Permit`], makes the future of a [`Partner::valuation`] and gets a [`Verdict`]. All that can go
//! wrong on the way is handled inside:
//!
//! - `budget`: the partner's limits, calls in flight and sends a second, and the pauses it asks for;
//! - `window`: how many calls may be out, fewer than allowed while the partner shows overload;
//! - `breaker`: suspends everyone while the partner as a whole is at fault;
//! - `retry`: what an answer means, and how often a listing is tried; `retry_budget` bounds the repeats of all of them;
//! - `client`: one try; `connection` and `credential` are what it needs, `http1` and `wire` what it speaks.
//!
//! One [`Partner`] serves all events of the process, because the limits are the process's. A listing keeps its permit
//! while it waits to be tried again: permits bound how many listings are held in memory, and a partner that fails is
//! called less.

mod breaker;
mod budget;
mod client;
mod connection;
mod credential;
#[cfg(fuzzing)]
pub mod fuzzing;
mod http1;
mod retry;
mod retry_budget;
mod window;
mod wire;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use http::StatusCode;

pub use breaker::BreakerState;
pub use budget::Permit;
pub use wire::{Request, RunKey};

use breaker::{Breaker, Sign};
use budget::Budget;
use client::{Client, Terms};
use retry::{Failure, Outcome, Patience};
use retry_budget::RetryBudget;

use crate::config;
use crate::fault;
use crate::metrics::Metrics;
use crate::task::{For, wait};

/// The most of a [`Verdict::Failed`]'s reason, in bytes.
const MAX_REASON_BYTES: usize = 200;

/// The partner's client, one for the process. Cheap to clone.
#[derive(Clone)]
pub struct Partner {
    shared: Arc<Shared>,
}

struct Shared {
    settings: config::Partner,
    budget: Budget,
    breaker: Breaker,
    retry_budget: RetryBudget,
    client: Client,
}

/// How a listing ended: in one of two terminal states, or not yet.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// The partner valued it.
    Valued {
        /// In US cents, never negative.
        valuation_cents: i64,
        /// From 0 to 1.
        confidence: f64,
    },
    /// It has no valuation and gets none in this run.
    Failed {
        /// Why, for people; at most 200 bytes.
        reason: String,
    },
    /// Its run was closed before the next try was sent ([`RunKey::close`]): nothing is known of it.
    NotSent,
}

impl Partner {
    /// Connects to nothing yet. An error is about the settings: a credential or certificates that cannot be read.
    pub fn new(config: &config::Partner, metrics: Arc<Metrics>) -> anyhow::Result<Partner> {
        let shared = Shared {
            settings: config.clone(),
            budget: Budget::new(config.in_flight, config.rate_per_second, metrics.partner_in_flight_limit.clone()),
            breaker: Breaker::new(metrics.partner_breaker_open.clone()),
            retry_budget: RetryBudget::new(metrics.partner_repeats.clone(), metrics.partner_repeats_waiting.clone()),
            client: Client::new(config, &metrics)?,
        };
        Ok(Partner { shared: Arc::new(shared) })
    }

    /// Waits for a place among the calls in flight, first come, first served. To keep memory bounded, get the permit
    /// before anything is made for the call.
    pub async fn permit(&self) -> Permit {
        self.shared.budget.permit().await
    }

    /// The partner's verdict on one listing. Tries, backoff, limits and the breaker are inside; each try carries the same
    /// idempotency key.
    ///
    /// It takes as long as it takes: while the partner as a whole is at fault it waits, and no listing fails. Drop the
    /// future to give up; a call that is under way then loses its connection, and the permit is free. A future that is
    /// kept must be polled, since it may be the one whose turn it is.
    pub async fn valuation(&self, permit: Permit, run: &RunKey, request: Request) -> Verdict {
        // Held to the end, backoff included.
        let _permit = permit;
        let Shared { settings, budget, breaker, retry_budget, client } = &*self.shared;
        let mut patience = Patience::new(settings);
        let mut tried = false;
        let mut is_after_stale = false;
        loop {
            let Some(mut pass) = run.while_open(wait(For::Partner, breaker.admit())).await else {
                return Verdict::NotSent;
            };
            // A probe is free: there is one at a time, and all else waits for it.
            let repeat = tried && !pass.is_probe();
            // Boxed: repeats are rare, and the future of every call would have room for this wait.
            if repeat && Box::pin(run.while_open(retry_budget.spend())).await.is_none() {
                return Verdict::NotSent;
            }
            // What was kept through an outage says little of its end.
            let only_fresh = is_after_stale || pass.is_probe();
            let terms = Terms { limit: patience.next_timeout(), only_fresh };
            let attempt = client.attempt(budget, breaker, &mut pass, run, &request, terms).await;
            match (repeat, &attempt.outcome) {
                (true, Outcome::Withdrawn) => retry_budget.refund(),
                (true, _) => retry_budget.made(),
                (false, outcome) if !tried && outcome.was_sent() => retry_budget.earn(),
                (false, _) => {}
            }
            if !matches!(attempt.outcome, Outcome::Withdrawn) {
                tried = true;
                is_after_stale = matches!(attempt.outcome, Outcome::Stale);
            }
            let failure = match attempt.outcome {
                Outcome::Valued(valuation) => {
                    breaker.record(&pass, Sign::Working, &"");
                    return Verdict::Valued {
                        valuation_cents: valuation.valuation_cents,
                        confidence: valuation.confidence,
                    };
                }
                Outcome::Refused(status) => {
                    breaker.record(&pass, Sign::Working, &"");
                    return Verdict::Failed { reason: format!("partner answered {}", status.as_u16()) };
                }
                // No listing's fault, and none of the partner's that a breaker would help against.
                Outcome::Withdrawn | Outcome::Stale => continue,
                Outcome::Fault(status) => {
                    breaker.record(&pass, Sign::Fault, &FaultAdvice(status));
                    continue;
                }
                Outcome::Failed(failure) => failure,
            };
            let sign = if matches!(failure, Failure::Connect(_)) { Sign::Unconnected } else { Sign::Failed };
            let charged = breaker.record(&pass, sign, &failure);
            // The probe is over, if it was one; the next may be somebody else's.
            drop(pass);
            self.pause_everyone(&failure, patience.tries() + 1);
            if !charged {
                continue;
            }
            match patience.charge(attempt.took) {
                Some(backoff) => {
                    if run.while_open(tokio::time::sleep(backoff)).await.is_none() {
                        return Verdict::NotSent;
                    }
                }
                None => return Verdict::Failed { reason: final_reason(&failure, patience.tries()) },
            }
        }
    }

    /// Whether calls are made, and if not, why.
    pub fn breaker_state(&self) -> BreakerState {
        self.shared.breaker.state()
    }

    /// Checks that calls can be made: the breaker is closed, and a connection to the partner can be opened, its name
    /// resolved and TLS set up. Sends nothing. The error says since when calls are suspended and why, or names the address
    /// and what went wrong.
    pub async fn check(&self) -> anyhow::Result<()> {
        if let BreakerState::Open { reason, .. } = self.breaker_state() {
            anyhow::bail!("calls are suspended: {reason}");
        }
        self.shared.client.reach().await
    }

    /// Honours what an answer asks of everyone: the pause of its `Retry-After`, and a backoff after a 429 without one.
    fn pause_everyone(&self, failure: &Failure, attempt: u32) {
        if fault::planted("retry-after-ignored") {
            return;
        }
        let wait = match failure {
            Failure::Status(_, Some(wait)) => *wait,
            Failure::Status(StatusCode::TOO_MANY_REQUESTS, None) => self.shared.settings.retry.wait(attempt),
            _ => return,
        };
        if self.shared.budget.pause(wait) {
            tracing::info!(pause_seconds = wait.as_secs_f64(), "the partner asked for a pause: {failure}");
        }
    }
}

/// Why a listing failed after its last try.
fn final_reason(failure: &Failure, tries: u32) -> String {
    let mut reason = failure.to_string();
    let suffix = format!(", tries: {tries}");
    reason.truncate(reason.floor_char_boundary(MAX_REASON_BYTES - suffix.len()));
    reason + &suffix
}

/// A status that is the fault of no listing, and where to look.
struct FaultAdvice(StatusCode);

impl fmt::Display for FaultAdvice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let advice = match self.0.as_u16() {
            401 | 403 | 407 => "check partner.credential_header and the content of partner.credential_file",
            300..=399 => "redirects are not followed, set partner.base_url to where the API is",
            405 => "check partner.base_url",
            _ => "ask the partner's team what changed",
        };
        write!(f, "partner answered {}; {advice}", self.0.as_u16())
    }
}
