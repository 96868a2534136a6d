//! Heap profiles kept on disk while the service works, each with a record of its moment, so that what grew over a weekend
//! can be read on Monday and a killed process loses at most one interval, which is up to 16 times as long while the profiler is
//! above its budget.
//!
//! A thread of its own at low priority hears of each slow event that begins or ends, looks at memory once a second, decides
//! whether a snapshot is due (`trigger`), takes it, and writes it (`directory`). The work never waits for it; what fails is
//! told and tried again later. A second thread sends what is written to S3 where that is set (`upload`).

mod bucket;
mod directory;
mod name;
mod record;
mod retention;
mod store;
mod trigger;
mod upload;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::{heap, now};
use crate::config;
use crate::task::cost::{self, Part, ThreadClock};
use crate::task::{Kind, registry};

pub use bucket::Bucket;
use directory::Directory;
pub use name::Name;
pub use record::{Allocator, Record};
pub use store::{Store, Stored};
use trigger::{Due, Look, Trigger};
use upload::Uploader;

const NICE: libc::c_int = 10;

/// What came of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is on disk; so many bytes are all that are kept.
    Written {
        /// Of all snapshots in the directory.
        bytes: u64,
    },
    /// It is not.
    Failed,
    /// It is in S3.
    Sent {
        /// So many are still to be sent.
        left: u64,
    },
    /// It is not in S3, and will be sent again.
    NotSent,
}

/// Who hears of outcomes.
type Tell = Arc<dyn Fn(Outcome) + Send + Sync>;

/// What the thread is told.
enum Signal {
    /// The task of that number began with a slow event.
    Began(u64, String),
    /// The task of that number ended with its slow event.
    Ended(u64, String),
    /// The last snapshot is to be taken.
    Stop,
}

/// The running thread.
pub struct Snapshots {
    signals: mpsc::Sender<Signal>,
    thread: JoinHandle<()>,
}

impl Snapshots {
    /// Starts the threads; `tell` is called with each outcome. For one at a time in a process: the slow events are told to the
    /// one that was started last.
    pub fn start(settings: &config::Snapshots, tell: impl Fn(Outcome) + Send + Sync + 'static) -> anyhow::Result<Self> {
        let tell: Tell = Arc::new(tell);
        let (signals, received) = mpsc::channel();
        let uploader = match (&settings.s3_url, &settings.directory) {
            (Some(url), Some(directory)) => {
                let bucket = Bucket::open(url, &settings.s3)?;
                Some(Uploader::start(directory.clone(), bucket, Arc::clone(&tell))?)
            }
            _ => None,
        };
        let writer = Writer::new(settings.clone(), uploader);
        let thread = thread::Builder::new().name("snapshots".to_owned()).spawn(move || {
            // SAFETY: takes numbers only; 0 is the calling thread. Refused, the thread merely has a higher priority.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
            writer.run(&received, &tell);
        })?;
        let heard = signals.clone();
        registry::on_slow_event(move |event| {
            let name = format!("{} {}", event.kind.name(), event.about);
            // Nobody hears it any more while the process ends.
            let _ = heard.send(match event.began {
                true => Signal::Began(event.task, name),
                false => Signal::Ended(event.task, name),
            });
        });
        Ok(Snapshots { signals, thread })
    }

    /// Takes the last one and ends. Blocks until it is written and, for some seconds at most, sent.
    pub fn stop(self) {
        let _ = self.signals.send(Signal::Stop);
        if self.thread.join().is_err() {
            tracing::warn!("the thread of the snapshots panicked");
        }
    }
}

/// Makes the directory, and writes a file there and removes it.
pub fn try_directory(settings: &config::Snapshots) -> anyhow::Result<()> {
    let Some(directory) = Directory::of(settings) else { return Ok(()) };
    directory.tidy()?;
    directory.try_out()
}

/// Writes a small file to S3, where nothing may be removed; it is the same file each time.
pub async fn try_bucket(url: &str, settings: &config::S3) -> anyhow::Result<()> {
    Bucket::open(url, settings)?.put("write-api_check", b"a test".to_vec()).await
}

struct Writer {
    settings: config::Snapshots,
    directory: Option<Directory>,
    uploader: Option<Uploader>,
    /// Whether the directory is there and without the rests of dead processes.
    tidied: bool,
    trigger: Trigger,
    host: String,
    start_ms: u64,
    sequence: u64,
    limit: Option<u64>,
}

impl Writer {
    fn new(settings: config::Snapshots, uploader: Option<Uploader>) -> Self {
        Writer {
            directory: Directory::of(&settings),
            uploader,
            tidied: false,
            trigger: Trigger::new(settings.interval, settings.growth_bytes),
            host: record::host(),
            start_ms: now_ms(),
            sequence: 0,
            limit: settings.memory_limit_bytes.or_else(record::memory_limit_bytes),
            settings,
        }
    }

    fn run(mut self, signals: &mpsc::Receiver<Signal>, tell: &Tell) {
        let begin = Instant::now();
        let mut stopping = false;
        let mut clock = ThreadClock::begin(Part::Snapshots);
        loop {
            let due = if stopping {
                Some(self.trigger.stop())
            } else {
                let (rss, stretch) = (record::rss_bytes(), cost::slowdown());
                self.trigger.due(Look { now: begin.elapsed(), rss, limit: self.limit, stretch })
            };
            if let Some(due) = due {
                let written = self.write(&due);
                // Who is told of it may ask what it took.
                clock.turn();
                match written {
                    Ok(bytes) => {
                        self.trigger.taken();
                        tell(Outcome::Written { bytes });
                        if let Some(uploader) = &self.uploader {
                            uploader.wake();
                        }
                    }
                    Err(error) => {
                        tell(Outcome::Failed);
                        let reason = due.reason.name();
                        let pause = self.trigger.failed(due, begin.elapsed());
                        let directory = self.settings.directory.as_deref().unwrap_or_else(|| "".as_ref());
                        tracing::warn!(
                            error = format!("{error:#}"),
                            directory = %directory.display(),
                            reason,
                            pause_s = pause.as_secs(),
                            "no snapshot of the heap; the work goes on, and it is tried again after a pause"
                        );
                    }
                }
            }
            if stopping {
                if let Some(uploader) = self.uploader.take() {
                    uploader.stop();
                }
                return;
            }
            let wait = self.trigger.wait(begin.elapsed(), cost::slowdown());
            clock.turn();
            stopping = self.hear(signals, wait);
        }
    }

    /// Waits for a signal and takes all that there are. Tells whether it is time to stop.
    fn hear(&mut self, signals: &mpsc::Receiver<Signal>, wait: Duration) -> bool {
        let mut signal = signals.recv_timeout(wait);
        loop {
            match signal {
                Ok(Signal::Began(task, event)) => self.trigger.begin(task, event, record::rss_bytes()),
                Ok(Signal::Ended(task, event)) => self.trigger.end(task, event),
                Ok(Signal::Stop) | Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => return false,
            }
            signal = signals.recv_timeout(Duration::ZERO);
        }
    }

    fn write(&mut self, due: &Due) -> anyhow::Result<u64> {
        let directory = self.directory.as_mut().context("profiling.snapshots.directory is not set")?;
        if !self.tidied {
            directory.tidy()?;
            self.tidied = true;
        }
        let time_ms = now_ms();
        let _unsampled = heap::Unsampled::this_thread();
        let profile = heap::profile(heap::View::Heap)?;
        self.sequence += 1;
        let record = Record {
            time_ms,
            reason: due.reason.name().to_owned(),
            service: SERVICE.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            build_id: profile.mappings.first().map(|program| program.build_id.clone()).unwrap_or_default(),
            host: self.host.clone(),
            start_ms: self.start_ms,
            sequence: self.sequence,
            events_in_flight: events_in_flight(),
            slow_events: self.trigger.slow_events(),
            began: due.began.clone(),
            ended: due.ended.clone(),
            rss_bytes: record::rss_bytes(),
            memory_limit_bytes: self.limit,
            jemalloc: Allocator::read(),
        };
        directory.write(&record, &profile.encode())
    }
}

/// What the names of snapshots begin with.
const SERVICE: &str = "write-api";

/// Events that tasks work on now, by kind.
fn events_in_flight() -> BTreeMap<String, u64> {
    let mut kinds = BTreeMap::new();
    for task in registry::live() {
        if task.kind != Kind::Service && task.about.is_some() {
            *kinds.entry(task.kind.name().to_owned()).or_default() += 1;
        }
    }
    kinds
}

fn now_ms() -> u64 {
    u64::try_from(now() / 1_000_000).unwrap_or(0)
}
