//! Stacks of waits, sampled by their length.
//!
//! A wait is taken with a probability that is its length over the [`rate`], and a longer one always; what is taken stands for those
//! that were not, so that counts and times are right on average (as in Go's runtime, `runtime.SetBlockProfileRate`). The
//! exact figures, without stacks, are in [`places`](super::places).

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use super::cost::{self, Part};
use super::mark::Mark;
use super::places::For;
use crate::stack;

/// The most frames that are kept of one stack.
const DEPTH: usize = 64;

/// The most stacks. Their number follows the paths of the code, so it is reached by an error only.
const MOST_STACKS: usize = 4096;

/// For one stack on average of so much waiting at locks, which are short; without a slowdown.
const LOCK_RATE: Duration = Duration::from_micros(100);

/// For one stack on average of so much of all other waiting. A thousand calls at once wait a thousand seconds in each, and two
/// hundred stacks say as much of them as a thousand would.
const RATE: Duration = Duration::from_secs(5);

/// Where it waited, for what, and whose work it was.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Return addresses, the innermost first.
    pub stack: Box<[usize]>,
    /// What was waited for.
    pub reason: For,
    /// Whose work waited.
    pub mark: Mark,
}

/// How often and how long, estimated.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Contended {
    /// Waits.
    pub count: f64,
    /// Nanoseconds.
    pub nanoseconds: f64,
}

static STACKS: LazyLock<Mutex<HashMap<Key, Contended>>> = LazyLock::new(Mutex::default);

/// The rate in force. Each stack is weighed with that of its own moment, so a change biases nothing.
pub fn rate(reason: For) -> Duration {
    let rate = if reason == For::Lock { LOCK_RATE } else { RATE };
    rate * cost::slowdown()
}

/// Bytes that are held.
pub(super) fn memory() -> u64 {
    let stacks = STACKS.lock().unwrap_or_else(PoisonError::into_inner);
    let frames: usize = stacks.keys().map(|key| size_of_val(&*key.stack)).sum();
    (stacks.capacity() * (size_of::<(Key, Contended)>() + 1) + frames) as u64
}

/// Everything that was sampled since the start.
pub fn sampled() -> HashMap<Key, Contended> {
    STACKS.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// What a wait stands for, if it is taken; `luck` is even between 0 and 1.
fn weight(took: Duration, rate: Duration, luck: f64) -> Option<Contended> {
    if took.is_zero() {
        return None;
    }
    let (took, rate) = (took.as_nanos() as f64, rate.as_nanos() as f64);
    if took >= rate {
        return Some(Contended { count: 1.0, nanoseconds: took });
    }
    (luck * rate < took).then(|| Contended { count: rate / took, nanoseconds: rate })
}

/// What a wait that has just ended stands for, if its stack is to be taken.
pub(super) fn draw(reason: For, took: Duration) -> Option<Contended> {
    weight(took, rate(reason), fastrand::f64())
}

/// Takes the stack of a wait that has just ended, or does not.
pub(super) fn sample(reason: For, mark: Mark, took: Duration) {
    let Some(weight) = draw(reason, took) else { return };
    cost::timed(Part::WaitStacks, Duration::ZERO, || keep(reason, mark, weight));
}

fn keep(reason: For, mark: Mark, weight: Contended) {
    let mut frames = [0; DEPTH];
    let length = stack::own(&mut frames);
    let key = Key { stack: frames[..length].into(), reason, mark };
    let mut stacks = STACKS.lock().unwrap_or_else(PoisonError::into_inner);
    if stacks.len() < MOST_STACKS || stacks.contains_key(&key) {
        let sum = stacks.entry(key).or_default();
        sum.count += weight.count;
        sum.nanoseconds += weight.nanoseconds;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_stands_for_what_is_not() {
        let rate = Duration::from_millis(100);
        for took in [1, 10, 50, 99, 100, 1000].map(Duration::from_millis) {
            let draws = 100_000;
            let mut sum = Contended::default();
            for draw in 0..draws {
                if let Some(weight) = weight(took, rate, (f64::from(draw) + 0.5) / f64::from(draws)) {
                    sum.count += weight.count;
                    sum.nanoseconds += weight.nanoseconds;
                }
            }
            let draws = f64::from(draws);
            assert!((sum.count / draws - 1.0).abs() < 0.01, "{took:?}: {sum:?}");
            assert!((sum.nanoseconds / draws / took.as_nanos() as f64 - 1.0).abs() < 0.01, "{took:?}: {sum:?}");
        }
        assert_eq!(weight(Duration::ZERO, rate, 0.0), None);
    }

    #[test]
    fn a_long_wait_leaves_its_stack() {
        stack::learn();
        let planted = Mark { kind: super::super::Kind::Planted, stage: super::super::Stage::Write };
        sample(For::Kafka, planted, Duration::from_secs(5));
        let sampled = sampled();
        let (key, contended) = sampled.iter().find(|(key, _)| key.mark == planted).unwrap();
        assert!(key.stack.len() > 3 && contended.nanoseconds >= 5e9, "{key:?} {contended:?}");
    }
}
