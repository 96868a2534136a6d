//! When a snapshot is due. Nothing here reads a clock or a file.

use std::collections::BTreeSet;
use std::time::Duration;

/// Shares of the memory limit, in percent; each is a reason for one snapshot on the way up.
const STAGES: [u64; 3] = [70, 80, 85];

/// Below this share all stages count again.
const REARM: u64 = 65;

/// Between two snapshots, but for those that begin and end a process.
const LEAST: Duration = Duration::from_secs(5);

/// Why a snapshot was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// The process began.
    Start,
    /// The time since the last one is over.
    Interval,
    /// Memory crossed a share of its limit.
    Memory,
    /// A slow event began.
    EventStart,
    /// A slow event ended.
    EventEnd,
    /// The process ends in order.
    Stop,
}

impl Reason {
    pub fn name(self) -> &'static str {
        match self {
            Reason::Start => "start",
            Reason::Interval => "interval",
            Reason::Memory => "memory",
            Reason::EventStart => "event-start",
            Reason::EventEnd => "event-end",
            Reason::Stop => "stop",
        }
    }
}

/// The process at one moment.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// Since the process began to look.
    pub now: Duration,
    /// Resident bytes.
    pub rss: u64,
    /// The most they may be, where there is a limit.
    pub limit: Option<u64>,
    /// Ids of the slow events being worked on.
    pub slow_events: BTreeSet<String>,
}

/// What was seen before, so far as it decides.
#[derive(Debug)]
pub(super) struct Trigger {
    interval: Duration,
    last: Option<Duration>,
    /// The first stage that was not told yet.
    stage: usize,
    slow_events: BTreeSet<String>,
}

impl Trigger {
    pub fn new(interval: Duration) -> Self {
        Trigger { interval, last: None, stage: 0, slow_events: BTreeSet::new() }
    }

    /// Whether a snapshot is due, and why; what it tells is then told.
    pub fn due(&mut self, look: Look) -> Option<Reason> {
        let share = look.limit.filter(|limit| *limit > 0).map_or(0, |limit| look.rss.saturating_mul(100) / limit);
        if share < REARM {
            self.stage = 0;
        }
        let reached = STAGES.iter().filter(|stage| share >= **stage).count();
        let reason = match self.last {
            None => Reason::Start,
            // What came up meanwhile is not forgotten: it is compared with what was told, not with the look before.
            Some(last) if look.now.saturating_sub(last) < LEAST => return None,
            Some(_) if reached > self.stage => Reason::Memory,
            Some(_) if look.slow_events.difference(&self.slow_events).next().is_some() => Reason::EventStart,
            Some(_) if self.slow_events.difference(&look.slow_events).next().is_some() => Reason::EventEnd,
            Some(last) if look.now.saturating_sub(last) >= self.interval => Reason::Interval,
            Some(_) => return None,
        };
        self.last = Some(look.now);
        // The first one is no answer to memory that is high already.
        if reason == Reason::Memory {
            self.stage = reached;
        }
        self.slow_events = look.slow_events;
        Some(reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(second: u64, share: u64, slow_events: &[&str]) -> Look {
        Look {
            now: Duration::from_secs(second),
            rss: share,
            limit: Some(100),
            slow_events: slow_events.iter().map(|id| (*id).to_owned()).collect(),
        }
    }

    /// The reasons for these looks, with the second of each.
    fn reasons(looks: impl IntoIterator<Item = Look>) -> Vec<(u64, Reason)> {
        let mut trigger = Trigger::new(Duration::from_secs(30));
        let due = looks.into_iter().filter_map(|look| {
            let second = look.now.as_secs();
            trigger.due(look).map(|reason| (second, reason))
        });
        due.collect()
    }

    #[test]
    fn one_at_the_start_and_one_for_each_interval() {
        let seen = reasons((0..=65).map(|second| look(second, 10, &[])));
        assert_eq!(seen, [(0, Reason::Start), (30, Reason::Interval), (60, Reason::Interval)]);
    }

    #[test]
    fn each_stage_tells_once_until_memory_fell() {
        let shares = [(0, 10), (6, 71), (12, 72), (18, 69), (24, 71), (29, 81), (34, 99), (39, 99), (44, 64), (49, 70)];
        let seen = reasons(shares.map(|(second, share)| look(second, share, &[])));
        let memory: Vec<u64> = seen.iter().filter(|seen| seen.1 == Reason::Memory).map(|seen| seen.0).collect();
        assert_eq!(memory, [6, 29, 34, 49]);
    }

    #[test]
    fn a_stage_that_comes_too_soon_is_told_later() {
        let seen = reasons((0..=6).map(|second| look(second, if second == 0 { 10 } else { 75 }, &[])));
        assert_eq!(seen, [(0, Reason::Start), (5, Reason::Memory)]);
    }

    #[test]
    fn slow_events_are_told_when_they_begin_and_end() {
        let events = |second| if (6..20).contains(&second) { look(second, 10, &["a"]) } else { look(second, 10, &[]) };
        let seen = reasons((0..=25).map(events));
        assert_eq!(seen, [(0, Reason::Start), (6, Reason::EventStart), (20, Reason::EventEnd)]);
    }

    #[test]
    fn without_a_limit_memory_is_no_reason() {
        let seen = reasons((0..=20).map(|second| Look { limit: None, ..look(second, u64::MAX, &[]) }));
        assert_eq!(seen, [(0, Reason::Start)]);
    }
}
