//! Heap profiles kept on disk while the service works, each with a record of its moment, so that what grew over a weekend
//! can be read on Monday and a killed process loses at most one interval.
//!
//! A thread of its own at low priority looks once a second whether one is due (`trigger`), takes it, and writes it
//! (`directory`). The work never waits for it; what fails is told and tried again later.

mod directory;
mod record;
mod trigger;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::{heap, now};
use crate::config;
use crate::task::{Kind, registry};

use directory::Directory;
pub use record::{Allocator, Record};
use trigger::{Look, Reason, Trigger};

/// Between two looks at memory and events.
const TICK: Duration = Duration::from_secs(1);

/// After a failure nothing is written for so long, then for twice as long, up to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

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
}

/// The running thread.
pub struct Snapshots {
    stop: mpsc::Sender<()>,
    thread: JoinHandle<()>,
}

impl Snapshots {
    /// Starts the thread; `tell` is called on it with each outcome.
    pub fn start(settings: &config::Snapshots, tell: impl Fn(Outcome) + Send + 'static) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let settings = settings.clone();
        let thread = thread::Builder::new().name("snapshots".to_owned()).spawn(move || {
            // SAFETY: takes numbers only; 0 is the calling thread. Refused, the thread merely has a higher priority.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
            let writer = Writer::new(settings);
            writer.run(&stopped, tell);
        })?;
        Ok(Snapshots { stop, thread })
    }

    /// Takes the last one and ends. Blocks until it is written.
    pub fn stop(self) {
        let _ = self.stop.send(());
        if self.thread.join().is_err() {
            tracing::warn!("the thread of the snapshots panicked");
        }
    }
}

/// Makes the directory, and writes a file there and removes it.
pub fn try_directory(settings: &config::Snapshots) -> anyhow::Result<()> {
    let Some(directory) = directory_of(settings) else { return Ok(()) };
    directory.tidy()?;
    directory.try_out()
}

fn directory_of(settings: &config::Snapshots) -> Option<Directory> {
    let path = settings.directory.clone()?;
    Some(Directory::new(path, settings.budget_bytes))
}

struct Writer {
    settings: config::Snapshots,
    directory: Option<Directory>,
    /// Whether the directory is there and without the rests of dead processes.
    tidied: bool,
    trigger: Trigger,
    host: String,
    start_ms: u64,
    sequence: u64,
    limit: Option<u64>,
}

impl Writer {
    fn new(settings: config::Snapshots) -> Self {
        let directory = directory_of(&settings);
        let trigger = Trigger::new(settings.interval);
        let limit = settings.memory_limit_bytes.or_else(record::memory_limit_bytes);
        Writer {
            settings,
            directory,
            tidied: false,
            trigger,
            host: record::host(),
            start_ms: now_ms(),
            sequence: 0,
            limit,
        }
    }

    fn run(mut self, stopped: &mpsc::Receiver<()>, tell: impl Fn(Outcome)) {
        let begin = Instant::now();
        let mut pause = PAUSE;
        let mut not_before = begin;
        // What failed is tried again for its reason.
        let mut owed = None;
        loop {
            let stopping = match stopped.recv_timeout(TICK) {
                Err(RecvTimeoutError::Timeout) => false,
                Ok(()) | Err(RecvTimeoutError::Disconnected) => true,
            };
            if !stopping && Instant::now() < not_before {
                continue;
            }
            let reason = match stopping {
                true => Some(Reason::Stop),
                false => owed.take().or_else(|| self.trigger.due(look(begin.elapsed(), self.limit))),
            };
            if let Some(reason) = reason {
                match self.write(reason) {
                    Ok(bytes) => {
                        pause = PAUSE;
                        tell(Outcome::Written { bytes });
                    }
                    Err(error) => {
                        tell(Outcome::Failed);
                        let directory = self.settings.directory.as_deref().unwrap_or_else(|| "".as_ref());
                        tracing::warn!(
                            error = format!("{error:#}"),
                            directory = %directory.display(),
                            reason = reason.name(),
                            pause_s = pause.as_secs(),
                            "no snapshot of the heap; the work goes on, and it is tried again after a pause"
                        );
                        owed = Some(reason);
                        not_before = Instant::now() + pause;
                        pause = (pause * 2).min(LONGEST_PAUSE);
                    }
                }
            }
            if stopping {
                return;
            }
        }
    }

    fn write(&mut self, reason: Reason) -> anyhow::Result<u64> {
        let directory = self.directory.as_mut().context("profiling.snapshots.directory is not set")?;
        if !self.tidied {
            directory.tidy()?;
            self.tidied = true;
        }
        let profile = heap::profile(heap::View::Heap)?;
        self.sequence += 1;
        let record = Record {
            time_ms: now_ms(),
            reason: reason.name().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            build_id: profile.mappings.first().map(|program| program.build_id.clone()).unwrap_or_default(),
            host: self.host.clone(),
            start_ms: self.start_ms,
            sequence: self.sequence,
            events_in_flight: events_in_flight(),
            rss_bytes: record::rss_bytes(),
            memory_limit_bytes: self.limit,
            jemalloc: Allocator::read(),
        };
        directory.write(&record, &profile.encode())
    }
}

fn look(now: Duration, limit: Option<u64>) -> Look {
    let mut slow_events = BTreeSet::new();
    for task in registry::live() {
        if let (Kind::ValuationsRefresh | Kind::ValuationsPublish, Some(id)) = (task.kind, &task.about) {
            slow_events.insert(format!("{} {id}", task.kind.name()));
        }
    }
    Look { now, rss: record::rss_bytes(), limit, slow_events }
}

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
