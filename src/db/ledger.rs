//! What the work on a run or a publication has used, as its row keeps it: it outlives the process, and sums up all
//! attempts.

use std::collections::BTreeMap;
use std::ops::Add;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::task::Kind;
use crate::task::usage::Used;

/// The sum over attempts. A field that an older row lacks is 0.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkLedger {
    /// Bytes handed out by the allocator.
    pub allocated_bytes: u64,
    /// Bytes taken back.
    pub freed_bytes: u64,
    /// Microseconds in polls.
    pub busy_us: u64,
    /// Polls.
    pub polls: u64,
    /// Microseconds waited, by what for.
    pub waited_us: BTreeMap<String, u64>,
}

impl WorkLedger {
    /// What the row of a run, or of one of its publications, has. Another release may have written it: what this one
    /// cannot read counts as nothing, and is told. It is a figure, and no reason to fail work.
    pub fn read(kind: Kind, run_id: &str, kept: &RawValue) -> Self {
        serde_json::from_str(kept.get()).unwrap_or_else(|error| {
            let kind = kind.name();
            tracing::warn!(run_id, kind, %error, "what work on a run has used cannot be read; it counts as nothing");
            WorkLedger::default()
        })
    }

    /// With what one more attempt has used so far.
    pub fn with(&self, used: &Used) -> Self {
        let waits = used.waits_by_name();
        self.clone()
            + WorkLedger {
                allocated_bytes: used.allocated,
                freed_bytes: used.freed,
                busy_us: used.busy.as_micros() as u64,
                polls: used.polls,
                waited_us: waits.map(|(reason, waited)| (reason.to_owned(), waited.as_micros() as u64)).collect(),
            }
    }

    /// What was allocated and not freed by the work itself. Negative where it freed what others had allocated.
    pub fn held_bytes(&self) -> i64 {
        self.allocated_bytes.wrapping_sub(self.freed_bytes) as i64
    }
}

impl Add for WorkLedger {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        // What a row has can be any number.
        let add = |sum: &mut u64, more: u64| *sum = sum.saturating_add(more);
        add(&mut self.allocated_bytes, other.allocated_bytes);
        add(&mut self.freed_bytes, other.freed_bytes);
        add(&mut self.busy_us, other.busy_us);
        add(&mut self.polls, other.polls);
        for (reason, us) in other.waited_us {
            add(self.waited_us.entry(reason).or_default(), us);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::task::For;

    #[test]
    fn what_cannot_be_read_counts_as_nothing() {
        let read = |json: &str| {
            WorkLedger::read(Kind::ValuationsRefresh, "run", &RawValue::from_string(json.to_owned()).unwrap())
        };
        let written = WorkLedger { polls: 7, waited_us: [("kafka".to_owned(), 1)].into(), ..WorkLedger::default() };
        assert_eq!(read(&serde_json::to_string(&written).unwrap()), written);
        assert_eq!(read(r#"{"polls": 7, "waited_us": {"kafka": 1}, "of a later release": []}"#), written);
        for other in
            [r#"{"polls": -7}"#, r#"{"polls": 1.5}"#, r#"{"polls": 1e400}"#, r#"{"waited_us": [1]}"#, "[]", "7"]
        {
            assert_eq!(read(other), WorkLedger::default(), "{other}");
        }
    }

    #[test]
    fn figures_that_cannot_be_are_summed_up_as_well() {
        let most = WorkLedger {
            allocated_bytes: u64::MAX,
            busy_us: u64::MAX,
            polls: 1,
            waited_us: [("kafka".to_owned(), u64::MAX)].into(),
            ..WorkLedger::default()
        };
        let sum = most.clone() + most.clone();
        assert_eq!(sum, WorkLedger { polls: 2, ..most });
        assert_eq!(sum.held_bytes(), -1);
    }

    #[test]
    fn attempts_add_up() {
        let mut used = Used { allocated: 10, freed: 7, busy: Duration::from_millis(2), polls: 3, ..Used::default() };
        used.waits[For::Partner as usize] = Duration::from_micros(5);
        let first = WorkLedger::default().with(&used);
        used.waits[For::Kafka as usize] = Duration::from_micros(1);
        let both = first.with(&used);
        assert_eq!((both.allocated_bytes, both.freed_bytes, both.busy_us, both.polls), (20, 14, 4_000, 6));
        assert_eq!(both.waited_us, [("kafka".to_owned(), 1), ("partner".to_owned(), 10)].into());
        assert_eq!(both.held_bytes(), 6);
    }
}
