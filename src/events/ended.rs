//! Ends of attempts that Postgres has not taken yet.
//!
//! An attempt whose record stays looks like one that died. So an end is kept here before it is written, and leaves when
//! it is: nothing that ended in order counts as a death while the process lives, however often Postgres is away just then.
//! Whoever begins the same work again writes what is kept of it first; a loop writes the rest.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::Events;
use crate::db::ledger::WorkLedger;
use crate::db::{Database, DbError};
use crate::task::park;

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
    /// What the attempts at the run or publication have used; `None` leaves it at what the last batch or page said.
    pub(super) used: Option<WorkLedger>,
}

/// The ends that are kept.
#[derive(Debug, Default)]
pub struct Ended(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    /// The oldest first.
    ends: Vec<End>,
    /// How many were dropped for newer ones and not told yet.
    dropped: usize,
}

impl Ended {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps ends until they are written.
    pub(super) fn keep(&self, ends: &[End]) {
        let mut kept = self.kept();
        kept.ends.extend_from_slice(ends);
        let too_many = kept.ends.len().saturating_sub(MOST_KEPT);
        kept.ends.drain(..too_many);
        kept.dropped += too_many;
    }

    /// Writes what is kept of a message or run, before its work is begun again.
    pub(super) async fn write_of(&self, database: &Database, id: &str) -> Result<(), DbError> {
        let ends: Vec<End> = self.kept().ends.iter().filter(|end| end.id == id).cloned().collect();
        self.write(database, &ends).await
    }

    /// Writes ends; those that are written are no longer kept. Each kind by itself and at once: what keeps one from being
    /// written keeps no other, and waits for none.
    pub(super) async fn write(&self, database: &Database, ends: &[End]) -> Result<(), DbError> {
        // In a box each: every event's future has room for this, and hardly one needs it.
        let kind = |of| {
            let of_kind: Vec<End> = ends.iter().filter(|end| end.of == of).cloned().collect();
            Box::pin(self.write_kind(database, of, of_kind))
        };
        let (owners, publishers, deliveries) = tokio::join!(kind(Of::Owner), kind(Of::Publisher), kind(Of::Delivery));
        owners.and(publishers).and(deliveries)
    }

    async fn write_kind(&self, database: &Database, of: Of, ends: Vec<End>) -> Result<(), DbError> {
        match write_together(database, of, &ends).await {
            // One of them is at fault.
            Err(DbError::Refused { .. }) => {}
            Err(error) => return Err(error),
            Ok(()) => {
                self.forget(of, &ends);
                return Ok(());
            }
        }
        for end in ends {
            let mut written = write_together(database, of, std::slice::from_ref(&end)).await;
            if matches!(written, Err(DbError::Refused { .. })) && end.error.is_some() {
                // That the attempt has ended matters more than why.
                written = write_together(database, of, &[End { error: None, ..end.clone() }]).await;
            }
            match written {
                Ok(()) => {}
                Err(error @ DbError::Refused { .. }) => {
                    tracing::error!(id = end.id, %error, "Postgres refuses the end of an attempt; it is dropped and counts as a death");
                }
                Err(error) => return Err(error),
            }
            self.forget(of, &[end]);
        }
        Ok(())
    }

    fn forget(&self, of: Of, ends: &[End]) {
        let tokens: HashSet<Uuid> = ends.iter().map(|end| end.token).collect();
        self.kept().ends.retain(|end| end.of != of || !tokens.contains(&end.token));
    }

    /// Writes all that is kept, as far as Postgres takes it within `bound`. Gives how many ends are left.
    pub async fn write_all(&self, database: &Database, bound: Duration) -> usize {
        let (ends, dropped) = {
            let mut kept = self.kept();
            (kept.ends.clone(), std::mem::take(&mut kept.dropped))
        };
        if dropped > 0 {
            tracing::error!(
                dropped,
                most = MOST_KEPT,
                "more ends of attempts than are kept; the oldest are dropped and count as deaths"
            );
        }
        let written = timeout(bound, self.write(database, &ends)).await;
        if let Ok(Err(error)) = written {
            // Whoever ended the attempt has said so; this says nothing new.
            tracing::debug!(%error, ends = ends.len(), "ends of attempts are still kept");
        }
        self.kept().ends.len()
    }
}

/// Writes ends of one kind, all or none.
async fn write_together(database: &Database, of: Of, ends: &[End]) -> Result<(), DbError> {
    if ends.is_empty() {
        return Ok(());
    }
    let ids: Vec<String> = ends.iter().map(|end| end.id.clone()).collect();
    let tokens: Vec<Uuid> = ends.iter().map(|end| end.token).collect();
    let errors: Vec<Option<String>> = ends.iter().map(|end| end.error.clone()).collect();
    let used: Vec<Option<WorkLedger>> = ends.iter().map(|end| end.used.clone()).collect();
    match of {
        Of::Owner => database.release_runs(&ids, &tokens, &errors, &used).await,
        Of::Publisher => database.release_publishers(&ids, &tokens, &errors, &used).await,
        Of::Delivery => database.end_deliveries(&ids, &tokens).await,
    }
}

/// Writes what is kept again and again, for as long as it is polled: another process may be given the same work, and this one
/// may have nothing to do any more.
pub async fn keep_writing(events: Arc<Events>) {
    loop {
        park(sleep(INTERVAL)).await;
        events.ended.write_all(&events.database, Duration::MAX).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end() -> End {
        End { of: Of::Delivery, id: "m-1".to_owned(), token: Uuid::new_v4(), error: None, used: None }
    }

    #[test]
    fn the_oldest_ends_make_room_for_newer_ones_and_are_counted() {
        let ended = Ended::default();
        let oldest = end();
        ended.keep(std::slice::from_ref(&oldest));
        let others: Vec<End> = (1..MOST_KEPT).map(|_| end()).collect();
        ended.keep(&others);
        {
            let kept = ended.kept();
            assert_eq!((kept.ends.first(), kept.dropped), (Some(&oldest), 0));
        }
        ended.keep(&[end(), end()]);
        {
            let kept = ended.kept();
            assert_eq!((kept.ends.len(), kept.ends.first(), kept.dropped), (MOST_KEPT, Some(&others[1]), 2));
        }
        // Of one kind only: a token tells an attempt, which may have ended in two ways.
        let twice = End { of: Of::Owner, ..others[1].clone() };
        ended.keep(std::slice::from_ref(&twice));
        ended.forget(Of::Owner, &others);
        let kept = ended.kept();
        assert_eq!((kept.ends.len(), kept.ends.contains(&twice)), (MOST_KEPT - 1, false));
    }
}
