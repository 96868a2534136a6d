//! Faults: what is broken, and the proof that it was.
//!
//! An injection counts as a hit only if something shows that it took effect, and as a hit at work only if that was in the
//! middle of work: a run had an owner or a publisher, or calls were out.

mod clock;
mod descriptors;
pub mod disk;
mod early;
mod kafka;
mod memory;
mod partner;
pub mod points;
mod postgres;
mod process;
mod redrive;
mod sqs;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use fastrand::Rng;
use local_stack::{SqsFault, Stack};
use serde::Serialize;

use crate::checker::Violation;
use crate::world::World;

/// A kind of fault, by its name in `--faults`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// kill -9 at a random instant.
    Kill,
    /// SIGTERM under load.
    Term,
    /// SIGSTOP past the lease, SIGCONT when somebody else has the run.
    Stop,
    /// The process ends itself at a named point.
    CrashPoint,
    /// A panic at a named point.
    Panic,
    /// A thread of the runtime stands still at a named point.
    Stall,
    /// An event that ends the process each time.
    Poison,
    /// A publish event before its run is complete.
    PublishEarly,
    /// The wall clock of a process jumps and jumps back.
    Clock,
    /// A process gets no more memory and is killed by the kernel.
    MemoryCap,
    /// The disk with the database's tables is full for some seconds.
    DiskFull,
    /// A process that lost its connections to the database can open no file and no connection for some seconds.
    Descriptors,
    /// The partner.
    Partner(partner::Schedule),
    /// The broker.
    Kafka(kafka::Trouble),
    /// The database.
    Postgres(postgres::Trouble),
    /// The queues.
    Sqs(SqsFault),
}

/// Past the client's limit of its wait and 2 s more, so that the messages are lost until they are visible.
const LATE_RECEIVE_ANSWER: SqsFault = SqsFault::LateReceiveAnswer(3_500);
/// Past the client's limit for a call.
const SLOW_EXTENSION: SqsFault = SqsFault::ExtensionSlow(2_500);

/// All kinds, with their names and what a round of it needs.
pub const KINDS: &[(&str, Kind)] = &[
    ("kill", Kind::Kill),
    ("term", Kind::Term),
    ("stop", Kind::Stop),
    ("crash-point", Kind::CrashPoint),
    ("panic", Kind::Panic),
    ("stall", Kind::Stall),
    ("poison", Kind::Poison),
    ("publish-early", Kind::PublishEarly),
    ("clock", Kind::Clock),
    ("memory-cap", Kind::MemoryCap),
    ("disk-full", Kind::DiskFull),
    ("descriptors", Kind::Descriptors),
    ("partner-429", Kind::Partner(partner::Schedule::TooMany)),
    ("partner-retry-after", Kind::Partner(partner::Schedule::RetryAfter)),
    ("partner-5xx", Kind::Partner(partner::Schedule::Errors)),
    ("partner-outage", Kind::Partner(partner::Schedule::Outage)),
    ("partner-hang", Kind::Partner(partner::Schedule::Hang)),
    ("partner-garbage", Kind::Partner(partner::Schedule::Garbage)),
    ("partner-answer-lost", Kind::Partner(partner::Schedule::AnswerLost)),
    ("partner-mischief", Kind::Partner(partner::Schedule::Mischief)),
    ("partner-latency", Kind::Partner(partner::Schedule::Latency)),
    ("kafka-errors", Kind::Kafka(kafka::Trouble::Errors)),
    ("kafka-down", Kind::Kafka(kafka::Trouble::Down)),
    ("kafka-late", Kind::Kafka(kafka::Trouble::Late)),
    ("postgres-restart", Kind::Postgres(postgres::Trouble::Restart)),
    ("postgres-backend", Kind::Postgres(postgres::Trouble::Backend)),
    ("postgres-cut", Kind::Postgres(postgres::Trouble::Cut)),
    ("postgres-cut-after-commit", Kind::Postgres(postgres::Trouble::CutAfterCommit)),
    ("postgres-cut-before-execute", Kind::Postgres(postgres::Trouble::CutBeforeExecute)),
    ("postgres-swallow", Kind::Postgres(postgres::Trouble::Swallow)),
    ("postgres-delay", Kind::Postgres(postgres::Trouble::Delay)),
    ("postgres-throttle", Kind::Postgres(postgres::Trouble::Throttle)),
    ("postgres-read-only", Kind::Postgres(postgres::Trouble::ReadOnly)),
    ("sqs-hung-receive", Kind::Sqs(SqsFault::HungReceive)),
    ("sqs-late-receive-answer", Kind::Sqs(LATE_RECEIVE_ANSWER)),
    ("sqs-duplicate-delivery", Kind::Sqs(SqsFault::DuplicateDelivery)),
    ("sqs-extension-fails", Kind::Sqs(SqsFault::ExtensionFails)),
    ("sqs-extension-slow", Kind::Sqs(SLOW_EXTENSION)),
    ("sqs-extension-refused", Kind::Sqs(SqsFault::ExtensionRefused)),
    ("sqs-twelve-hour-refusal", Kind::Sqs(SqsFault::TwelveHourRefusal)),
    ("sqs-delete-answer-lost", Kind::Sqs(SqsFault::DeleteAnswerLost)),
    ("sqs-delete-fails", Kind::Sqs(SqsFault::DeleteFails)),
    ("sqs-stale-receipt", Kind::Sqs(SqsFault::StaleReceipt)),
    ("sqs-partial-batch-failure", Kind::Sqs(SqsFault::PartialBatchFailure)),
    ("sqs-throttle", Kind::Sqs(SqsFault::Throttle)),
    ("sqs-expired-credentials", Kind::Sqs(SqsFault::ExpiredCredentials)),
    ("sqs-send-answer-lost", Kind::Sqs(SqsFault::SendAnswerLost)),
    ("sqs-down", Kind::Sqs(SqsFault::Down)),
];

impl Kind {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        KINDS.iter().find(|(_, kind)| *kind == self).map_or("?", |(name, _)| name)
    }

    /// The kind of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        KINDS.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind)
    }

    /// How many processes its rounds have.
    #[must_use]
    pub fn replicas(self) -> usize {
        // What a message delivered twice is about is its second owner.
        if matches!(self, Self::Stop | Self::Sqs(SqsFault::DuplicateDelivery)) { 2 } else { 1 }
    }

    /// How often it is injected in one round.
    #[must_use]
    pub fn injections(self) -> usize {
        match self {
            Self::Kill => 6,
            Self::Term => 4,
            Self::Postgres(postgres::Trouble::Backend | postgres::Trouble::Cut) => 8,
            Self::CrashPoint => 4,
            Self::Kafka(kafka::Trouble::Errors) | Self::Panic | Self::Postgres(_) => 3,
            Self::Stop
            | Self::Stall
            | Self::PublishEarly
            | Self::Clock
            | Self::MemoryCap
            | Self::DiskFull
            | Self::Descriptors
            | Self::Partner(_)
            | Self::Kafka(_)
            | Self::Sqs(_) => 2,
            Self::Poison => 1,
        }
    }

    /// Whether its rounds need a proxy before Postgres.
    #[must_use]
    pub fn needs_postgres_proxy(self) -> bool {
        matches!(self, Self::Sqs(_) | Self::Postgres(_) | Self::Descriptors)
    }

    /// Whether it needs points in the sources.
    #[must_use]
    pub fn needs_points(self) -> bool {
        matches!(self, Self::CrashPoint | Self::Panic | Self::Stall | Self::Poison)
    }

    /// Whether no process dies by it and none is cut off from its queue and its database: work must not be begun anew.
    #[must_use]
    pub fn leaves_the_owner_alone(self) -> bool {
        matches!(self, Self::Partner(_) | Self::Kafka(_) | Self::Clock | Self::PublishEarly)
    }

    /// Why this machine does not let it be played, if so.
    #[must_use]
    pub fn unplayable(self) -> Option<String> {
        match self {
            Self::Clock => clock::refusal(),
            Self::MemoryCap => memory::refusal(),
            Self::DiskFull => disk::refusal(),
            _ => None,
        }
    }

    /// Makes ready what its rounds need in a world that has not started yet.
    pub async fn prepare(self, world: &mut World, stack: &Stack) -> Result<()> {
        match self {
            Self::Clock => clock::prepare(world),
            Self::DiskFull => disk::prepare(world, stack).await,
            _ => Ok(()),
        }
    }

    /// Whether each loss of partner calls is by a death or a change of owner that the log of faults counts.
    fn is_counted_exactly(self) -> bool {
        matches!(
            self,
            Self::Kill
                | Self::Term
                | Self::Stop
                | Self::CrashPoint
                | Self::MemoryCap
                | Self::PublishEarly
                | Self::Clock
                | Self::Partner(_)
                | Self::Kafka(_)
        )
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One line of the fault log.
#[derive(Clone, Debug, Serialize)]
pub struct Injection {
    /// Seconds since the round began.
    pub at: f64,
    /// The kind's name.
    pub kind: &'static str,
    /// What it was done to.
    pub target: String,
    /// How often it really took effect.
    pub hits: u64,
    /// How often that was in the middle of work.
    pub hits_at_work: u64,
    /// What shows it.
    pub proof: String,
    /// Times that calls and uncommitted answers of a process were lost by it.
    pub interruptions: u64,
    /// Batches of answers that may have been uncommitted then: one for each run at work. `None`: as many as there can be.
    pub batches: Option<u64>,
}

/// Runs at work in a process at most.
const RUNS_AT_WORK: u64 = 4;

/// What an injection is made in.
pub struct Scene<'a> {
    /// The world.
    pub world: &'a mut World,
    /// The servers of this runner: nobody else uses them.
    pub stack: &'a Stack,
    /// All choices come from here.
    pub rng: Rng,
    /// When the round began.
    pub started: Instant,
    /// What was done so far.
    pub log: Vec<Injection>,
    /// What broke in a way that only the fault's own code can see.
    pub violations: Vec<Violation>,
    /// Deaths in a row without progress, by run or publication, with the progress at the last one.
    unproductive: BTreeMap<String, (i64, u32)>,
}

impl<'a> Scene<'a> {
    /// A scene without faults so far.
    pub fn new(world: &'a mut World, stack: &'a Stack, rng: Rng) -> Self {
        let (log, violations, unproductive) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { world, stack, rng, started: Instant::now(), log, violations, unproductive }
    }

    /// Breaks something once and mends it again. `points` are those of the sources that are due.
    pub async fn inject(&mut self, kind: Kind, point: Option<&str>) -> Result<()> {
        tracing::debug!(%kind, point, "injecting");
        let at = self.started.elapsed().as_secs_f64();
        let mut injection = match kind {
            Kind::Kill => process::kill(self).await?,
            Kind::Term => process::term(self).await?,
            Kind::Stop => process::stop(self).await?,
            Kind::CrashPoint => points::crash(self, point.unwrap_or_default()).await?,
            Kind::Panic => points::panic(self, point.unwrap_or_default()).await?,
            Kind::Stall => points::stall(self, point.unwrap_or_default()).await?,
            Kind::Poison => points::poison(self).await?,
            Kind::PublishEarly => early::publish(self).await?,
            Kind::Clock => clock::shift(self).await?,
            Kind::MemoryCap => memory::cap(self).await?,
            Kind::DiskFull => disk::full(self).await?,
            Kind::Descriptors => descriptors::run_out(self).await?,
            Kind::Partner(schedule) => partner::inject(self, schedule).await?,
            Kind::Kafka(trouble) => kafka::inject(self, trouble).await?,
            Kind::Postgres(trouble) => postgres::inject(self, trouble).await?,
            Kind::Sqs(fault) => sqs::inject(self, fault).await?,
        };
        (injection.at, injection.kind) = (at, kind.name());
        self.log.push(injection);
        Ok(())
    }

    /// How many partner calls may have been repeated for what was done so far. `attempts` are all attempts at runs beyond
    /// the first ones; they count where a fault's effect on a process can't be told from outside.
    #[must_use]
    pub fn repeated_calls(&self, attempts: u64) -> u64 {
        let exact = self.log.iter().all(|injection| Kind::named(injection.kind).is_some_and(Kind::is_counted_exactly));
        let counted: u64 = self.log.iter().map(|injection| injection.interruptions).sum();
        let batches = |injection: &Injection| injection.batches.unwrap_or(injection.interruptions * RUNS_AT_WORK);
        let batches: u64 = self.log.iter().map(batches).sum();
        let more = if exact { 0 } else { attempts.saturating_sub(counted) };
        // The permits are the process's; each run at work has a batch of its own.
        (counted + more) * self.world.size.in_flight + (batches + more * RUNS_AT_WORK) * self.world.size.page
    }

    fn violation(&mut self, invariant: &'static str, what: String) {
        self.violations.push(Violation { invariant, what });
    }

    async fn pause(&mut self, milliseconds: std::ops::Range<u64>) {
        tokio::time::sleep(Duration::from_millis(self.rng.u64(milliseconds))).await;
    }
}

impl Injection {
    fn new(target: impl Into<String>) -> Self {
        let (target, proof) = (target.into(), String::new());
        Self { at: 0.0, kind: "", target, hits: 0, hits_at_work: 0, proof, interruptions: 0, batches: None }
    }

    fn hit(mut self, at_work: bool, proof: String) -> Self {
        self.hits += 1;
        self.hits_at_work += u64::from(at_work);
        self.proof = proof;
        self
    }
}

/// Names of all points in the sources below `root`.
pub fn points_in(root: &Path) -> Result<Vec<String>> {
    points::find(root)
}
