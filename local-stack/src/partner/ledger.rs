//! What the stub has seen and done.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::mischief::Mischief;
use super::wire::{KeyHash, Valuation};

const SECOND: Duration = Duration::from_secs(1);

/// The counts of a stub, as `GET /stats` gives them. "Requests" are POSTs to `/v1/valuations`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// All requests.
    pub requests: u64,
    /// Distinct keys among the well-formed requests.
    pub distinct_keys: u64,
    /// Well-formed requests whose key had been seen before, whatever the answer was then.
    pub repeated_requests: u64,
    /// Valuations made: one for each key that was ever let through, however often it was repeated.
    pub effects: u64,
    /// Requests being worked on.
    pub in_flight: u64,
    /// The most requests that were worked on at once.
    pub max_in_flight: u64,
    /// Mean of `in_flight` over the time from the first call to the last answer.
    pub mean_in_flight: f64,
    /// The most arrivals in any sliding second.
    pub max_in_one_second: u64,
    /// Answers by status.
    pub by_status: BTreeMap<u16, u64>,
    /// Answers, with status 200, that were nonsense on purpose.
    pub garbage: u64,
    /// Requests that were left without an answer on purpose, the connection open.
    pub hung: u64,
    /// Connections closed on purpose after the valuation was made.
    pub dropped: u64,
    /// Answers that came badly on purpose, by way. They are in no other count of answers.
    #[serde(default)]
    pub mischief: BTreeMap<Mischief, u64>,
    /// Requests whose client went away before the answer.
    pub abandoned: u64,
    /// Arrival of the first request, in seconds since 1970.
    pub first_call: Option<f64>,
    /// The last answer, in seconds since 1970.
    pub last_answer: Option<f64>,
    /// Connections accepted, those for `/stats` and `/control` included.
    pub connections: u64,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Answered(u16),
    Garbled,
    Dropped,
    Spoiled(Mischief),
    Abandoned,
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Those fields that are simply counted.
    counts: Stats,
    /// Every key seen, with the valuation that was made for it, so that its repeats get the same answer.
    keys: HashMap<KeyHash, Option<Valuation>>,
    arrivals: SlidingSecond,
    admitted: SlidingSecond,
    /// The integral of `in_flight` over time, in seconds, up to `changed`.
    busy: f64,
    busy_at_last_answer: f64,
    changed: Option<Instant>,
    first_call: Option<Instant>,
    last_answer: Option<Instant>,
}

impl Ledger {
    /// A request is here.
    pub(super) fn arrive(&mut self, now: Instant) {
        self.advance(now);
        self.first_call.get_or_insert(now);
        self.arrivals.push(now);
        self.counts.requests += 1;
        self.counts.in_flight += 1;
        self.counts.max_in_flight = self.counts.max_in_flight.max(self.counts.in_flight);
        self.counts.max_in_one_second = self.counts.max_in_one_second.max(self.arrivals.len());
    }

    /// Whether the request that arrived at `now` is within the rate cap (0: none). Refused ones don't count.
    pub(super) fn admit(&mut self, now: Instant, rate_cap: u32) -> bool {
        self.admitted.forget_before(now);
        let admitted = rate_cap == 0 || self.admitted.len() < u64::from(rate_cap);
        if admitted {
            self.admitted.push(now);
        }
        admitted
    }

    /// A well-formed request named this key.
    pub(super) fn note_key(&mut self, key: KeyHash) {
        match self.keys.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(None);
                self.counts.distinct_keys += 1;
            }
            Entry::Occupied(_) => self.counts.repeated_requests += 1,
        }
    }

    /// Makes the key's valuation, or gives the one that was made the first time.
    pub(super) fn apply(&mut self, key: KeyHash, valuation: impl FnOnce() -> Valuation) -> Valuation {
        *self.keys.entry(key).or_default().get_or_insert_with(|| {
            self.counts.effects += 1;
            valuation()
        })
    }

    /// A request will get no answer.
    pub(super) fn hang(&mut self) {
        self.counts.hung += 1;
    }

    /// A connection was accepted.
    pub(super) fn connect(&mut self) {
        self.counts.connections += 1;
    }

    /// A request has gone.
    pub(super) fn leave(&mut self, now: Instant, end: End) {
        self.advance(now);
        self.counts.in_flight = self.counts.in_flight.saturating_sub(1);
        match end {
            End::Answered(status) => *self.counts.by_status.entry(status).or_default() += 1,
            End::Garbled => {
                *self.counts.by_status.entry(200).or_default() += 1;
                self.counts.garbage += 1;
            }
            End::Dropped => self.counts.dropped += 1,
            End::Spoiled(mischief) => *self.counts.mischief.entry(mischief).or_default() += 1,
            End::Abandoned => self.counts.abandoned += 1,
        }
        if end != End::Abandoned {
            self.last_answer = Some(now);
            self.busy_at_last_answer = self.busy;
        }
    }

    /// Forgets everything but the requests being worked on.
    pub(super) fn reset(&mut self, now: Instant) {
        let in_flight = self.counts.in_flight;
        *self = Self {
            counts: Stats { in_flight, max_in_flight: in_flight, ..Stats::default() },
            changed: Some(now),
            ..Self::default()
        };
    }

    pub(super) fn stats(&self) -> Stats {
        let span = match (self.first_call, self.last_answer) {
            (Some(first), Some(last)) => last.saturating_duration_since(first).as_secs_f64(),
            _ => 0.0,
        };
        Stats {
            mean_in_flight: if span > 0.0 { self.busy_at_last_answer / span } else { 0.0 },
            first_call: self.first_call.map(epoch_seconds),
            last_answer: self.last_answer.map(epoch_seconds),
            ..self.counts.clone()
        }
    }

    fn advance(&mut self, now: Instant) {
        if let Some(changed) = self.changed.replace(now) {
            self.busy += self.counts.in_flight as f64 * now.saturating_duration_since(changed).as_secs_f64();
        }
    }
}

/// The instants of the last second: those `t` with `now - 1 s < t <= now`.
#[derive(Debug, Default)]
struct SlidingSecond(VecDeque<Instant>);

impl SlidingSecond {
    fn push(&mut self, now: Instant) {
        self.forget_before(now);
        self.0.push_back(now);
    }

    fn forget_before(&mut self, now: Instant) {
        while self.0.front().is_some_and(|first| now.saturating_duration_since(*first) >= SECOND) {
            self.0.pop_front();
        }
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }
}

fn epoch_seconds(instant: Instant) -> f64 {
    let at = SystemTime::now() - instant.elapsed();
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::super::wire::valuation;
    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn key(listing_id: i64) -> KeyHash {
        KeyHash::of(format!("run:{listing_id}").as_bytes(), listing_id).expect("well-formed")
    }

    #[test]
    fn the_second_slides() {
        let start = Instant::now();
        let mut ledger = Ledger::default();
        // Ten at the end of one second and ten at the start of the next: a window on full seconds would see ten.
        for at in (900..1_000).chain(1_000..1_100).step_by(10) {
            ledger.arrive(start + ms(at));
        }
        assert_eq!(ledger.stats().max_in_one_second, 20);
        // Exactly one second after the first arrival, that one is out.
        ledger.arrive(start + ms(1_900));
        assert_eq!(ledger.stats().max_in_one_second, 20);
    }

    #[test]
    fn the_cap_holds_in_every_second_and_refused_requests_do_not_count() {
        let start = Instant::now();
        let mut ledger = Ledger::default();
        let admitted: Vec<u64> = (0..3_000).filter(|at| ledger.admit(start + ms(*at), 10)).collect();
        assert_eq!(admitted.len(), 30);
        assert!(admitted.windows(11).all(|window| window[10] - window[0] >= 1_000));
        assert!(ledger.admit(start + ms(3_000), 0), "no cap");
    }

    #[test]
    fn the_mean_is_weighted_by_time_and_ends_with_the_last_answer() {
        let start = Instant::now();
        let mut ledger = Ledger::default();
        ledger.arrive(start);
        ledger.arrive(start + ms(1_000));
        ledger.leave(start + ms(2_000), End::Answered(200));
        ledger.leave(start + ms(4_000), End::Answered(503));
        // 1 for 1 s, 2 for 1 s, 1 for 2 s: 5 / 4. The idle time after that is not counted.
        ledger.arrive(start + ms(60_000));
        let stats = ledger.stats();
        assert!((stats.mean_in_flight - 1.25).abs() < 1e-9, "{stats:?}");
        assert_eq!((stats.in_flight, stats.max_in_flight), (1, 2));
        assert_eq!(stats.by_status, BTreeMap::from([(200, 1), (503, 1)]));
    }

    #[test]
    fn a_repeated_key_gets_the_first_answer() {
        let mut ledger = Ledger::default();
        for _ in 0..3 {
            ledger.note_key(key(1));
        }
        ledger.note_key(key(2));
        let first = ledger.apply(key(1), || valuation(1, 1_000));
        let second = ledger.apply(key(1), || valuation(1, 9_000));
        assert_eq!(first, second);
        let stats = ledger.stats();
        assert_eq!((stats.distinct_keys, stats.repeated_requests, stats.effects), (2, 2, 1));
    }

    #[test]
    fn a_reset_keeps_only_what_is_in_flight() {
        let start = Instant::now();
        let mut ledger = Ledger::default();
        ledger.arrive(start);
        ledger.note_key(key(1));
        ledger.reset(start + ms(10));
        assert_eq!(ledger.stats(), Stats { in_flight: 1, max_in_flight: 1, ..Stats::default() });
        ledger.leave(start + ms(20), End::Abandoned);
        assert_eq!(ledger.stats().in_flight, 0);
    }
}
