//! The live tasks of the process, each with where it was spawned, whose work it does and where it waits.

use std::cell::Cell;
use std::collections::HashMap;
use std::panic::Location;
use std::pin::Pin;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use pin_project_lite::pin_project;

use super::mark::{self, Kind, Mark, Stage};
use super::trace;
use super::usage::{self, Ledger};

/// All of them, by number. Held for an insertion, a removal, or the copying of pointers.
static TASKS: LazyLock<Mutex<HashMap<u64, Arc<Task>>>> = LazyLock::new(Mutex::default);

static NEXT: AtomicU64 = AtomicU64::new(1);

/// What times of polls are counted from.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Nanoseconds from START; 0 for what came before it was first looked at.
fn since_start(now: Instant) -> u64 {
    now.saturating_duration_since(*START).as_nanos() as u64
}

/// Who hears of slow events.
static LISTENER: RwLock<Option<Listener>> = RwLock::new(None);

type Listener = Box<dyn Fn(&SlowEvent<'_>) + Send + Sync>;

thread_local! {
    /// The task that this thread polls.
    static CURRENT: Cell<*const Task> = const { Cell::new(ptr::null()) };
}

/// A live task.
struct Task {
    number: u64,
    name: &'static str,
    /// Whether the event's work ends with it.
    is_event: bool,
    /// Whether the ledger is an event's, and so that of all tasks that it spawns.
    is_events_ledger: bool,
    place: &'static Location<'static>,
    spawned_at: Instant,
    kind: AtomicU8,
    /// What it works on, once that is known.
    about: OnceLock<Box<str>>,
    ledger: Arc<Ledger>,
    polls: AtomicU64,
    /// Nanoseconds from START to the beginning of the poll that goes on or, while it waits, to the end of the last one.
    turned_at: AtomicU64,
    running: AtomicU8,
    /// Waits that go on in it, side by side.
    waits: AtomicU32,
    /// Where the last of them began, or was polled last.
    waits_at: AtomicPtr<Location<'static>>,
}

/// A task as it was at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Counted from 1 in the process.
    pub number: u64,
    /// What it is for.
    pub name: &'static str,
    /// Where it was spawned.
    pub place: &'static Location<'static>,
    /// Whose work it does.
    pub kind: Kind,
    /// What it works on, such as an event's id.
    pub about: Option<Box<str>>,
    /// Since it was spawned.
    pub age: Duration,
    /// So often it was polled.
    pub polls: u64,
    /// Whether a thread polls it right now.
    pub running: bool,
    /// How long this poll has taken, or how long ago the last one ended.
    pub since: Duration,
    /// The wait that the last poll ended in, where it is one of those that are counted.
    pub waits_at: Option<&'static Location<'static>>,
}

/// The work on a slow event, as it begins or ends.
#[derive(Clone, Copy, Debug)]
pub struct SlowEvent<'a> {
    /// Number of the task that does it. An event that is delivered again while it is worked on has two.
    pub task: u64,
    /// Whose work it is.
    pub kind: Kind,
    /// The event's id.
    pub about: &'a str,
    /// Whether the work begins; else it ends.
    pub began: bool,
}

/// Has `listener` called when the work on a slow event begins or ends, by the thread that does it: it must not wait. It
/// takes the place of the one before.
pub fn on_slow_event(listener: impl Fn(&SlowEvent<'_>) + Send + Sync + 'static) {
    *LISTENER.write().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(listener));
}

fn tell(event: &SlowEvent<'_>) {
    if event.kind.is_slow()
        && let Some(listener) = &*LISTENER.read().unwrap_or_else(PoisonError::into_inner)
    {
        listener(event);
    }
}

fn tasks() -> MutexGuard<'static, HashMap<u64, Arc<Task>>> {
    TASKS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All tasks that live now, in the order in which they were spawned.
pub fn live() -> Vec<Snapshot> {
    let all: Vec<Arc<Task>> = tasks().values().cloned().collect();
    let now = START.elapsed();
    let mut snapshots: Vec<Snapshot> = all.iter().map(|task| task.snapshot(now)).collect();
    snapshots.sort_unstable_by_key(|task| task.number);
    snapshots
}

/// Bytes that are held for all of them, as if each had a ledger of its own; without the texts of what they work on.
pub(super) fn memory() -> u64 {
    let tasks = tasks();
    // With the two counts of each Arc.
    let each = size_of::<Task>() + size_of::<Ledger>() + 4 * size_of::<usize>();
    (tasks.capacity() * (size_of::<(u64, Arc<Task>)>() + 1) + tasks.len() * each) as u64
}

/// How many tasks there have been in the process.
pub(super) fn made() -> u64 {
    NEXT.load(Ordering::Relaxed) - 1
}

/// How many tasks live now.
pub fn count() -> usize {
    tasks().len()
}

/// Says whose work this task does from now on, and on what. Outside of a task it does nothing.
pub fn identify(kind: Kind, about: &str) {
    with_current(|task| {
        task.kind.store(kind as u8, Ordering::Relaxed);
        let is_new = task.about.set(about.into()).is_ok();
        mark::set_kind(kind);
        if is_new && task.is_event {
            tell(&SlowEvent { task: task.number, kind, about, began: true });
        }
    });
}

/// Charges what this task does from now on to `kind`, without beginning an event of it. Outside of a task it does nothing.
pub fn label(kind: Kind) {
    with_current(|task| {
        task.kind.store(kind as u8, Ordering::Relaxed);
        mark::set_kind(kind);
    });
}

/// What the event that this task works for has used until now; nothing outside of a task.
pub fn ledger() -> Option<Arc<Ledger>> {
    usage::settle();
    with_current(|task| Arc::clone(&task.ledger))
}

/// The number of the task that is being polled; 0 outside of one.
pub(super) fn number() -> u32 {
    with_current(|task| task.number as u32).unwrap_or(0)
}

/// The task that is being polled waits there, for one thing more if that `begins`.
pub(super) fn waits_at(place: &'static Location<'static>, begins: bool) {
    with_current(|task| {
        if begins {
            // Written by the thread that polls the task, and by no other.
            task.waits.store(task.waits.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        task.waits_at.store(ptr::from_ref(place).cast_mut(), Ordering::Relaxed);
    });
}

/// A wait of the task that is being polled is over. While others go on in it, it is shown at the place that was noted last.
pub(super) fn waited() {
    with_current(|task| {
        // What is dropped outside of its own task's poll is not counted there.
        let before = task.waits.load(Ordering::Relaxed);
        task.waits.store(before.saturating_sub(1), Ordering::Relaxed);
        if before <= 1 {
            task.waits_at.store(ptr::null_mut(), Ordering::Relaxed);
        }
    });
}

fn with_current<T>(work: impl FnOnce(&Task) -> T) -> Option<T> {
    // SAFETY: the poll that set it holds the task.
    unsafe { CURRENT.get().as_ref() }.map(work)
}

impl Task {
    /// A poll begins or ends `now`.
    fn turned(&self, now: Instant) {
        self.turned_at.store(since_start(now), Ordering::Relaxed);
    }

    fn snapshot(&self, now: Duration) -> Snapshot {
        let waits_at = self.waits_at.load(Ordering::Relaxed);
        let running = self.running.load(Ordering::Relaxed) != 0;
        Snapshot {
            number: self.number,
            name: self.name,
            place: self.place,
            kind: Kind::ALL[usize::from(self.kind.load(Ordering::Relaxed))],
            about: self.about.get().cloned(),
            age: self.spawned_at.elapsed(),
            polls: self.polls.load(Ordering::Relaxed),
            running,
            since: now.saturating_sub(Duration::from_nanos(self.turned_at.load(Ordering::Relaxed))),
            // SAFETY: null, or put there from a static reference.
            waits_at: unsafe { waits_at.as_ref() }.filter(|_| !running),
        }
    }
}

/// In the table from its making to its drop.
struct Registered {
    task: Arc<Task>,
}

impl Registered {
    /// An event of its own, or work for `whose`, of an event where it has a ledger.
    fn new(name: &'static str, place: &'static Location<'static>, whose: Option<(Kind, Option<Arc<Ledger>>)>) -> Self {
        let is_event = whose.is_none();
        let now = Instant::now();
        let (kind, ledger) = whose.unwrap_or((Kind::Service, None));
        let is_events_ledger = is_event || ledger.is_some();
        let ledger = ledger.unwrap_or_default();
        let task = Arc::new(Task {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            name,
            is_event,
            is_events_ledger,
            place,
            spawned_at: now,
            kind: AtomicU8::new(kind as u8),
            about: OnceLock::new(),
            ledger,
            polls: AtomicU64::new(0),
            turned_at: AtomicU64::new(since_start(now)),
            running: AtomicU8::new(0),
            waits: AtomicU32::new(0),
            waits_at: AtomicPtr::new(ptr::null_mut()),
        });
        tasks().insert(task.number, Arc::clone(&task));
        Registered { task }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let task = &self.task;
        tasks().remove(&task.number);
        if task.is_event {
            let kind = Kind::ALL[usize::from(task.kind.load(Ordering::Relaxed))];
            trace::note(Mark { kind, stage: Stage::Other }, task.number as u32, task.spawned_at);
            if let Some(about) = task.about.get() {
                tell(&SlowEvent { task: task.number, kind, about, began: false });
            }
        }
    }
}

pin_project! {
    /// A future whose polls are known to the registry and charged to its event.
    pub struct Tracked<F> {
        // Dropped after the future: what the future frees when it is dropped unfinished is not charged, but it is listed.
        #[pin]
        future: F,
        task: Registered,
    }
}

impl<F: Future> Tracked<F> {
    /// A task for the work of whoever makes it: of the same kind, on the same ledger.
    pub(super) fn inherit(name: &'static str, place: &'static Location<'static>, future: F) -> Self {
        // What is no event's has a ledger for each task: nobody reads them, and in one all threads would meet.
        let ledger = with_current(|task| task.is_events_ledger.then(|| Arc::clone(&task.ledger))).flatten();
        Tracked { future, task: Registered::new(name, place, Some((mark::current().kind, ledger))) }
    }

    /// A task of that kind that belongs to no event.
    pub(super) fn apart(kind: Kind, name: &'static str, place: &'static Location<'static>, future: F) -> Self {
        Tracked { future, task: Registered::new(name, place, Some((kind, None))) }
    }

    /// A task with a ledger of its own.
    pub(super) fn fresh(name: &'static str, place: &'static Location<'static>, future: F) -> Self {
        Tracked { future, task: Registered::new(name, place, None) }
    }
}

impl<F: Future> Future for Tracked<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let _turn = Turn::begin(&this.task.task);
        this.future.poll(context)
    }
}

/// A poll of a task.
struct Turn<'a> {
    task: &'a Task,
    former: *const Task,
    former_mark: Mark,
    outer: usage::Outer,
}

impl<'a> Turn<'a> {
    fn begin(task: &'a Task) -> Self {
        let now = Instant::now();
        let mark = Mark { kind: Kind::ALL[usize::from(task.kind.load(Ordering::Relaxed))], stage: Stage::Other };
        let outer = usage::begin_poll(&task.ledger, mark, now);
        // One thread at a time polls a task.
        task.polls.store(task.polls.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        task.turned(now);
        task.running.store(1, Ordering::Relaxed);
        Turn { task, former: CURRENT.replace(task), former_mark: mark::replace(mark), outer }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        usage::end_poll(&self.outer, now);
        mark::replace(self.former_mark);
        CURRENT.set(self.former);
        self.task.running.store(0, Ordering::Relaxed);
        self.task.turned(now);
    }
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;
    use crate::task::{spawn, spawn_apart, spawn_event};

    fn named(name: &str) -> Option<Snapshot> {
        live().into_iter().find(|task| task.name == name)
    }

    #[tokio::test]
    async fn a_task_is_listed_while_it_lives() {
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let task = spawn("listed", async move {
            identify(Kind::ListingUpsert, "event 7");
            let _ = wait.await;
        });
        while named("listed").is_none_or(|task| task.polls == 0 || task.running) {
            tokio::task::yield_now().await;
        }
        let seen = named("listed").unwrap();
        assert!(seen.place.file().ends_with("registry.rs"), "{seen:?}");
        assert_eq!((seen.kind, seen.about.as_deref()), (Kind::ListingUpsert, Some("event 7")));
        go.send(()).unwrap();
        task.await.unwrap();
        assert!(named("listed").is_none());
    }

    #[tokio::test]
    async fn slow_events_are_told_when_they_begin_and_end() {
        static TOLD: Mutex<Vec<(String, u64, bool)>> = Mutex::new(Vec::new());
        on_slow_event(|event| TOLD.lock().unwrap().push((event.about.to_owned(), event.task, event.began)));
        let told = |about: &str| -> Vec<bool> {
            TOLD.lock().unwrap().iter().filter(|told| told.0 == about).map(|told| told.2).collect()
        };
        let slow = spawn_event("slow", async move {
            identify(Kind::ValuationsPublish, "event 12");
            assert_eq!(told("event 12"), [true]);
            // A part of it is not the event.
            spawn("part", async { identify(Kind::ValuationsPublish, "event 12, a part") }).await.unwrap();
            panic!("as a handler might");
        });
        assert!(slow.await.unwrap_err().is_panic());
        assert_eq!(told("event 12"), [true, false]);
        assert!(told("event 12, a part").is_empty());
        let again = || spawn_event("again", async { identify(Kind::ValuationsPublish, "event 14") });
        again().await.unwrap();
        again().await.unwrap();
        let tasks: Vec<u64> =
            TOLD.lock().unwrap().iter().filter(|told| told.0 == "event 14").map(|told| told.1).collect();
        assert!(tasks[0] == tasks[1] && tasks[2] == tasks[3] && tasks[0] != tasks[2], "{tasks:?}");
        // What only labels itself begins no event.
        let labelled = spawn_event("forwards", async {
            label(Kind::ValuationsPublish);
            u64::from(number())
        });
        let labelled = labelled.await.unwrap();
        // Of this task alone: other tests have slow events as well.
        assert!(TOLD.lock().unwrap().iter().all(|told| told.1 != labelled));
        spawn_event("fast", async { identify(Kind::ListingUpsert, "event 13") }).await.unwrap();
        assert!(told("event 13").is_empty());
        *LISTENER.write().unwrap() = None;
    }

    #[tokio::test]
    async fn a_task_that_panics_or_is_aborted_is_not_listed() {
        let task = spawn("panics", async { panic!("as a handler might") });
        assert!(task.await.unwrap_err().is_panic());
        assert!(named("panics").is_none());
        let task = spawn("aborted", std::future::pending::<()>());
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
        assert!(named("aborted").is_none());
        assert_eq!(mark::current(), Mark::NONE);
    }

    #[tokio::test]
    async fn tasks_of_an_event_share_its_ledger_and_others_have_their_own() {
        async fn shared() -> bool {
            let ours = ledger().unwrap();
            spawn("part", async move { Arc::ptr_eq(&ours, &ledger().unwrap()) }).await.unwrap()
        }
        assert!(spawn_event("event", shared()).await.unwrap());
        let part = spawn_event("event", async { spawn("part", shared()).await.unwrap() });
        assert!(part.await.unwrap());
        let apart = spawn_event("event", async { spawn_apart(Kind::ListingUpsert, "apart", shared()).await.unwrap() });
        assert!(!apart.await.unwrap());
        assert!(!spawn("beside events", shared()).await.unwrap());
    }

    #[tokio::test]
    async fn an_event_is_charged_to_the_byte_with_the_tasks_that_it_spawns() {
        let used = spawn_event("event", async {
            identify(Kind::ValuationsRefresh, "event 8");
            let before = ledger().unwrap().read();
            let kept = black_box(vec![0_u8; 1 << 20]);
            spawn("child", async {
                assert_eq!(mark::current().kind, Kind::ValuationsRefresh);
                drop(black_box(vec![1_u8; 1 << 21]));
            })
            .await
            .unwrap();
            tokio::task::yield_now().await;
            let after = ledger().unwrap().read();
            drop(kept);
            (before, after)
        });
        let (before, after) = used.await.unwrap();
        let (allocated, freed) = (after.allocated - before.allocated, after.freed - before.freed);
        let (kept, dropped) = (1 << 20, 1 << 21);
        // What the runtime itself needs for a task is in it as well.
        assert!((kept + dropped..kept + dropped + 20_000).contains(&allocated), "{allocated}");
        assert!((dropped..dropped + 20_000).contains(&freed), "{freed}");
        assert!(after.polls > before.polls && after.busy > Duration::ZERO, "{after:?}");
    }
}
