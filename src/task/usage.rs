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

    /// What was used until now. A poll that goes on is not in it, but for that of whoever asked for it by
    /// [`task::ledger`](super::ledger).
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
        add(&self.allocated, allocated);
        add(&self.freed, freed);
    }

    fn add_busy(&self, busy: Duration) {
        add(&self.busy, busy.as_nanos() as u64);
    }

    fn add_wait(&self, reason: usize, nanoseconds: u64) {
        add(&self.waits[reason], nanoseconds);
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
    stages: AtomicU64,
    waits: AtomicU64,
}

/// By mark.
static TOTALS: [Total; Mark::COUNT] =
    [const { Total { ledger: Ledger::new(), stages: AtomicU64::new(0), waits: AtomicU64::new(0) } }; Mark::COUNT];

/// Marks of a thread, and reasons of their waits, that were added to what all threads share.
static SETTLED: AtomicU64 = AtomicU64::new(0);

/// How often books were kept since the start of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Of a poll of a task.
    pub polls: u64,
    /// Of a stage in a poll.
    pub stages: u64,
    /// Of a wait.
    pub waits: u64,
    /// Of a mark of a thread, or a reason of its waits, in the sums that all threads share.
    pub settled: u64,
}

pub(super) fn kept() -> Kept {
    let sum = |of: fn(&Total) -> &AtomicU64| TOTALS.iter().map(|total| of(total).load(Ordering::Relaxed)).sum();
    Kept {
        polls: sum(|total| &total.ledger.polls),
        stages: sum(|total| &total.stages),
        waits: sum(|total| &total.waits),
        settled: SETTLED.load(Ordering::Relaxed),
    }
}

/// Bytes of the sums, without those of each thread.
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

/// What a thread has used and not added to the sums that all threads share: a poll can go through hundreds of stages, and
/// each would cost some atomic operations.
struct Pending {
    of: [Sums; Mark::COUNT],
    /// The marks that have anything, a bit for each.
    marks: Cell<u32>,
}

struct Sums {
    allocated: Cell<u64>,
    freed: Cell<u64>,
    stages: Cell<u64>,
    waits: Cell<u64>,
    /// Nanoseconds waited, by reason.
    waited: [Cell<u64>; REASONS],
}

impl Sums {
    const fn new() -> Self {
        Sums {
            allocated: Cell::new(0),
            freed: Cell::new(0),
            stages: Cell::new(0),
            waits: Cell::new(0),
            waited: [const { Cell::new(0) }; REASONS],
        }
    }
}

const _: () = assert!(Mark::COUNT <= u32::BITS as usize);

impl Pending {
    fn of(&self, mark: Mark) -> &Sums {
        self.marks.set(self.marks.get() | 1 << mark.index());
        &self.of[mark.index()]
    }

    /// Adds all of it to the sums that are shared, and to that of `ledger`.
    fn settle(&self, ledger: Option<&Ledger>) {
        let mut marks = self.marks.take();
        let (mut allocated, mut freed) = (0, 0);
        let mut settled = u64::from(marks.count_ones());
        while marks != 0 {
            let index = marks.trailing_zeros() as usize;
            marks &= marks - 1;
            let (sums, total) = (&self.of[index], &TOTALS[index]);
            let memory = (sums.allocated.take(), sums.freed.take());
            total.ledger.add_memory(memory.0, memory.1);
            add(&total.stages, sums.stages.take());
            let waits = sums.waits.take();
            if waits > 0 {
                add(&total.waits, waits);
                for (reason, waited) in sums.waited.iter().enumerate().filter(|(_, waited)| waited.get() > 0) {
                    let waited = waited.take();
                    settled += 1;
                    total.ledger.add_wait(reason, waited);
                    if let Some(ledger) = ledger {
                        ledger.add_wait(reason, waited);
                    }
                }
            }
            allocated += memory.0;
            freed += memory.1;
        }
        if let Some(ledger) = ledger {
            ledger.add_memory(allocated, freed);
        }
        add(&SETTLED, settled);
    }
}

/// An atomic addition costs as much as all else that is done for a sum, and many are of nothing.
fn add(to: &AtomicU64, more: u64) {
    if more > 0 {
        to.fetch_add(more, Ordering::Relaxed);
    }
}

/// The books of one thread: what it has read, whom it works for, and what it has not settled yet.
struct Here {
    /// Where the allocator counts; null: not asked for yet.
    allocated_at: Cell<*const u64>,
    freed_at: Cell<*const u64>,
    /// Those counters as they were when last read.
    allocated: Cell<u64>,
    freed: Cell<u64>,
    /// Beginning of what is not charged to anybody yet; none outside of polls.
    since: Cell<Option<Instant>>,
    /// The event whose work is being polled.
    ledger: Cell<*const Ledger>,
    pending: Pending,
}

thread_local! {
    static HERE: Here = const {
        Here {
            allocated_at: Cell::new(ptr::null()),
            freed_at: Cell::new(ptr::null()),
            allocated: Cell::new(0),
            freed: Cell::new(0),
            since: Cell::new(None),
            ledger: Cell::new(ptr::null()),
            pending: Pending { of: [const { Sums::new() }; Mark::COUNT], marks: Cell::new(0) },
        }
    };
}

impl Here {
    /// Finds out where the allocator counts for this thread. Without such an allocator it counts nowhere.
    #[cold]
    fn locate(&self) {
        static NOWHERE: u64 = 0;
        // SAFETY: both give a pointer to a counter that lives as long as the thread.
        let at = |name: &'static [u8]| unsafe { raw::read::<*const u64>(name) }.unwrap_or(&raw const NOWHERE);
        self.allocated_at.set(at(b"thread.allocatedp\0"));
        self.freed_at.set(at(b"thread.deallocatedp\0"));
        self.read();
    }

    /// What was allocated and freed since the last reading, once the counters are located.
    fn read(&self) -> (u64, u64) {
        debug_assert!(!self.allocated_at.get().is_null());
        // SAFETY: they were located on this thread.
        let (allocated, freed) = unsafe { (*self.allocated_at.get(), *self.freed_at.get()) };
        (allocated.wrapping_sub(self.allocated.replace(allocated)), freed.wrapping_sub(self.freed.replace(freed)))
    }

    /// Notes what was allocated and freed since the last reading as that of `mark`.
    fn note(&self, mark: Mark) {
        if self.allocated_at.get().is_null() {
            return self.locate();
        }
        let (allocated, freed) = self.read();
        if allocated | freed == 0 {
            return;
        }
        let sums = self.pending.of(mark);
        sums.allocated.set(sums.allocated.get() + allocated);
        sums.freed.set(sums.freed.get() + freed);
    }

    /// Charges everything until `now` to `mark`, and to the event that is being polled.
    fn charge(&self, mark: Mark, now: impl FnOnce() -> Instant) {
        self.note(mark);
        // SAFETY: the poll that set it holds it.
        let ledger = unsafe { self.ledger.get().as_ref() };
        self.pending.settle(ledger);
        if let Some(since) = self.since.get() {
            let now = now();
            let busy = now.saturating_duration_since(since);
            self.since.set(Some(now));
            TOTALS[mark.index()].ledger.add_busy(busy);
            if let Some(ledger) = ledger {
                ledger.add_busy(busy);
            }
        }
    }
}

/// The mark of this thread gives way to `next`. Sums and time are told apart by kind at once; between stages of the same kind
/// only what was allocated is.
pub(super) fn change(former: Mark, next: Mark) {
    HERE.with(|here| {
        if former.kind == next.kind {
            here.note(former);
        } else {
            here.charge(former, Instant::now);
        }
    });
}

/// Charges what this thread has used until now, so that whoever reads the sums in the middle of a poll finds it there.
pub(super) fn settle() {
    HERE.with(|here| here.charge(mark::current(), Instant::now));
}

/// Counts a stage of a poll, which has `mark`.
#[inline]
pub(super) fn stage(mark: Mark) {
    HERE.with(|here| {
        let sums = here.pending.of(mark);
        sums.stages.set(sums.stages.get() + 1);
    });
}

/// Begins a poll of a task at `now`: what is used until [`end_poll`] goes to `ledger` as well. The mark is the caller's to
/// change, without a charge of its own. Returns what [`end_poll`] puts back.
pub(super) fn begin_poll(ledger: &Arc<Ledger>, mark: Mark, now: Instant) -> Outer {
    ledger.polls.fetch_add(1, Ordering::Relaxed);
    TOTALS[mark.index()].ledger.polls.fetch_add(1, Ordering::Relaxed);
    HERE.with(|here| {
        // What the thread did before, its scheduler's work, is not this task's.
        here.charge(mark::current(), || now);
        Outer { ledger: here.ledger.replace(Arc::as_ptr(ledger)), since: here.since.replace(Some(now)) }
    })
}

/// Ends it at `now`.
pub(super) fn end_poll(outer: &Outer, now: Instant) {
    HERE.with(|here| {
        here.charge(mark::current(), || now);
        // A poll inside of another is not charged to it.
        here.ledger.set(outer.ledger);
        here.since.set(outer.since.map(|_| now));
    });
}

/// What was polled when a poll began.
pub(super) struct Outer {
    ledger: *const Ledger,
    since: Option<Instant>,
}

/// When the poll of a task that this thread is in began, or turned to another kind of work; now, outside of one. Waits and calls
/// are timed by it: they begin and end in polls, many in one, and a look at the clock costs as much as all else that is noted
/// of them.
pub(super) fn poll_began() -> Instant {
    HERE.with(|here| here.since.get()).unwrap_or_else(Instant::now)
}

/// Adds a wait that has ended to its kind and, in a poll, to the event that is polled.
pub(super) fn waited(mark: Mark, reason: For, took: Duration) {
    let took = took.as_nanos() as u64;
    HERE.with(|here| {
        if here.since.get().is_some() {
            let sums = here.pending.of(mark);
            sums.waits.set(sums.waits.get() + 1);
            let waited = &sums.waited[reason as usize];
            waited.set(waited.get() + took);
        } else {
            let total = &TOTALS[mark.index()];
            add(&total.waits, 1);
            total.ledger.add_wait(reason as usize, took);
        }
    });
}
