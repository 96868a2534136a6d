//! The test of the tests: mistakes that are made on purpose in the service, and the faults that must find them out.

use crate::faults::Kind;

/// A mistake, by its name in the service, and the kinds of faults that it cannot survive.
#[derive(Clone, Copy, Debug)]
pub struct Planted {
    /// The value of `WRITE_API_PLANTED_BUG`.
    pub name: &'static str,
    /// Names of the kinds that are injected, in turn.
    pub faults: &'static [&'static str],
    /// Where processes die, for faults that have a place; all points if empty.
    pub points: &'static [&'static str],
}

/// All mistakes.
pub const PLANTED: &[Planted] = &[
    Planted { name: "delete-before-commit", faults: &["kill", "postgres-restart"], points: &[] },
    Planted { name: "no-unique-key", faults: &["postgres-cut-after-commit"], points: &[] },
    Planted { name: "no-owner-check", faults: &["stop"], points: &[] },
    Planted { name: "cursor-ahead", faults: &["kill"], points: &[] },
    Planted { name: "outbox-by-sequence", faults: &["crash-point"], points: &["run.after_complete"] },
    Planted { name: "no-kafka-flush", faults: &["kafka-down", "kill"], points: &[] },
    Planted { name: "retry-commit-as-new", faults: &["postgres-cut-after-commit"], points: &[] },
    Planted { name: "no-receive-timeout", faults: &["sqs-hung-receive"], points: &[] },
    Planted { name: "permit-leak", faults: &["kafka-errors"], points: &[] },
    Planted { name: "attempt-by-receive", faults: &["term", "sqs-duplicate-delivery"], points: &[] },
    Planted { name: "visibility-never-extended", faults: &["partner-outage", "partner-latency"], points: &[] },
    Planted { name: "retry-after-ignored", faults: &["partner-retry-after"], points: &[] },
];

impl Planted {
    /// The kinds.
    #[must_use]
    pub fn kinds(&self) -> Vec<Kind> {
        self.faults.iter().filter_map(|name| Kind::named(name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mistake_has_faults_that_exist() {
        for planted in PLANTED {
            assert_eq!(planted.kinds().len(), planted.faults.len(), "{planted:?}");
        }
    }
}
