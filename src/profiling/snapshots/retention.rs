//! Which snapshots go. Nothing here reads a clock or a file.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

/// A snapshot, so far as retention asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// The process: its host and start.
    pub process: (String, u64),
    pub time_ms: u64,
    pub bytes: u64,
    pub rss_bytes: u64,
}

/// What may stay.
#[derive(Debug, Clone, Copy)]
pub(super) struct Retention {
    pub budget_bytes: u64,
    pub most: usize,
    pub age: Duration,
}

impl Retention {
    /// What has to go, the newest aside, which stays whatever the limits are.
    ///
    /// The first, the last and the largest of each process are its landmarks. They stay beyond the age, and go after all
    /// others where there are too many, or too many bytes; else the oldest goes first.
    pub fn surplus(&self, entries: &HashMap<String, Entry>, now_ms: u64) -> Vec<String> {
        let mut by_time: Vec<(&String, &Entry)> = entries.iter().collect();
        by_time.sort_by_key(|(stem, entry)| (entry.time_ms, *stem));
        let landmarks = landmarks(&by_time);
        let newest = by_time.last().map(|(stem, _)| *stem);
        let mut bytes: u64 = by_time.iter().map(|(_, entry)| entry.bytes).sum();
        let mut count = by_time.len();
        let oldest_ms = now_ms.saturating_sub(u64::try_from(self.age.as_millis()).unwrap_or(u64::MAX));
        let (last_to_go, first_to_go): (Vec<_>, Vec<_>) =
            by_time.into_iter().partition(|(stem, _)| landmarks.contains(stem));
        let ordinary = first_to_go.len();
        let mut gone = Vec::new();
        for (index, (stem, entry)) in first_to_go.into_iter().chain(last_to_go).enumerate() {
            let is_old = index < ordinary && entry.time_ms < oldest_ms;
            let is_too_much = bytes > self.budget_bytes || count > self.most;
            if Some(stem) != newest && (is_old || is_too_much) {
                bytes -= entry.bytes;
                count -= 1;
                gone.push(stem.clone());
            }
        }
        gone
    }
}

fn landmarks<'a>(by_time: &[(&'a String, &Entry)]) -> BTreeSet<&'a String> {
    let mut processes: BTreeMap<&(String, u64), Vec<&(&'a String, &Entry)>> = BTreeMap::new();
    for entry in by_time {
        processes.entry(&entry.1.process).or_default().push(entry);
    }
    let of_process = |entries: Vec<&(&'a String, &Entry)>| {
        let peak = entries.iter().max_by_key(|(_, entry)| entry.rss_bytes).copied();
        [entries.first().copied(), entries.last().copied(), peak].into_iter().flatten().map(|(stem, _)| *stem).collect()
    };
    processes.into_values().flat_map(|entries| -> Vec<_> { of_process(entries) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Retention = Retention { budget_bytes: u64::MAX, most: usize::MAX, age: Duration::MAX };

    /// Of one process each ten bytes and a second apart; the fourth is the largest.
    fn of_one_process(count: u64) -> HashMap<String, Entry> {
        let entry = |n| Entry {
            process: ("a".to_owned(), 1),
            time_ms: n * 1_000,
            bytes: 10,
            rss_bytes: if n == 4 { 9 } else { 1 },
        };
        (1..=count).map(|n| (n.to_string(), entry(n))).collect()
    }

    #[test]
    fn nothing_goes_without_need() {
        assert!(ALL.surplus(&of_one_process(9), 9_000).is_empty());
        assert!(ALL.surplus(&HashMap::new(), 9_000).is_empty());
    }

    #[test]
    fn bytes_and_count_keep_first_last_and_peak_longest() {
        let entries = of_one_process(9);
        let bytes = |budget_bytes| Retention { budget_bytes, ..ALL }.surplus(&entries, 9_000);
        let count = |most| Retention { most, ..ALL }.surplus(&entries, 9_000);
        for few in [bytes(45), count(4)] {
            assert_eq!(few, ["2", "3", "5", "6", "7"]);
        }
        for fewer in [bytes(20), count(2)] {
            assert_eq!(fewer, ["2", "3", "5", "6", "7", "8", "1"]);
        }
        assert_eq!(bytes(0).len(), 8, "the newest stays");
        assert_eq!(count(0).len(), 8, "the newest stays");
    }

    #[test]
    fn age_leaves_landmarks() {
        let retention = Retention { age: Duration::from_secs(4), ..ALL };
        assert_eq!(retention.surplus(&of_one_process(9), 10_000), ["2", "3", "5"]);
        assert_eq!(retention.surplus(&of_one_process(9), 1_000_000), ["2", "3", "5", "6", "7", "8"]);
    }

    #[test]
    fn landmarks_of_dead_processes_go_before_the_budget_breaks() {
        let entry = |start, time_ms| Entry { process: ("a".to_owned(), start), time_ms, bytes: 10, rss_bytes: 1 };
        let entries: HashMap<String, Entry> = (1..=9).map(|n| (n.to_string(), entry(n, n))).collect();
        let retention = Retention { budget_bytes: 20, ..ALL };
        assert_eq!(retention.surplus(&entries, 9), ["1", "2", "3", "4", "5", "6", "7"]);
    }
}
