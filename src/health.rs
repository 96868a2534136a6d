//! What the parts of the service report of themselves, for whoever wants to know whether they are well.
//!
//! Parts write here, the health pages only read. This file imports nothing of the crate, so that every part can report
//! without knowing of HTTP. Two questions are kept apart, because the answers lead to different deeds:
//!
//! - *Alive*: do the loops turn? Each loop holds a [`Beat`]. A loop that is silent for longer than its limit will not
//!   recover, and a restart helps.
//! - *Ready*: can work be done? Each neighbour has a [`Dependency`]. One that is away comes back by itself; a restart
//!   would help nobody.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// The registry. Clones share one state.
#[derive(Clone)]
pub struct Health {
    state: Arc<State>,
}

struct State {
    /// Beats count milliseconds from here, so that touching one is a single atomic store.
    origin: Instant,
    draining: AtomicBool,
    beats: Mutex<Vec<Arc<BeatState>>>,
    dependencies: Mutex<Vec<Arc<DependencyState>>>,
}

/// How a loop turns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turning {
    /// Name of the loop.
    pub name: String,
    /// Time since its last turn.
    pub silent: Duration,
    /// The longest time that is still healthy.
    pub limit: Duration,
    /// The loop is gone: it ended without being asked to.
    pub ended: bool,
}

impl Turning {
    /// Whether the loop turns as it should.
    pub fn is_well(&self) -> bool {
        !self.ended && self.silent <= self.limit
    }
}

/// A neighbour that cannot be worked with now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotReady {
    /// Name of the neighbour.
    pub name: String,
    /// What was seen last; the newest reason if there were several.
    pub reason: String,
    /// When it was last known to be well, or first waited for.
    pub since: SystemTime,
}

impl Health {
    /// An empty registry: nothing to wait for, nothing to watch.
    pub fn new() -> Self {
        Health {
            state: Arc::new(State {
                origin: Instant::now(),
                draining: AtomicBool::new(false),
                beats: Mutex::default(),
                dependencies: Mutex::default(),
            }),
        }
    }

    /// Watches a loop that has to turn at least once per `limit`. The clock starts now, so a loop that never starts is
    /// noticed as well.
    pub fn beat(&self, name: impl Into<String>, limit: Duration) -> Beat {
        let beat = Arc::new(BeatState {
            name: name.into(),
            limit,
            last_ms: AtomicU64::new(self.state.now_ms()),
            ended: AtomicBool::new(false),
        });
        lock(&self.state.beats).push(Arc::clone(&beat));
        Beat { registry: Arc::clone(&self.state), beat }
    }

    /// Adds a neighbour, which counts as not ready until it was seen.
    pub fn dependency(&self, name: impl Into<String>) -> Dependency {
        let seen = Seen::Down { reason: "not seen yet".to_owned(), since: SystemTime::now() };
        let dependency = Arc::new(DependencyState { name: name.into(), seen: Mutex::new(seen) });
        lock(&self.state.dependencies).push(Arc::clone(&dependency));
        Dependency(dependency)
    }

    /// From now on the service is not ready, whatever its neighbours do. There is no way back.
    pub fn drain(&self) {
        self.state.draining.store(true, Ordering::Relaxed);
    }

    /// Whether [`Health::drain`] was called.
    pub fn is_draining(&self) -> bool {
        self.state.draining.load(Ordering::Relaxed)
    }

    /// The loops, in the order in which they were added.
    pub fn loops(&self) -> Vec<Turning> {
        let now = self.state.now_ms();
        lock(&self.state.beats).iter().map(|beat| beat.at(now)).collect()
    }

    /// The neighbours that are not ready, in the order in which they were added; empty if all are.
    pub fn not_ready(&self) -> Vec<NotReady> {
        lock(&self.state.dependencies).iter().filter_map(|dependency| dependency.not_ready()).collect()
    }
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    fn now_ms(&self) -> u64 {
        self.origin.elapsed().as_millis() as u64
    }
}

/// Held by a loop, or shared by the tasks that turn it together.
///
/// Dropped without [`Beat::retire`], it reports at once that the loop ended: a panic must not look like health.
pub struct Beat {
    registry: Arc<State>,
    beat: Arc<BeatState>,
}

struct BeatState {
    name: String,
    limit: Duration,
    last_ms: AtomicU64,
    ended: AtomicBool,
}

impl Beat {
    /// The loop has turned. Takes no lock.
    pub fn touch(&self) {
        self.beat.last_ms.store(self.registry.now_ms(), Ordering::Relaxed);
    }

    /// The loop ends as it was asked to; nobody watches it any more.
    pub fn retire(self) {
        lock(&self.registry.beats).retain(|beat| !Arc::ptr_eq(beat, &self.beat));
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        self.beat.ended.store(true, Ordering::Relaxed);
    }
}

impl BeatState {
    fn at(&self, now_ms: u64) -> Turning {
        // A touch may be newer than `now_ms`, which was read before it.
        let silent = Duration::from_millis(now_ms.saturating_sub(self.last_ms.load(Ordering::Relaxed)));
        Turning { name: self.name.clone(), silent, limit: self.limit, ended: self.ended.load(Ordering::Relaxed) }
    }
}

/// Held by whoever sees a neighbour answer, or not. Clones report of the same neighbour.
#[derive(Clone)]
pub struct Dependency(Arc<DependencyState>);

struct DependencyState {
    name: String,
    seen: Mutex<Seen>,
}

enum Seen {
    Up,
    Down { reason: String, since: SystemTime },
}

impl Dependency {
    /// The neighbour answered.
    pub fn up(&self) {
        *lock(&self.0.seen) = Seen::Up;
    }

    /// The neighbour did not answer, or not well. The time it has been away counts from the first such report.
    pub fn down(&self, reason: impl Into<String>) {
        let reason = reason.into();
        let mut seen = lock(&self.0.seen);
        let since = match *seen {
            Seen::Up => SystemTime::now(),
            Seen::Down { since, .. } => since,
        };
        *seen = Seen::Down { reason, since };
    }
}

impl DependencyState {
    fn not_ready(&self) -> Option<NotReady> {
        match &*lock(&self.seen) {
            Seen::Up => None,
            Seen::Down { reason, since } => {
                Some(NotReady { name: self.name.clone(), reason: reason.clone(), since: *since })
            }
        }
    }
}

/// Every critical section of this file leaves its data whole, so a panic elsewhere in a holder changes nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_is_stale_only_beyond_its_limit() {
        let health = Health::new();
        let beat = health.beat("poll events", Duration::from_millis(100));
        let touched = beat.beat.last_ms.load(Ordering::Relaxed);
        assert!(beat.beat.at(touched + 100).is_well());
        let stale = beat.beat.at(touched + 101);
        assert!(!stale.is_well());
        assert_eq!(
            (stale.name.as_str(), stale.silent, stale.ended),
            ("poll events", Duration::from_millis(101), false)
        );
    }

    #[test]
    fn touching_a_loop_makes_it_fresh_again() {
        let health = Health::new();
        let beat = health.beat("keeper", Duration::from_millis(20));
        std::thread::sleep(Duration::from_millis(40));
        assert!(!health.loops()[0].is_well());
        beat.touch();
        assert!(health.loops()[0].is_well());
    }

    #[test]
    fn a_loop_that_died_is_told_at_once_and_one_that_retired_is_not() {
        let health = Health::new();
        let retired = health.beat("retired", Duration::from_secs(60));
        let died = health.beat("died", Duration::from_secs(60));
        retired.retire();
        let _ = std::thread::spawn(move || {
            let _died = died;
            panic!("as a loop might");
        })
        .join();
        let loops = health.loops();
        assert_eq!(loops.len(), 1, "{loops:?}");
        assert_eq!((loops[0].name.as_str(), loops[0].ended, loops[0].is_well()), ("died", true, false));
    }

    #[test]
    fn a_neighbour_is_not_ready_until_it_was_seen() {
        let health = Health::new();
        let database = health.dependency("database");
        assert_eq!(health.not_ready()[0].reason, "not seen yet");
        database.up();
        assert_eq!(health.not_ready(), []);
    }

    #[test]
    fn an_outage_keeps_its_beginning_and_shows_its_newest_reason() {
        let health = Health::new();
        let queue = health.dependency("queue");
        queue.up();
        queue.down("timeout");
        let first = health.not_ready()[0].since;
        std::thread::sleep(Duration::from_millis(5));
        queue.clone().down("connection refused");
        let now = &health.not_ready()[0];
        assert_eq!((now.since, now.reason.as_str()), (first, "connection refused"));
    }

    #[test]
    fn draining_is_for_good() {
        let health = Health::new();
        assert!(!health.is_draining());
        health.clone().drain();
        assert!(health.is_draining());
    }
}
