//! What watching costs: CPU time and memory of everything that is there only so that the process can be looked at.
//!
//! Threads that do nothing else are read from their CPU clocks. What happens inside of other work is counted, and its cost is
//! measured: each time where it is rare, one in sixteen inside the allocator, and once for all, by a trial, for the books of
//! tasks. Those are estimates.
//!
//! Here are also the rates by which all of it can be made cheaper, as one number: [`slowdown`].

use std::future::poll_fn;
use std::hint;
use std::panic::Location;
use std::pin::pin;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::mark::{self, Stage};
use super::places::For;
use super::registry::{self, Tracked};
use super::{contention, places, trace, usage, waits};

/// What takes the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Part {
    /// Profiles that somebody asks for: their taking, naming and encoding.
    Requests,
    /// Snapshots of the heap, with their way to S3.
    Snapshots,
    /// Samples of CPU time, inside the signal handler, with an estimate of the signal itself.
    CpuSamples,
    /// Samples of memory, inside the allocator; an estimate.
    HeapSamples,
    /// Stacks of waits.
    WaitStacks,
    /// What each poll, stage and wait of a task is charged and listed with; an estimate.
    Bookkeeping,
}

/// How many there are.
pub const PARTS: usize = 6;

impl Part {
    /// All of them, in the order of their numbers.
    pub const ALL: [Part; PARTS] =
        [Part::Requests, Part::Snapshots, Part::CpuSamples, Part::HeapSamples, Part::WaitStacks, Part::Bookkeeping];

    /// The label `part` in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Part::Requests => "requests",
            Part::Snapshots => "snapshots",
            Part::CpuSamples => "cpu_samples",
            Part::HeapSamples => "heap_samples",
            Part::WaitStacks => "wait_stacks",
            Part::Bookkeeping => "bookkeeping",
        }
    }

    /// Whether a [`slowdown`] makes it cheaper, or makes room for it. The allocator cannot change the distance of its samples
    /// without forgetting all of them, and books are kept whole or are worth nothing.
    pub fn gives_way(self) -> bool {
        !matches!(self, Part::HeapSamples | Part::Bookkeeping)
    }
}

/// Nanoseconds that were measured, by part.
static MEASURED: [AtomicU64; PARTS] = [const { AtomicU64::new(0) }; PARTS];

/// Longer than any of what is measured by the wall clock takes: within more, the thread was not on a CPU.
const MOST: Duration = Duration::from_micros(100);

/// Adds what was measured. May be called in a signal handler.
pub fn add(part: Part, took: Duration) {
    MEASURED[part as usize].fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
}

/// Does `work` for a part and adds its time, by the wall clock and with `more`, which it cannot see. For what takes
/// microseconds. May be called in a signal handler.
pub fn timed<T>(part: Part, more: Duration, work: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let result = work();
    add(part, begin.elapsed().min(MOST) + more);
    result
}

/// CPU time of a part since the start of the process.
pub fn cpu(part: Part) -> Duration {
    match part {
        Part::Bookkeeping => {
            let kept = usage::kept();
            let counted = [
                (PRICES.task, registry::made()),
                (PRICES.poll, kept.polls),
                (PRICES.stage, kept.stages),
                (PRICES.wait, kept.waits),
                (PRICES.charge, kept.charges),
                (PRICES.reason, kept.reasons),
                (PRICES.span, trace::noted()),
            ];
            Duration::from_nanos(counted.into_iter().map(|(each, count)| each * count as f64).sum::<f64>() as u64)
        }
        _ => Duration::from_nanos(MEASURED[part as usize].load(Ordering::Relaxed)),
    }
}

/// The CPU time of this thread, charged to a part turn by turn, and when it is dropped. To be kept on its thread.
pub struct ThreadClock {
    part: Part,
    at: Duration,
}

impl ThreadClock {
    /// From now on.
    pub fn begin(part: Part) -> Self {
        ThreadClock { part, at: thread_time() }
    }

    /// Charges what the thread has used since the last time.
    pub fn turn(&mut self) {
        let now = thread_time();
        add(self.part, now.saturating_sub(self.at));
        self.at = now;
    }
}

impl Drop for ThreadClock {
    fn drop(&mut self) {
        self.turn();
    }
}

fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid for the call; every thread has this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// One in so many stacks that the allocator asks for is timed: two looks at the clock cost as much as the stack.
const TIMED: u64 = 16;

/// What the allocator itself does for a sample, beside the stack: looking it up among those that it knows, and counting. By a
/// comparison of allocations with and without samples; it cannot be measured while the service runs.
const ALLOCATORS_SHARE: Duration = Duration::from_micros(1);

/// Stacks that the allocator asked for.
static HEAP_SAMPLES: AtomicU64 = AtomicU64::new(0);

/// Takes the stack of a sample of memory. Neither allocates nor locks nor panics, as it is called inside the allocator.
#[inline(always)]
pub fn heap_sample(work: impl FnOnce()) {
    if !HEAP_SAMPLES.fetch_add(1, Ordering::Relaxed).is_multiple_of(TIMED) {
        return work();
    }
    let begin = Instant::now();
    work();
    let took = begin.elapsed().min(MOST) + ALLOCATORS_SHARE;
    // It stands for those that were not timed, so that the sum only ever grows.
    add(Part::HeapSamples, Duration::from_nanos(took.as_nanos() as u64 * TIMED));
}

/// What the books cost, in nanoseconds.
#[derive(Debug)]
struct Prices {
    /// To list a task and to take it off the list.
    task: f64,
    /// A poll of a task, with the charges at its beginning and its end.
    poll: f64,
    /// A stage in a poll.
    stage: f64,
    /// A wait.
    wait: f64,
    /// A charge in the middle of a poll: the work turns to another kind, or somebody reads the ledger.
    charge: f64,
    /// Adding the waits for one reason to the event's ledger.
    reason: f64,
    /// A span of the trace.
    span: f64,
}

impl Prices {
    /// A trial of each. What is measured of one is little beside what comes between, so it may be anything, below zero too.
    fn tried() -> Self {
        const TIMES: u32 = 100;
        const MANY: usize = 9;
        fn timed(mut each: impl FnMut()) -> f64 {
            // Of this thread alone: on a busy machine it is not on a CPU all the time.
            let begin = thread_time();
            (0..TIMES).for_each(|_| each());
            thread_time().saturating_sub(begin).as_nanos() as f64 / f64::from(TIMES)
        }
        // Between two of anything something is allocated and freed: what is zero is not added to any sum.
        fn work(_: usize) {
            drop(hint::black_box(Box::new(0_u64)));
        }
        fn polled(future: impl Future<Output = ()>) -> f64 {
            let mut future = pin!(future);
            let mut context = Context::from_waker(Waker::noop());
            timed(|| {
                work(0);
                let _ = hint::black_box(future.as_mut().poll(&mut context));
            })
        }
        fn repeated(times: usize, each: impl Fn(usize)) -> impl Future<Output = ()> {
            poll_fn(move |_| {
                (0..times).for_each(&each);
                Poll::Pending
            })
        }
        fn tracked(times: usize, each: impl Fn(usize)) -> f64 {
            polled(Tracked::inherit("trial of a poll", Location::caller(), repeated(times, each)))
        }
        // One more in a poll: what is settled once, at the end of the poll, is not in it.
        fn next(each: impl Fn(usize) + Copy) -> f64 {
            let more = |each: &dyn Fn(usize) -> f64| each(MANY) - each(1);
            let with = more(&|times| {
                tracked(times, |index| {
                    work(index);
                    each(index);
                })
            });
            (with - more(&|times| tracked(times, work))) / (MANY - 1) as f64
        }
        // Of both, services wait for seconds and more, in which the microseconds of a trial are nothing.
        const REASONS: [For; 2] = [For::Queue, For::Permit];
        let twice = |reasons: [For; 2]| tracked(2, move |index| waits::trial(reasons[index]));
        Prices {
            task: timed(|| drop(Tracked::inherit("trial of a task", Location::caller(), std::future::ready(())))),
            poll: tracked(1, work) - polled(repeated(1, work)),
            // In a real one something is allocated. What that costs by itself is in neither.
            stage: next(|index| {
                mark::stage(Stage::Call, || {
                    trace::trial_of_one_left_out();
                    work(index);
                });
            }) - next(work),
            wait: next(|_| waits::trial(For::Queue)),
            charge: next(|_| usage::settle()),
            reason: twice(REASONS) - twice([For::Queue; 2]),
            span: next(|_| trace::trial()),
        }
    }
}

static PRICES: LazyLock<Prices> = LazyLock::new(|| {
    const TRIALS: usize = 9;
    let trials: [Prices; TRIALS] = std::array::from_fn(|_| Prices::tried());
    let median = |of: fn(&Prices) -> f64| {
        let mut all = trials.each_ref().map(of);
        all.sort_unstable_by(f64::total_cmp);
        all[TRIALS / 2].max(0.0)
    };
    Prices {
        task: median(|prices| prices.task),
        poll: median(|prices| prices.poll),
        stage: median(|prices| prices.stage),
        wait: median(|prices| prices.wait),
        charge: median(|prices| prices.charge),
        reason: median(|prices| prices.reason),
        span: median(|prices| prices.span),
    }
});

/// Makes the trial of the books, which takes some milliseconds, unless it was made before.
pub fn calibrate() {
    LazyLock::force(&PRICES);
}

/// By how much everything that gives way is sampled less than it was asked for; 1 for not at all.
static SLOWDOWN: AtomicU32 = AtomicU32::new(1);

/// Divides the rate of CPU profiles and of stacks of waits, and stretches the time between two snapshots.
pub fn slowdown() -> u32 {
    SLOWDOWN.load(Ordering::Relaxed)
}

/// From now on it is `by`, at least 1.
pub fn slow_down(by: u32) {
    SLOWDOWN.store(by.max(1), Ordering::Relaxed);
}

/// Places for samples of CPU time, while a profile of it is taken.
static CPU_SAMPLES_BYTES: AtomicU64 = AtomicU64::new(0);

/// Memory for samples of CPU time, until it is dropped.
pub struct Held(u64);

impl Held {
    /// So many bytes.
    pub fn new(bytes: u64) -> Self {
        CPU_SAMPLES_BYTES.fetch_add(bytes, Ordering::Relaxed);
        Held(bytes)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        CPU_SAMPLES_BYTES.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// Bytes that are held, each with the label `part` in metrics. Without what the allocator holds for its samples, and without what
/// a profile needs while it is taken.
pub fn memory() -> [(&'static str, u64); 5] {
    [
        ("cpu_samples", CPU_SAMPLES_BYTES.load(Ordering::Relaxed)),
        ("spans", trace::memory()),
        ("tables", places::memory() + usage::memory()),
        ("tasks", registry::memory()),
        ("wait_stacks", contention::memory()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_charged_what_it_computes_and_not_what_it_sleeps() {
        let before = cpu(Part::Snapshots);
        let mut clock = ThreadClock::begin(Part::Snapshots);
        let begin = thread_time();
        while thread_time() - begin < Duration::from_millis(20) {
            hint::black_box(0);
        }
        std::thread::sleep(Duration::from_millis(200));
        clock.turn();
        let charged = cpu(Part::Snapshots) - before;
        assert!(charged >= Duration::from_millis(20) && charged < Duration::from_millis(120), "{charged:?}");
    }

    #[test]
    fn what_is_counted_inside_of_other_work_has_a_cost() {
        calibrate();
        println!("the books: {:?}", *PRICES);
        let Prices { task, poll, stage, wait, charge, reason, span } = *PRICES;
        let each = [task, poll, stage, wait, charge, span];
        assert!(each.iter().all(|each| *each > 0.0 && *each < 50_000.0) && reason < 50_000.0, "{:?}", *PRICES);
        let (heap, books, kept) = (cpu(Part::HeapSamples), cpu(Part::Bookkeeping), usage::kept());
        // Twice as many as are asked for: other tests have samples that are under way.
        for _ in 0..128 {
            heap_sample(|| ());
        }
        assert!(cpu(Part::HeapSamples) - heap >= ALLOCATORS_SHARE * 64);
        const POLLS: u64 = 10_000;
        let two_stages = poll_fn(|_| {
            mark::stage(Stage::Read, || ());
            mark::stage(Stage::Call, || ());
            Poll::<()>::Pending
        });
        let mut polled = pin!(Tracked::inherit("stages", Location::caller(), two_stages));
        for _ in 0..POLLS {
            let _ = polled.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        }
        let after = usage::kept();
        assert!(after.polls - kept.polls >= POLLS, "{kept:?} {after:?}");
        assert!(after.stages - kept.stages >= 2 * POLLS, "{kept:?} {after:?}");
        let least = POLLS as f64 * (poll + 2.0 * stage);
        assert!(cpu(Part::Bookkeeping) - books >= Duration::from_nanos(least as u64 - 1));
    }

    #[test]
    fn a_moment_off_the_cpu_is_not_charged() {
        let before = cpu(Part::WaitStacks);
        timed(Part::WaitStacks, Duration::ZERO, || std::thread::sleep(Duration::from_millis(30)));
        let charged = cpu(Part::WaitStacks) - before;
        // Other tests have waits as well.
        assert!(charged >= MOST && charged < Duration::from_millis(30), "{charged:?}");
    }

    #[test]
    fn memory_follows_what_is_held() {
        let of = |name: &str| memory().into_iter().find(|(part, _)| *part == name).unwrap().1;
        let held = Held::new(5_000_000_000);
        assert!(of("cpu_samples") >= 5_000_000_000);
        drop(held);
        assert!(of("cpu_samples") < 5_000_000_000);
        assert!(of("tables") > 10_000, "{}", of("tables"));
        let before = of("tasks");
        let tasks: Vec<_> =
            (0..20_000).map(|_| Tracked::inherit("held", Location::caller(), std::future::ready(()))).collect();
        assert!(of("tasks") >= before + 20_000 * 100, "{} after {before}", of("tasks"));
        drop(tasks);
    }
}
