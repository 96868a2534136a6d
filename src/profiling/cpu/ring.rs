//! Samples on their way from signal handlers to the thread that counts them.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// The most frames of one sample; what is further out is cut off.
pub const DEPTH: usize = 128;

/// What a thread was at when its time was up.
pub struct Sample {
    /// The thread, by the kernel's number.
    pub thread: i32,
    /// Periods that this sample stands for.
    pub periods: u32,
    /// What the thread works on.
    pub mark: u16,
    length: usize,
    frames: [usize; DEPTH],
}

impl Sample {
    /// The stack, the innermost frame first.
    pub fn frames(&self) -> &[usize] {
        &self.frames[..self.length]
    }
}

/// Places for samples. Writers never wait: where none is free the sample is counted as lost.
pub struct Ring {
    slots: Box<[Slot]>,
    next: AtomicUsize,
    lost: AtomicU64,
}

struct Slot {
    state: AtomicU32,
    sample: UnsafeCell<Sample>,
}

const FREE: u32 = 0;
const TAKEN: u32 = 1;
const FULL: u32 = 2;

// SAFETY: the state gives a slot to one at a time.
unsafe impl Sync for Slot {}

impl Ring {
    pub fn new(places: usize) -> Self {
        let slot = |_| Slot {
            state: AtomicU32::new(FREE),
            sample: UnsafeCell::new(Sample { thread: 0, periods: 0, mark: 0, length: 0, frames: [0; DEPTH] }),
        };
        Ring { slots: (0..places).map(slot).collect(), next: AtomicUsize::new(0), lost: AtomicU64::new(0) }
    }

    /// Bytes of all places.
    pub fn memory(&self) -> u64 {
        size_of_val(&*self.slots) as u64
    }

    /// Adds a sample whose frames `fill` writes. Async-signal-safe as far as `fill` is.
    pub fn add(&self, thread: i32, periods: u32, mark: u16, fill: impl FnOnce(&mut [usize]) -> usize) {
        let at = self.next.fetch_add(1, Ordering::Relaxed) % self.slots.len();
        let slot = &self.slots[at];
        if slot.state.compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed).is_err() {
            self.lost.fetch_add(u64::from(periods), Ordering::Relaxed);
            return;
        }
        // SAFETY: the slot was free and is ours.
        let sample = unsafe { &mut *slot.sample.get() };
        (sample.thread, sample.periods, sample.mark) = (thread, periods, mark);
        sample.length = fill(&mut sample.frames);
        slot.state.store(FULL, Ordering::Release);
    }

    /// Hands out what has come, and frees its places.
    pub fn drain(&self, mut take: impl FnMut(&Sample)) {
        for slot in &self.slots {
            if slot.state.load(Ordering::Acquire) == FULL {
                // SAFETY: a full slot belongs to the only reader until it is free again.
                take(unsafe { &*slot.sample.get() });
                slot.state.store(FREE, Ordering::Release);
            }
        }
    }

    /// Periods that found no free place.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}
