//! Keeps what the profiler costs within `profiling.cpu_budget`.
//!
//! Once a second its CPU time is compared with the budget over a window. Above it, everything that gives way is sampled half as
//! much: CPU profiles, stacks of waits, and snapshots of the heap, whose times apart are stretched. Well below it for
//! some time, that is taken back, step by step. Nothing is biased by it: each sample is weighed with the rate of its own moment,
//! and a CPU profile keeps the rate that it began with.
//!
//! The distance of the allocator's samples stays: to change it is to forget all that was sampled. It is chosen at the start, in
//! `MALLOC_CONF`.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::cpu;
use crate::config;
use crate::task::cost::{self, PARTS, Part};
use crate::task::{self, For, contention};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// The time over which the budget holds. One profile may take a fifth of a second, which is no reason to do anything.
const WINDOW: Duration = Duration::from_secs(60);

/// So long the profiler must stay below half of its budget before it samples more: twice the window, so that one of the
/// new rates has been seen whole.
const CALM: Duration = Duration::from_secs(120);

/// The most that rates are divided by. With less than that a profile would show nothing.
const MOST: u32 = 16;

/// What gives way must cost at least this part of the budget, or slowing it down would not help.
const WORTH_IT: f64 = 0.1;

/// CPU time of the profiler until a moment, or within a time, by part.
#[derive(Debug, Clone, Copy, Default)]
struct Spent([Duration; PARTS]);

impl Spent {
    fn now() -> Self {
        Spent(Part::ALL.map(cost::cpu))
    }

    fn since(self, then: Spent) -> Self {
        Spent(Part::ALL.map(|part| self.0[part as usize].saturating_sub(then.0[part as usize])))
    }

    /// As a share of one core over the whole window, of the parts that `counts` says.
    fn share(&self, counts: impl Fn(Part) -> bool) -> f64 {
        let counted = Part::ALL.into_iter().filter(|part| counts(*part));
        counted.map(|part| self.0[part as usize]).sum::<Duration>().as_secs_f64() / WINDOW.as_secs_f64()
    }

    /// The part that cost most.
    fn most(&self) -> Part {
        Part::ALL.into_iter().max_by_key(|part| self.0[*part as usize]).unwrap_or(Part::Requests)
    }
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Decision {
    /// The slowdown changes.
    Change { from: u32, to: u32 },
    /// Too much is used and no rate can be lowered that would help.
    Exceeded,
}

/// Decides; reads no clock.
#[derive(Debug)]
struct Controller {
    /// Shares of one core.
    budget: f64,
    slowdown: u32,
    /// Looks within the window, the oldest first. Each change begins anew: what was spent before is not held against new rates.
    looks: VecDeque<(Duration, Spent)>,
    calm_since: Option<Duration>,
    is_exceeded: bool,
}

impl Controller {
    fn new(budget: f64) -> Self {
        Controller { budget, slowdown: 1, looks: VecDeque::new(), calm_since: None, is_exceeded: false }
    }

    /// What was spent within the window that ends `now`. One that has just begun counts as if nothing had been spent before it.
    fn within(&mut self, now: Duration, spent: Spent) -> Spent {
        self.looks.push_back((now, spent));
        while self.looks.get(1).is_some_and(|(at, _)| *at + WINDOW <= now) {
            self.looks.pop_front();
        }
        let (_, first) = self.looks[0];
        spent.since(first)
    }

    /// At `now`, with what was spent until then; also tells what was spent within the window that decided.
    fn look(&mut self, now: Duration, spent: Spent) -> (Spent, Option<Decision>) {
        let within = self.within(now, spent);
        let (all, gives_way) = (within.share(|_| true), within.share(Part::gives_way));
        let decision = if all > self.budget {
            self.calm_since = None;
            self.lower(gives_way)
        } else if all < self.budget / 2.0 {
            let since = *self.calm_since.get_or_insert(now);
            (now - since >= CALM).then(|| self.raise()).flatten()
        } else {
            self.calm_since = None;
            None
        };
        if let Some(Decision::Change { to, .. }) = decision {
            self.slowdown = to;
            self.looks = VecDeque::from([(now, spent)]);
            self.calm_since = None;
        }
        (within, decision)
    }

    fn lower(&mut self, gives_way: f64) -> Option<Decision> {
        if self.slowdown < MOST && gives_way >= self.budget * WORTH_IT {
            return Some(Decision::Change { from: self.slowdown, to: self.slowdown * 2 });
        }
        // Told once, until it was calm again.
        (!std::mem::replace(&mut self.is_exceeded, true)).then_some(Decision::Exceeded)
    }

    fn raise(&mut self) -> Option<Decision> {
        self.is_exceeded = false;
        (self.slowdown > 1).then_some(Decision::Change { from: self.slowdown, to: self.slowdown / 2 })
    }
}

/// The rate that a CPU profile takes samples with where `asked` times a second are wanted.
pub(super) fn hz(asked: u32) -> u32 {
    (asked / cost::slowdown()).max(1)
}

/// Keeps to the budget for as long as it is polled.
pub async fn keep(profiling: config::Profiling) {
    // Not in a poll, whose own books would be in it, and not in the way of anything. What it says is asked for later.
    let _ = task::park(task::spawn_blocking(cost::calibrate)).await;
    let mut controller = Controller::new(profiling.cpu_budget.as_secs_f64());
    let begin = Instant::now();
    loop {
        let (within, decision) = controller.look(begin.elapsed(), Spent::now());
        match decision {
            Some(Decision::Change { from, to }) => {
                let before = rates(&profiling);
                cost::slow_down(to);
                tell(from, to, within, &profiling, &format!("{before} -> {}", rates(&profiling)));
            }
            Some(Decision::Exceeded) => tracing::warn!(
                share_percent = percent(within.share(|_| true)),
                budget_percent = percent(controller.budget),
                most = within.most().name(),
                slowdown = controller.slowdown,
                "the profiler uses more than profiling.cpu_budget, and lower rates do not help"
            ),
            None => {}
        }
        task::park(tokio::time::sleep(LOOK)).await;
    }
}

fn tell(from: u32, to: u32, within: Spent, profiling: &config::Profiling, rates: &str) {
    let (share_percent, most) = (percent(within.share(|_| true)), within.most().name());
    let budget_percent = percent(profiling.cpu_budget.as_secs_f64());
    if to > from {
        tracing::warn!(
            share_percent,
            budget_percent,
            most,
            slowdown = to,
            rates,
            "the profiler used more than profiling.cpu_budget and samples less"
        );
    } else {
        tracing::info!(
            share_percent,
            budget_percent,
            most,
            slowdown = to,
            rates,
            "the profiler uses less than half of profiling.cpu_budget and samples more again"
        );
    }
}

/// The rates in force, for people.
fn rates(profiling: &config::Profiling) -> String {
    let mut text = format!(
        "CPU profiles {} Hz, a stack each {:?} of waiting and {:?} at locks",
        hz(cpu::HZ),
        contention::rate(For::Permit),
        contention::rate(For::Lock),
    );
    if profiling.snapshots.directory.is_some() {
        text += &format!(", snapshots each {:?}", profiling.snapshots.interval * cost::slowdown());
    }
    text
}

/// With two decimals.
fn percent(share: f64) -> f64 {
    (share * 10_000.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock and what is spent by it, at rates for each second of CPU time that gives way and that does not.
    struct Course {
        controller: Controller,
        second: u64,
        spent: Spent,
        changes: Vec<(u64, Decision)>,
        /// The part that cost most, at each change.
        most: Vec<Part>,
    }

    impl Course {
        fn new() -> Self {
            // One percent.
            let controller = Controller::new(0.01);
            Course { controller, second: 0, spent: Spent::default(), changes: Vec::new(), most: Vec::new() }
        }

        /// Goes on for `seconds`, each with so many milliseconds that give way, divided by the slowdown, and so many that do not.
        fn go(&mut self, seconds: u64, gives_way: f64, stays: f64) -> &mut Self {
            for _ in 0..seconds {
                let yielding = Duration::from_secs_f64(gives_way / 1000.0 / f64::from(self.controller.slowdown));
                self.spent.0[Part::WaitStacks as usize] += yielding;
                self.spent.0[Part::HeapSamples as usize] += Duration::from_secs_f64(stays / 1000.0);
                self.second += 1;
                let (within, decision) = self.controller.look(Duration::from_secs(self.second), self.spent);
                self.changes.extend(decision.map(|decision| (self.second, decision)));
                self.most.extend(decision.map(|_| within.most()));
            }
            self
        }

        fn slowdowns(&self) -> Vec<u32> {
            let of = |decision: &Decision| match decision {
                Decision::Change { to, .. } => Some(*to),
                Decision::Exceeded => None,
            };
            self.changes.iter().filter_map(|(_, decision)| of(decision)).collect()
        }
    }

    #[test]
    fn within_the_budget_nothing_changes() {
        let mut course = Course::new();
        course.go(3600, 9.0, 0.5);
        assert_eq!(course.changes, []);
    }

    #[test]
    fn rates_fall_until_the_cost_is_within_the_budget_and_no_further() {
        let mut course = Course::new();
        // Three and a half percent: a quarter of that is below one.
        course.go(3600, 35.0, 0.0);
        assert_eq!(course.slowdowns(), [2, 4]);
        // After as much as the budget is of a window, and again.
        assert_eq!(course.changes[0].0, 19);
        assert!(course.changes[1].0 > 19 + 30, "{:?}", course.changes);
    }

    #[test]
    fn one_expensive_moment_lowers_by_one_step_and_is_forgotten() {
        let mut course = Course::new();
        course.go(1, 0.0, 0.0).go(1, 1_000.0, 0.0);
        course.go(100, 0.0, 0.0);
        assert_eq!(course.slowdowns(), [2]);
        course.go(CALM.as_secs(), 0.0, 0.0);
        assert_eq!(course.slowdowns(), [2, 1]);
    }

    #[test]
    fn rates_come_back_only_after_a_calm_below_half_of_the_budget() {
        let mut course = Course::new();
        course.go(300, 35.0, 0.0);
        assert_eq!(course.slowdowns(), [2, 4]);
        // Three percent with a quarter of the rates is 0.75, which is more than half.
        course.go(3600, 30.0, 0.0);
        assert_eq!(course.slowdowns(), [2, 4]);
        // 0.4 percent, but with a moment of more each minute and a half.
        for _ in 0..20 {
            course.go(90, 16.0, 0.0);
            course.go(1, 1200.0, 0.0);
        }
        assert_eq!(course.slowdowns(), [2, 4]);
        let second = course.second;
        course.go(3600, 16.0, 0.0);
        // 1.6 percent at full rate: half of it is as near as it comes.
        assert_eq!(course.slowdowns(), [2, 4, 2]);
        assert!(course.changes[2].0 >= second + CALM.as_secs(), "{:?}", course.changes);
        course.go(3600, 5.0, 0.0);
        assert_eq!(course.slowdowns(), [2, 4, 2, 1]);
    }

    #[test]
    fn at_the_floor_it_is_told_once() {
        let mut course = Course::new();
        course.go(3600, 1_000.0, 0.0);
        assert_eq!(course.slowdowns(), [2, 4, 8, MOST]);
        let exceeded = course.changes.iter().filter(|change| change.1 == Decision::Exceeded).count();
        assert_eq!(exceeded, 1, "{:?}", course.changes);
        assert_eq!(course.changes.last().map(|change| change.1), Some(Decision::Exceeded));
    }

    #[test]
    fn what_cost_most_is_told_of_the_window_and_not_since_the_start() {
        let mut course = Course::new();
        // For an hour samples of memory cost most, within the budget; then, after a quiet minute, stacks of waits exceed it.
        course.go(3600, 0.0, 9.0).go(60, 0.0, 0.0).go(60, 15.0, 0.0);
        assert!(course.spent.most() == Part::HeapSamples && course.slowdowns() == [2], "{:?}", course.changes);
        assert_eq!(course.most, [Part::WaitStacks]);
    }

    #[test]
    fn what_no_rate_changes_lowers_none() {
        let mut course = Course::new();
        course.go(3600, 0.5, 30.0);
        assert_eq!(course.changes.iter().map(|change| change.1).collect::<Vec<_>>(), [Decision::Exceeded]);
        // Calm in between, so that the next time is told again.
        course.go(300, 0.0, 0.0).go(300, 0.5, 30.0);
        assert_eq!(course.changes.len(), 2, "{:?}", course.changes);
    }
}
