//! A connection lent by the pool, which gives it back within a bound.
//!
//! sqlx asks a connection whether it still lives before it goes back to the pool, and waits for the answer for as long as
//! the kernel believes in the other end, a quarter of an hour and more. Its slot is taken for so long.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnection, Postgres};
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::task;

/// How long a connection may take to answer before it goes back to the pool; one that does not is closed. As long as sqlx
/// gives a connection that is to be closed.
pub(super) const GIVE_BACK: Duration = Duration::from_secs(5);

/// A connection of the pool.
pub(super) struct Pooled {
    connection: PoolConnection<Postgres>,
    is_spoilt: bool,
}

impl Pooled {
    pub fn new(connection: PoolConnection<Postgres>) -> Self {
        Pooled { connection, is_spoilt: false }
    }

    /// The connection is closed instead of going back. Its slot is free within [`GIVE_BACK`].
    pub fn spoil(&mut self) {
        self.is_spoilt = true;
        self.connection.close_on_drop();
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        // Without a runtime nothing can be asked: the connection's own drop closes it.
        if !self.is_spoilt
            && let Ok(runtime) = Handle::try_current()
        {
            // Given up, the connection is dropped, which closes it and frees its slot.
            let _runtime = runtime.enter();
            task::spawn("return of a connection", timeout(GIVE_BACK, self.connection.return_to_pool()));
        }
    }
}

impl Deref for Pooled {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Pooled {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}
