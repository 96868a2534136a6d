//! Stopping: one signal that everything listens to.
//!
//! A stop has two stages. *Draining*: nothing new is begun, what is under way may finish until a deadline. *Ended*: what
//! still runs is dropped, and its messages are given back.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    Draining { until: Instant },
    Ended,
}

/// Gives the signal.
pub struct StopSource(watch::Sender<Stage>);

/// Hears the signal; cloning is cheap.
#[derive(Debug, Clone)]
pub struct Stop(watch::Receiver<Stage>);

impl StopSource {
    /// A source that has not been used, and its first listener.
    pub fn new() -> (Self, Stop) {
        let (sender, receiver) = watch::channel(Stage::Running);
        (StopSource(sender), Stop(receiver))
    }

    /// Begins to drain: work under way has `time` left.
    pub fn drain(&self, time: Duration) {
        self.0.send_if_modified(|stage| {
            let first = *stage == Stage::Running;
            if first {
                *stage = Stage::Draining { until: Instant::now() + time };
            }
            first
        });
    }

    /// Drops what still runs.
    pub fn end(&self) {
        self.0.send_replace(Stage::Ended);
    }
}

impl Stop {
    /// Whether nothing new may be begun.
    pub fn is_draining(&self) -> bool {
        *self.0.borrow() != Stage::Running
    }

    /// Waits until nothing new may be begun. A source that is gone counts as a stop.
    pub async fn draining(&self) {
        let _ = self.0.clone().wait_for(|stage| *stage != Stage::Running).await;
    }

    /// Waits until what still runs is to be dropped.
    pub async fn ended(&self) {
        let _ = self.0.clone().wait_for(|stage| *stage == Stage::Ended).await;
    }

    /// Until when work under way may finish; `None` while nothing was stopped.
    pub fn deadline(&self) -> Option<Instant> {
        match *self.0.borrow() {
            Stage::Running => None,
            Stage::Draining { until } => Some(until),
            Stage::Ended => Some(Instant::now()),
        }
    }
}

/// Shared by parts that leave together: each has a clone of it while it works, and is told when nobody works any more.
#[derive(Clone)]
pub struct Company {
    working: watch::Receiver<()>,
    all: Arc<watch::Sender<()>>,
}

impl Company {
    /// A company of one.
    pub fn new() -> Self {
        let (all, working) = watch::channel(());
        Company { working, all: Arc::new(all) }
    }

    /// This part's work is done; waits for the others. One that is dropped counts as done.
    pub async fn done(self) {
        drop(self.working);
        self.all.closed().await;
    }
}

impl Default for Company {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_deadline_stands_and_the_end_is_heard() {
        let (source, stop) = StopSource::new();
        assert!(stop.deadline().is_none());
        source.drain(Duration::from_secs(5));
        let deadline = stop.deadline();
        source.drain(Duration::from_secs(50));
        assert_eq!(stop.deadline(), deadline);
        stop.draining().await;
        source.end();
        stop.ended().await;
    }

    #[tokio::test]
    async fn a_company_is_done_when_its_last_part_is() {
        let first = Company::new();
        let (second, third) = (first.clone(), first.clone());
        let mut waiting = tokio::spawn(first.done());
        drop(second);
        tokio::time::timeout(Duration::from_millis(50), &mut waiting).await.expect_err("one part works");
        third.done().await;
        waiting.await.expect("no panic");
    }
}
