//! What was done last: a ring of the spans of events and of their stages.
//!
//! It is always on, so that what led to a moment can be looked at after it. A span is noted when it ends; one that is under way
//! is not in it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::mark::{self, Mark, Stage};
use super::{registry, usage};

/// So many spans are kept. At 16 bytes each that is 256 KiB.
pub const MOST_SPANS: usize = 16 * 1024;

/// What times are counted from.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

static SPANS: Mutex<VecDeque<Packed>> = Mutex::new(VecDeque::new());

/// Of calls at most one that began within so long is kept: at 20,000 calls a second they would leave nothing else in the
/// ring, and less than a second of themselves.
pub const CALLS_APART: Duration = Duration::from_micros(500);

/// When the last call that is kept began, in nanoseconds from START.
static LAST_CALL: AtomicU64 = AtomicU64::new(0);

/// Spans that were noted since the start of the process.
static NOTED: AtomicU64 = AtomicU64::new(0);

/// A stretch of work that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Whose work, and which part of it; a whole event is [`Stage::Other`].
    pub mark: Mark,
    /// The task that did it, by its number in the registry.
    pub task: u32,
    /// From the start of the process.
    pub begin: Duration,
    /// How long it took.
    pub took: Duration,
}

/// A span in as little memory as it takes.
#[derive(Clone, Copy)]
struct Packed {
    /// The mark is in the lowest byte; what is left for the time is two thousand years.
    end_microseconds_and_mark: u64,
    /// Of one longer than 71 minutes only the last so many are told: when it ended is known of each.
    took_microseconds: u32,
    task: u32,
}

const _: () = assert!(Mark::COUNT <= 1 << u8::BITS, "a mark has one byte in a packed span");

impl Packed {
    /// Both ends are rounded down, so that a span within another stays within it.
    fn new(mark: Mark, task: u32, begin: Duration, end: Duration) -> Self {
        let (begin, end) = (begin.as_micros() as u64, end.as_micros() as u64);
        Packed {
            end_microseconds_and_mark: end << u8::BITS | mark.index() as u64,
            took_microseconds: u32::try_from(end.saturating_sub(begin)).unwrap_or(u32::MAX),
            task,
        }
    }

    fn unpack(self) -> Span {
        let took = Duration::from_micros(self.took_microseconds.into());
        Span {
            mark: Mark::from_index((self.end_microseconds_and_mark as u8).into()),
            task: self.task,
            begin: Duration::from_micros(self.end_microseconds_and_mark >> u8::BITS) - took,
            took,
        }
    }
}

/// A span under way; noted when it is dropped.
#[derive(Debug)]
pub(super) struct Open {
    mark: Mark,
    task: u32,
    since: Instant,
}

impl Open {
    /// Begins now, for the task that is being polled; none for a call that is not kept.
    pub fn begin() -> Option<Self> {
        let mark = mark::current();
        (mark.stage != Stage::Call || is_kept(&LAST_CALL, since_start(usage::poll_began()))).then(|| Open {
            mark,
            task: registry::number(),
            since: Instant::now(),
        })
    }
}

/// Whether a call that begins at `now` is far enough from `last`, the last one kept, whose place it then takes.
fn is_kept(last: &AtomicU64, now: u64) -> bool {
    let before = last.load(Ordering::Relaxed);
    now.saturating_sub(before) >= CALLS_APART.as_nanos() as u64
        && last.compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
}

fn since_start(at: Instant) -> u64 {
    at.saturating_duration_since(*START).as_nanos() as u64
}

impl Drop for Open {
    fn drop(&mut self) {
        note(self.mark, self.task, self.since);
    }
}

/// Notes a span that ends now.
pub(super) fn note(mark: Mark, task: u32, since: Instant) {
    put(&SPANS, MOST_SPANS, mark, task, since);
    NOTED.fetch_add(1, Ordering::Relaxed);
}

/// How many were noted since the start of the process.
pub(super) fn noted() -> u64 {
    NOTED.load(Ordering::Relaxed)
}

/// Does for a span that begins and ends now all that is done for one, for a trial of what it costs. Nobody sees it.
pub(super) fn trial() {
    static UNSEEN: Mutex<VecDeque<Packed>> = Mutex::new(VecDeque::new());
    let open = Open { mark: mark::current(), task: registry::number(), since: Instant::now() };
    put(&UNSEEN, 1, open.mark, open.task, open.since);
    std::mem::forget(open);
}

/// Does all that is done for a call that is not kept, for a trial of what it costs.
pub(super) fn trial_of_one_left_out() {
    static NEVER: AtomicU64 = AtomicU64::new(u64::MAX);
    let _ = std::hint::black_box(is_kept(&NEVER, since_start(usage::poll_began())));
}

fn put(spans: &Mutex<VecDeque<Packed>>, most: usize, mark: Mark, task: u32, since: Instant) {
    let begin = Duration::from_nanos(since_start(since));
    let packed = Packed::new(mark, task, begin, begin + since.elapsed());
    let mut spans = spans.lock().unwrap_or_else(PoisonError::into_inner);
    if spans.len() == most {
        spans.pop_front();
    }
    spans.push_back(packed);
}

/// Bytes that are held.
pub(super) fn memory() -> u64 {
    (SPANS.lock().unwrap_or_else(PoisonError::into_inner).capacity() * size_of::<Packed>()) as u64
}

/// Spans that ended within the last `within`, in the order in which they ended; and the time now, counted as theirs.
pub fn last(within: Duration) -> (Vec<Span>, Duration) {
    let now = START.elapsed();
    let since = now.saturating_sub(within);
    let packed: Vec<Packed> = SPANS.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
    let spans = packed.into_iter().map(Packed::unpack);
    (spans.filter(|span| span.begin + span.took >= since).collect(), now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{Kind, Stage, identify, in_stage, spawn_event};

    #[tokio::test]
    async fn an_event_and_its_stages_leave_spans() {
        let task = spawn_event("traced", async {
            identify(Kind::Planted, "event 10");
            in_stage(Stage::Publish, tokio::time::sleep(Duration::from_millis(10))).await;
            registry::number()
        });
        let number = task.await.unwrap();
        let (spans, now) = last(Duration::from_secs(60));
        let ours: Vec<Span> = spans.into_iter().filter(|span| span.task == number).collect();
        let stages: Vec<Stage> = ours.iter().map(|span| span.mark.stage).collect();
        assert_eq!(stages, [Stage::Publish, Stage::Other], "{ours:?}");
        let [stage, event] = ours[..] else { panic!("{ours:?}") };
        assert_eq!(event.mark.kind, Kind::Planted);
        assert!(stage.took >= Duration::from_millis(10) && event.took >= stage.took, "{ours:?}");
        assert!(event.begin <= stage.begin && event.begin + event.took <= now + Duration::from_millis(1), "{ours:?}");
    }

    #[test]
    fn of_calls_that_begin_close_together_one_is_kept() {
        let (last, apart) = (AtomicU64::new(0), CALLS_APART.as_nanos() as u64);
        let kept: Vec<u64> = (0..40).map(|tenth| apart * tenth / 10).filter(|now| is_kept(&last, *now)).collect();
        assert_eq!(kept, [apart, 2 * apart, 3 * apart]);
        // A poll that began before the last one that is kept.
        assert!(!is_kept(&last, 0));
    }

    #[tokio::test]
    async fn calls_leave_room_for_what_else_is_done() {
        let task = spawn_event("calls", async {
            identify(Kind::Planted, "event 15");
            for _ in 0..1000 {
                in_stage(Stage::Call, async {}).await;
                in_stage(Stage::Read, async {}).await;
            }
            registry::number()
        });
        let number = task.await.unwrap();
        let (spans, _) = last(Duration::from_secs(60));
        let of = |stage| spans.iter().filter(|span| span.task == number && span.mark.stage == stage).count();
        let of_apart = spawn_event("calls apart", async {
            identify(Kind::Planted, "event 16");
            // Other tests have calls too, and any of those may be the one that is kept.
            for _ in 0..20 {
                tokio::time::sleep(2 * CALLS_APART).await;
                in_stage(Stage::Call, async {}).await;
            }
            registry::number()
        });
        let apart = of_apart.await.unwrap();
        let is_call = |span: &Span| span.task == apart && span.mark.stage == Stage::Call;
        assert!(last(Duration::from_secs(60)).0.iter().any(is_call));
        // All in one poll, whose beginning is that of each of them.
        assert!(of(Stage::Call) <= 1, "{}", of(Stage::Call));
        assert_eq!(of(Stage::Read), 1000);
    }

    #[test]
    fn a_packed_span_is_what_it_was_to_the_microsecond() {
        let nanoseconds = Duration::from_nanos;
        for index in 0..Mark::COUNT {
            let mark = Mark::from_index(index);
            let span = Packed::new(mark, u32::MAX, nanoseconds(1_999), nanoseconds(5_000)).unpack();
            let (begin, took) = (Duration::from_micros(1), Duration::from_micros(4));
            assert_eq!(span, Span { mark, task: u32::MAX, begin, took });
        }
        // Ten years after the start, and longer than is told: it ended when it did.
        let begin = Duration::from_secs(10 * 365 * 86_400);
        let end = begin + Duration::from_secs(86_400);
        let span = Packed::new(Mark::from_index(1), 7, begin, end).unpack();
        assert_eq!((span.begin + span.took, span.took), (end, Duration::from_micros(u32::MAX.into())));
        assert_eq!(size_of::<Packed>(), 16);
    }

    #[test]
    fn the_oldest_make_room() {
        // Not the one that other tests look at.
        static SPANS: Mutex<VecDeque<Packed>> = Mutex::new(VecDeque::new());
        let mark = Mark { kind: Kind::Planted, stage: Stage::Read };
        for task in 0..15 {
            put(&SPANS, 10, mark, task, Instant::now());
        }
        let kept: Vec<u32> = SPANS.lock().unwrap().iter().map(|span| span.task).collect();
        assert_eq!(kept, Vec::from_iter(5..15));
    }
}
