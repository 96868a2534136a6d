//! Ends of attempts that Postgres has not taken yet.
//!
//! An attempt whose record stays looks like one that died. So an end is kept here before it is written, and leaves when
//! it is: nothing that ended in order counts as a death while the process lives, however often Postgres is away just then.
//! Whoever begins the same work again writes what is kept of it first; a loop writes the rest.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::Events;
use crate::db::{Database, DbError};

/// Between two looks at what is kept.
const INTERVAL: Duration = Duration::from_secs(1);

/// The most ends that are kept; beyond that the oldest are dropped.
const MOST_KEPT: usize = 10_000;

/// What an attempt worked on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    /// A message.
    Delivery,
    /// A run, refreshing it.
    Owner,
    /// A run, publishing it.
    Publisher,
}

/// The end of an attempt. To write it again changes nothing: the token is in no other row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct End {
    pub(super) of: Of,
    /// Id of the message or of the run.
    pub(super) id: String,
    /// What tells the attempt from all others.
    pub(super) token: Uuid,
    /// Shown to operators with the run.
    pub(super) error: Option<String>,
}

/// The ends that are kept, the oldest first.
#[derive(Debug, Default)]
pub struct Ended(Mutex<Vec<End>>);

impl Ended {
    fn kept(&self) -> MutexGuard<'_, Vec<End>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps ends until they are written.
    pub(super) fn keep(&self, ends: &[End]) {
        let mut kept = self.kept();
        kept.extend_from_slice(ends);
        let too_many = kept.len().saturating_sub(MOST_KEPT);
        kept.drain(..too_many);
    }

    /// Writes what is kept of a message or run, before its work is begun again.
    pub(super) async fn write_of(&self, database: &Database, id: &str) -> Result<(), DbError> {
        let ends: Vec<End> = self.kept().iter().filter(|end| end.id == id).cloned().collect();
        self.write(database, &ends).await
    }

    /// Writes ends; those that are written are no longer kept.
    pub(super) async fn write(&self, database: &Database, ends: &[End]) -> Result<(), DbError> {
        for of in [Of::Owner, Of::Publisher, Of::Delivery] {
            let ends = || ends.iter().filter(|end| end.of == of);
            let ids: Vec<String> = ends().map(|end| end.id.clone()).collect();
            let tokens: Vec<Uuid> = ends().map(|end| end.token).collect();
            if ids.is_empty() {
                continue;
            }
            let errors: Vec<Option<String>> = ends().map(|end| end.error.clone()).collect();
            match of {
                Of::Owner => database.release_runs(&ids, &tokens, &errors).await?,
                Of::Publisher => database.release_publishers(&ids, &tokens, &errors).await?,
                Of::Delivery => database.end_deliveries(&ids, &tokens).await?,
            }
            self.kept().retain(|end| end.of != of || !tokens.contains(&end.token));
        }
        Ok(())
    }

    /// Writes all that is kept, as far as Postgres takes it within `bound`. Gives how many ends are left.
    pub async fn write_all(&self, database: &Database, bound: Duration) -> usize {
        let ends = self.kept().clone();
        let written = timeout(bound, self.write(database, &ends)).await;
        if let Ok(Err(error)) = written {
            // Whoever ended the attempt has said so; this says nothing new.
            tracing::debug!(%error, ends = ends.len(), "ends of attempts are still kept");
        }
        self.kept().len()
    }
}

/// Writes what is kept again and again, for as long as it is polled: another process may be given the same work, and this one
/// may have nothing to do any more.
pub async fn keep_writing(events: Arc<Events>) {
    loop {
        sleep(INTERVAL).await;
        events.ended.write_all(&events.database, Duration::MAX).await;
    }
}
