//! The gate that lets a suspect work alone.
//!
//! An event holds a pass until it has ended, has made progress, or has waited for [`PROBATION`]. A suspect, on which work died
//! before, is let in when nobody holds one, and for [`ALONE`] at most nobody is let in beside it. So what dies right after a
//! suspect began most likely dies of it. What gave its pass back and is still at work may be charged for that death; it has
//! made progress or forgotten its own, so one is not enough to quarantine it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::task::{For, wait};

/// How long a suspect waits to be alone, and others because of that.
const WAIT: Duration = Duration::from_secs(2);

/// How long others wait for a suspect that is alone. What lives for longer can be slow for other reasons, such as a partner
/// that is away, and must not hold up the whole process.
const ALONE: Duration = Duration::from_secs(30);

/// How long work that makes no progress keeps its pass. What has lived for so long and waits, for a partner that is away, say,
/// must not keep suspects from being alone. Shorter than [`ALONE`], so that nobody is let in beside a suspect that still
/// counts as one.
pub const PROBATION: Duration = Duration::from_secs(20);

#[derive(Debug, Default)]
struct State {
    /// Passes that are held.
    passes: usize,
    /// The suspect for which nobody else is let in, and until when.
    closed: Option<(u64, Instant)>,
    /// Numbers the suspects.
    suspects: u64,
    /// Those who wait to be let in: a suspect does not keep out who waited for another one.
    waiting: usize,
}

impl State {
    fn closed_until(&self) -> Option<Instant> {
        self.closed.map(|(_, until)| until).filter(|until| *until > Instant::now())
    }
}

/// The gate of a process.
#[derive(Debug, Default)]
pub struct Gate(watch::Sender<State>);

/// Leave to work; dropped when the work is over and nothing of it can be charged any more, or known to do no harm.
#[derive(Debug)]
pub struct Pass {
    gate: Arc<Gate>,
    suspect: Option<u64>,
}

impl Gate {
    /// Lets work in; waits while a suspect is alone or about to be.
    pub async fn enter(self: &Arc<Self>) -> Pass {
        if let Some(pass) = self.try_enter() {
            return pass;
        }
        let _waiting = Waiting::new(self);
        let mut changes = self.0.subscribe();
        loop {
            let closed_until = changes.borrow_and_update().closed_until();
            if let Some(until) = closed_until {
                let _ = wait(For::Permit, timeout_at(until, changes.changed())).await;
            }
            if let Some(pass) = self.try_enter() {
                return pass;
            }
        }
    }

    fn try_enter(self: &Arc<Self>) -> Option<Pass> {
        let mut entered = false;
        self.0.send_if_modified(|state| {
            entered = state.closed_until().is_none();
            state.passes += usize::from(entered);
            // Nobody waits for there to be more passes.
            false
        });
        // Made only where it was let in: a pass that is dropped is given back.
        entered.then(|| Pass { gate: self.clone(), suspect: None })
    }

    /// Lets a suspect in when nobody else is; `None` if that did not come about in 2 s.
    pub async fn enter_alone(self: &Arc<Self>) -> Option<Pass> {
        let deadline = Instant::now() + WAIT;
        let number = self.close(deadline).await?;
        // From here on the gate is opened again by dropping this, whatever happens.
        let closed = Closed { gate: self, number };
        let mut changes = self.0.subscribe();
        timeout_at(deadline, changes.wait_for(|state| state.passes == 0)).await.ok()?.ok()?;
        let mut entered = false;
        self.0.send_if_modified(|state| {
            entered = state.closed.is_some_and(|(suspect, _)| suspect == number) && state.passes == 0;
            if entered {
                state.passes = 1;
                state.closed = Some((number, Instant::now() + ALONE));
            }
            false
        });
        if !entered {
            return None;
        }
        std::mem::forget(closed);
        Some(Pass { gate: self.clone(), suspect: Some(number) })
    }

    /// Keeps everyone else out until `deadline`, one suspect at a time.
    async fn close(&self, deadline: Instant) -> Option<u64> {
        let mut changes = self.0.subscribe();
        loop {
            changes.borrow_and_update();
            let mut number = None;
            let mut closed_until = None;
            self.0.send_if_modified(|state| {
                closed_until = state.closed_until();
                if closed_until.is_none() && state.waiting == 0 {
                    state.suspects += 1;
                    state.closed = Some((state.suspects, deadline));
                    number = Some(state.suspects);
                }
                false
            });
            if number.is_some() {
                return number;
            }
            let until = closed_until.map_or(deadline, |until| until.min(deadline));
            let _ = timeout_at(until, changes.changed()).await;
            if Instant::now() >= deadline {
                return None;
            }
        }
    }

    fn open(&self, number: u64) {
        self.0.send_if_modified(|state| state.closed.take_if(|(suspect, _)| *suspect == number).is_some());
    }
}

/// Somebody who waits to be let in.
struct Waiting<'a>(&'a Gate);

impl<'a> Waiting<'a> {
    fn new(gate: &'a Gate) -> Self {
        gate.0.send_if_modified(|state| {
            state.waiting += 1;
            false
        });
        Waiting(gate)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.0.send_if_modified(|state| {
            state.waiting -= 1;
            // Suspects wait for the last one.
            state.waiting == 0
        });
    }
}

/// The gate while a suspect waits to be alone.
struct Closed<'a> {
    gate: &'a Gate,
    number: u64,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.open(self.number);
    }
}

impl Pass {
    /// Whether it is a suspect's.
    pub fn is_alone(&self) -> bool {
        self.suspect.is_some()
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.0.send_if_modified(|state| {
            state.passes -= 1;
            // Suspects wait for the last one.
            state.passes == 0
        });
        if let Some(number) = self.suspect {
            self.gate.open(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const MOMENT: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn a_suspect_is_let_in_alone_and_nobody_beside_it() {
        let gate = Arc::new(Gate::default());
        let (first, second) = (gate.enter().await, gate.enter().await);
        let mut alone = std::pin::pin!(gate.enter_alone());
        timeout(MOMENT, &mut alone).await.expect_err("two are in");
        timeout(MOMENT, gate.enter()).await.expect_err("a suspect waits");
        drop(first);
        timeout(MOMENT, &mut alone).await.expect_err("one is in");
        drop(second);
        let alone = timeout(MOMENT, alone).await.expect("nobody is in").expect("it has its turn");
        assert!(alone.is_alone());
        let mut next = std::pin::pin!(gate.enter());
        timeout(MOMENT, &mut next).await.expect_err("a suspect is in");
        drop(alone);
        assert!(!timeout(MOMENT, next).await.expect("the suspect is gone").is_alone());
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspect_and_those_behind_it_wait_for_two_seconds_at_most() {
        let gate = Arc::new(Gate::default());
        let begin = Instant::now();
        let slow = gate.enter().await;
        let (alone, behind) = tokio::join!(gate.enter_alone(), async {
            tokio::task::yield_now().await;
            let pass = gate.enter().await;
            (begin.elapsed(), pass)
        });
        assert!(alone.is_none(), "one is in");
        assert!(behind.0 <= WAIT + MOMENT, "{:?}", behind.0);
        assert!(begin.elapsed() <= WAIT + MOMENT, "{:?}", begin.elapsed());
        drop((slow, behind));
        assert!(gate.enter_alone().await.is_some(), "a wait in vain leaves nothing behind");
    }

    #[tokio::test(start_paused = true)]
    async fn one_suspect_at_a_time() {
        let gate = Arc::new(Gate::default());
        let first = gate.enter_alone().await.expect("nobody is in");
        let mut second = std::pin::pin!(gate.enter_alone());
        timeout(WAIT / 2, &mut second).await.expect_err("a suspect is in");
        drop(first);
        let second = timeout(MOMENT, second).await.expect("it is gone").expect("in time");
        let begin = Instant::now();
        assert!(gate.enter_alone().await.is_none() && begin.elapsed() <= WAIT + MOMENT);
        drop(second);
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspect_that_lives_long_holds_up_nobody_for_ever() {
        let gate = Arc::new(Gate::default());
        let alone = gate.enter_alone().await.expect("nobody is in");
        let begin = Instant::now();
        let beside = gate.enter().await;
        assert_eq!(begin.elapsed().as_secs(), ALONE.as_secs());
        // Its late end does not open the gate for what another suspect waits for.
        let mut other = std::pin::pin!(gate.enter_alone());
        timeout(MOMENT, &mut other).await.expect_err("two are in");
        drop(alone);
        timeout(MOMENT, gate.enter()).await.expect_err("another suspect waits");
        drop(beside);
        assert!(timeout(MOMENT, other).await.expect("nobody is in").is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_gives_up_waiting_leaves_the_gate_as_it_was() {
        let gate = Arc::new(Gate::default());
        let pass = gate.enter().await;
        timeout(WAIT / 2, gate.enter_alone()).await.expect_err("one is in");
        timeout(MOMENT, gate.enter()).await.expect("the suspect gave up");
        drop(pass);
        let alone = gate.enter_alone().await.expect("nobody is in");
        timeout(MOMENT, gate.enter()).await.expect_err("a suspect is in");
        drop(alone);
        assert_eq!(gate.0.borrow().passes, 0);
    }

    /// Under threads, whatever the order: never two where one is alone.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn nobody_is_ever_beside_a_suspect() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let gate = Arc::new(Gate::default());
        let inside = Arc::new(AtomicUsize::new(0));
        let tasks: Vec<_> = (0..64)
            .map(|task| {
                let (gate, inside) = (gate.clone(), inside.clone());
                tokio::spawn(async move {
                    let mut alone = 0;
                    for round in 0..50 {
                        if (task + round) % 8 == 0 {
                            let Some(_pass) = gate.enter_alone().await else { continue };
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "beside others");
                            tokio::task::yield_now().await;
                            assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1, "others came in");
                            alone += 1;
                        } else {
                            let _pass = gate.enter().await;
                            inside.fetch_add(1, Ordering::SeqCst);
                            tokio::task::yield_now().await;
                            inside.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                    alone
                })
            })
            .collect();
        let mut alone = 0;
        for task in tasks {
            alone += task.await.expect("no panic");
        }
        assert!(alone > 0, "no suspect was ever alone");
        assert_eq!((gate.0.borrow().passes, gate.0.borrow().closed), (0, None));
    }
}
