//! What an answer means for its listing and for everyone, and how often a listing is tried.

use std::fmt;
use std::time::{Duration, SystemTime};

use http::StatusCode;
use time::OffsetDateTime;
use time::PrimitiveDateTime;
use time::macros::format_description;

use super::window::Overload;
use super::wire::Valuation;
use crate::config;

/// The longest pause that the partner can ask for.
pub(super) const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// What came of one try.
pub(super) enum Outcome {
    /// The partner's valuation.
    Valued(Valuation),
    /// A final answer: another try would bring the same.
    Refused(StatusCode),
    /// Worth another try.
    Failed(Failure),
    /// No listing's fault: whoever called would have been answered so.
    Fault(StatusCode),
    /// The partner closed a connection that had carried calls, before the first byte of an answer: it was idle, as far as can
    /// be known, and the call crossed with its end. The listing has no part in it, and the key makes it safe to send it again.
    Stale,
    /// Not sent, because the breaker opened or the run was closed while the call waited for its connection or its turn.
    Withdrawn,
}

impl Outcome {
    /// Whether the call reached the partner, as far as can be known.
    pub(super) fn was_sent(&self) -> bool {
        !matches!(self, Outcome::Withdrawn | Outcome::Failed(Failure::Connect(_)))
    }
}

/// Why a try brought no verdict.
pub(super) enum Failure {
    /// No connection could be opened.
    Connect(String),
    /// The whole answer did not come within this time.
    Timeout(Duration),
    /// An answer that makes no sense, or an end in the middle of one.
    Broken(String),
    /// An answer that invites another try, with the pause it asks of everyone.
    Status(StatusCode, Option<Duration>),
}

impl Failure {
    /// Whether it shows that the partner is called too much.
    pub(super) fn overload(&self) -> Option<Overload> {
        match self {
            Failure::Status(StatusCode::TOO_MANY_REQUESTS, _) => Some(Overload::Said),
            Failure::Status(StatusCode::SERVICE_UNAVAILABLE, _) | Failure::Timeout(_) => Some(Overload::Suspected),
            Failure::Status(..) | Failure::Connect(_) | Failure::Broken(_) => None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Connect(error) => f.write_str(error),
            Failure::Timeout(limit) => write!(f, "no whole answer from the partner within {limit:?}"),
            Failure::Broken(problem) => write!(f, "broken answer from the partner: {problem}"),
            Failure::Status(status, _) => write!(f, "partner answered {}", status.as_u16()),
        }
    }
}

/// What a status means, the body not yet looked at.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// The body holds the valuation.
    Answer,
    /// Final for the listing.
    Final,
    /// To be tried again.
    Retry,
    /// A fault of the whole run.
    Fault,
    /// A success that the contract does not know.
    Nonsense,
}

impl Class {
    /// The class of a status, by the partner's contract.
    pub(super) fn of(status: StatusCode) -> Class {
        match status.as_u16() {
            200 => Class::Answer,
            400 | 404 | 410 | 422 => Class::Final,
            408 | 409 | 425 | 429 => Class::Retry,
            300..=499 => Class::Fault,
            500..=599 => Class::Retry,
            _ => Class::Nonsense,
        }
    }
}

/// The wait asked for by a `Retry-After`: seconds or an HTTP date, at most [`MAX_RETRY_AFTER`]. `None` for what is
/// neither; the two obsolete forms of dates are not understood.
pub(super) fn parse_retry_after(value: &[u8], now: SystemTime) -> Option<Duration> {
    let text = std::str::from_utf8(value).ok()?;
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // A number too large for the type is larger than the cap as well.
        let seconds = text.parse().unwrap_or(u64::MAX);
        return Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
    }
    let format =
        format_description!("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT");
    let date = PrimitiveDateTime::parse(text, format).ok()?.assume_utc();
    let wait = date - OffsetDateTime::from(now);
    Some(Duration::try_from(wait).unwrap_or(Duration::ZERO).min(MAX_RETRY_AFTER))
}

/// How much longer a listing is tried. Only its own time counts: tries and the backoff between them, not the waits for
/// its turn, for the window, for the retry budget, for the end of a pause or for the breaker, all shared by everyone.
pub(super) struct Patience<'a> {
    settings: &'a config::Partner,
    tries: u32,
    spent: Duration,
}

impl<'a> Patience<'a> {
    /// For a listing that was never tried.
    pub(super) fn new(settings: &'a config::Partner) -> Self {
        Patience { settings, tries: 0, spent: Duration::ZERO }
    }

    /// How long the next try may take from its write to its last byte.
    pub(super) fn next_timeout(&self) -> Duration {
        self.settings.request_timeout.min(self.settings.total_timeout.saturating_sub(self.spent))
    }

    /// Charges a failed try that took this long. Returns the backoff before the next one, or `None` when it was the
    /// last.
    pub(super) fn charge(&mut self, took: Duration) -> Option<Duration> {
        self.tries += 1;
        let backoff = self.settings.retry.wait(self.tries);
        self.spent += took + backoff;
        (self.tries < self.settings.max_attempts && self.spent < self.settings.total_timeout).then_some(backoff)
    }

    /// Tries charged so far.
    pub(super) fn tries(&self) -> u32 {
        self.tries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_status_has_the_class_of_the_contract() {
        let statuses_of = |wanted: Class| -> Vec<u16> {
            let all = (200..=999).map(|code| StatusCode::from_u16(code).expect("a legal code"));
            all.filter(|status| Class::of(*status) == wanted).map(|status| status.as_u16()).collect()
        };
        assert_eq!(statuses_of(Class::Answer), [200]);
        assert_eq!(statuses_of(Class::Final), [400, 404, 410, 422]);
        let retried: Vec<u16> = [408, 409, 425, 429].into_iter().chain(500..=599).collect();
        assert_eq!(statuses_of(Class::Retry), retried);
        let faults: Vec<u16> =
            (300..=499).filter(|code| ![400, 404, 410, 422, 408, 409, 425, 429].contains(code)).collect();
        assert_eq!(statuses_of(Class::Fault), faults);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_and_capped() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777); // Sun, 06 Nov 1994 08:49:37 GMT
        let parse = |text: &str| parse_retry_after(text.as_bytes(), now);
        let seconds = |count| Some(Duration::from_secs(count));
        assert_eq!(parse("0"), seconds(0));
        assert_eq!(parse("2"), seconds(2));
        assert_eq!(parse("86400"), seconds(300));
        assert_eq!(parse("99999999999999999999999999"), seconds(300));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:47 GMT"), seconds(10));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:07 GMT"), seconds(0));
        assert_eq!(parse("Wed, 01 Jan 2200 00:00:00 GMT"), seconds(300));
        for absurd in ["", "-5", "1.5", "soon", "1e9", "Sun, 99 Nov 1994 08:49:37 GMT"] {
            assert_eq!(parse(absurd), None, "{absurd}");
        }
        assert_eq!(parse_retry_after(b"\xff", now), None);
    }
}
