//! The directory of snapshots: written so that no reader sees half a file, and kept within its limits.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

use super::name::{Name, PROFILE, RECORD};
use super::record::Record;
use super::retention::{Entry, Retention};
use crate::config;

const HALF: &str = ".tmp";

/// An empty file of this kind says that the snapshot is in S3.
const SENT: &str = ".sent";

/// A file that is half of something for so long belongs to a process that is dead.
const ABANDONED: Duration = Duration::from_secs(60);

/// Names of the files of snapshots, half ones too, and of nothing else that may lie there.
fn names(path: &Path) -> anyhow::Result<BTreeSet<String>> {
    let context = || format!("cannot read {}", path.display());
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(path).with_context(context)? {
        let name = entry.with_context(context)?.file_name().to_string_lossy().into_owned();
        if name.trim_start_matches('.').starts_with("write-api_") {
            names.insert(name);
        }
    }
    Ok(names)
}

/// A snapshot that is not in S3 yet.
pub(super) struct Unsent {
    path: PathBuf,
    pub name: Name,
}

/// The snapshots in a directory that are not in S3 yet, in the order in which they were taken.
pub(super) fn unsent(path: &Path) -> anyhow::Result<Vec<Unsent>> {
    let names = match names(path) {
        // The first snapshot makes it.
        Err(_) if !path.exists() => return Ok(Vec::new()),
        names => names?,
    };
    let mut unsent: Vec<Name> = names.iter().filter_map(|name| Name::of_profile(name)).collect();
    unsent.retain(|name| !names.contains(&format!("{name}{SENT}")));
    unsent.sort();
    Ok(unsent.into_iter().map(|name| Unsent { path: path.to_owned(), name }).collect())
}

impl Unsent {
    /// Record and profile; none if it was removed meanwhile.
    pub fn read(&self) -> anyhow::Result<Option<(Vec<u8>, Vec<u8>)>> {
        let read = |file: String| {
            let path = self.path.join(file);
            match fs::read(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                content => content.map(Some).with_context(|| format!("cannot read {}", path.display())),
            }
        };
        Ok(read(self.name.record())?.zip(read(self.name.profile())?))
    }

    /// Notes that it is in S3.
    pub fn mark(&self) -> anyhow::Result<()> {
        let path = self.path.join(format!("{}{SENT}", self.name));
        let made = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        made.map(drop).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// A directory of snapshots, which several processes may share.
pub(super) struct Directory {
    path: PathBuf,
    retention: Retention,
    /// Whether what lies there is to be sent to S3.
    is_spool: bool,
    known: HashMap<String, Entry>,
}

impl Directory {
    pub fn new(path: PathBuf, retention: Retention, is_spool: bool) -> Self {
        Directory { path, retention, is_spool, known: HashMap::new() }
    }

    /// The one that is set, if any.
    pub fn of(settings: &config::Snapshots) -> Option<Self> {
        let retention =
            Retention { budget_bytes: settings.budget_bytes, most: settings.max_count, age: settings.max_age };
        settings.directory.clone().map(|path| Directory::new(path, retention, settings.s3_url.is_some()))
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
        let names = names(&self.path)?;
        for name in &names {
            let half = name.ends_with(HALF);
            let stem = name.strip_suffix(RECORD).or_else(|| name.strip_suffix(SENT));
            let lone = stem.is_some_and(|stem| !names.contains(&format!("{stem}{PROFILE}")));
            let path = self.path.join(name);
            let age = fs::metadata(&path).and_then(|data| data.modified()).ok().and_then(|time| time.elapsed().ok());
            if (half || lone) && age.is_some_and(|age| age > ABANDONED) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Makes room for a snapshot and writes it. Gives the bytes that all snapshots take.
    ///
    /// Room is made first, so that a directory which takes nothing more, a full disk above all, is brought within its
    /// limits all the same.
    pub fn write(&mut self, record: &Record, profile: &[u8]) -> anyhow::Result<u64> {
        let stem = record.name().to_string();
        let text = serde_json::to_vec_pretty(record)?;
        self.read()?;
        self.known.insert(stem.clone(), Entry::of(record, (profile.len() + text.len()) as u64, !self.is_spool));
        let written = self.make_room(record.time_ms).and_then(|()| {
            // The profile last: where it is, its record is.
            let at = self.path.join(format!("{stem}{RECORD}"));
            self.put(&format!("{stem}{RECORD}"), &text)?;
            self.put(&format!("{stem}{PROFILE}"), profile).inspect_err(|_| drop(remove(&at)))
        });
        if written.is_err() {
            self.known.remove(&stem);
        }
        written?;
        Ok(self.known.values().map(|entry| entry.bytes).sum())
    }

    fn make_room(&mut self, now_ms: u64) -> anyhow::Result<()> {
        for stem in self.retention.surplus(&self.known, now_ms) {
            for kind in [PROFILE, RECORD, SENT] {
                remove(&self.path.join(format!("{stem}{kind}")))?;
            }
            self.known.remove(&stem);
        }
        Ok(())
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

    /// Brings `known` up to what is in the directory. A record is read once.
    fn read(&mut self) -> anyhow::Result<()> {
        let names = names(&self.path)?;
        let stems: BTreeSet<&str> = names.iter().filter_map(|name| name.strip_suffix(PROFILE)).collect();
        self.known.retain(|stem, _| stems.contains(stem.as_str()));
        for stem in stems {
            let is_sent = !self.is_spool || names.contains(&format!("{stem}{SENT}"));
            if let Some(known) = self.known.get_mut(stem) {
                known.is_sent = is_sent;
                continue;
            }
            let profile = self.path.join(format!("{stem}{PROFILE}"));
            let record = self.path.join(format!("{stem}{RECORD}"));
            // Another process may have removed it meanwhile; what has no readable record is not ours to remove.
            let (Ok(data), Ok(text)) = (fs::metadata(profile), fs::read(record)) else { continue };
            let Ok(record) = serde_json::from_slice::<Record>(&text) else { continue };
            self.known.insert(stem.to_owned(), Entry::of(&record, data.len() + text.len() as u64, is_sent));
        }
        Ok(())
    }
}

impl Entry {
    fn of(record: &Record, bytes: u64, is_sent: bool) -> Self {
        let process = (record.host.clone(), record.start_ms);
        Entry { process, time_ms: record.time_ms, bytes, rss_bytes: record.rss_bytes, is_sent }
    }
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::profiling::snapshots::Store;

    const ALL: Retention = Retention { budget_bytes: 1 << 20, most: 1_000, age: Duration::MAX };

    fn record(sequence: u64, rss_bytes: u64) -> Record {
        Record {
            time_ms: 1_000 + sequence,
            reason: "interval".to_owned(),
            service: "write-api".to_owned(),
            version: "0.1.0".to_owned(),
            build_id: "0123456789abcdef".to_owned(),
            host: "pod-1".to_owned(),
            start_ms: 1_000,
            sequence,
            rss_bytes,
            ..Record::default()
        }
    }

    fn sequences(directory: &Directory) -> Vec<u64> {
        let names = names(&directory.path).expect("readable");
        names.iter().filter_map(|name| Name::of_profile(name)).map(|name| name.sequence).collect()
    }

    #[tokio::test]
    async fn what_is_written_is_read() {
        let folder = tempfile::tempdir().expect("a directory");
        let mut directory = Directory::new(folder.path().to_owned(), ALL, false);
        directory.write(&record(2, 1), b"later").expect("written");
        directory.write(&record(1, 1), b"first").expect("written");
        let store = Store::Directory(folder.path().to_owned());
        let stored = store.list().await.expect("readable");
        let names: Vec<String> = stored.iter().map(|stored| stored.name.profile()).collect();
        assert_eq!(
            names,
            [
                "write-api_0.1.0_0123456789ab_pod-1_1000_000001_interval.pb.gz",
                "write-api_0.1.0_0123456789ab_pod-1_1000_000002_interval.pb.gz"
            ]
        );
        assert_eq!(stored[1].bytes, 5);
        assert_eq!(store.profile(&stored[1].name).await.expect("there"), b"later");
        assert_eq!(store.record(&stored[1].name).await.expect("there").time_ms, 1_002);
    }

    #[test]
    fn the_budget_holds_after_every_write() {
        let folder = tempfile::tempdir().expect("a directory");
        let mut directory = Directory::new(folder.path().to_owned(), Retention { budget_bytes: 25_000, ..ALL }, false);
        for sequence in 1..=10 {
            let bytes = directory.write(&record(sequence, if sequence == 4 { 900 } else { 100 }), &[0; 5_000]);
            assert!(bytes.expect("written") <= 25_000);
        }
        assert_eq!(sequences(&directory), [1, 4, 9, 10]);
    }

    #[test]
    fn a_profile_that_cannot_be_written_leaves_no_record_and_the_budget_holds_all_the_same() {
        let folder = tempfile::tempdir().expect("a directory");
        let mut directory = Directory::new(folder.path().to_owned(), ALL, false);
        for sequence in 1..=5 {
            directory.write(&record(sequence, 1), &[0; 5_000]).expect("written");
        }
        directory.retention.budget_bytes = 17_000;
        // In the way of the profile, so that its record is written and it is not: as on a disk that fills up between them.
        let stem = record(6, 1).name().to_string();
        fs::create_dir_all(folder.path().join(format!(".{stem}{PROFILE}{HALF}"))).expect("made");
        let error = directory.write(&record(6, 1), &[0; 5_000]).expect_err("in the way");
        assert!(format!("{error:#}").contains("000006_interval.pb.gz"), "{error:#}");
        assert!(!folder.path().join(format!("{stem}{RECORD}")).exists(), "a record without a profile");
        assert_eq!(sequences(&directory), [1, 5], "room was made for the one that could not be written");
    }

    #[test]
    fn what_is_sent_goes_before_what_is_not() {
        let folder = tempfile::tempdir().expect("a directory");
        let retention = Retention { budget_bytes: 21_000, ..ALL };
        let mut directory = Directory::new(folder.path().to_owned(), retention, true);
        assert!(unsent(&folder.path().join("not there")).expect("nothing").is_empty());
        for sequence in 1..=3 {
            directory.write(&record(sequence, 1), &[0; 5_000]).expect("written");
        }
        let sequences_of = |unsent: &[Unsent]| unsent.iter().map(|one| one.name.sequence).collect::<Vec<_>>();
        let first = unsent(folder.path()).expect("readable");
        assert_eq!(sequences_of(&first), [1, 2, 3]);
        let (text, profile) = first[2].read().expect("readable").expect("there");
        assert_eq!(serde_json::from_slice::<Record>(&text).expect("a record").sequence, 3);
        assert_eq!(profile.len(), 5_000);
        first[2].mark().expect("marked");
        assert_eq!(sequences_of(&unsent(folder.path()).expect("readable")), [1, 2]);
        // An outage: nothing is sent any more, and the budget holds at the cost of what was sent, then of the oldest.
        for (sequence, kept) in [(4, &[1, 2, 4][..]), (5, &[1, 4, 5]), (6, &[1, 5, 6])] {
            directory.write(&record(sequence, 1), &[0; 5_000]).expect("written");
            assert_eq!(sequences(&directory), kept, "after {sequence}");
        }
        assert!(!names(folder.path()).expect("readable").iter().any(|name| name.ends_with(SENT)), "a mark is left");
        assert!(first[1].read().expect("no error").is_none(), "it is gone");
    }

    #[test]
    fn files_are_private_and_whole() {
        let folder = tempfile::tempdir().expect("a directory");
        let mut directory = Directory::new(folder.path().to_owned(), ALL, false);
        directory.write(&record(1, 1), b"profile").expect("written");
        for name in names(folder.path()).expect("readable") {
            assert!(!name.ends_with(HALF), "{name}");
            let mode = fs::metadata(folder.path().join(&name)).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn what_a_reader_meets_is_whole() {
        // Takes milliseconds to write, and the reader looks every few microseconds.
        const BYTES: usize = 8 << 20;
        let folder = tempfile::tempdir().expect("a directory");
        let retention = Retention { budget_bytes: u64::MAX, most: 2, ..ALL };
        let mut directory = Directory::new(folder.path().to_owned(), retention, false);
        let (path, mut met) = (folder.path(), 0);
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                for sequence in 1..=5 {
                    directory.write(&record(sequence, 1), &vec![1; BYTES]).expect("written");
                }
            });
            while !writer.is_finished() {
                for name in names(path).expect("readable").iter().filter(|name| Name::of_profile(name).is_some()) {
                    // Gone when it was its turn to make room.
                    let Ok(profile) = fs::metadata(path.join(name)) else { continue };
                    assert_eq!(profile.len(), BYTES as u64, "{name}");
                    met += 1;
                }
            }
        });
        assert!(met > 0, "nothing was met");
    }

    #[test]
    fn what_dead_processes_left_half_done_goes_and_strangers_stay() {
        let folder = tempfile::tempdir().expect("a directory");
        let directory = Directory::new(folder.path().to_owned(), ALL, false);
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
        let directory = Directory::new(file.path().join("below"), ALL, false);
        let error = format!("{:#}", directory.tidy().expect_err("no directory"));
        assert!(error.contains("below") && error.contains("cannot make"), "{error}");
    }
}
