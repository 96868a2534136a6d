//! How the stub answers, good or bad.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use http::{HeaderName, HeaderValue, StatusCode};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use super::mischief::Mischief;

/// The date of HTTP headers (IMF-fixdate).
const HTTP_DATE: &[BorrowedFormatItem<'_>] =
    format_description!("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT");

/// How the stub answers. By default: rightly, at once, without a limit.
///
/// The ratios are of all requests that the rate cap lets through; together they are at most 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Behaviour {
    /// From a request's arrival to its answer, in milliseconds. A 429 of the rate cap and a 400 come at once.
    pub latency_ms: u64,
    /// How the latency changes from the moment that this is set.
    pub latency_ramp: Option<LatencyRamp>,
    /// The most requests let through in any sliding second; those beyond it get 429. 0: no limit.
    pub rate_cap: u32,
    /// Ratio of requests, 0 to 1, answered with each error status.
    pub errors: BTreeMap<u16, f64>,
    /// Ratio of requests, 0 to 1, that are never answered.
    pub hang_ratio: f64,
    /// Ratio of requests, 0 to 1, answered with status 200 and nonsense: a wrong type, a cut-off body or another
    /// listing's id.
    pub garbage_ratio: f64,
    /// Ratio of requests, 0 to 1, whose valuation is made and whose connection is closed instead of an answer.
    pub drop_ratio: f64,
    /// Ratio of requests, 0 to 1, whose valuation is made and whose answer comes badly, in each way.
    pub mischief: BTreeMap<Mischief, f64>,
    /// Listings that get this error status always.
    pub forced: BTreeMap<i64, u16>,
    /// What 429 and 503 carry.
    pub retry_after: RetryAfter,
    /// A header that requests must carry; those without get 401.
    pub required_header: Option<RequiredHeader>,
}

/// A latency that goes from [`latency_ms`](Behaviour::latency_ms) to another in a straight line, and stays there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatencyRamp {
    /// The latency at its end, in milliseconds.
    pub to_ms: u64,
    /// How long it takes to get there, in milliseconds.
    pub over_ms: u64,
}

/// The form of `Retry-After`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetryAfter {
    /// No such header.
    None,
    /// A number of seconds.
    Seconds(u32),
    /// The date this many seconds from the answer, rounded up to a whole second.
    Date(u32),
    /// The date this many seconds before the answer.
    PastDate(u32),
    /// A number of seconds that fits no integer of 64 bits.
    Absurd,
    /// Neither a number nor a date.
    Nonsense,
}

impl Default for RetryAfter {
    /// One second: the window of the rate cap.
    fn default() -> Self {
        Self::Seconds(1)
    }
}

/// A header and the value it must have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequiredHeader {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// What becomes of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Answer,
    Refuse(StatusCode),
    Hang,
    Garbage,
    Drop,
    Mischief(Mischief),
}

impl Behaviour {
    /// Changes the fields that `changes`, a JSON object, names, and leaves the others.
    pub fn merge(&self, changes: &[u8]) -> Result<Self> {
        let changes: serde_json::Map<_, _> = serde_json::from_slice(changes).context("not a JSON object")?;
        let mut merged = serde_json::to_value(self)?;
        for (name, value) in changes {
            merged[name] = value;
        }
        let merged: Self = serde_json::from_value(merged)?;
        merged.check()?;
        Ok(merged)
    }

    /// Fails on what cannot be: ratios outside 0 to 1, statuses that are no errors, headers that HTTP cannot carry.
    pub fn check(&self) -> Result<()> {
        let ratios = self.errors.values().chain(self.mischief.values());
        let ratios = ratios.chain([&self.hang_ratio, &self.garbage_ratio, &self.drop_ratio]);
        let mut sum = 0.0;
        for ratio in ratios {
            ensure!((0.0..=1.0).contains(ratio), "a ratio is {ratio}: it must be from 0 to 1");
            sum += ratio;
        }
        ensure!(sum <= 1.0 + f64::EPSILON, "the ratios add up to {sum}: together they are at most 1");
        for status in self.errors.keys().chain(self.forced.values()) {
            ensure!((300..=599).contains(status), "{status} is no error status: use 300 to 599");
        }
        if let Some(RequiredHeader { name, value }) = &self.required_header {
            HeaderName::from_bytes(name.as_bytes()).with_context(|| format!("{name:?} is no header name"))?;
            HeaderValue::from_str(value).with_context(|| format!("the value of header {name} is no header value"))?;
        }
        Ok(())
    }

    /// The latency of a request that arrives `after` the ramp was set.
    pub(super) fn latency(&self, after: Duration) -> Duration {
        let from = Duration::from_millis(self.latency_ms);
        let Some(LatencyRamp { to_ms, over_ms }) = self.latency_ramp else { return from };
        let to = Duration::from_millis(to_ms);
        let done = if over_ms == 0 { 1.0 } else { (after.as_secs_f64() * 1_000.0 / over_ms as f64).min(1.0) };
        from.mul_f64(1.0 - done) + to.mul_f64(done)
    }

    /// What becomes of a request for `listing_id`; `draw` is uniform in 0..1.
    pub(super) fn fate(&self, listing_id: i64, draw: f64) -> Fate {
        if let Some(status) = self.forced.get(&listing_id) {
            return refuse(*status);
        }
        let bad = [(self.hang_ratio, Fate::Hang), (self.garbage_ratio, Fate::Garbage), (self.drop_ratio, Fate::Drop)];
        let errors = self.errors.iter().map(|(status, ratio)| (*ratio, refuse(*status)));
        let mischief = self.mischief.iter().map(|(mischief, ratio)| (*ratio, Fate::Mischief(*mischief)));
        let mut upper = 0.0;
        for (ratio, fate) in errors.chain(bad).chain(mischief) {
            upper += ratio;
            if draw < upper {
                return fate;
            }
        }
        Fate::Answer
    }
}

fn refuse(status: u16) -> Fate {
    Fate::Refuse(StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR))
}

impl RetryAfter {
    /// The header's value for an answer given now.
    pub(super) fn header(self, now: OffsetDateTime) -> Option<String> {
        match self {
            Self::None => None,
            Self::Seconds(seconds) => Some(seconds.to_string()),
            Self::Date(seconds) => {
                let part = u32::from(now.nanosecond() > 0);
                (now + Duration::from_secs(u64::from(seconds + part))).format(HTTP_DATE).ok()
            }
            Self::PastDate(seconds) => (now - Duration::from_secs(u64::from(seconds))).format(HTTP_DATE).ok(),
            Self::Absurd => Some("99999999999999999999".to_owned()),
            Self::Nonsense => Some("soon, -1".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn a_change_leaves_the_other_fields_alone() -> Result<()> {
        let before = Behaviour { latency_ms: 250, rate_cap: 1_000, ..Behaviour::default() };
        let after = before.merge(
            br#"{"rate_cap": 10, "errors": {"503": 0.25}, "forced": {"17": 404}, "retry_after": {"date": 3}}"#,
        )?;
        let expected = Behaviour {
            rate_cap: 10,
            errors: BTreeMap::from([(503, 0.25)]),
            forced: BTreeMap::from([(17, 404)]),
            retry_after: RetryAfter::Date(3),
            ..before
        };
        assert_eq!(after, expected);
        Ok(())
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for changes in [
            r#"{"latency": 5}"#,
            r#"{"hang_ratio": 1.5}"#,
            r#"{"hang_ratio": 0.6, "drop_ratio": 0.6}"#,
            r#"{"errors": {"200": 0.1}}"#,
            r#"{"drop_ratio": 0.6, "mischief": {"drip": 0.6}}"#,
            r#"{"mischief": {"prank": 0.1}}"#,
            r#"{"forced": {"17": 42}}"#,
            r#"{"required_header": {"name": "a b", "value": "c"}}"#,
            "[]",
        ] {
            assert!(Behaviour::default().merge(changes.as_bytes()).is_err(), "{changes}");
        }
    }

    #[test]
    fn fates_follow_their_ratios() {
        let behaviour = Behaviour {
            errors: BTreeMap::from([(500, 0.1), (503, 0.2)]),
            hang_ratio: 0.1,
            garbage_ratio: 0.1,
            drop_ratio: 0.1,
            mischief: BTreeMap::from([(Mischief::Drip, 0.1)]),
            forced: BTreeMap::from([(17, 404)]),
            ..Behaviour::default()
        };
        let fates = [0.05, 0.15, 0.35, 0.45, 0.55, 0.65, 0.75].map(|draw| behaviour.fate(1, draw));
        let drip = Fate::Mischief(Mischief::Drip);
        let expected = [refuse(500), refuse(503), Fate::Hang, Fate::Garbage, Fate::Drop, drip, Fate::Answer];
        assert_eq!(fates, expected);
        assert_eq!(behaviour.fate(17, 0.99), refuse(404));
    }

    #[test]
    fn retry_after_has_both_forms() {
        let now = datetime!(2026-11-22 23:59:58.5 UTC);
        assert_eq!(RetryAfter::Seconds(7).header(now).as_deref(), Some("7"));
        assert_eq!(RetryAfter::Date(3).header(now).as_deref(), Some("Mon, 23 Nov 2026 00:00:02 GMT"));
        assert_eq!(RetryAfter::None.header(now), None);
        assert_eq!(RetryAfter::PastDate(3).header(now).as_deref(), Some("Sun, 22 Nov 2026 23:59:55 GMT"));
        assert!(RetryAfter::Absurd.header(now).is_some_and(|value| value.parse::<u64>().is_err()));
    }

    #[test]
    fn the_latency_goes_in_a_straight_line() {
        let ramp = Some(LatencyRamp { to_ms: 1_000, over_ms: 10_000 });
        let behaviour = Behaviour { latency_ms: 100, latency_ramp: ramp, ..Behaviour::default() };
        let latencies = [0, 5, 10, 60].map(|after| behaviour.latency(Duration::from_secs(after)).as_millis());
        assert_eq!(latencies, [100, 550, 1_000, 1_000]);
    }
}
