//! Group commit: listings that come at the same time are written by one statement.
//!
//! Whoever comes while fewer than [`WRITERS`] statements are under way is written at once, with all whose tasks were ready to run
//! just then, as those that were received together are; who comes later waits, and is written with all others who wait when one of
//! the statements ends. So the busier Postgres is, the more share a statement, a round trip and a flush of its log.
//!
//! They share nothing else. What Postgres refuses or fails of several, or does not do at once because of a lock, is tried again by each
//! alone, and is then no longer in anybody's way. What a statement for several uses is charged to their kind and to none of them.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::db::upserts::{ListingEvent, Upsert};
use crate::db::{Database, DbError};
use crate::task::{self, For, Kind, Stage, in_stage, wait};

/// Statements at a time. Two, so that one of them is prepared while Postgres flushes what the other wrote.
const WRITERS: usize = 2;

/// Listings of a statement, at most.
const MOST: usize = 100;

/// Bytes of their data, at most, but for a single one that is larger.
const MOST_BYTES: usize = 1024 * 1024;

/// Those who wait to be written. Clones are the same.
#[derive(Clone, Default)]
pub struct GroupCommit(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    waiting: VecDeque<Waiting>,
    /// What the statements under way write. Another one with the same would wait for it, with all that it has beside.
    listings: HashSet<i64>,
    ids: HashSet<String>,
    writers: usize,
    /// One of the writers has begun and not taken its first group: whoever comes now is of it.
    gathering: bool,
}

struct Waiting {
    event: Arc<ListingEvent>,
    answer: oneshot::Sender<Result<Upsert, DbError>>,
}

impl GroupCommit {
    /// Writes the event's listing, with others if there are any, as [`Database::upsert_listing`] does. Given up, it may be written
    /// all the same.
    pub async fn write(&self, database: &Database, event: ListingEvent) -> Result<Upsert, DbError> {
        let event = Arc::new(event);
        let (answer, answered) = oneshot::channel();
        let begins = {
            let mut state = self.state();
            state.waiting.push_back(Waiting { event: Arc::clone(&event), answer });
            state.begin()
        };
        if begins {
            self.spawn_writer(database);
        }
        match wait(For::Database, answered).await {
            Ok(answer) => answer,
            // It failed for several, or its writer was ended.
            Err(_) => Box::pin(database.upsert_listing(&event)).await,
        }
    }

    /// To be called where [`State::begin`] said so.
    fn spawn_writer(&self, database: &Database) {
        let writer = Writer { of: self.clone(), gathering: true, ended: false };
        task::spawn_apart(Kind::ListingUpsert, "group commit", writer.run(database.clone()));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of those who write.
struct Writer {
    of: GroupCommit,
    gathering: bool,
    ended: bool,
}

impl Writer {
    async fn run(mut self, database: Database) {
        task::after_those_ready().await;
        while let Some(group) = self.next() {
            if self.of.state().begin_for_the_rest() {
                self.of.spawn_writer(&database);
            }
            in_stage(Stage::Write, group.write(&database)).await;
        }
    }

    /// The next group; `None`: nobody waits whom this one could write, and it has ended. Who waits for what a statement under way
    /// writes is for the writer of that.
    fn next(&mut self) -> Option<Group> {
        let mut state = self.of.state();
        if std::mem::take(&mut self.gathering) {
            state.gathering = false;
        }
        let waiting = state.next_group();
        if waiting.is_empty() {
            // Before anybody else looks whether one is needed.
            state.writers -= 1;
            self.ended = true;
            return None;
        }
        drop(state);
        Some(Group { of: self.of.clone(), waiting })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.ended {
            // In the middle, by a panic or with the runtime. Whoever waits is told by that, and tries for itself.
            let mut state = self.of.state();
            state.writers -= 1;
            if self.gathering {
                state.gathering = false;
            }
            state.waiting.clear();
        }
    }
}

/// What a statement writes, until it is dropped.
struct Group {
    of: GroupCommit,
    waiting: Vec<Waiting>,
}

impl Group {
    /// Writes them and tells each. Where it fails nobody is told: they try for themselves.
    async fn write(mut self, database: &Database) {
        let events: Vec<Arc<ListingEvent>> = self.waiting.iter().map(|waiting| Arc::clone(&waiting.event)).collect();
        match database.upsert_listings(&events).await {
            Ok(upserts) => {
                self.end();
                for (waiting, upsert) in self.waiting.drain(..).zip(upserts) {
                    let _ = waiting.answer.send(Ok(upsert));
                }
            }
            Err(error @ DbError::Refused { .. }) if events.len() == 1 => {
                self.end();
                if let Some(waiting) = self.waiting.pop() {
                    let _ = waiting.answer.send(Err(error));
                }
            }
            Err(error) => {
                tracing::debug!(listings = events.len(), %error, "listings were not written together; each is tried alone");
            }
        }
    }

    /// Nothing of it is under way any more.
    fn end(&self) {
        let mut state = self.of.state();
        for Waiting { event, .. } in &self.waiting {
            state.listings.remove(&event.listing.listing_id);
            state.ids.remove(&event.event_id);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.end();
    }
}

impl State {
    /// Whether one more writer is to begin for whoever came just now; it is counted then.
    fn begin(&mut self) -> bool {
        let begins = self.writers < WRITERS && !self.gathering;
        if begins {
            self.writers += 1;
            self.gathering = true;
        }
        begins
    }

    /// As [`begin`](State::begin), for those for whom a group had no room.
    fn begin_for_the_rest(&mut self) -> bool {
        !self.waiting.is_empty() && self.begin()
    }

    /// The first of those who wait, without those who gave up. Of a listing and of an id one is under way at a time; others stay, in
    /// their order. What is returned is under way.
    fn next_group(&mut self) -> Vec<Waiting> {
        let (mut group, mut later, mut bytes) = (Vec::new(), VecDeque::new(), 0);
        while let Some(next) = self.waiting.pop_front() {
            if next.answer.is_closed() {
                continue;
            }
            let ListingEvent { listing, event_id, size, .. } = &*next.event;
            let has_room = group.is_empty() || (group.len() < MOST && bytes + size <= MOST_BYTES);
            if has_room && !self.listings.contains(&listing.listing_id) && !self.ids.contains(event_id) {
                self.listings.insert(listing.listing_id);
                self.ids.insert(event_id.clone());
                bytes += size;
                group.push(next);
            } else {
                later.push_back(next);
            }
        }
        self.waiting = later;
        group
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::*;
    use crate::db::listings::Listing;

    type Answered = oneshot::Receiver<Result<Upsert, DbError>>;

    fn waiting(listing_id: i64, event_id: &str, size: usize) -> (Waiting, Answered) {
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
            size,
        };
        (Waiting { event: Arc::new(event), answer }, answered)
    }

    fn ids(of: impl IntoIterator<Item = Waiting>) -> Vec<String> {
        of.into_iter().map(|waiting| waiting.event.event_id.clone()).collect()
    }

    /// A state in which these wait; whoever keeps the receivers has them wait.
    fn state(all: impl IntoIterator<Item = (i64, &'static str, usize)>) -> (State, Vec<Answered>) {
        let (waiting, receivers) = all.into_iter().map(|(listing, id, size)| waiting(listing, id, size)).unzip();
        (State { waiting, ..State::default() }, receivers)
    }

    #[test]
    fn of_a_listing_and_of_an_id_one_is_under_way() {
        let (mut state, _receivers) =
            state([(1, "a", 1), (1, "b", 1), (2, "a", 1), (3, "c", 1), (3, "c", 1), (4, "d", 1)]);
        assert_eq!(ids(state.next_group()), ["a", "c", "d"]);
        assert!(state.next_group().is_empty());
        let of = GroupCommit(Arc::new(Mutex::new(state)));
        // Those of the first group end.
        let end = |all: [(i64, &str); 3]| {
            let waiting = all.map(|(listing, id)| waiting(listing, id, 1).0).into();
            drop(Group { of: of.clone(), waiting });
        };
        end([(1, "a"), (3, "c"), (4, "d")]);
        let next = || ids(of.state().next_group());
        assert_eq!(next(), ["b", "a", "c"]);
        end([(1, "b"), (2, "a"), (3, "c")]);
        assert!(next().is_empty() && of.state().listings.is_empty() && of.state().ids.is_empty());
    }

    #[test]
    fn one_writer_begins_for_all_who_come_until_it_takes_them() {
        let of = GroupCommit::default();
        let writer = || Writer { of: of.clone(), gathering: true, ended: false };
        assert!(of.state().begin());
        assert!(!of.state().begin());
        let (someone, _answered) = waiting(1, "a", 1);
        of.state().waiting.push_back(someone);
        let mut first = writer();
        let group = first.next().expect("someone waits");
        // That one is at work now, and whoever comes needs another.
        assert!(of.state().begin());
        assert!(!of.state().begin());
        drop(writer());
        assert!(of.state().begin(), "one that ended before it took anybody is in the way of others");
        drop(writer());
        drop(group);
        assert!(first.next().is_none());
        let State { writers, gathering, .. } = &*of.state();
        assert_eq!((*writers, *gathering), (0, false));
    }

    #[test]
    fn those_for_whom_a_group_has_no_room_do_not_wait_for_its_statement() {
        let numbers: Vec<&'static str> = (0..=MOST).map(|number| &*number.to_string().leak()).collect();
        let (mut state, _receivers) = state(numbers.iter().zip(0..).map(|(id, listing)| (listing, *id, 1)));
        assert!(state.begin());
        state.gathering = false;
        assert_eq!(state.next_group().len(), MOST);
        assert!(state.begin_for_the_rest());
        state.gathering = false;
        assert_eq!(state.next_group().len(), 1);
        assert!(!state.begin_for_the_rest());
    }

    #[test]
    fn a_group_has_an_end_and_none_of_those_who_gave_up() {
        let numbers: Vec<&'static str> = (0..MOST + 10).map(|number| &*number.to_string().leak()).collect();
        let (mut state, mut receivers) = state(numbers.iter().zip(0..).map(|(id, listing)| (listing, *id, 1)));
        receivers.remove(3);
        let first = ids(state.next_group());
        assert_eq!(first.len(), MOST);
        assert!(!first.contains(&"3".to_owned()));
        assert_eq!(ids(state.next_group()).first(), Some(&(MOST + 1).to_string()));
        assert!(state.waiting.is_empty());
    }

    #[test]
    fn a_group_takes_no_more_bytes_than_may_be_but_for_a_single_event() {
        let (mut state, _receivers) =
            state([(1, "a", MOST_BYTES + 1), (2, "b", MOST_BYTES / 2), (3, "c", MOST_BYTES), (4, "d", MOST_BYTES / 2)]);
        let groups = [0; 3].map(|_| ids(state.next_group()));
        assert_eq!(groups, [vec!["a"], vec!["b", "d"], vec!["c"]]);
    }
}
