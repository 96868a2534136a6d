//! Connections lent to work, and given back within a bound.
//!
//! sqlx asks a connection whether it still lives before it goes back to its pool: a second round trip for each statement. A
//! connection whose work ended in order has just shown that it lives, so it is kept here for whoever comes next, and sqlx gets
//! it when nobody has come for a while. All others are asked, and not for as long as the kernel believes in the other end,
//! which is a quarter of an hour and more.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::Connection as _;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnection, PgPool, Postgres};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use crate::task;

/// How long a connection may take to answer before it goes back to the pool; one that does not is closed. As long as sqlx
/// gives a connection that is to be closed.
pub(super) const GIVE_BACK: Duration = Duration::from_secs(5);

/// How long a connection is kept that nobody uses; then it is for sqlx to close it when it has been idle for long.
const IDLE: Duration = Duration::from_secs(1);

/// How long one is kept that is always used; then sqlx has it for a moment, which closes those that are old.
const BUSY: Duration = Duration::from_secs(60);

/// As many connections as the pool may have, for one piece of work each.
pub(super) struct Connections {
    pool: PgPool,
    acquire_timeout: Duration,
    /// One for each connection. Here and not in sqlx's pool is where work waits, since sqlx does not know of those kept.
    turns: Arc<Semaphore>,
    kept: Mutex<Kept>,
}

/// Connections that are ready, the last one used at the end.
#[derive(Default)]
struct Kept {
    connections: Vec<(Lent, Instant)>,
    is_closed: bool,
}

impl Kept {
    fn close_all(&mut self) {
        self.connections.drain(..).for_each(|(lent, _)| lent.close(None));
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.close_all();
    }
}

impl Connections {
    /// Those of a pool that has `most` at a time.
    pub fn new(pool: PgPool, most: u32, acquire_timeout: Duration) -> Arc<Self> {
        let turns = Arc::new(Semaphore::new(most as usize));
        Arc::new(Connections { pool, acquire_timeout, turns, kept: Mutex::default() })
    }

    /// The pool that they are of.
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// One of them, within `database.acquire_timeout`.
    pub async fn acquire(self: Arc<Self>) -> sqlx::Result<Pooled> {
        let acquired = timeout(self.acquire_timeout, async {
            let turn = self.turns.clone().acquire_owned().await.expect("the semaphore is never closed");
            let kept = self.kept().connections.pop();
            let lent = match kept {
                Some((lent, _)) => lent,
                None => Lent { connection: self.pool.acquire().await?, since: Instant::now() },
            };
            Ok((lent, turn))
        });
        let (lent, turn) = acquired.await.map_err(|_| sqlx::Error::PoolTimedOut).flatten()?;
        Ok(Pooled { lent: Some((lent, turn)), end: End::Asked, connections: self })
    }

    /// Gives those that nobody has used for a while to sqlx. To be called now and then.
    pub fn sweep(&self) {
        let now = Instant::now();
        let mut kept = self.kept();
        let idle = kept.connections.partition_point(|(_, since)| now.duration_since(*since) >= IDLE);
        kept.connections.drain(..idle).for_each(|(lent, _)| lent.give_back(None));
    }

    /// Keeps none any more; those that are kept are closed with the pool.
    pub fn close(&self) {
        let mut kept = self.kept();
        kept.is_closed = true;
        kept.connections.drain(..).for_each(|(lent, _)| lent.give_back(None));
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection for one piece of work.
pub(super) struct Pooled {
    /// There until the drop; with one of the turns.
    lent: Option<(Lent, OwnedSemaphorePermit)>,
    end: End,
    connections: Arc<Connections>,
}

/// A connection that sqlx has lent.
struct Lent {
    connection: PoolConnection<Postgres>,
    since: Instant,
}

impl Lent {
    /// Closes the connection, which frees its slot. Whoever waits for `turn` gets it afterwards.
    fn close(self, turn: Option<OwnedSemaphorePermit>) {
        self.part(turn, |connection| connection.close());
    }

    /// Asks the connection, and gives it back if it answers. Whoever waits for `turn` gets it afterwards.
    fn give_back(self, turn: Option<OwnedSemaphorePermit>) {
        self.part(turn, |mut connection| {
            // They have grown to what the largest statement and answer took, a quarter of a megabyte for a page and its answers.
            connection.shrink_buffers();
            connection.return_to_pool()
        });
    }

    fn part<F>(self, turn: Option<OwnedSemaphorePermit>, part: impl FnOnce(PoolConnection<Postgres>) -> F)
    where
        F: Future<Output: Send> + Send + 'static,
    {
        // Without a runtime nothing can be said to the server, and sqlx panics for a connection of its pool that is dropped.
        if Handle::try_current().is_err() {
            return drop(self.connection.detach());
        }
        // Given up, it is dropped, which closes it and frees its slot.
        let parted = timeout(GIVE_BACK, part(self.connection));
        task::spawn("parting from a connection", async move {
            let _ = task::park(parted).await;
            drop(turn);
        });
    }
}

/// What becomes of a connection.
enum End {
    /// It may be in the middle of something: it is asked whether it lives, which also ends that.
    Asked,
    /// Its work ended in order.
    Kept,
    /// It is closed.
    Spoilt,
}

impl Pooled {
    /// The connection is closed instead of going back, and so are those that are kept: what ended one may have ended all, or
    /// they are of a server that lost its role, which answers as if nothing were wrong. Its slot is free within [`GIVE_BACK`].
    pub fn spoil(&mut self) {
        self.end = End::Spoilt;
    }

    /// Its work has ended in order: it can be used again as it is.
    pub fn keep(&mut self) {
        // The rollback of a transaction that was left is not sent before somebody uses the connection again.
        if !self.should_flush() {
            self.end = End::Kept;
        }
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let Some((lent, turn)) = self.lent.take() else { return };
        match self.end {
            End::Spoilt => {
                self.connections.kept().close_all();
                lent.close(Some(turn));
            }
            End::Kept if lent.since.elapsed() < BUSY => {
                let mut kept = self.connections.kept();
                if kept.is_closed {
                    return lent.give_back(Some(turn));
                }
                // Before the turn is free, so that whoever has it next finds it.
                kept.connections.push((lent, Instant::now()));
            }
            End::Kept | End::Asked => lent.give_back(Some(turn)),
        }
    }
}

impl Deref for Pooled {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.lent.as_ref().expect("it is there until the drop").0.connection
    }
}

impl DerefMut for Pooled {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.lent.as_mut().expect("it is there until the drop").0.connection
    }
}
