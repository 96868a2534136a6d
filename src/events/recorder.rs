//! `serve --record`: what was consumed from the common lane as a file that `write-api replay` reads, a CloudEvent a line.
//!
//! An event is taken once it has ended well, done or forwarded, and before its message is deleted: so a retried event
//! is there once and not once a try, whichever process ended it. What was refused is not there; it is in the dead-letter
//! queue. A message that comes again after its end, because its delete was lost, is known by its id for the next 65,536
//! at least; beyond that the event is written again, and its own id absorbs that in a replay.
//!
//! The file is written by a thread, so a slow disk delays nobody; lines wait for it in memory up to a limit and are
//! left out beyond. It is appended whole lines at a time, as they come: `kill -9` loses what waits, which is moments,
//! and leaves one broken line at most, the last. Nothing that happens to the recording ever reaches the work: a file that
//! cannot be written ends the recording with one log line, and a metric counts what it misses.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use tokio::sync::oneshot;

use super::envelope;
use crate::metrics::Metrics;
use crate::queue::Message;

/// Bytes of lines that may wait for the disk.
const MOST_WAITING_BYTES: usize = 8 * 1024 * 1024;

/// Bytes written at once, about.
const CHUNK_BYTES: usize = 256 * 1024;

/// Messages known by their id, at least.
const REMEMBERED: usize = 65_536;

/// What to record to.
#[derive(Debug, Clone)]
pub struct Recording {
    /// Created if it is missing, else appended to.
    pub file: PathBuf,
    /// The recording ends before the file is larger than this.
    pub limit_bytes: u64,
}

/// Takes lines for the file. The thread that writes them ends with it.
pub struct Recorder {
    orders: Sender<Order>,
    waiting_bytes: Arc<AtomicUsize>,
    overrun_told: AtomicBool,
    hasher: RandomState,
    metrics: Arc<Metrics>,
}

enum Order {
    /// A line of a message, known by a hash of its id.
    Write { message: u64, line: String },
    /// Say when everything before this is written.
    Flush(oneshot::Sender<()>),
}

impl Recorder {
    /// Starts the thread. The file is opened by it, so that nobody waits for that either.
    pub fn start(recording: Recording, metrics: Arc<Metrics>) -> io::Result<Recorder> {
        let (orders, receiver) = mpsc::channel();
        let waiting_bytes = Arc::new(AtomicUsize::new(0));
        let writer = Writer {
            recording,
            state: State::Ended("failed"),
            size: 0,
            recent: Recent::default(),
            waiting_bytes: waiting_bytes.clone(),
            metrics: metrics.clone(),
        };
        std::thread::Builder::new().name("recorder".to_owned()).spawn(move || writer.run(&receiver))?;
        Ok(Recorder {
            orders,
            waiting_bytes,
            overrun_told: AtomicBool::new(false),
            hasher: RandomState::new(),
            metrics,
        })
    }

    /// Records the event of a message that has ended well. Never waits.
    pub fn record(&self, message: &Message) {
        // The event was decoded before; what cannot be unwrapped was refused.
        let Ok(document) = envelope::document(&message.body) else { return };
        let bytes = document.len() + 1;
        if self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > MOST_WAITING_BYTES {
            self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.metrics.recorded.with_label_values(&["overrun"]).inc();
            if !self.overrun_told.swap(true, Ordering::Relaxed) {
                tracing::error!(
                    waiting_bytes = MOST_WAITING_BYTES,
                    "the recording's disk is slower than the events; the recording lacks what \
                     write_api_recorded_events_total{{result=\"overrun\"}} counts"
                );
            }
            return;
        }
        let mut line = document.into_owned();
        line.push('\n');
        let message = self.hasher.hash_one(&message.id);
        let _ = self.orders.send(Order::Write { message, line });
    }

    /// Waits until everything recorded so far is written, at most for `bound`.
    pub async fn flush(&self, bound: Duration) {
        let (sender, written) = oneshot::channel();
        let _ = self.orders.send(Order::Flush(sender));
        if tokio::time::timeout(bound, written).await.is_err() {
            tracing::warn!(?bound, "the recording's last lines were not written in time");
        }
    }
}

struct Writer {
    recording: Recording,
    state: State,
    size: u64,
    recent: Recent,
    waiting_bytes: Arc<AtomicUsize>,
    metrics: Arc<Metrics>,
}

enum State {
    Recording(File),
    /// For good, with the word that the metric counts the rest by.
    Ended(&'static str),
}

impl Writer {
    fn run(mut self, orders: &Receiver<Order>) {
        match open(&self.recording.file) {
            Ok((file, size)) => {
                let (file_name, limit_bytes) = (self.recording.file.display(), self.recording.limit_bytes);
                tracing::info!(file = %file_name, size_bytes = size, limit_bytes, "recording");
                self.size = size;
                self.state = State::Recording(file);
            }
            Err(error) => self.fail("opened", &error),
        }
        let mut lines = Vec::new();
        while let Ok(first) = orders.recv() {
            let (mut count, mut next) = (0, Some(first));
            while let Some(order) = next.take() {
                match order {
                    Order::Write { message, line } => {
                        self.waiting_bytes.fetch_sub(line.len(), Ordering::Relaxed);
                        count += u64::from(self.take(message, &line, &mut lines));
                    }
                    Order::Flush(done) => {
                        self.write(&mut lines, std::mem::take(&mut count));
                        let _ = done.send(());
                    }
                }
                if lines.len() < CHUNK_BYTES {
                    next = orders.try_recv().ok();
                }
            }
            self.write(&mut lines, count);
        }
    }

    /// Adds a line to those to be written, unless it is there already or the recording has ended.
    fn take(&mut self, message: u64, line: &str, lines: &mut Vec<u8>) -> bool {
        if !self.recent.is_new(message) {
            return false;
        }
        if matches!(self.state, State::Recording(_))
            && self.size + (lines.len() + line.len()) as u64 > self.recording.limit_bytes
        {
            tracing::warn!(
                file = %self.recording.file.display(),
                limit_bytes = self.recording.limit_bytes,
                "the recording has reached --record-limit and ends; the service goes on"
            );
            // What came before still goes into the file, after which nothing more does.
            let taken = lines.iter().filter(|byte| **byte == b'\n').count() as u64;
            self.write(lines, taken);
            if matches!(self.state, State::Recording(_)) {
                self.state = State::Ended("over_limit");
            }
        }
        match self.state {
            State::Recording(_) => {
                lines.extend_from_slice(line.as_bytes());
                true
            }
            State::Ended(why) => {
                self.metrics.recorded.with_label_values(&[why]).inc();
                false
            }
        }
    }

    fn write(&mut self, lines: &mut Vec<u8>, count: u64) {
        if let (State::Recording(file), false) = (&mut self.state, lines.is_empty()) {
            let result = match file.write_all(lines) {
                Ok(()) => {
                    self.size += lines.len() as u64;
                    "written"
                }
                Err(error) => {
                    self.fail("written", &error);
                    "failed"
                }
            };
            self.metrics.recorded.with_label_values(&[result]).inc_by(count);
        }
        lines.clear();
    }

    fn fail(&mut self, what: &str, error: &io::Error) {
        self.state = State::Ended("failed");
        tracing::error!(
            file = %self.recording.file.display(),
            %error,
            "the recording could not be {what} and ends; the service goes on without it"
        );
    }
}

/// Opens the file for appending and gives its size. A line that a killed process left broken gets its end, so that it
/// spoils no other.
fn open(path: &Path) -> io::Result<(File, u64)> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
    let size = file.metadata()?.len();
    if size == 0 {
        return Ok((file, 0));
    }
    let mut last = [0];
    file.seek(SeekFrom::Start(size - 1))?;
    file.read_exact(&mut last)?;
    if last == *b"\n" {
        return Ok((file, size));
    }
    file.write_all(b"\n")?;
    Ok((file, size + 1))
}

/// The last messages, as two generations: when one is full, the one before it is forgotten.
#[derive(Default)]
struct Recent {
    young: HashSet<u64>,
    old: HashSet<u64>,
}

impl Recent {
    fn is_new(&mut self, message: u64) -> bool {
        if self.old.contains(&message) || !self.young.insert(message) {
            return false;
        }
        if self.young.len() >= REMEMBERED {
            self.old = std::mem::take(&mut self.young);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    const SOON: Duration = Duration::from_secs(10);

    fn message(id: &str) -> Message {
        let body = format!(
            r#"{{"specversion":"1.0","id":"{id}","source":"/t","type":"x","time":"2026-01-31T02:00:00Z","data":{{}}}}"#
        );
        Message {
            id: id.to_owned(),
            body,
            receipt: String::new(),
            receive_count: 1,
            redrives: 0,
            received_at: Instant::now(),
        }
    }

    async fn recorded(file: &Path, limit_bytes: u64, ids: &[&str]) -> Arc<Metrics> {
        let metrics = Arc::new(Metrics::new());
        let recording = Recording { file: file.to_owned(), limit_bytes };
        let recorder = Recorder::start(recording, metrics.clone()).expect("a thread");
        for id in ids {
            recorder.record(&message(id));
        }
        recorder.flush(SOON).await;
        metrics
    }

    fn count(metrics: &Metrics, result: &str) -> u64 {
        metrics.recorded.with_label_values(&[result]).get()
    }

    #[tokio::test]
    async fn a_message_is_one_line_however_often_it_comes() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("events");
        let metrics = recorded(&file, u64::MAX, &["a", "b", "a", "c", "b"]).await;
        let text = std::fs::read_to_string(&file).expect("readable");
        let bodies: Vec<String> = ["a", "b", "c"].map(|id| message(id).body).into();
        assert_eq!(text.lines().collect::<Vec<_>>(), bodies);
        assert!(text.ends_with('\n'));
        assert_eq!(count(&metrics, "written"), 3);
    }

    #[tokio::test]
    async fn a_line_that_was_left_broken_spoils_no_other() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("events");
        std::fs::write(&file, "whole\nbrok").expect("writable");
        recorded(&file, u64::MAX, &["a"]).await;
        recorded(&file, u64::MAX, &["b"]).await;
        let text = std::fs::read_to_string(&file).expect("readable");
        assert_eq!(text, format!("whole\nbrok\n{}\n{}\n", message("a").body, message("b").body));
    }

    #[tokio::test]
    async fn the_limit_is_never_passed_and_what_is_missing_is_counted() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("events");
        let line = message("a").body.len() as u64 + 1;
        let metrics = recorded(&file, line * 2 + 1, &["a", "b", "c", "d"]).await;
        assert_eq!(std::fs::metadata(&file).expect("there").len(), line * 2);
        assert_eq!((count(&metrics, "written"), count(&metrics, "over_limit")), (2, 2));
        // The limit is about the file, not about what one process adds to it.
        let metrics = recorded(&file, line * 2 + 1, &["e"]).await;
        assert_eq!((count(&metrics, "written"), count(&metrics, "over_limit")), (0, 1));
    }

    #[tokio::test]
    async fn a_disk_that_is_full_or_a_file_that_cannot_be_made_ends_the_recording_and_nothing_else() {
        for file in ["/dev/full", "/proc/nowhere/events"] {
            let metrics = recorded(Path::new(file), u64::MAX, &["a"]).await;
            assert_eq!((count(&metrics, "written"), count(&metrics, "failed")), (0, 1), "{file}");
        }
    }

    #[test]
    fn messages_are_remembered_long_enough_and_not_for_ever() {
        let mut recent = Recent::default();
        assert!((0..REMEMBERED as u64 * 5).all(|message| recent.is_new(message)));
        let last = REMEMBERED as u64 * 5 - 1;
        assert!((last - REMEMBERED as u64 + 1..=last).all(|message| !recent.is_new(message)));
        assert!(recent.young.len() + recent.old.len() <= REMEMBERED * 2);
    }
}
