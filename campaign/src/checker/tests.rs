//! A checker that cannot fail proves nothing: each invariant is broken once here and must be named.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use local_stack::partner::{Stats, valuation};
use local_stack::{Action, Done, TapRecord, WatchedCall, WatchedMessage};
use serde_json::{Value, json};
use uuid::Uuid;

use super::*;
use crate::workload::{Doomed, Lane, SEEDED_AT, SEEDED_BY, Workload};

/// A world in which all is well: one refresh of everything with its rival, one upsert, one refused body, one publish event
/// by hand.
fn good() -> (Inputs, Observed, Allowances) {
    let mut workload = Workload::new(3, 100);
    let (run, first) = workload.whole_refresh();
    let (upsert, _) = workload.one_upsert();
    workload.publish_now(&run);
    let mut inputs = workload.inputs;
    let rival = first.body.replace("\"limit\":null", "\"limit\":7");
    let refresh = inputs.refreshes.get_mut(&run).expect("it was made");
    refresh.variants.push((Selection { zip_codes: None, limit: Some(7) }, rival.clone()));
    inputs.doomed.push(Doomed { lane: Lane::Events, body: "#no".to_owned(), code: "invalid_json" });

    let valuations: Vec<Valuation> = inputs.listings.iter().map(|home| row(&run, home, &inputs)).collect();
    let valued: Vec<&Valuation> = valuations.iter().filter(|row| row.failure.is_none()).collect();
    let (time, count) = (inputs.refreshes[&run].time, valued.len() as i64);
    let event: Value = serde_json::from_str(&first.body).expect("JSON");
    let records = valued.iter().map(|row| record(row)).collect();
    let mut listings: Vec<Listing> = inputs.listings.iter().map(|home| listing(home, SEEDED_BY, SEEDED_AT)).collect();
    let (home, won) = inputs.upserts[&upsert].variants[0].clone();
    listings.push(listing(&home, &upsert, inputs.upserts[&upsert].time));
    let (other, lost) = (Home { price_cents: home.price_cents + 1, ..home }, format!("{won} "));
    inputs.upserts.get_mut(&upsert).expect("it was made").variants.push((other, lost.clone()));
    let current = valued.iter().map(|row| Current {
        listing_id: row.listing_id,
        run_id: run.clone(),
        valuation_cents: row.valuation_cents.expect("valued"),
        confidence: row.confidence.expect("valued"),
    });
    let publish = Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("{run}:publish").as_bytes()).to_string();
    let by_hand = inputs.publishes.keys().next().expect("one").clone();
    let publication = |event_id: &str| Publication {
        event_id: event_id.to_owned(),
        run_id: run.clone(),
        state: "complete".to_owned(),
        published: count,
        attempts: 1,
    };
    let letter = |lane, body: &str, code: &str| Letter {
        lane,
        body: body.to_owned(),
        reason: json!({"code": code, "reason": "because"}).to_string(),
    };
    let finals = 100 - count as u64;
    let observed = Observed {
        runs: vec![Run {
            run_id: run.clone(),
            state: "complete".to_owned(),
            selected: 100,
            valued: count,
            failed: 100 - count,
            attempts: 1,
            held: false,
            event_time: time,
            event_data: Some(event["data"].to_string()),
            completed_at: Some(time),
            deaths: Some(0),
        }],
        current: current.collect(),
        listings,
        outbox: vec![Sent { event_id: publish.clone(), lane: "post_processing".to_owned(), sent: true }],
        publications: vec![publication(&publish), publication(&by_hand)],
        records,
        records_missed: 0,
        letters: vec![
            letter(Lane::Events, "#no", "invalid_json"),
            letter(Lane::Events, &lost, "id_reused"),
            letter(Lane::Valuations, &rival, "id_reused"),
        ],
        sqs_calls: Vec::new(),
        interruptions: Vec::new(),
        left: vec![(Lane::Events, 0, 0)],
        strangers: Vec::new(),
        partner: Stats {
            requests: 100,
            distinct_keys: 100,
            effects: count as u64,
            by_status: BTreeMap::from([(200, count as u64), (404, finals)]),
            max_in_one_second: 50,
            ..Stats::default()
        },
        replicas: vec![Figures { name: "replica-1".to_owned(), descriptors: (20, 30), ..Figures::default() }],
        connections: 4,
        valuations,
    };
    let allowances = Allowances {
        calls_per_second: 50,
        connections: 6,
        descriptors: 100,
        resident: 1 << 20,
        ..Allowances::default()
    };
    (inputs, observed, allowances)
}

fn row(run: &str, home: &Home, inputs: &Inputs) -> Valuation {
    let right = valuation(home.id, home.price_cents);
    let refused = inputs.unwanted.contains_key(&home.id);
    Valuation {
        run_id: run.to_owned(),
        listing_id: home.id,
        zip_code: home.zip_code,
        list_price_cents: home.price_cents,
        valuation_cents: (!refused).then_some(right.valuation_cents),
        confidence: (!refused).then_some(right.confidence()),
        failure: refused.then(|| "404".to_owned()),
    }
}

fn listing(home: &Home, event_id: &str, event_time: time::OffsetDateTime) -> Listing {
    Listing {
        listing_id: home.id,
        zip_code: home.zip_code,
        list_price_cents: home.price_cents,
        event_id: event_id.to_owned(),
        event_time,
    }
}

/// A record as the topic's contract has it; its value is checked against a pinned one below.
fn record(row: &Valuation) -> TapRecord {
    let (price, valuation) = (row.list_price_cents, row.valuation_cents.expect("valued"));
    let ten_thousandths = (valuation - price) as f64 / price as f64;
    let assessment = match ten_thousandths {
        high if high >= 0.05 => "undervalued",
        low if low <= -0.05 => "overvalued",
        _ => "fair",
    };
    let value = format!(
        r#"{{"run_id":"{}","listing_id":{},"zip_code":{},"list_price_cents":{price},"valuation_cents":{valuation},"delta_cents":{},"delta_ratio":{:.4},"assessment":"{assessment}","confidence":{:?}}}"#,
        row.run_id,
        row.listing_id,
        row.zip_code,
        valuation - price,
        ten_thousandths,
        row.confidence.expect("valued"),
    );
    let ce_id = Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("{}:{}", row.run_id, row.listing_id).as_bytes());
    let headers = [
        ("ce_id", ce_id.to_string()),
        ("ce_type", "writeapi.listing.valued.v1".to_owned()),
        ("ce_specversion", "1.0".to_owned()),
        ("ce_source", "/writeapi".to_owned()),
        ("ce_time", String::new()),
        ("content-type", "application/json".to_owned()),
    ];
    TapRecord {
        partition: 0,
        offset: 0,
        key: row.listing_id.to_string(),
        payload: value.into_bytes(),
        headers: headers.map(|(name, value)| (name.to_owned(), value)).into(),
    }
}

/// The good world with the times of its records filled in.
fn world() -> (Inputs, Observed, Allowances) {
    let (inputs, mut observed, allowances) = good();
    let at = observed.runs[0].completed_at.expect("complete");
    let at = at.format(&time::format_description::well_known::Rfc3339).expect("four digits");
    for record in &mut observed.records {
        record.headers.insert("ce_time".to_owned(), at.clone());
    }
    (inputs, observed, allowances)
}

/// The invariants that are found broken after `harm` was done.
fn broken(harm: impl FnOnce(&mut Observed)) -> Vec<&'static str> {
    let (inputs, mut observed, allowances) = world();
    harm(&mut observed);
    let mut found: Vec<&str> = check(&inputs, &observed, &allowances).iter().map(|one| one.invariant).collect();
    found.dedup();
    found
}

#[test]
fn a_world_in_which_all_is_well_has_no_violation() {
    let (inputs, observed, allowances) = world();
    assert_eq!(check(&inputs, &observed, &allowances), []);
}

#[test]
fn books_that_do_not_balance_are_found() {
    assert!(broken(|world| drop(world.valuations.remove(0))).contains(&"I1"), "a listing without a state");
    assert!(broken(|world| world.runs.clear()).contains(&"I1"), "a run is missing");
    assert!(broken(|world| world.runs[0].state = "running".to_owned()).contains(&"I1"), "an unfinished run");
    assert!(broken(|world| world.runs[0].held = true).contains(&"I1"), "an owner is left");
    assert!(broken(|world| world.runs[0].valued -= 1).contains(&"I1"), "wrong counts");
    assert_eq!(broken(|world| world.runs[0].selected -= 1), ["I1"], "a listing that was not counted");
    assert_eq!(broken(|world| world.runs[0].selected += 1), ["I1"], "a listing that was counted and has no state");
    assert!(broken(|world| world.runs[0].event_data = Some("{}".to_owned())).contains(&"I1"), "of another event");
    let stranger = |world: &mut Observed| {
        world.valuations[0].listing_id = 100_000;
    };
    assert!(broken(stranger).contains(&"I1"), "a listing that nobody selected");
    let nobodys = |world: &mut Observed| {
        let run = Run { run_id: "nobody's".to_owned(), ..world.runs[0].clone() };
        world.runs.push(run);
    };
    assert!(broken(nobodys).contains(&"I1"), "a run that nobody asked for");
}

#[test]
fn wrong_valuations_are_found() {
    let valued = |world: &Observed| world.valuations.iter().position(|row| row.failure.is_none()).expect("one");
    let wrong_cents = |world: &mut Observed| {
        let index = valued(world);
        world.valuations[index].valuation_cents = Some(1);
    };
    assert!(broken(wrong_cents).contains(&"I1"));
    let wrong_price = |world: &mut Observed| {
        let index = valued(world);
        world.valuations[index].list_price_cents += 1;
    };
    assert!(broken(wrong_price).contains(&"I1"));
    let must_not_fail = |world: &mut Observed| {
        let index = valued(world);
        let row = &mut world.valuations[index];
        (row.valuation_cents, row.confidence, row.failure) = (None, None, Some("503".to_owned()));
    };
    assert!(broken(must_not_fail).contains(&"I1"));
}

#[test]
fn what_is_done_twice_is_found() {
    let twice = |world: &mut Observed| {
        let row = world.valuations[0].clone();
        world.valuations.push(row);
    };
    assert!(broken(twice).contains(&"I2"), "two states");
    assert_eq!(broken(|world| world.partner.effects += 1), ["I2"], "an effect too many");
    assert_eq!(broken(|world| world.strangers.push("replica_1 wrote".to_owned())), ["I2"], "a late owner");
    assert_eq!(broken(|world| world.partner.distinct_keys += 1), ["I2"], "a key too many");
    assert_eq!(broken(|world| world.partner.repeated_requests = 1), ["repeats"], "a call again without a reason");
    let explained = |world: &mut Observed| {
        world.partner.requests += 1;
        world.partner.by_status.insert(503, 1);
        world.partner.repeated_requests = 1;
    };
    assert_eq!(broken(explained), Vec::<&str>::new(), "a call again after an error");
}

#[test]
fn results_without_their_sending_are_found() {
    assert_eq!(broken(|world| world.outbox.clear()), ["I3"]);
    assert_eq!(broken(|world| world.outbox[0].sent = false), ["I3"]);
    assert_eq!(broken(|world| world.outbox[0].lane = "events".to_owned()), ["I3"]);
    assert_eq!(broken(|world| drop(world.publications.pop())), ["I3"], "a publish event that was lost");
    assert_eq!(broken(|world| world.publications[0].published -= 1), ["I3"]);
    assert_eq!(broken(|world| world.publications[0].state = "running".to_owned()), ["I3"]);
    let uncalled = |world: &mut Observed| {
        world.outbox.push(Sent { event_id: "x".to_owned(), lane: "post_processing".to_owned(), sent: true });
    };
    assert_eq!(broken(uncalled), ["I3"], "post-processing of nothing");
}

#[test]
fn wrong_records_are_found() {
    assert_eq!(broken(|world| drop(world.records.pop())), ["I4"], "a record that was lost");
    assert_eq!(broken(|world| world.records[0].payload[20] ^= 1), ["I4"], "a value that is not right");
    assert_eq!(broken(|world| world.records[0].key.push('0')), ["I4"], "another key");
    assert_eq!(broken(|world| world.records_missed = 1), ["I4"], "a record that was not read");
    let header = |world: &mut Observed| drop(world.records[0].headers.remove("ce_type"));
    assert_eq!(broken(header), ["I4"], "a header that is missing");
    let again = |world: &mut Observed| {
        let record = world.records[0].clone();
        world.records.push(record);
    };
    assert_eq!(broken(again), Vec::<&str>::new(), "the same record again");
    let uncommitted = |world: &mut Observed| {
        let mut record = world.records[0].clone();
        record.headers.insert("ce_id".to_owned(), Uuid::nil().to_string());
        world.records.push(record);
    };
    assert_eq!(broken(uncommitted), ["I4"], "a record of no valuation");
}

#[test]
fn wrong_letters_are_found() {
    assert_eq!(broken(|world| drop(world.letters.pop())), ["I5"], "a refused event that was lost");
    assert_eq!(broken(|world| world.letters[0].body.push(' ')), ["I5"], "a body that was changed");
    assert_eq!(broken(|world| world.letters[0].reason.clear()), ["I5"], "no reason");
    assert_eq!(broken(|world| world.letters[0].lane = Lane::Valuations), ["I5"], "another queue");
    let again = |world: &mut Observed| {
        let letter = world.letters[0].clone();
        world.letters.push(letter);
    };
    assert_eq!(broken(again), ["I5"], "a letter again without a fault");
    let good_event = |world: &mut Observed| {
        let mut letter = world.letters[0].clone();
        letter.body = "an event that is good".to_owned();
        world.letters.push(letter);
    };
    assert_eq!(broken(good_event), ["I5"]);
}

#[test]
fn of_upserts_with_one_id_exactly_one_is_refused() {
    assert_eq!(broken(|world| drop(world.letters.remove(1))), ["I5", "order"], "none");
    let both = |world: &mut Observed| {
        let mut letter = world.letters[1].clone();
        letter.body.pop();
        world.letters.push(letter);
    };
    assert_eq!(broken(both), ["I5", "order"], "both");
    // The one that was refused was written all the same.
    let wrong = |world: &mut Observed| world.listings.last_mut().expect("the upsert").list_price_cents += 1;
    assert_eq!(broken(wrong), ["order"]);
}

/// A world in which the bad body is in the dead-letter queue twice, and what the proxy saw of it. Times are milliseconds.
struct Twice {
    begin: Instant,
    calls: Vec<WatchedCall>,
    interruptions: Vec<(u64, u64)>,
}

impl Twice {
    fn new() -> Self {
        Self { begin: Instant::now(), calls: Vec::new(), interruptions: Vec::new() }
    }

    fn call(mut self, action: Action, at: u64, answered_after: Option<u64>, receipt: &str, done: Done) -> Self {
        let messages = vec![WatchedMessage::new(receipt, "message", "#no", done)];
        let (at, answered_after) = (self.begin + Duration::from_millis(at), answered_after.map(Duration::from_millis));
        self.calls.push(WatchedCall { action, at, answered_after, messages });
        self
    }

    /// The whole of a refusal, with a delete that ends so.
    fn refusal(self, at: u64, receipt: &str, deleted: Option<Done>) -> Self {
        let sent = self.call(Action::Receive, at, Some(1), receipt, Done::Yes);
        let sent = sent.call(Action::Send, at + 2, Some(1), "", Done::Yes);
        match deleted {
            Some(done) => sent.call(Action::Delete, at + 4, Some(1), receipt, done),
            None => sent,
        }
    }

    fn interrupted(mut self, at: u64) -> Self {
        self.interruptions.push((at, at));
        self
    }

    fn broken(self) -> Vec<&'static str> {
        broken(|world| {
            let letter = world.letters.iter().find(|letter| letter.body == "#no").expect("it is there").clone();
            world.letters.push(letter);
            let at = |milliseconds: u64| self.begin + Duration::from_millis(milliseconds);
            world.interruptions = self.interruptions.iter().map(|(since, until)| (at(*since), at(*until))).collect();
            world.sqs_calls = self.calls.clone();
        })
    }
}

#[test]
fn a_dead_letter_that_is_there_again_has_a_cause() {
    let good = || Twice::new().refusal(0, "first", Some(Done::Yes)).refusal(4_000, "second", Some(Done::Yes));
    let none: [&str; 0] = [];
    assert_eq!(good().broken(), ["I5"], "refused twice and deleted twice");
    assert_eq!(good().interrupted(1_000).broken(), ["I5"], "a death that met nothing of it");
    let forgotten = || Twice::new().refusal(0, "first", None).refusal(4_000, "second", Some(Done::Yes));
    assert_eq!(forgotten().broken(), ["I5"], "no delete was asked for");
    assert_eq!(forgotten().interrupted(5_000).broken(), ["I5"], "a death after the second delivery");
    assert_eq!(forgotten().interrupted(1).broken(), ["I5"], "a death before the send");
    assert_eq!(forgotten().interrupted(3).broken(), none, "a death between send and delete");

    let undeleted = Twice::new().refusal(0, "first", Some(Done::No)).refusal(4_000, "second", Some(Done::Yes));
    assert_eq!(undeleted.broken(), none, "a delete that SQS did not do");
    let lost = good().call(Action::Send, 5, None, "", Done::Yes);
    assert_eq!(lost.broken(), none, "a send whose answer was lost");
    let late = good().call(Action::Send, 5, Some(1_500), "", Done::Perhaps);
    assert_eq!(late.broken(), none, "a send whose answer was late");
    let again = || Twice::new().refusal(0, "first", Some(Done::Yes)).call(Action::Send, 5_000, Some(1), "", Done::Yes);
    assert_eq!(again().broken(), ["I5"], "sent again for no reason");
    assert_eq!(again().interrupted(1_000).broken(), ["I5"], "a stop long after the answer");
    assert_eq!(again().interrupted(3).broken(), none, "a stop before the answer of a send was read");
    assert_eq!(good().interrupted(3).broken(), none, "the same, and the second send is another's");
    let refused = good().call(Action::Send, 5, None, "", Done::No);
    assert_eq!(refused.broken(), ["I5"], "a send that SQS never got");
    let repeated = good().call(Action::Receive, 6, Some(1), "first", Done::Yes);
    assert_eq!(repeated.broken(), none, "the proxy delivered it twice");

    let lapsed = |extended| {
        let first = Twice::new().refusal(0, "first", None).call(Action::Change, 2_000, Some(1), "first", extended);
        let both = first.refusal(4_000, "second", Some(Done::Yes));
        both.call(Action::Delete, 4_500, Some(1), "first", Done::Yes)
    };
    assert_eq!(lapsed(Done::Yes).broken(), ["I5"], "delivered again although it was kept");
    assert_eq!(lapsed(Done::No).broken(), none, "SQS did not keep it");
}

#[test]
fn older_over_newer_is_found() {
    let stale = |world: &mut Observed| {
        let row = world.listings.last_mut().expect("the upsert");
        row.event_id = SEEDED_BY.to_owned();
    };
    assert_eq!(broken(stale), ["order"]);
    assert_eq!(broken(|world| drop(world.listings.pop())), ["order"], "an upsert that was lost");
    assert_eq!(broken(|world| world.current[0].run_id = "older".to_owned()), ["order"]);
    assert_eq!(broken(|world| drop(world.current.pop())), ["order"]);
}

#[test]
fn leftovers_are_found() {
    assert_eq!(broken(|world| world.left[0].1 = 1), ["I6"]);
    assert_eq!(broken(|world| world.left[0].2 = 1), ["I6"]);
    assert_eq!(broken(|world| world.connections = 7), ["I7"]);
    assert_eq!(broken(|world| world.partner.in_flight = 1), ["I7"]);
    assert_eq!(broken(|world| world.replicas[0].descriptors.1 = 200), ["I7"]);
    assert_eq!(broken(|world| world.replicas[0].resident.1 = 2 << 20), ["I7"]);
    let permit = |world: &mut Observed| world.replicas[0].not_at_rest.push("events_in_flight 1".to_owned());
    assert_eq!(broken(permit), ["I7"]);
}

#[test]
fn too_many_calls_a_second_are_found() {
    assert_eq!(broken(|world| world.partner.max_in_one_second = 51), ["I8"]);
}

#[test]
fn a_selection_has_its_limit_and_its_zip_codes() {
    let (inputs, observed, allowances) = world();
    let world = World::new(&inputs, &observed, &allowances);
    let of = |zip_codes: Option<Vec<i32>>, limit| world.selected(&Selection { zip_codes, limit });
    assert_eq!(of(None, Some(3)), (BTreeSet::from([1, 2, 3]), BTreeSet::new()));
    assert_eq!(of(Some(vec![98_001]), Some(2)), (BTreeSet::from([1, 11]), BTreeSet::new()));
    let (must, may) = of(None, None);
    assert_eq!((must.len(), may.len()), (100, 1));
    assert_eq!(of(None, Some(0)).0.len(), 0);
}
