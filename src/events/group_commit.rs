//! Group commit: listings that come at the same time are written by one statement.
//!
//! Whoever comes while fewer than [`WRITERS`] statements are under way writes at once, alone; who comes later waits, and is
//! written with all others who wait when one of them ends. So nobody waits for others to come, and the busier Postgres is, the more
//! share a statement, a round trip and a flush of its log. What Postgres refuses or fails of several is tried again by each alone,
//! so that no listing is refused for the fault of another. One that is locked holds up those that it shares a statement with, until
//! `database.statement_timeout`.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Semaphore, oneshot};

use crate::db::upserts::{ListingEvent, Upsert};
use crate::db::{Database, DbError};
use crate::task::{For, wait};

/// Statements at a time. Two, so that a listing that somebody has locked does not keep all others waiting.
const WRITERS: usize = 2;

/// Listings of a statement, at most.
const MOST: usize = 100;

/// Those who wait to be written.
pub struct GroupCommit {
    waiting: Mutex<VecDeque<Waiting>>,
    turns: Semaphore,
}

struct Waiting {
    event: Arc<ListingEvent>,
    answer: oneshot::Sender<Upsert>,
}

impl Default for GroupCommit {
    fn default() -> Self {
        GroupCommit { waiting: Mutex::default(), turns: Semaphore::new(WRITERS) }
    }
}

impl GroupCommit {
    /// Writes the event's listing, alone or with others, as [`Database::upsert_listings`] does. Given up, it may be written
    /// all the same.
    pub async fn write(&self, database: &Database, event: ListingEvent) -> Result<Upsert, DbError> {
        let event = Arc::new(event);
        let (answer, mut answered) = oneshot::channel();
        self.waiting().push_back(Waiting { event: Arc::clone(&event), answer });
        let together = loop {
            tokio::select! {
                biased;
                answer = wait(For::Database, &mut answered) => break answer.ok(),
                turn = self.turns.acquire() => {
                    let wrote = self.write_group(database).await;
                    drop(turn.expect("the semaphore is never closed"));
                    if !wrote {
                        // It is in a statement that is under way.
                        break wait(For::Database, answered).await.ok();
                    }
                }
            }
        };
        match together {
            Some(upsert) => Ok(upsert),
            // It failed, or whoever wrote it was ended meanwhile.
            None => Ok(database.upsert_listings(&[event]).await?[0]),
        }
    }

    /// Writes those who wait and tells each; nobody is told if that fails. `false`: nobody waits.
    async fn write_group(&self, database: &Database) -> bool {
        // Those that were received together come here one after another: they may all join the first.
        tokio::task::yield_now().await;
        let group = next_group(&mut self.waiting());
        if group.is_empty() {
            return false;
        }
        let events: Vec<Arc<ListingEvent>> = group.iter().map(|waiting| Arc::clone(&waiting.event)).collect();
        match database.upsert_listings(&events).await {
            Ok(upserts) => {
                for (waiting, upsert) in group.into_iter().zip(upserts) {
                    let _ = waiting.answer.send(upsert);
                }
            }
            Err(error) => {
                tracing::debug!(listings = events.len(), %error, "listings were not written together; each is tried alone");
            }
        }
        true
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The first of those who wait, without those who gave up. Of a listing and of an id there is one in a statement; others stay,
/// in their order.
fn next_group(waiting: &mut VecDeque<Waiting>) -> Vec<Waiting> {
    let (mut group, mut later) = (Vec::new(), VecDeque::new());
    let (mut listings, mut ids) = (HashSet::new(), HashSet::new());
    while let Some(next) = waiting.pop_front() {
        if next.answer.is_closed() {
            continue;
        }
        let is_new = listings.insert(next.event.listing.listing_id) & ids.insert(next.event.event_id.clone());
        if is_new && group.len() < MOST {
            group.push(next);
        } else {
            later.push_back(next);
        }
    }
    *waiting = later;
    group
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::*;
    use crate::db::listings::Listing;

    fn waiting(listing_id: i64, event_id: &str) -> (Waiting, oneshot::Receiver<Upsert>) {
        let listing: Listing = serde_json::from_value(serde_json::json!({
            "listing_id": listing_id, "zip_code": 98001, "list_price_cents": 1, "bedrooms": 1, "living_square_feet": 1,
        }))
        .unwrap();
        let (answer, answered) = oneshot::channel();
        let event = ListingEvent {
            listing,
            event_time: OffsetDateTime::UNIX_EPOCH,
            event_id: event_id.to_owned(),
            digest: [0; 32],
        };
        (Waiting { event: Arc::new(event), answer }, answered)
    }

    fn ids(of: impl IntoIterator<Item = Waiting>) -> Vec<String> {
        of.into_iter().map(|waiting| waiting.event.event_id.clone()).collect()
    }

    #[test]
    fn a_group_has_each_listing_and_each_id_once() {
        let (all, receivers): (VecDeque<_>, Vec<_>) = [(1, "a"), (1, "b"), (2, "a"), (3, "c"), (3, "c"), (4, "d")]
            .map(|(listing, id)| waiting(listing, id))
            .into_iter()
            .unzip();
        let mut all = all;
        assert_eq!(ids(next_group(&mut all)), ["a", "c", "d"]);
        assert_eq!(ids(next_group(&mut all)), ["b", "a", "c"]);
        assert!(next_group(&mut all).is_empty());
        drop(receivers);
    }

    #[test]
    fn a_group_has_an_end_and_none_of_those_who_gave_up() {
        let (all, mut receivers): (VecDeque<_>, Vec<_>) =
            (0..MOST as i64 + 10).map(|number| waiting(number, &number.to_string())).unzip();
        let mut all = all;
        receivers.remove(3);
        let first = ids(next_group(&mut all));
        assert_eq!(first.len(), MOST);
        assert!(!first.contains(&"3".to_owned()));
        assert_eq!(ids(next_group(&mut all)).first().unwrap(), &(MOST + 1).to_string());
        assert!(all.is_empty());
    }
}
