//! Waiting, as Go shows it: `block` for everything that work waits for, `mutex` for locks.
//!
//! Each sampled wait is charged to the stack of whoever waited, which for a task is the chain of its futures at the moment when
//! the wait ended. Go charges a lock's wait to whoever held it; here it is whoever wanted it.

use std::fmt::Write as _;
use std::time::Duration;

use super::heap::{EVENT_KIND, labels};
use super::objects::Objects;
use super::pprof::{Builder, Label, Profile, ValueType, frames};
use super::{now, symbols};
use crate::task::For;
use crate::task::contention::{self, Contended, Key};

/// The label with what was waited for.
const WAITS_FOR: &str = "waits_for";

/// Which of the waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    /// All but locks.
    Block,
    /// Locks.
    Mutex,
}

impl Which {
    pub fn name(self) -> &'static str {
        match self {
            Which::Block => "block",
            Which::Mutex => "mutex",
        }
    }

    fn includes(self, reason: For) -> bool {
        (reason == For::Lock) == (self == Which::Mutex)
    }
}

/// All waits since the start, with function names.
pub(super) fn profile(which: Which) -> Profile {
    let mut builder = Builder::new(Profile {
        sample_types: vec![ValueType::new("contentions", "count"), ValueType::new("delay", "nanoseconds")],
        default_sample_type: "delay".to_owned(),
        period_type: ValueType::new("contentions", "count"),
        period: 1,
        comments: vec![format!(
            "one stack for each {:?} of waiting on average now; longer waits always. All waits by place: goroutine?debug=1, and write_api_wait_seconds_total in /metrics",
            rate(which)
        )],
        time_nanos: now(),
        ..Profile::default()
    });
    let objects = Objects::of_this_process();
    objects.program_first(&mut builder);
    for (Key { stack, reason, mark }, Contended { count, nanoseconds }) in contention::sampled() {
        if which.includes(reason) {
            let locations: Vec<usize> =
                stack.iter().map(|address| objects.location(&mut builder, address.saturating_sub(1))).collect();
            let mut labels = labels(mark);
            labels.push(Label::text(WAITS_FOR, reason.name()));
            builder.add(&locations, &[count.round() as i64, nanoseconds.round() as i64], &labels);
        }
    }
    let mut profile = builder.finish();
    symbols::resolve(&mut profile);
    profile
}

fn rate(which: Which) -> Duration {
    contention::rate(match which {
        Which::Block => For::Permit,
        Which::Mutex => For::Lock,
    })
}

/// Stacks that were sampled.
pub(super) fn count(which: Which) -> usize {
    contention::sampled().keys().filter(|key| which.includes(key.reason)).count()
}

/// As text in the form of Go's, the longest wait first: `NANOSECONDS COUNT @ STACK`.
pub(super) fn text(which: Which) -> String {
    let profile = profile(which);
    let mut samples: Vec<_> = profile.samples.iter().collect();
    samples.sort_by_key(|sample| std::cmp::Reverse(sample.values[1]));
    let mut text = format!("--- {}:\n# a stack for each {:?} of waiting on average\n", which.name(), rate(which));
    for sample in samples {
        let _ = write!(text, "{} {} @", sample.values[1], sample.values[0]);
        for index in &sample.locations {
            let _ = write!(text, " {:#x}", profile.locations[*index].address);
        }
        let label = |key: &str| sample.label(key).unwrap_or("-");
        let _ = writeln!(
            text,
            "\n# labels: {{{EVENT_KIND:?}:{:?}, {WAITS_FOR:?}:{:?}}}",
            label(EVENT_KIND),
            label(WAITS_FOR)
        );
        for frame in frames(&profile, sample).iter().rev() {
            let _ = writeln!(text, "#\t{frame}");
        }
        text.push('\n');
    }
    text
}
