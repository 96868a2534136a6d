//! The directory of snapshots: written so that no reader sees half a file, and kept within its budget.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;

use super::record::Record;

const PROFILE: &str = ".pb.gz";
const RECORD: &str = ".json";
const HALF: &str = ".tmp";

/// A file that is half of something for so long belongs to a process that is dead.
const ABANDONED: Duration = Duration::from_secs(60);

/// A snapshot on disk, so far as retention asks.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// The process: its host and start.
    process: (String, u64),
    time_ms: u64,
    bytes: u64,
    rss_bytes: u64,
}

/// A directory of snapshots, which several processes may share.
pub(super) struct Directory {
    path: PathBuf,
    budget_bytes: u64,
    known: HashMap<String, Entry>,
}

impl Directory {
    pub fn new(path: PathBuf, budget_bytes: u64) -> Self {
        Directory { path, budget_bytes, known: HashMap::new() }
    }

    /// Writes a file and removes it again.
    pub fn try_out(&self) -> anyhow::Result<()> {
        let name = format!("write-api_check_{}", std::process::id());
        self.put(&name, b"a test")?;
        let path = self.path.join(name);
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }

    /// Removes what dead processes left half done. A directory that is not there is made.
    pub fn tidy(&self) -> anyhow::Result<()> {
        fs::create_dir_all(&self.path).with_context(|| format!("cannot make {}", self.path.display()))?;
        let names = self.names()?;
        for name in &names {
            let half = name.ends_with(HALF);
            let lone = name.strip_suffix(RECORD).is_some_and(|stem| !names.contains(&format!("{stem}{PROFILE}")));
            let path = self.path.join(name);
            let age = fs::metadata(&path).and_then(|data| data.modified()).ok().and_then(|time| time.elapsed().ok());
            if (half || lone) && age.is_some_and(|age| age > ABANDONED) {
                remove(path)?;
            }
        }
        Ok(())
    }

    /// Writes a snapshot and removes what is then too much. Gives the bytes that all snapshots take.
    pub fn write(&mut self, record: &Record, profile: &[u8]) -> anyhow::Result<u64> {
        let build: String = record.build_id.chars().take(12).collect();
        let stem = format!(
            "write-api_{}_{build}_{}_{}_{:06}_{}",
            record.version, record.host, record.start_ms, record.sequence, record.reason
        );
        // The profile last: where it is, its record is.
        self.put(&format!("{stem}{RECORD}"), &serde_json::to_vec_pretty(record)?)?;
        self.put(&format!("{stem}{PROFILE}"), profile)?;
        self.read()?;
        for stem in surplus(&self.known, self.budget_bytes) {
            remove(self.path.join(format!("{stem}{PROFILE}")))?;
            remove(self.path.join(format!("{stem}{RECORD}")))?;
            self.known.remove(&stem);
        }
        Ok(self.known.values().map(|entry| entry.bytes).sum())
    }

    fn put(&self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        let half = self.path.join(format!(".{name}{HALF}"));
        let whole = self.path.join(name);
        let written = (|| {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&half)?;
            file.write_all(content)?;
            file.sync_data()?;
            fs::rename(&half, &whole)
        })();
        if written.is_err() {
            // A full disk should not be kept full by what did not fit.
            let _ = fs::remove_file(&half);
        }
        written.with_context(|| format!("cannot write {}", whole.display()))
    }

    /// Names of the files of snapshots, half ones too, and of nothing else that may lie here.
    fn names(&self) -> anyhow::Result<BTreeSet<String>> {
        let context = || format!("cannot read {}", self.path.display());
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&self.path).with_context(context)? {
            let name = entry.with_context(context)?.file_name().to_string_lossy().into_owned();
            if name.trim_start_matches('.').starts_with("write-api_") {
                names.insert(name);
            }
        }
        Ok(names)
    }

    /// Brings `known` up to what is in the directory. A record is read once.
    fn read(&mut self) -> anyhow::Result<()> {
        let names = self.names()?;
        let stems: BTreeSet<&str> = names.iter().filter_map(|name| name.strip_suffix(PROFILE)).collect();
        self.known.retain(|stem, _| stems.contains(stem.as_str()));
        for stem in stems {
            if self.known.contains_key(stem) {
                continue;
            }
            let profile = self.path.join(format!("{stem}{PROFILE}"));
            let record = self.path.join(format!("{stem}{RECORD}"));
            // Another process may have removed it meanwhile; what has no readable record is not ours to remove.
            let (Ok(data), Ok(text)) = (fs::metadata(profile), fs::read(record)) else { continue };
            let Ok(record) = serde_json::from_slice::<Record>(&text) else { continue };
            let entry = Entry {
                process: (record.host, record.start_ms),
                time_ms: record.time_ms,
                bytes: data.len() + text.len() as u64,
                rss_bytes: record.rss_bytes,
            };
            self.known.insert(stem.to_owned(), entry);
        }
        Ok(())
    }
}

fn remove(path: PathBuf) -> anyhow::Result<()> {
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// What has to go for the rest to fit: the oldest first, and the first, the last and the largest of each process after
/// all others. The newest of all stays.
fn surplus(entries: &HashMap<String, Entry>, budget_bytes: u64) -> Vec<String> {
    let mut by_time: Vec<(&String, &Entry)> = entries.iter().collect();
    by_time.sort_by_key(|(stem, entry)| (entry.time_ms, *stem));
    let mut processes: BTreeMap<&(String, u64), Vec<(&String, &Entry)>> = BTreeMap::new();
    for (stem, entry) in &by_time {
        processes.entry(&entry.process).or_default().push((stem, entry));
    }
    let mut landmarks: BTreeSet<&String> = BTreeSet::new();
    for of_process in processes.values() {
        let peak = of_process.iter().max_by_key(|(_, entry)| entry.rss_bytes);
        landmarks.extend([of_process.first(), of_process.last(), peak].into_iter().flatten().map(|(stem, _)| *stem));
    }
    let newest = by_time.last().map(|(stem, _)| *stem);
    let mut total: u64 = by_time.iter().map(|(_, entry)| entry.bytes).sum();
    let (kept_longer, first_to_go): (Vec<_>, Vec<_>) =
        by_time.into_iter().partition(|(stem, _)| landmarks.contains(stem));
    let mut gone = Vec::new();
    for (stem, entry) in first_to_go.into_iter().chain(kept_longer) {
        if total <= budget_bytes {
            break;
        }
        if Some(stem) != newest {
            total -= entry.bytes;
            gone.push(stem.clone());
        }
    }
    gone
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::profiling::snapshots::record::Allocator;

    fn record(sequence: u64, rss_bytes: u64) -> Record {
        Record {
            time_ms: 1_000 + sequence,
            reason: "interval".to_owned(),
            version: "0.1.0".to_owned(),
            build_id: "0123456789abcdef".to_owned(),
            host: "pod-1".to_owned(),
            start_ms: 1_000,
            sequence,
            events_in_flight: BTreeMap::new(),
            rss_bytes,
            memory_limit_bytes: None,
            jemalloc: Allocator::default(),
        }
    }

    fn sequences(directory: &Directory) -> Vec<u64> {
        let names = directory.names().expect("readable");
        let profiles = names.iter().filter(|name| name.ends_with(PROFILE));
        profiles.map(|name| name.split('_').nth(5).expect("a number").parse().expect("a number")).collect()
    }

    #[test]
    fn the_budget_keeps_first_last_and_peak() {
        let folder = tempfile::tempdir().expect("a directory");
        let mut directory = Directory::new(folder.path().to_owned(), 25_000);
        for sequence in 1..=10 {
            let bytes = directory.write(&record(sequence, if sequence == 4 { 900 } else { 100 }), &[0; 5_000]);
            assert!(bytes.expect("written") <= 25_000);
        }
        assert_eq!(sequences(&directory), [1, 4, 9, 10]);
    }

    #[test]
    fn landmarks_of_dead_processes_go_before_the_budget_breaks() {
        let entry = |start, time_ms| Entry { process: ("a".to_owned(), start), time_ms, bytes: 10, rss_bytes: 1 };
        let entries: HashMap<String, Entry> = (1..=9).map(|n| (format!("{n}"), entry(n, n))).collect();
        assert_eq!(surplus(&entries, 20), ["1", "2", "3", "4", "5", "6", "7"]);
        assert_eq!(surplus(&entries, 0).len(), 8);
    }

    #[test]
    fn files_are_private_and_whole() {
        let folder = tempfile::tempdir().expect("a directory");
        let mut directory = Directory::new(folder.path().to_owned(), 1 << 20);
        directory.write(&record(1, 1), b"profile").expect("written");
        for name in directory.names().expect("readable") {
            assert!(!name.ends_with(HALF), "{name}");
            let mode = fs::metadata(folder.path().join(&name)).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn what_dead_processes_left_half_done_goes_and_strangers_stay() {
        let folder = tempfile::tempdir().expect("a directory");
        let directory = Directory::new(folder.path().to_owned(), 1 << 20);
        let old = std::time::SystemTime::now() - ABANDONED * 2;
        for (name, is_old) in
            [(".write-api_a.pb.gz.tmp", true), ("write-api_b.json", true), ("write-api_c.json", false), ("notes", true)]
        {
            let file = fs::File::create(folder.path().join(name)).expect("made");
            if is_old {
                file.set_modified(old).expect("set");
            }
        }
        directory.tidy().expect("tidied");
        let mut left: Vec<_> =
            fs::read_dir(folder.path()).expect("readable").map(|entry| entry.expect("one").file_name()).collect();
        left.sort();
        assert_eq!(left, ["notes", "write-api_c.json"]);
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_named() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let directory = Directory::new(file.path().join("below"), 1 << 20);
        let error = format!("{:#}", directory.tidy().expect_err("no directory"));
        assert!(error.contains("below") && error.contains("cannot make"), "{error}");
    }
}
