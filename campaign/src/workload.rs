//! What is put into a world: listings, and events good and bad. [`Inputs`] keeps all of it, because the checker computes
//! the expected world from nothing else.

use std::collections::BTreeMap;

use fastrand::Rng;
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;
use time::macros::datetime;
use time::{Duration, OffsetDateTime};

/// Zip codes of the listings that are there from the beginning.
pub const ZIP_CODES: std::ops::Range<i32> = 98_000..98_010;
/// Listings that events bring have one of these, so a refresh by zip codes never meets them.
const NEW_ZIP_CODE: i32 = 99_000;
/// Event times are this and some seconds; the listings of the beginning are older than all of them.
const EPOCH: OffsetDateTime = datetime!(2026-01-01 00:00 UTC);
const SPREAD_SECONDS: i64 = 1_000_000;
/// Time and id of the event that the first listings count as written by.
pub const SEEDED_AT: OffsetDateTime = datetime!(2015-06-01 00:00 UTC);
/// See [`SEEDED_AT`].
pub const SEEDED_BY: &str = "seed";

/// A queue of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// What producers send to.
    Events,
    /// The slow lane.
    Valuations,
    /// Publish events.
    PostProcessing,
}

/// All of them.
pub const LANES: [Lane; 3] = [Lane::Events, Lane::Valuations, Lane::PostProcessing];

/// What the refresh needs of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Home {
    /// The listing.
    pub id: i64,
    /// Its zip code.
    pub zip_code: i32,
    /// Its price in cents.
    pub price_cents: i64,
}

impl Home {
    /// Listing `id` of the beginning.
    #[must_use]
    pub fn seeded(id: i64) -> Self {
        let zips = i64::from(ZIP_CODES.end - ZIP_CODES.start);
        let zip_code = ZIP_CODES.start + i32::try_from(id % zips).unwrap_or(0);
        // Not round, so that ratios are not either.
        Self { id, zip_code, price_cents: 10_000_000 + id * 137_531 % 90_000_000 }
    }
}

/// A message on its way to a lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Where it goes.
    pub lane: Lane,
    /// Its body.
    pub body: String,
}

/// What a refresh selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Only these; `None`: all.
    pub zip_codes: Option<Vec<i32>>,
    /// At most so many, by id.
    pub limit: Option<i64>,
}

/// A refresh event: usually one body, sent once or twice. With two, both have the same id and the first to arrive wins.
#[derive(Clone, Debug)]
pub struct Refresh {
    /// When it happened.
    pub time: OffsetDateTime,
    /// What each body selects, and the body.
    pub variants: Vec<(Selection, String)>,
}

/// A listing.upsert event: one body, or two with the same id, of which the first to arrive wins.
#[derive(Clone, Debug)]
pub struct Upsert {
    /// When it happened.
    pub time: OffsetDateTime,
    /// What each body writes, and the body.
    pub variants: Vec<(Home, String)>,
}

/// A message that must end in its lane's dead-letter queue.
#[derive(Clone, Debug)]
pub struct Doomed {
    /// Where it was sent and is refused.
    pub lane: Lane,
    /// Its body.
    pub body: String,
    /// The word in the reason.
    pub code: &'static str,
}

/// Everything that was put into one world.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// There from the beginning, ids 1, 2, 3 ...
    pub listings: Vec<Home>,
    /// Listings that the partner refuses for good, with the status.
    pub unwanted: BTreeMap<i64, u16>,
    /// Refresh events by id.
    pub refreshes: BTreeMap<String, Refresh>,
    /// Upsert events by id.
    pub upserts: BTreeMap<String, Upsert>,
    /// Publish events sent by hand for runs that exist: the event's id and the run's.
    pub publishes: BTreeMap<String, String>,
    /// What must be refused.
    pub doomed: Vec<Doomed>,
    /// All messages sent, repeats counted.
    pub messages: u64,
}

/// Makes events from a seed and keeps them.
#[derive(Debug)]
pub struct Workload {
    rng: Rng,
    /// What was made so far.
    pub inputs: Inputs,
    made: u64,
}

impl Workload {
    /// A world of `listings`, one in fifty of which the partner does not want.
    #[must_use]
    pub fn new(seed: u64, listings: i64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut inputs = Inputs { listings: (1..=listings).map(Home::seeded).collect(), ..Inputs::default() };
        for _ in 0..listings / 50 {
            let status = rng.choice([400, 404, 410, 422]).unwrap_or(404);
            inputs.unwanted.insert(rng.i64(1..=listings), status);
        }
        Self { rng, inputs, made: 0 }
    }

    /// Some of everything, in a random order: `refreshes` refreshes (repeats and rivals not counted), upserts old and new,
    /// garbage, publish events of runs that nobody knows and of `complete` ones.
    pub fn burst(&mut self, refreshes: usize, complete: &[String]) -> Vec<Message> {
        let mut messages = Vec::new();
        for _ in 0..refreshes {
            messages.extend(self.refresh());
        }
        for _ in 0..self.rng.usize(10..25) {
            messages.extend(self.upsert());
        }
        // More than the lane has permits: one that is not given back after a bad body is missed at once.
        for _ in 0..self.rng.usize(10..14) {
            messages.extend(self.garbage());
        }
        if let Some(run) = self.rng.choice(complete).filter(|_| self.rng.bool()) {
            messages.push(self.publish(run));
        }
        self.rng.shuffle(&mut messages);
        self.inputs.messages += messages.len() as u64;
        messages
    }

    /// One refresh of everything, and nothing else.
    pub fn whole_refresh(&mut self) -> (String, Message) {
        let id = self.id("refresh");
        let message = self.refresh_of(&id, Selection { zip_codes: None, limit: None });
        self.inputs.messages += 1;
        (id, message)
    }

    /// A publish event by hand for a run that exists, finished or not.
    pub fn publish_now(&mut self, run: &str) -> Message {
        self.inputs.messages += 1;
        self.publish(run)
    }

    /// An upsert event that ends the process or the handler whenever it is begun: its id, and the message, which must be
    /// refused with `code`.
    pub fn poison(&mut self, code: &'static str) -> (String, Message) {
        let id = self.id("poison");
        let home = Home { id: 1, zip_code: NEW_ZIP_CODE, price_cents: 1 };
        let body = upsert_body(&id, EPOCH, home).to_string();
        self.inputs.doomed.push(Doomed { lane: Lane::Events, body: body.clone(), code });
        self.inputs.messages += 1;
        (id, Message { lane: Lane::Events, body })
    }

    /// An upsert event, good, of a listing of its own.
    pub fn one_upsert(&mut self) -> (String, Message) {
        let id = self.id("upsert");
        let listing = self.inputs.listings.len() as i64 + self.rng.i64(1..=200);
        let home = Home { id: listing, zip_code: NEW_ZIP_CODE, price_cents: self.rng.i64(1..=90_000_000) };
        let time = self.time();
        let body = upsert_body(&id, time, home).to_string();
        self.inputs.upserts.insert(id.clone(), Upsert { time, variants: vec![(home, body.clone())] });
        self.inputs.messages += 1;
        (id, Message { lane: Lane::Events, body })
    }

    fn refresh(&mut self) -> Vec<Message> {
        let id = self.id("refresh");
        let selection = self.selection();
        let first = self.refresh_of(&id, selection.clone());
        let mut messages = vec![first.clone()];
        match self.rng.u8(0..10) {
            0..3 => messages.push(first),
            3 => {
                // The same id for something else.
                let limit = Some(selection.limit.map_or(7, |limit| limit + 1));
                let rival = Selection { limit, ..selection };
                let lane = self.slow_lane();
                if let Some(refresh) = self.inputs.refreshes.get_mut(&id) {
                    let body = refresh_body(&id, refresh.time, &rival);
                    refresh.variants.push((rival, body.clone()));
                    messages.push(Message { lane, body });
                }
            }
            _ => {}
        }
        messages
    }

    fn refresh_of(&mut self, id: &str, selection: Selection) -> Message {
        let time = self.time();
        let body = refresh_body(id, time, &selection);
        let refresh = Refresh { time, variants: vec![(selection, body.clone())] };
        self.inputs.refreshes.insert(id.to_owned(), refresh);
        Message { lane: self.slow_lane(), body }
    }

    fn slow_lane(&mut self) -> Lane {
        if self.rng.u8(0..4) == 0 { Lane::Valuations } else { Lane::Events }
    }

    fn selection(&mut self) -> Selection {
        let all = self.inputs.listings.len() as i64;
        match self.rng.u8(0..6) {
            0..3 => Selection { zip_codes: None, limit: None },
            3 => Selection { zip_codes: None, limit: Some(self.rng.i64(0..=all)) },
            _ => {
                let zip_codes = (0..self.rng.usize(1..6)).map(|_| self.rng.i32(ZIP_CODES)).collect();
                let limit = self.rng.bool().then(|| self.rng.i64(1..=all));
                Selection { zip_codes: Some(zip_codes), limit }
            }
        }
    }

    fn upsert(&mut self) -> Vec<Message> {
        let id = self.id("upsert");
        let all = self.inputs.listings.len() as i64;
        let time = self.time();
        // Mostly new listings; sometimes one of the beginning, which keeps its zip code.
        let listing = if self.rng.u8(0..4) == 0 { self.rng.i64(1..=all) } else { all + self.rng.i64(1..=40) };
        let zip_code = if listing <= all { Home::seeded(listing).zip_code } else { NEW_ZIP_CODE };
        let home = Home { id: listing, zip_code, price_cents: self.rng.i64(0..=90_000_000) };
        let mut variants = vec![(home, upsert_body(&id, time, home).to_string())];
        let again = self.rng.u8(0..8);
        if again == 7 {
            // The same id for something else: another price, or another listing.
            let rival = match self.rng.bool() {
                true => Home { price_cents: home.price_cents + 1, ..home },
                false => Home { id: all + 41, zip_code: NEW_ZIP_CODE, ..home },
            };
            variants.push((rival, upsert_body(&id, time, rival).to_string()));
        }
        let mut messages: Vec<Message> =
            variants.iter().map(|(_, body)| Message { lane: Lane::Events, body: body.clone() }).collect();
        if again < 2 {
            messages.push(messages[0].clone());
        }
        self.inputs.upserts.insert(id, Upsert { time, variants });
        messages
    }

    fn publish(&mut self, run: &str) -> Message {
        let id = self.id("publish");
        self.inputs.publishes.insert(id.clone(), run.to_owned());
        let lane = if self.rng.bool() { Lane::PostProcessing } else { Lane::Events };
        let time = self.time();
        Message { lane, body: publish_body(&id, time, run) }
    }

    fn garbage(&mut self) -> Option<Message> {
        let id = self.id("garbage");
        let time = self.time();
        let home = Home { id: 1, zip_code: NEW_ZIP_CODE, price_cents: 1 };
        let good = upsert_body(&id, time, home);
        let with = |path: &str, value: Value| {
            let mut body = good.clone();
            if let Some(field) = body.pointer_mut(path) {
                *field = value;
            }
            body.to_string()
        };
        let (code, body) = match self.rng.u8(0..14) {
            0 => ("invalid_json", self.noise(&id)),
            1 => {
                let whole = good.to_string();
                // ASCII, so every index is between two characters.
                ("invalid_json", whole[..self.rng.usize(1..whole.len())].to_owned())
            }
            2 => ("invalid_json", format!("[{good}]")),
            3 => ("invalid_envelope", format!(r#"{{"id":"{id}"}}"#)),
            4 => ("unknown_version", with("/specversion", json!("2.0"))),
            5 => ("unknown_type", with("/type", json!("writeapi.listing.upsert.v9"))),
            6 => ("too_deep", with("/data", nested(40))),
            7 => ("invalid_data", with("/data/list_price_cents", json!(-1))),
            8 => ("invalid_data", with("/data/bedrooms", json!("three"))),
            9 => ("invalid_data", with("/data", json!([1, 2, 3]))),
            10 => ("invalid_envelope", with("/time", json!("yesterday"))),
            11 => ("invalid_envelope", with("/id", json!(""))),
            12 => {
                let run = self.id("nobody");
                let body = publish_body(&id, time, &run);
                self.inputs.doomed.push(Doomed { lane: Lane::PostProcessing, body: body.clone(), code: "unknown_run" });
                return Some(Message { lane: Lane::PostProcessing, body });
            }
            _ => {
                let body = refresh_body(&id, time, &Selection { zip_codes: None, limit: Some(-1) });
                ("invalid_data", body)
            }
        };
        self.inputs.doomed.push(Doomed { lane: Lane::Events, body: body.clone(), code });
        Some(Message { lane: Lane::Events, body })
    }

    /// Text that is no JSON, whatever follows its first character.
    fn noise(&mut self, id: &str) -> String {
        let characters = (0..self.rng.usize(1..200)).map(|_| {
            let any = self.rng.char(' '..='\u{2fff}');
            // What SQS takes and an emulator's XML does not change.
            if any.is_control() { '~' } else { any }
        });
        format!("#{id}{}", characters.collect::<String>())
    }

    fn id(&mut self, what: &str) -> String {
        self.made += 1;
        format!("{what}-{}-{:04x}", self.made, self.rng.u16(..))
    }

    fn time(&mut self) -> OffsetDateTime {
        EPOCH + Duration::seconds(self.rng.i64(0..SPREAD_SECONDS))
    }
}

fn event(id: &str, kind: &str, time: OffsetDateTime, data: Value) -> Value {
    let time = time.format(&Rfc3339).unwrap_or_default();
    json!({"specversion": "1.0", "id": id, "source": "/campaign", "type": kind, "time": time, "data": data})
}

fn refresh_body(id: &str, time: OffsetDateTime, selection: &Selection) -> String {
    let Selection { zip_codes, limit } = selection;
    event(id, "writeapi.valuations.refresh.v1", time, json!({"zip_codes": zip_codes, "limit": limit})).to_string()
}

fn upsert_body(id: &str, time: OffsetDateTime, home: Home) -> Value {
    let data = json!({
        "listing_id": home.id, "zip_code": home.zip_code, "list_price_cents": home.price_cents,
        "bedrooms": 3, "living_square_feet": 1_500
    });
    event(id, "writeapi.listing.upsert.v1", time, data)
}

fn publish_body(id: &str, time: OffsetDateTime, run: &str) -> String {
    event(id, "writeapi.valuations.publish.v1", time, json!({"run_id": run})).to_string()
}

fn nested(levels: usize) -> Value {
    (0..levels).fold(json!(1), |inner, _| json!({ "a": inner }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_world() {
        let make = |seed| {
            let mut workload = Workload::new(seed, 500);
            (workload.burst(3, &[]), workload.burst(3, &["run".to_owned()]))
        };
        assert_eq!(make(7), make(7));
        assert_ne!(make(7), make(8));
    }

    #[test]
    fn in_time_a_workload_has_everything() {
        let mut workload = Workload::new(1, 500);
        let messages: Vec<Message> = (0..60).flat_map(|_| workload.burst(2, &["run".to_owned()])).collect();
        let inputs = &workload.inputs;
        assert_eq!(inputs.messages, messages.len() as u64);
        assert!(inputs.refreshes.values().any(|refresh| refresh.variants.len() == 2), "no rivals");
        assert!(inputs.upserts.values().any(|upsert| upsert.variants.len() == 2), "no rivals of upserts");
        assert!(!inputs.publishes.is_empty() && !inputs.unwanted.is_empty());
        let mut codes: Vec<&str> = inputs.doomed.iter().map(|doomed| doomed.code).collect();
        codes.sort_unstable();
        codes.dedup();
        let all = [
            "invalid_data",
            "invalid_envelope",
            "invalid_json",
            "too_deep",
            "unknown_run",
            "unknown_type",
            "unknown_version",
        ];
        assert_eq!(codes, all);
        let mut bodies: Vec<&str> = inputs.doomed.iter().map(|doomed| doomed.body.as_str()).collect();
        bodies.sort_unstable();
        bodies.dedup();
        // A letter is told from others by its body. Truncated ones may coincide.
        assert!(bodies.len() * 10 >= inputs.doomed.len() * 9);
    }
}
