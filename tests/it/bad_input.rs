//! What cannot be read goes to the dead-letter queue at once, unchanged and with the reason; its neighbours don't notice.

use std::time::Duration;

use anyhow::{Result, ensure};
use local_stack::Behaviour;
use serde_json::{Value, json};

use crate::harness::{DeadLetter, LONG, Lane, SOON, World, until};

pub const UPSERT: &str = "writeapi.listing.upsert.v1";
pub const REFRESH: &str = "writeapi.valuations.refresh.v1";
pub const PUBLISH: &str = "writeapi.valuations.publish.v1";

/// A CloudEvent as a producer would write it.
pub fn event(id: &str, kind: &str, time: &str, data: Value) -> Value {
    json!({"specversion": "1.0", "id": id, "source": "/test", "type": kind, "time": time, "data": data})
}

pub fn listing(listing_id: i64, list_price_cents: i64) -> Value {
    json!({"listing_id": listing_id, "zip_code": 98_001, "list_price_cents": list_price_cents, "bedrooms": 3,
        "living_square_feet": 1_200})
}

fn upsert(listing_id: i64) -> Value {
    event(&format!("upsert-{listing_id}"), UPSERT, "2026-01-31T02:00:00Z", listing(listing_id, 50_000_000))
}

fn with(field: &str, value: Value) -> String {
    let mut event = upsert(7);
    event[field] = value;
    event.to_string()
}

fn without(field: &str) -> String {
    let mut event = upsert(7);
    event.as_object_mut().expect("an object").remove(field);
    event.to_string()
}

fn with_data(field: &str, value: Value) -> String {
    let mut event = upsert(7);
    event["data"][field] = value;
    event.to_string()
}

/// Bodies with the code of their refusal.
pub fn unreadable() -> Vec<(&'static str, String)> {
    let refresh = |data| event("bad", REFRESH, "2026-01-31T02:00:00Z", data).to_string();
    let publish = |data| event("bad", PUBLISH, "2026-01-31T02:00:00Z", data).to_string();
    let notification = |inner: String| json!({"Type": "Notification", "Message": inner}).to_string();
    let deep = format!(r#"{{"specversion":"1.0","data":{}{}}}"#, "[".repeat(5_000), "]".repeat(5_000));
    vec![
        ("invalid_json", "not JSON \u{fc}\u{1f3e0} \"<&>\" \\ \t end".to_owned()),
        ("invalid_json", r#"{"specversion": "1.0", "id": "#.to_owned()),
        ("invalid_json", "[1, 2]".to_owned()),
        ("invalid_envelope", "{}".to_owned()),
        ("invalid_envelope", without("id")),
        ("invalid_envelope", without("source")),
        ("invalid_envelope", without("type")),
        ("invalid_envelope", without("time")),
        ("invalid_envelope", with("time", json!("yesterday"))),
        ("invalid_envelope", with("id", json!(""))),
        ("invalid_envelope", with("id", json!("\u{fc}".repeat(200)))),
        ("invalid_envelope", with("datacontenttype", json!("text/xml"))),
        ("invalid_envelope", with("data_base64", json!("AAAA"))),
        ("invalid_envelope", notification(notification(notification(notification(upsert(7).to_string()))))),
        ("unknown_version", with("specversion", json!("0.3"))),
        ("unknown_type", with("type", json!("writeapi.listing.upsert.v2"))),
        ("unknown_type", with("type", json!("\"quoted\" ".repeat(25)))),
        ("too_large", with("data", json!("x".repeat(256 * 1024)))),
        ("too_deep", deep),
        ("invalid_data", without("data")),
        ("invalid_data", with("data", json!("text"))),
        ("invalid_data", with_data("list_price_cents", json!(-1))),
        ("invalid_data", with_data("list_price_cents", json!(1.5))),
        ("invalid_data", with_data("bedrooms", json!("three"))),
        ("invalid_data", with_data("listed_on", json!("31.01.2026"))),
        ("invalid_data", with_data("description", json!("a\u{0}b"))),
        ("invalid_data", with_data("living_square_feet", Value::Null)),
        ("invalid_data", refresh(json!({"limit": -1}))),
        ("invalid_data", refresh(json!({"zip_code": [98_002]}))),
        ("invalid_data", refresh(json!({"zip_codes": "98002"}))),
        ("invalid_data", publish(json!({}))),
    ]
}

fn check_reason(letter: &DeadLetter, code: &str, queue: &str) -> Result<()> {
    ensure!(letter.reason.len() <= 1_024, "{} bytes of reason: {}", letter.reason.len(), letter.reason);
    let reason: Value = serde_json::from_str(&letter.reason)?;
    ensure!(reason["code"] == code, "{code} expected for {}, which has {reason}", letter.body);
    ensure!(reason["reason"].as_str().is_some_and(|text| text.len() > 10), "{reason}");
    ensure!(reason["receive_count"] == 1, "received more than once: {reason}");
    ensure!(reason["queue"] == queue, "{reason}");
    Ok(())
}

#[tokio::test]
async fn each_kind_of_unreadable_body_is_refused_at_once_and_its_neighbours_are_done() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let service = world.serve().await?;
    let bodies = unreadable();
    for (number, (_, body)) in bodies.iter().enumerate() {
        world.put(Lane::Events, body).await?;
        world.put(Lane::Events, &upsert(1_000 + number as i64).to_string()).await?;
    }
    let letters = world.wait_for_dead_letters(Lane::Events, bodies.len()).await?;
    world.quiet(SOON).await?;
    ensure!(letters.len() == bodies.len() && world.dead_letters(Lane::Events).await?.is_empty(), "{letters:?}");
    for (code, body) in &bodies {
        let same: Vec<&DeadLetter> = letters.iter().filter(|letter| letter.body == *body).collect();
        ensure!(same.len() == 1, "{} letters with this very body: {body}", same.len());
        check_reason(same[0], code, world.queue_name(Lane::Events))?;
    }
    let listings = world.number("SELECT count(*) FROM listings WHERE listing_id >= 1000").await?;
    ensure!(listings == bodies.len() as i64, "{listings} neighbours were done");
    ensure!(world.number("SELECT count(*) FROM listings").await? == listings, "a refused listing was written");
    ensure!(world.number("SELECT count(*) FROM runs").await? == 0);
    world.finish(service).await
}

#[tokio::test]
async fn what_sns_and_eventbridge_put_around_an_event_comes_off() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let service = world.serve().await?;
    let sns = json!({"Type": "Notification", "MessageId": "m-1", "TopicArn": "arn:aws:sns:us-east-1:1:t", "Message":
        upsert(1).to_string(), "Timestamp": "2026-01-31T02:00:00.000Z"});
    let around = |id: &str, kind: &str, detail: Value| {
        json!({"version": "0", "id": id, "detail-type": kind, "source": "scheduler", "account": "1",
            "time": "2026-01-31T02:00:00Z", "region": "us-east-1", "resources": [], "detail": detail})
    };
    let both = json!({"Type": "Notification", "Message": around("b-3", "any", upsert(3)).to_string()});
    let night = around("night-1", REFRESH, json!({"zip_codes": null, "limit": 2}));
    for body in [sns, around("b-2", "any", upsert(2)), both] {
        world.put(Lane::Events, &body.to_string()).await?;
    }
    until("three listings", SOON, async || {
        Ok((world.number("SELECT count(*) FROM listings").await? == 3).then_some(()))
    })
    .await?;
    world.put(Lane::Events, &night.to_string()).await?;
    world.published("night-1", LONG).await?;
    world.check_run("night-1", &world.homes(2).await?).await?;
    let from_inside = "SELECT count(*) FROM listings WHERE event_id = 'upsert-' || listing_id";
    ensure!(world.number(from_inside).await? == 3);
    world.quiet(SOON).await?;
    world.finish(service).await
}

#[tokio::test]
async fn an_id_means_one_event_for_ever() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.listings(10).await?;
    let service = world.serve().await?;
    let of = |limit: i64| event("same", REFRESH, "2026-01-31T02:00:00Z", json!({"zip_codes": null, "limit": limit}));
    world.put(Lane::Events, &of(5).to_string()).await?;
    world.published("same", LONG).await?;
    // White space and the order of keys do not make another event.
    world.put(Lane::Events, &serde_json::to_string_pretty(&of(5))?).await?;
    let other = of(6).to_string();
    world.put(Lane::Events, &other).await?;
    let letters = world.wait_for_dead_letters(Lane::Valuations, 1).await?;
    world.quiet(SOON).await?;
    ensure!(letters.len() == 1 && letters[0].body == other, "{letters:?}");
    check_reason(&letters[0], "id_reused", world.queue_name(Lane::Valuations))?;
    world.check_run("same", &world.homes(5).await?).await?;
    ensure!(world.partner.stats().requests == 5, "{:?}", world.partner.stats());

    // The same for publications.
    world.done(&["send", "publish", "same", "--id", "again"])?;
    world.publications("same", 2, LONG).await?;
    world.done(&["send", "publish", "another", "--id", "again"])?;
    let letters = world.wait_for_dead_letters(Lane::PostProcessing, 1).await?;
    ensure!(matches!(letters[0].code().as_str(), "id_reused" | "unknown_run"), "{letters:?}");
    world.finish(service).await
}

#[tokio::test]
async fn an_unknown_run_is_refused_and_an_unfinished_one_is_waited_for() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 3_600_000, ..Behaviour::default() }).await?;
    world.set("partner.request_timeout", "7m").set("partner.total_timeout", "1h").set("shutdown.grace", "3s");
    world.listings(10).await?;
    let tap = world.environment().tap()?;
    let service = world.serve().await?;
    world.done(&["send", "publish", "no-such-run"])?;
    let letters = world.wait_for_dead_letters(Lane::PostProcessing, 1).await?;
    check_reason(&letters[0], "unknown_run", world.queue_name(Lane::PostProcessing))?;

    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.leased).await?;
    world.done(&["send", "publish", &id])?;
    let deferred = r#"write_api_events_total{kind="valuations.publish",outcome="deferred"}"#;
    until("a deferred event", SOON, async || Ok((service.metric(deferred).await? == 1.0).then_some(()))).await?;
    until("a hidden message", SOON, async || Ok((world.depth(Lane::PostProcessing).await? == (0, 1)).then_some(())))
        .await?;
    ensure!(world.dead_letters(Lane::PostProcessing).await?.is_empty() && tap.count() == 0);
    ensure!(world.number("SELECT count(*) FROM publications").await? == 0, "a deferred event is not charged");
    world.expect_work_left();
    world.finish(service).await
}

#[tokio::test]
async fn a_refresh_of_nothing_is_complete_at_once() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.listings(50).await?;
    let tap = world.environment().tap()?;
    let service = world.serve().await?;
    for options in [&["--limit", "0"][..], &["--zip-code", "1"], &["--zip-code", "98001", "--limit", "0"]] {
        let id = world.refresh(options)?;
        let run = world.published(&id, LONG).await?;
        ensure!((run.selected, run.valued, run.failed) == (0, 0, 0), "{options:?}: {run:?}");
    }
    let id = world.refresh(&["--zip-code", "98001", "--zip-code", "98007", "--zip-code", "98001"])?;
    let run = world.published(&id, LONG).await?;
    ensure!(run.valued == 10, "{run:?}");
    ensure!(tap.wait_for(10, SOON).await == 10);
    ensure!(world.partner.stats().requests == 10);
    ensure!(tap.wait_for(11, Duration::from_millis(200)).await == 10, "an empty run has no records");
    world.quiet(SOON).await?;
    world.finish(service).await
}

#[tokio::test]
async fn events_that_sqs_refuses_stay_in_the_outbox_in_nobodys_way() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.listings(3).await?;
    // As many as a relay claims at once, older than everything else, each with a character that SQS does not carry.
    world
        .sql(
            "INSERT INTO outbox (event_id, lane, body, created_at)
             SELECT gen_random_uuid(), 'post_processing', 'refused ' || chr(65535), now() - interval '1 hour'
             FROM generate_series(1, 10)",
        )
        .await?;
    let service = world.serve().await?;
    service.expect_errors();
    let id = world.refresh(&[])?;
    world.published(&id, LONG).await?;
    let waiting = "SELECT count(*) FROM outbox WHERE sent_at IS NULL AND claimed_until > now() + interval '50 minutes'";
    ensure!(world.number(waiting).await? == 10, "they are not put off");
    until("the gauges of the outbox", SOON, async || {
        let (pending, lag) =
            (service.metric("write_api_outbox_pending").await?, service.metric("write_api_outbox_lag_seconds").await?);
        Ok((pending == 10.0 && lag >= 3_600.0).then_some(()))
    })
    .await?;
    let log = service.log()?;
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("SQS refuses an event of the outbox")).collect();
    ensure!(lines.len() == 10 && lines.iter().all(|line| line.contains("event_id")), "{lines:#?}");
    world.sql("DELETE FROM outbox WHERE sent_at IS NULL").await?;
    world.finish(service).await
}
