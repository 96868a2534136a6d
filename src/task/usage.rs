//! What work has used: memory by the allocator's own counters, and time in polls.
//!
//! The allocator counts for each thread what it hands out and takes back, to the byte. Read whenever the thread's mark changes, the
//! differences belong to the mark before. A block is charged to who allocates it and credited to who frees it, so
//! that what one kind hands to another shows as a difference at both.

use std::cell::Cell;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tikv_jemalloc_ctl::raw;

use super::mark::{self, Kind, Mark};
use super::places::{For, REASONS};

/// What something has used since it began.
#[derive(Debug)]
pub struct Ledger {
    allocated: AtomicU64,
    freed: AtomicU64,
    busy: AtomicU64,
    polls: AtomicU64,
    waits: [AtomicU64; REASONS],
}

/// A [`Ledger`] at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Bytes handed out by the allocator.
    pub allocated: u64,
    /// Bytes taken back.
    pub freed: u64,
    /// Time in polls, by the wall clock: CPU time, and what a busy machine adds to it.
    pub busy: Duration,
    /// Polls of its tasks.
    pub polls: u64,
    /// Time waited, by [`For`]. What waits side by side counts side by side, so that a sum can exceed the time that passed.
    pub waits: [Duration; REASONS],
}

impl Used {
    /// What was waited for, with its name, and how long; without what was not.
    pub fn waits_by_name(&self) -> impl Iterator<Item = (&'static str, Duration)> {
        For::ALL.into_iter().map(|reason| (reason.name(), self.waited(reason))).filter(|(_, waited)| !waited.is_zero())
    }

    /// Time waited for `reason`.
    pub fn waited(&self, reason: For) -> Duration {
        self.waits[reason as usize]
    }
}

impl Ledger {
    /// An empty one.
    pub const fn new() -> Self {
        Ledger {
            allocated: AtomicU64::new(0),
            freed: AtomicU64::new(0),
            busy: AtomicU64::new(0),
            polls: AtomicU64::new(0),
            waits: [const { AtomicU64::new(0) }; REASONS],
        }
    }

    /// What was used until now. The poll that goes on is not in it.
    pub fn read(&self) -> Used {
        let nanoseconds = |of: &AtomicU64| Duration::from_nanos(of.load(Ordering::Relaxed));
        Used {
            allocated: self.allocated.load(Ordering::Relaxed),
            freed: self.freed.load(Ordering::Relaxed),
            busy: nanoseconds(&self.busy),
            polls: self.polls.load(Ordering::Relaxed),
            waits: std::array::from_fn(|reason| nanoseconds(&self.waits[reason])),
        }
    }

    fn add_memory(&self, allocated: u64, freed: u64) {
        self.allocated.fetch_add(allocated, Ordering::Relaxed);
        self.freed.fetch_add(freed, Ordering::Relaxed);
    }

    fn add_busy(&self, busy: Duration) {
        self.busy.fetch_add(busy.as_nanos() as u64, Ordering::Relaxed);
    }

    fn add_wait(&self, reason: For, took: Duration) {
        self.waits[reason as usize].fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }
}

impl Default for Ledger {
    fn default() -> Self {
        Ledger::new()
    }
}

/// Everything since the start, of one mark.
struct Total {
    ledger: Ledger,
    /// Polls, stages and waits.
    steps: AtomicU64,
}

/// By mark.
static TOTALS: [Total; Mark::COUNT] =
    [const { Total { ledger: Ledger::new(), steps: AtomicU64::new(0) } }; Mark::COUNT];

/// Counts a poll, a stage of one, or a wait, next to what is charged to the mark of this thread anyway: one count for all
/// would be written by all threads.
#[inline]
pub(super) fn step() {
    TOTALS[mark::current().index()].steps.fetch_add(1, Ordering::Relaxed);
}

/// Polls, stages and waits since the start of the process.
pub(super) fn steps() -> u64 {
    TOTALS.iter().map(|total| total.steps.load(Ordering::Relaxed)).sum()
}

/// Bytes of the sums.
pub(super) fn memory() -> u64 {
    size_of_val(&TOTALS) as u64
}

/// What all work of a kind has used since the start of the process.
pub fn of_kind(kind: Kind) -> Used {
    let mut sum = Used::default();
    for (index, total) in TOTALS.iter().enumerate() {
        if Mark::from_index(index).kind == kind {
            let used = total.ledger.read();
            sum.allocated += used.allocated;
            sum.freed += used.freed;
            sum.busy += used.busy;
            sum.polls += used.polls;
            for (sum, wait) in sum.waits.iter_mut().zip(used.waits) {
                *sum += wait;
            }
        }
    }
    sum
}

/// The counters of this thread as they were when last read.
#[derive(Clone, Copy)]
struct Counters {
    /// Where the allocator counts; null: not asked for yet.
    allocated_at: *const u64,
    freed_at: *const u64,
    allocated: u64,
    freed: u64,
    /// Beginning of what is not charged to anybody yet; none outside of polls.
    since: Option<Instant>,
    /// The event whose work is being polled.
    ledger: *const Ledger,
}

thread_local! {
    static COUNTERS: Cell<Counters> = const {
        Cell::new(Counters {
            allocated_at: ptr::null(),
            freed_at: ptr::null(),
            allocated: 0,
            freed: 0,
            since: None,
            ledger: ptr::null(),
        })
    };
}

impl Counters {
    /// Finds out where the allocator counts for this thread. Without such an allocator it counts nowhere.
    fn locate(&mut self) {
        static NOWHERE: u64 = 0;
        // SAFETY: both give a pointer to a counter that lives as long as the thread.
        let at = |name: &'static [u8]| unsafe { raw::read::<*const u64>(name) }.unwrap_or(&raw const NOWHERE);
        (self.allocated_at, self.freed_at) = (at(b"thread.allocatedp\0"), at(b"thread.deallocatedp\0"));
        self.read();
    }

    /// What was allocated and freed since the last reading.
    fn read(&mut self) -> (u64, u64) {
        // SAFETY: they were located on this thread.
        let (allocated, freed) = unsafe { (*self.allocated_at, *self.freed_at) };
        let used = (allocated.wrapping_sub(self.allocated), freed.wrapping_sub(self.freed));
        (self.allocated, self.freed) = (allocated, freed);
        used
    }

    /// Charges what was used since the last reading to `mark`; the time too if `timed`, which costs a look at the clock.
    fn charge(&mut self, mark: Mark, timed: bool) {
        if self.allocated_at.is_null() {
            return self.locate();
        }
        let (allocated, freed) = self.read();
        let total = &TOTALS[mark.index()].ledger;
        // SAFETY: the poll that set it holds it.
        let ledger = unsafe { self.ledger.as_ref() };
        total.add_memory(allocated, freed);
        if let Some(ledger) = ledger {
            ledger.add_memory(allocated, freed);
        }
        if let (true, Some(since)) = (timed, &mut self.since) {
            let now = Instant::now();
            let busy = now - std::mem::replace(since, now);
            total.add_busy(busy);
            if let Some(ledger) = ledger {
                ledger.add_busy(busy);
            }
        }
    }
}

/// Charges what this thread has used since the last charge to `former`, which gives way to `next`. Time is told apart by
/// kind only, so a change of stage does not look at the clock.
pub(super) fn charge(former: Mark, next: Mark) {
    let mut counters = COUNTERS.get();
    counters.charge(former, former.kind != next.kind);
    COUNTERS.set(counters);
}

/// A poll of a task. What is used until it is dropped goes to `ledger` as well.
#[must_use]
pub(super) struct Polling {
    former: (*const Ledger, Option<Instant>),
}

impl Polling {
    /// `now`: the time, which the caller has read anyway.
    pub fn begin(ledger: &Arc<Ledger>, now: Instant) -> Self {
        let mut counters = COUNTERS.get();
        // What the thread did before, its scheduler's work, is not this task's.
        counters.charge(mark::current(), true);
        let former = (counters.ledger, counters.since);
        (counters.ledger, counters.since) = (Arc::as_ptr(ledger), Some(now));
        COUNTERS.set(counters);
        ledger.polls.fetch_add(1, Ordering::Relaxed);
        Polling { former }
    }
}

impl Drop for Polling {
    fn drop(&mut self) {
        let mut counters = COUNTERS.get();
        counters.charge(mark::current(), true);
        (counters.ledger, counters.since) = self.former;
        COUNTERS.set(counters);
    }
}

/// Adds a wait that has ended to its event and to its kind.
pub(super) fn waited(mark: Mark, reason: For, took: Duration) {
    TOTALS[mark.index()].ledger.add_wait(reason, took);
    // SAFETY: the poll that set it holds it.
    if let Some(ledger) = unsafe { COUNTERS.get().ledger.as_ref() } {
        ledger.add_wait(reason, took);
    }
}
