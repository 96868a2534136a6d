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
    /// Whether it is in S3 as well, or is not to be.
    pub is_sent: bool,
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
    /// others where there are too many, or too many bytes; else the oldest goes first. What is not sent yet goes for bytes
    /// alone, and after all that is sent.
    pub fn surplus(&self, entries: &HashMap<String, Entry>, now_ms: u64) -> Vec<String> {
        let mut by_time: Vec<(&String, &Entry)> = entries.iter().collect();
        by_time.sort_by_key(|(stem, entry)| (entry.time_ms, *stem));
        let landmarks = landmarks(&by_time);
        let newest = by_time.last().map(|(stem, _)| *stem);
        let mut bytes: u64 = by_time.iter().map(|(_, entry)| entry.bytes).sum();
        let mut count = by_time.len();
        let oldest_ms = now_ms.saturating_sub(u64::try_from(self.age.as_millis()).unwrap_or(u64::MAX));
        // Stable, so that the order of time stays within each of the four.
        by_time.sort_by_key(|(stem, entry)| (!entry.is_sent, landmarks.contains(stem)));
        let mut gone = Vec::new();
        for (stem, entry) in by_time {
            let is_old = entry.time_ms < oldest_ms && !landmarks.contains(stem);
            let too_many = count > self.most;
            let goes = bytes > self.budget_bytes || entry.is_sent && (is_old || too_many);
            if goes && Some(stem) != newest {
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
            is_sent: true,
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
        let process = |start| ("a".to_owned(), start);
        let entry = |start, time_ms| Entry { process: process(start), time_ms, bytes: 10, rss_bytes: 1, is_sent: true };
        let entries: HashMap<String, Entry> = (1..=9).map(|n| (n.to_string(), entry(n, n))).collect();
        let retention = Retention { budget_bytes: 20, ..ALL };
        assert_eq!(retention.surplus(&entries, 9), ["1", "2", "3", "4", "5", "6", "7"]);
    }
    #[test]
    fn what_is_not_sent_goes_last_and_for_bytes_alone() {
        let mut entries = of_one_process(9);
        for unsent in ["2", "3", "9"] {
            entries.get_mut(unsent).expect("there").is_sent = false;
        }
        let age = Retention { age: Duration::ZERO, ..ALL };
        assert_eq!(age.surplus(&entries, 1_000_000), ["5", "6", "7", "8"]);
        let count = Retention { most: 1, ..ALL };
        assert_eq!(count.surplus(&entries, 9_000), ["5", "6", "7", "8", "1", "4"]);
        let bytes = Retention { budget_bytes: 20, ..ALL };
        assert_eq!(bytes.surplus(&entries, 9_000), ["5", "6", "7", "8", "1", "4", "2"]);
    }
}
