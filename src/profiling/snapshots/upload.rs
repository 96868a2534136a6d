//! Snapshots on their way to S3. The directory is the spool: what lies there without a mark is still to be sent, whichever
//! process wrote it, so that neither an outage nor a killed process loses what was written.

use std::io;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::anyhow;
use tokio::runtime;
use tokio::sync::watch;
use tokio::time::timeout;

use super::bucket::Bucket;
use super::directory;
use super::{NICE, Outcome, Tell};
use crate::task::cost::{Part, ThreadClock};

/// Looks at the spool without being told that something is new: another process may have died and left something.
const LOOK: Duration = Duration::from_secs(60);

/// After a failure nothing is sent for so long, then for twice as long, up to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How long the last ones may take when the process ends. What is left then waits in the directory.
const LAST: Duration = Duration::from_secs(8);

/// What the thread is told.
#[derive(Debug, Default, Clone, Copy)]
struct State {
    /// So many snapshots were written.
    written: u64,
    /// The process ends.
    stopping: bool,
}

/// The running thread.
pub(super) struct Uploader {
    state: watch::Sender<State>,
    thread: JoinHandle<()>,
}

impl Uploader {
    /// Starts the thread, which has a runtime of its own: the work's never waits for S3.
    pub fn start(directory: PathBuf, bucket: Bucket, tell: Tell) -> io::Result<Self> {
        let (state, told) = watch::channel(State::default());
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let spool = Spool { directory, bucket, tell };
        let thread = thread::Builder::new().name("snapshots-s3".to_owned()).spawn(move || {
            // SAFETY: takes numbers only; 0 is the calling thread. Refused, the thread merely has a higher priority.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
            runtime.block_on(spool.run(told));
            // A name look-up that hangs on a thread of its own must not keep a process that ends.
            runtime.shutdown_background();
        })?;
        Ok(Uploader { state, thread })
    }

    /// A snapshot was written.
    pub fn wake(&self) {
        self.state.send_modify(|state| state.written += 1);
    }

    /// Sends what there is and ends. Blocks for [`LAST`] at most.
    pub fn stop(self) {
        self.state.send_modify(|state| state.stopping = true);
        if self.thread.join().is_err() {
            tracing::warn!("the thread that sends snapshots to S3 panicked");
        }
    }
}

struct Spool {
    directory: PathBuf,
    bucket: Bucket,
    tell: Tell,
}

impl Spool {
    async fn run(self, mut told: watch::Receiver<State>) {
        let mut pause = PAUSE;
        // The runtime has this one thread.
        let mut clock = ThreadClock::begin(Part::Snapshots);
        loop {
            // Seen before the look at the directory, so that what is written during it is looked for again.
            let stopping = told.borrow_and_update().stopping || told.has_changed().is_err();
            let mut stop = told.clone();
            let sent = match stopping {
                true => timeout(LAST, self.send_all()).await.unwrap_or_else(|_| Err(anyhow!("no time is left"))),
                // It is begun anew then, with the time that is left.
                false => tokio::select! {
                    sent = self.send_all() => sent,
                    _ = stop.wait_for(|state| state.stopping) => continue,
                },
            };
            clock.turn();
            if let Err(error) = &sent {
                (self.tell)(Outcome::NotSent);
                tracing::warn!(
                    error = format!("{error:#}"),
                    pause_s = pause.as_secs(),
                    "a snapshot of the heap was not sent to S3; it stays in the directory until it is"
                );
            }
            if stopping {
                return;
            }
            match sent {
                Ok(()) => {
                    pause = PAUSE;
                    let _ = timeout(LOOK, told.changed()).await;
                }
                Err(_) => {
                    let _ = timeout(pause, stop.wait_for(|state| state.stopping)).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// Sends all that is not sent yet, the oldest first.
    async fn send_all(&self) -> anyhow::Result<()> {
        let unsent = directory::unsent(&self.directory)?;
        let mut unread = Ok(());
        for (index, one) in unsent.iter().enumerate() {
            // Whoever keeps the directory within its budget may have removed it meanwhile. One that cannot be read is no
            // reason to keep the others back.
            let (record, profile) = match one.read() {
                Ok(Some(read)) => read,
                Ok(None) => continue,
                Err(error) => {
                    unread = Err(error);
                    continue;
                }
            };
            // The profile last: where it is, its record is.
            self.bucket.put(&one.name.record(), record).await?;
            self.bucket.put(&one.name.profile(), profile).await?;
            one.mark()?;
            (self.tell)(Outcome::Sent { left: (unsent.len() - index - 1) as u64 });
        }
        unread
    }
}
