//! What work has used: memory by the allocator's own counters, and time in polls.
//!
//! The allocator counts for each thread what it hands out and takes back, to the byte. Read whenever the thread's mark changes, the
//! differences belong to the mark before. A block is charged to who allocates it and credited to who frees it, so
//! that what one kind hands to another shows as a difference at both.
//!
//! Each thread keeps books: sums by kind and stage that it alone writes, and that readers add up over all threads. An event has
//! a [`Ledger`], which every thread that polls a task of it adds to, at the end of the poll: what it has until then is pending.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tikv_jemalloc_ctl::raw;

use super::mark::{self, Kind, Mark, Stage};
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

    /// What was used until now. Of an event, a poll that goes on is not in it, but for that of whoever asked for it by
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
}

impl Default for Ledger {
    fn default() -> Self {
        Ledger::new()
    }
}

/// What one thread has used since it began, and those before it that had the same books: written by that thread alone, so that no
/// addition has to be atomic, and read by whoever asks.
struct Books {
    of: [Sums; Mark::COUNT],
    /// How often it was charged in the middle of a poll, and for how many reasons waits were added to a ledger.
    charges: AtomicU64,
    reasons: AtomicU64,
}

/// Of one mark.
struct Sums {
    used: Ledger,
    stages_entered: AtomicU64,
    waits_ended: AtomicU64,
}

impl Books {
    const fn new() -> Self {
        Books {
            of: [const { Sums { used: Ledger::new(), stages_entered: AtomicU64::new(0), waits_ended: AtomicU64::new(0) } };
                Mark::COUNT],
            charges: AtomicU64::new(0),
            reasons: AtomicU64::new(0),
        }
    }
}

/// The books of all threads.
static BOOKS: Mutex<Shelf> = Mutex::new(Shelf { all: Vec::new(), free: Vec::new() });

struct Shelf {
    all: Vec<&'static Books>,
    /// Of threads that have ended. The next that begin go on with them.
    free: Vec<&'static Books>,
}

fn shelf() -> MutexGuard<'static, Shelf> {
    BOOKS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shelf {
    /// Books that no thread has. There are never more than threads at a time, and none is ever freed: what is in them counts.
    fn take(&mut self) -> &'static Books {
        self.free.pop().unwrap_or_else(|| {
            let books: &'static Books = Box::leak(Box::new(Books::new()));
            self.all.push(books);
            // So that putting them back, which a thread does at its very end, needs no memory.
            self.free.reserve(self.all.len());
            books
        })
    }

    fn put_back(&mut self, books: &'static Books) {
        self.free.push(books);
    }
}

/// Adds to what no other thread writes.
fn add_own(to: &AtomicU64, more: u64) {
    to.store(to.load(Ordering::Relaxed) + more, Ordering::Relaxed);
}

/// How often books were kept since the start of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Of a poll of a task.
    pub polls: u64,
    /// Of a stage in a poll.
    pub stages: u64,
    /// Of a wait.
    pub waits: u64,
    /// By a charge in the middle of a poll.
    pub charges: u64,
    /// Of the waits for one reason that ended in a poll, in the event's ledger.
    pub reasons: u64,
}

pub(super) fn kept() -> Kept {
    let mut kept = Kept { polls: 0, stages: 0, waits: 0, charges: 0, reasons: 0 };
    let read = |of: &AtomicU64| of.load(Ordering::Relaxed);
    for books in &shelf().all {
        for sums in &books.of {
            kept.polls += read(&sums.used.polls);
            kept.stages += read(&sums.stages_entered);
            kept.waits += read(&sums.waits_ended);
        }
        kept.charges += read(&books.charges);
        kept.reasons += read(&books.reasons);
    }
    kept
}

/// Bytes of the books of all threads.
pub(super) fn memory() -> u64 {
    (shelf().all.len() * size_of::<Books>()) as u64
}

/// What all work of a kind has used since the start of the process.
pub fn of_kind(kind: Kind) -> Used {
    let mut sum = Used::default();
    for books in &shelf().all {
        for stage in Stage::ALL {
            let used = books.of[Mark { kind, stage }.index()].used.read();
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

/// What was used in a poll and is not added to the event's ledger yet, which other threads write too: a poll can go through hundreds of
/// stages and waits, and each would cost some atomic operations.
struct Pending {
    allocated: Cell<u64>,
    freed: Cell<u64>,
    /// Nanoseconds waited, by reason.
    waited: [Cell<u64>; REASONS],
    has_waited: Cell<bool>,
}

impl Pending {
    /// Adds all of it to `ledger`; says for how many reasons there were waits.
    fn settle(&self, ledger: &Ledger) -> u64 {
        add(&ledger.allocated, self.allocated.take());
        add(&ledger.freed, self.freed.take());
        let mut reasons = 0;
        if self.has_waited.take() {
            for (sum, waited) in ledger.waits.iter().zip(&self.waited).filter(|(_, waited)| waited.get() > 0) {
                add(sum, waited.take());
                reasons += 1;
            }
        }
        reasons
    }
}

/// An atomic addition costs as much as all else that is done for a sum, and many are of nothing.
fn add(to: &AtomicU64, more: u64) {
    if more > 0 {
        to.fetch_add(more, Ordering::Relaxed);
    }
}

/// What a thread keeps its books by.
struct Here {
    /// None: not asked for yet, or the thread is at its end.
    books: Cell<Option<&'static Books>>,
    /// Where the allocator counts, once there are books.
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
            books: Cell::new(None),
            allocated_at: Cell::new(ptr::null()),
            freed_at: Cell::new(ptr::null()),
            allocated: Cell::new(0),
            freed: Cell::new(0),
            since: Cell::new(None),
            ledger: Cell::new(ptr::null()),
            pending: Pending {
                allocated: Cell::new(0),
                freed: Cell::new(0),
                waited: [const { Cell::new(0) }; REASONS],
                has_waited: Cell::new(false),
            },
        }
    };

    /// Puts the books of the thread back when it ends.
    static BORROWED: Borrowed = Borrowed(shelf().take());
}

struct Borrowed(&'static Books);

impl Drop for Borrowed {
    fn drop(&mut self) {
        HERE.with(|here| here.books.set(None));
        shelf().put_back(self.0);
    }
}

impl Here {
    /// The books of this thread; none once it is at its end.
    fn books(&self) -> Option<&'static Books> {
        self.books.get().or_else(|| self.open())
    }

    /// Finds books for this thread, and where the allocator counts for it. Without such an allocator it counts nowhere.
    #[cold]
    fn open(&self) -> Option<&'static Books> {
        static NOWHERE: u64 = 0;
        let books = BORROWED.try_with(|borrowed| borrowed.0).ok()?;
        // SAFETY: both give a pointer to a counter that lives as long as the thread.
        let at = |name: &'static [u8]| unsafe { raw::read::<*const u64>(name) }.unwrap_or(&raw const NOWHERE);
        self.allocated_at.set(at(b"thread.allocatedp\0"));
        self.freed_at.set(at(b"thread.deallocatedp\0"));
        self.read();
        self.books.set(Some(books));
        Some(books)
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
        let Some(books) = self.books() else { return };
        let (allocated, freed) = self.read();
        if allocated | freed == 0 {
            return;
        }
        let used = &books.of[mark.index()].used;
        add_own(&used.allocated, allocated);
        add_own(&used.freed, freed);
        if !self.ledger.get().is_null() {
            self.pending.allocated.set(self.pending.allocated.get() + allocated);
            self.pending.freed.set(self.pending.freed.get() + freed);
        }
    }

    /// As [`charge`](Self::charge), in the middle of a poll: a poll has one at its beginning and one at its end.
    fn charge_within(&self, mark: Mark) {
        self.charge(mark, Instant::now);
        if let Some(books) = self.books() {
            add_own(&books.charges, 1);
        }
    }

    /// Charges everything until `now` to `mark`, and to the event that is being polled.
    fn charge(&self, mark: Mark, now: impl FnOnce() -> Instant) {
        self.note(mark);
        // SAFETY: the poll that set it holds it.
        let ledger = unsafe { self.ledger.get().as_ref() };
        if let Some(ledger) = ledger {
            let reasons = self.pending.settle(ledger);
            if let (1.., Some(books)) = (reasons, self.books()) {
                add_own(&books.reasons, reasons);
            }
        }
        if let Some(since) = self.since.get() {
            let now = now();
            let busy = now.saturating_duration_since(since).as_nanos() as u64;
            self.since.set(Some(now));
            if let Some(books) = self.books() {
                add_own(&books.of[mark.index()].used.busy, busy);
            }
            if let Some(ledger) = ledger {
                add(&ledger.busy, busy);
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
            here.charge_within(former);
        }
    });
}

/// Charges what this thread has used until now, so that whoever reads the sums in the middle of a poll finds it there.
pub(super) fn settle() {
    HERE.with(|here| here.charge_within(mark::current()));
}

/// Counts a stage of a poll, which has `mark`.
#[inline]
pub(super) fn stage(mark: Mark) {
    HERE.with(|here| {
        if let Some(books) = here.books() {
            add_own(&books.of[mark.index()].stages_entered, 1);
        }
    });
}

/// Begins a poll of a task at `now`: what is used until [`end_poll`] goes to `ledger` as well. The mark is the caller's to
/// change, without a charge of its own. Returns what [`end_poll`] puts back.
pub(super) fn begin_poll(ledger: &Arc<Ledger>, mark: Mark, now: Instant) -> Outer {
    add(&ledger.polls, 1);
    HERE.with(|here| {
        if let Some(books) = here.books() {
            add_own(&books.of[mark.index()].used.polls, 1);
        }
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
        if let Some(books) = here.books() {
            let sums = &books.of[mark.index()];
            add_own(&sums.waits_ended, 1);
            add_own(&sums.used.waits[reason as usize], took);
        }
        if !here.ledger.get().is_null() {
            let waited = &here.pending.waited[reason as usize];
            waited.set(waited.get() + took);
            here.pending.has_waited.set(true);
        }
    });
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;
    use std::thread;

    use super::*;
    use crate::task::mark::stage;

    #[test]
    fn what_a_thread_has_used_stays_when_it_ends() {
        const THREADS: u64 = 20;
        const EACH: u64 = 1 << 20;
        let before = of_kind(Kind::Service);
        for _ in 0..THREADS {
            thread::spawn(|| stage(Stage::Write, || drop(black_box(vec![0_u8; EACH as usize])))).join().unwrap();
        }
        let after = of_kind(Kind::Service);
        assert!(after.allocated - before.allocated >= THREADS * EACH, "{before:?} {after:?}");
        assert!(after.freed - before.freed >= THREADS * EACH, "{before:?} {after:?}");
    }

    #[test]
    fn the_next_thread_goes_on_with_the_books_of_one_that_ended() {
        let mut shelf = Shelf { all: Vec::new(), free: Vec::new() };
        let (one, other) = (shelf.take(), shelf.take());
        assert!(!ptr::eq(one, other));
        shelf.put_back(one);
        assert!(ptr::eq(shelf.take(), one));
        assert_eq!((shelf.all.len(), shelf.free.len()), (2, 0));
    }
}
