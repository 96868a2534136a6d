//! When a snapshot is due. Nothing here reads a clock or a file.

use std::collections::BTreeMap;
use std::time::Duration;

/// Shares of the memory limit, in percent; each is a reason for one snapshot on the way up.
const STAGES: [u64; 3] = [70, 80, 85];

/// Below this share all stages count again.
const REARM: u64 = 65;

/// Between two snapshots, but for those that begin and end a process. At a tenth of a second of CPU time for one, what many
/// short events can make them cost stays at two percent; with a budget below that it is stretched.
const LEAST: Duration = Duration::from_secs(5);

/// After a failure nothing is taken for so long, then for twice as long, up to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// Between two looks at memory.
const TICK: Duration = Duration::from_secs(1);

/// Beginnings and ends that a snapshot names at most. More of them within one pause would only make its record long.
const MOST_TOLD: usize = 256;

/// Why a snapshot was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// The process began.
    Start,
    /// The time since the last one is over.
    Interval,
    /// Memory crossed a share of its limit.
    Memory,
    /// Memory grew by a step since a slow event began.
    Growth,
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
            Reason::Growth => "growth",
            Reason::EventStart => "event-start",
            Reason::EventEnd => "event-end",
            Reason::Stop => "stop",
        }
    }
}

/// The process at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look {
    /// Since the process began to look.
    pub now: Duration,
    /// Resident bytes.
    pub rss: u64,
    /// The most they may be, where there is a limit.
    pub limit: Option<u64>,
    /// How many times longer the time between two is than asked for, to keep within the profiler's budget; but before memory
    /// that nears its limit or grows, which is rare and what snapshots are for.
    pub stretch: u32,
}

/// A snapshot that is due, with the slow events that began and ended since the one before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Due {
    pub reason: Reason,
    pub began: Vec<String>,
    pub ended: Vec<String>,
}

/// A slow event that goes on, and the growth since it began.
#[derive(Debug)]
struct SlowEvent {
    name: String,
    /// Resident bytes at its beginning.
    from: u64,
    /// The growth that is told next: a step, then twice as much each time.
    next: u64,
}

/// What was seen before, so far as it decides.
#[derive(Debug)]
pub(super) struct Trigger {
    interval: Duration,
    /// The first growth that is told; 0 for none.
    step: u64,
    last: Option<Duration>,
    /// The first stage that was not told yet.
    stage: usize,
    /// By the number of the task: deliveries of one event can be worked on side by side.
    slow_events: BTreeMap<u64, SlowEvent>,
    began: Vec<String>,
    ended: Vec<String>,
    /// What failed, and is tried again for its reason.
    owed: Option<Due>,
    not_before: Duration,
    /// After the next failure.
    pause: Duration,
}

impl Trigger {
    pub fn new(interval: Duration, step: u64) -> Self {
        Trigger {
            interval,
            step,
            last: None,
            stage: 0,
            slow_events: BTreeMap::new(),
            began: Vec::new(),
            ended: Vec::new(),
            owed: None,
            not_before: Duration::ZERO,
            pause: PAUSE,
        }
    }

    /// The task of that number began with a slow event, when so many bytes were resident.
    pub fn begin(&mut self, task: u64, event: String, rss: u64) {
        if self.began.len() < MOST_TOLD {
            self.began.push(event.clone());
        }
        self.slow_events.insert(task, SlowEvent { name: event, from: rss, next: self.step });
    }

    /// The task of that number ended with its slow event.
    pub fn end(&mut self, task: u64, event: String) {
        self.slow_events.remove(&task);
        if self.ended.len() < MOST_TOLD {
            self.ended.push(event);
        }
    }

    /// The slow events that go on, with the bytes that were resident when the first task for each began.
    pub fn slow_events(&self) -> BTreeMap<String, u64> {
        // Tasks are numbered in the order of their spawning, and the last one of a name is what the map keeps.
        self.slow_events.values().rev().map(|event| (event.name.clone(), event.from)).collect()
    }

    /// Whether a snapshot is due, and why; what it tells is then told.
    pub fn due(&mut self, look: Look) -> Option<Due> {
        if look.now < self.not_before {
            return None;
        }
        if let Some(owed) = self.owed.take() {
            self.last = Some(look.now);
            return Some(owed);
        }
        let share = look.limit.filter(|limit| *limit > 0).map_or(0, |limit| look.rss.saturating_mul(100) / limit);
        if share < REARM {
            self.stage = 0;
        }
        let reached = STAGES.iter().filter(|stage| share >= **stage).count();
        let mut grown = false;
        for event in self.slow_events.values_mut() {
            let by = look.rss.saturating_sub(event.from);
            if by < self.step / 2 {
                event.next = self.step;
            }
            grown |= self.step > 0 && by >= event.next;
        }
        let reason = match self.last {
            None => Reason::Start,
            // What came up meanwhile is not forgotten: it is compared with what was told, not with the look before.
            Some(last) if look.now.saturating_sub(last) < LEAST => return None,
            Some(_) if reached > self.stage => Reason::Memory,
            Some(_) if grown => Reason::Growth,
            Some(last) if look.now.saturating_sub(last) < LEAST * look.stretch => return None,
            Some(_) if !self.began.is_empty() => Reason::EventStart,
            Some(_) if !self.ended.is_empty() => Reason::EventEnd,
            Some(last) if look.now.saturating_sub(last) >= self.interval * look.stretch => Reason::Interval,
            Some(_) => return None,
        };
        // The first one is no answer to memory that is high already, and memory is no answer to growth.
        match reason {
            Reason::Memory => self.stage = reached,
            Reason::Growth => {
                for event in self.slow_events.values_mut() {
                    while look.rss.saturating_sub(event.from) >= event.next {
                        event.next = event.next.saturating_mul(2);
                    }
                }
            }
            _ => {}
        }
        self.last = Some(look.now);
        Some(Due { reason, began: std::mem::take(&mut self.began), ended: std::mem::take(&mut self.ended) })
    }

    /// What was due is taken.
    pub fn taken(&mut self) {
        self.pause = PAUSE;
    }

    /// What was due could not be taken: it is due again after a pause, which is told.
    pub fn failed(&mut self, due: Due, now: Duration) -> Duration {
        let pause = self.pause;
        self.owed = Some(due);
        self.not_before = now + pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        pause
    }

    /// The last one, which also tells what one before it owes.
    pub fn stop(&mut self) -> Due {
        let (mut began, mut ended) = self.owed.take().map(|due| (due.began, due.ended)).unwrap_or_default();
        began.append(&mut self.began);
        ended.append(&mut self.ended);
        Due { reason: Reason::Stop, began, ended }
    }

    /// Until the next look: not later than the interval ends, stretched as it is, so that a killed process loses no more than
    /// that. In a pause after a failure the interval may have ended long ago.
    pub fn wait(&self, now: Duration, stretch: u32) -> Duration {
        if now < self.not_before {
            return TICK;
        }
        let left = |last: Duration| (last + self.interval * stretch).saturating_sub(now);
        TICK.min(self.last.map_or(Duration::ZERO, left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(second: u64, rss: u64) -> Look {
        Look { now: Duration::from_secs(second), rss, limit: Some(100), stretch: 1 }
    }

    fn trigger() -> Trigger {
        Trigger::new(Duration::from_secs(30), 0)
    }

    /// The reasons for these looks, with the second of each.
    fn reasons(trigger: &mut Trigger, looks: impl IntoIterator<Item = Look>) -> Vec<(u64, Reason)> {
        let due = |look: Look| trigger.due(look).map(|due| (look.now.as_secs(), due.reason));
        looks.into_iter().filter_map(due).collect()
    }

    #[test]
    fn no_look_is_later_than_the_end_of_the_interval() {
        let mut trigger = Trigger::new(Duration::from_millis(7_300), 0);
        let (mut now, mut taken) = (Duration::ZERO, Vec::new());
        while now < Duration::from_secs(30) {
            if trigger.due(Look { now, rss: 10, limit: None, stretch: 1 }).is_some() {
                taken.push(now.as_millis());
            }
            now += trigger.wait(now, 1).max(Duration::from_millis(1));
        }
        assert_eq!(taken, [0, 7_300, 14_600, 21_900, 29_200]);
    }

    /// The looks at an interval of 30 s until `end`, while what is due is taken only where `can` says so: how many there were, and
    /// what was tried, in seconds.
    fn looks(trigger: &mut Trigger, end: u64, can: impl Fn(u64) -> bool) -> (usize, Vec<(u64, Reason)>) {
        let (mut now, mut looks, mut tried) = (Duration::ZERO, 0, Vec::new());
        while now < Duration::from_secs(end) && looks < 100_000 {
            looks += 1;
            if let Some(due) = trigger.due(Look { now, rss: 10, limit: None, stretch: 1 }) {
                tried.push((now.as_secs(), due.reason));
                if can(now.as_secs()) {
                    trigger.taken();
                } else {
                    trigger.failed(due, now);
                }
            }
            // What one look takes.
            now += trigger.wait(now, 1) + Duration::from_micros(100);
        }
        (looks, tried)
    }

    #[test]
    fn while_nothing_can_be_written_no_more_looks_are_taken_than_else() {
        let (looks, tried) = looks(&mut trigger(), 700, |_| false);
        let tries: Vec<u64> = tried.iter().map(|tried| tried.0).collect();
        assert_eq!(tries, [0, 5, 15, 35, 75, 155, 315, 635]);
        assert!(looks <= 700, "{looks} looks in 700 s");
    }

    #[test]
    fn what_was_owed_begins_the_interval_anew() {
        let (_, tried) = looks(&mut trigger(), 140, |second| second >= 70);
        let ends = [(75, Reason::Start), (105, Reason::Interval), (135, Reason::Interval)];
        assert_eq!(tried[tried.len() - 3..], ends, "{tried:?}");
    }

    #[test]
    fn another_delivery_of_a_slow_event_takes_its_watch_not_away() {
        let mut trigger = Trigger::new(Duration::from_secs(3600), 20);
        let unlimited = |second, rss| Look { limit: None, ..look(second, rss) };
        trigger.due(unlimited(0, 100));
        trigger.begin(1, "a".to_owned(), 100);
        trigger.begin(2, "a".to_owned(), 110);
        assert_eq!(trigger.slow_events(), BTreeMap::from([("a".to_owned(), 100)]));
        trigger.end(2, "a".to_owned());
        assert_eq!(trigger.slow_events(), BTreeMap::from([("a".to_owned(), 100)]));
        assert_eq!(reasons(&mut trigger, [unlimited(10, 120)]), [(10, Reason::Growth)]);
    }

    #[test]
    fn one_at_the_start_and_one_for_each_interval() {
        let seen = reasons(&mut trigger(), (0..=65).map(|second| look(second, 10)));
        assert_eq!(seen, [(0, Reason::Start), (30, Reason::Interval), (60, Reason::Interval)]);
    }

    #[test]
    fn what_is_stretched_comes_later_and_what_memory_says_does_not() {
        let stretched = |second, rss| Look { stretch: 4, ..look(second, rss) };
        let mut trigger = trigger();
        let mut seen = reasons(&mut trigger, (0..=130).map(|second| stretched(second, 10)));
        assert_eq!(seen, [(0, Reason::Start), (120, Reason::Interval)]);
        assert_eq!(trigger.wait(Duration::from_millis(239_900), 4), Duration::from_millis(100));
        trigger.begin(1, "a".to_owned(), 10);
        seen = reasons(&mut trigger, (131..=141).map(|second| stretched(second, 10)));
        assert_eq!(seen, [(140, Reason::EventStart)]);
        trigger.end(1, "a".to_owned());
        seen = reasons(&mut trigger, (142..=166).map(|second| stretched(second, if second < 150 { 75 } else { 10 })));
        assert_eq!(seen, [(145, Reason::Memory)]);
    }

    #[test]
    fn each_stage_tells_once_until_memory_fell() {
        let shares = [(0, 10), (6, 71), (12, 72), (18, 69), (24, 71), (29, 81), (34, 99), (39, 99), (44, 64), (49, 70)];
        let seen = reasons(&mut trigger(), shares.map(|(second, share)| look(second, share)));
        let memory: Vec<u64> = seen.iter().filter(|seen| seen.1 == Reason::Memory).map(|seen| seen.0).collect();
        assert_eq!(memory, [6, 29, 34, 49]);
    }

    #[test]
    fn a_stage_that_comes_too_soon_is_told_later() {
        let seen = reasons(&mut trigger(), (0..=6).map(|second| look(second, if second == 0 { 10 } else { 75 })));
        assert_eq!(seen, [(0, Reason::Start), (5, Reason::Memory)]);
    }

    #[test]
    fn slow_events_are_told_when_they_begin_and_end() {
        let mut trigger = trigger();
        assert_eq!(trigger.due(look(0, 10)).map(|due| due.reason), Some(Reason::Start));
        trigger.begin(1, "a".to_owned(), 10);
        assert_eq!(trigger.slow_events(), BTreeMap::from([("a".to_owned(), 10)]));
        let due = Due { reason: Reason::EventStart, began: vec!["a".to_owned()], ended: vec![] };
        assert_eq!(trigger.due(look(6, 10)), Some(due));
        assert_eq!(trigger.due(look(12, 10)), None);
        trigger.end(1, "a".to_owned());
        let due = Due { reason: Reason::EventEnd, began: vec![], ended: vec!["a".to_owned()] };
        assert_eq!(trigger.due(look(20, 10)), Some(due));
        assert_eq!(trigger.due(look(26, 10)), None);
        assert!(trigger.slow_events().is_empty());
    }

    #[test]
    fn an_event_shorter_than_the_time_between_two_looks_is_not_missed() {
        let mut trigger = trigger();
        trigger.due(look(0, 10));
        trigger.begin(1, "a".to_owned(), 10);
        trigger.end(1, "a".to_owned());
        assert_eq!(trigger.due(look(1, 10)), None, "too soon after the first");
        let due = Due { reason: Reason::EventStart, began: vec!["a".to_owned()], ended: vec!["a".to_owned()] };
        assert_eq!(trigger.due(look(5, 10)), Some(due));
    }

    #[test]
    fn growth_since_an_event_began_is_told_at_doubling_steps_until_it_fell() {
        let mut trigger = Trigger::new(Duration::from_secs(3600), 20);
        let unlimited = |second, rss| Look { limit: None, ..look(second, rss) };
        trigger.due(unlimited(0, 100));
        assert_eq!(reasons(&mut trigger, [unlimited(10, 900)]), [], "no event, no growth");
        trigger.begin(1, "a".to_owned(), 100);
        let looks = [(20, 100), (30, 119), (40, 120), (50, 130), (60, 139), (70, 195), (80, 195), (90, 109), (95, 120)];
        let seen = reasons(&mut trigger, looks.map(|(second, rss)| unlimited(second, rss)));
        let growth: Vec<u64> = seen.iter().filter(|seen| seen.1 == Reason::Growth).map(|seen| seen.0).collect();
        assert_eq!(growth, [40, 70, 95]);
        trigger.end(1, "a".to_owned());
        let after = reasons(&mut trigger, [unlimited(110, 500), unlimited(120, 900)]);
        assert_eq!(after, [(110, Reason::EventEnd)]);
    }

    #[test]
    fn without_a_limit_and_a_step_memory_is_no_reason() {
        let mut trigger = trigger();
        let mut seen = reasons(&mut trigger, [Look { limit: None, ..look(0, 1) }]);
        trigger.begin(1, "a".to_owned(), 1);
        seen.extend(reasons(&mut trigger, (1..=20).map(|second| Look { limit: None, ..look(second, u64::MAX) })));
        assert_eq!(seen, [(0, Reason::Start), (5, Reason::EventStart)]);
    }

    #[test]
    fn the_last_one_tells_what_was_owed() {
        let mut trigger = trigger();
        assert_eq!(trigger.wait(Duration::from_secs(1), 1), Duration::ZERO);
        trigger.due(look(10, 10));
        assert_eq!(trigger.wait(Duration::from_millis(39_500), 1), Duration::from_millis(500));
        assert_eq!(trigger.wait(Duration::from_millis(69_500), 2), Duration::from_millis(500));
        let owed = Due { reason: Reason::EventStart, began: vec!["a".to_owned()], ended: vec![] };
        trigger.failed(owed, Duration::from_secs(70));
        trigger.end(1, "a".to_owned());
        let last = Due { reason: Reason::Stop, began: vec!["a".to_owned()], ended: vec!["a".to_owned()] };
        assert_eq!(trigger.stop(), last);
    }

    #[test]
    fn a_thousand_events_in_one_pause_make_no_long_record() {
        let mut trigger = trigger();
        for event in 0..1_000 {
            trigger.begin(event, event.to_string(), 1);
            trigger.end(event, event.to_string());
        }
        let last = trigger.stop();
        assert_eq!((last.reason, last.began.len(), last.ended.len()), (Reason::Stop, MOST_TOLD, MOST_TOLD));
    }
}
