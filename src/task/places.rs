//! Where work waits: a row for each place in the sources, counted without locks.

use std::hint;
use std::panic::Location;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::time::Duration;

use super::mark::{KINDS, Kind};

/// More places than the sources have. What finds none left is counted together, without its place.
const MOST_PLACES: usize = 128;

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum For {
    /// A permit of a limit: calls in flight, pages in memory, events of a lane.
    Permit,
    /// The pace of the partner's calls.
    Pacing,
    /// The partner's answer.
    Partner,
    /// A connection of the pool, or Postgres' answer.
    Database,
    /// Kafka's delivery reports, or room in its queue.
    Kafka,
    /// SQS.
    Queue,
    /// A lock that another thread holds.
    Lock,
}

/// How many there are.
pub const REASONS: usize = 7;

impl For {
    /// All of them, in the order of their numbers.
    pub const ALL: [For; REASONS] =
        [For::Permit, For::Pacing, For::Partner, For::Database, For::Kafka, For::Queue, For::Lock];

    /// The name in profiles, metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            For::Permit => "permit",
            For::Pacing => "pacing",
            For::Partner => "partner",
            For::Database => "database",
            For::Kafka => "kafka",
            For::Queue => "queue",
            For::Lock => "lock",
        }
    }
}

/// What was counted at one place, for one event kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waited {
    /// Waits that go on.
    pub now: u64,
    /// Waits that have ended.
    pub count: u64,
    /// How long those took together.
    pub total: Duration,
}

/// A row of the table, as it is read.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The place in the sources; `None`: the places for which the table had no room.
    pub place: Option<&'static Location<'static>>,
    /// What is waited for there.
    pub reason: For,
    /// Whose work waits.
    pub kind: Kind,
    /// How much.
    pub waited: Waited,
}

struct Place {
    location: AtomicPtr<Location<'static>>,
    reason: AtomicU64,
    counts: [Counts; KINDS],
}

struct Counts {
    begun: AtomicU64,
    count: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Counts {
    const fn new() -> Counts {
        Counts { begun: AtomicU64::new(0), count: AtomicU64::new(0), nanoseconds: AtomicU64::new(0) }
    }
}

impl Place {
    const fn empty() -> Place {
        Place {
            location: AtomicPtr::new(ptr::null_mut()),
            reason: AtomicU64::new(0),
            counts: [const { Counts::new() }; KINDS],
        }
    }
}

static PLACES: [Place; MOST_PLACES] = [const { Place::empty() }; MOST_PLACES];
static ELSEWHERE: Place = Place::empty();

/// A wait that goes on.
pub(super) struct Waiting {
    counts: &'static Counts,
}

impl Waiting {
    pub fn begin(location: &'static Location<'static>, reason: For, kind: Kind) -> Self {
        let counts = &place(location, reason).counts[kind as usize];
        counts.begun.fetch_add(1, Ordering::Relaxed);
        Waiting { counts }
    }

    /// At a place that is looked up and not put into the table, for a trial.
    pub fn nowhere(location: &'static Location<'static>) -> Self {
        static NOWHERE: Place = Place::empty();
        let _ = hint::black_box(PLACES[first(location)].location.load(Ordering::Acquire));
        let counts = &NOWHERE.counts[Kind::Service as usize];
        counts.begun.fetch_add(1, Ordering::Relaxed);
        Waiting { counts }
    }

    /// To be called once, at its end.
    pub fn ended(&self, took: Duration) {
        self.counts.count.fetch_add(1, Ordering::Release);
        self.counts.nanoseconds.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }
}

/// Where the search for the row of a place begins. Locations are static and apart from each other by their size, so the address
/// spreads well enough.
fn first(location: &'static Location<'static>) -> usize {
    ptr::from_ref(location).addr() / size_of::<Location<'_>>() % MOST_PLACES
}

/// The row of a place, taken on its first use and kept for ever.
fn place(location: &'static Location<'static>, reason: For) -> &'static Place {
    let wanted = ptr::from_ref(location).cast_mut();
    let first = first(location);
    for step in 0..MOST_PLACES {
        let place = &PLACES[(first + step) % MOST_PLACES];
        let found = place.location.load(Ordering::Acquire);
        if found == wanted {
            return place;
        }
        if found.is_null() {
            match place.location.compare_exchange(found, wanted, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    place.reason.store(reason as u64, Ordering::Relaxed);
                    return place;
                }
                Err(other) if other == wanted => return place,
                Err(_) => {}
            }
        }
    }
    &ELSEWHERE
}

/// Bytes of the table.
pub(super) fn memory() -> u64 {
    (size_of_val(&PLACES) + size_of_val(&ELSEWHERE)) as u64
}

/// Everything that was ever counted.
pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for place in PLACES.iter().chain([&ELSEWHERE]) {
        let location = place.location.load(Ordering::Acquire);
        // SAFETY: null, or put there from a static reference.
        let location = unsafe { location.as_ref() };
        for (kind, counts) in Kind::ALL.into_iter().zip(&place.counts) {
            // In this order, so that one that ends meanwhile is not taken for one that never began.
            let count = counts.count.load(Ordering::Acquire);
            let waited = Waited {
                now: counts.begun.load(Ordering::Relaxed).saturating_sub(count),
                count,
                total: Duration::from_nanos(counts.nanoseconds.load(Ordering::Relaxed)),
            };
            if waited != Waited::default() {
                let reason = For::ALL[place.reason.load(Ordering::Relaxed) as usize];
                rows.push(Row { place: location, reason, kind, waited });
            }
        }
    }
    rows
}
