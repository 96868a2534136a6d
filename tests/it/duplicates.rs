//! SQS delivers at least once; each thing happens once.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use local_stack::{Behaviour, TapRecord};
use serde_json::json;

use crate::bad_input::{REFRESH, event};
use crate::harness::{LONG, Lane, SOON, World, until};

const TIME: &str = "2026-01-31T02:00:00Z";

#[tokio::test]
async fn a_refresh_sent_many_times_is_one_run() -> Result<()> {
    let mut world = World::for_services(2, Behaviour { latency_ms: 50, ..Behaviour::default() }).await?;
    world.set("partner.in_flight", 50).set("partner.rate_per_second", 0).set("refresh.page_size", 100);
    world.listings(1_500).await?;
    let services = [world.serve().await?, world.serve().await?];
    let tap = world.environment().tap()?;
    let body = event("once", REFRESH, TIME, json!({"zip_codes": null, "limit": null})).to_string();
    for _ in 0..4 {
        world.put(Lane::Events, &body).await?;
        world.put(Lane::Valuations, &body).await?;
    }
    let run = world.published("once", LONG).await?;
    ensure!(run.attempts == 1, "{run:?}");
    // The copies wait until the run's lease could have ended, and find it complete.
    world.quiet(LONG).await?;
    let homes = world.homes(1_500).await?;
    world.check_run("once", &homes).await?;
    world.check_records(&tap, "once", &homes).await?;
    let stats = world.partner.stats();
    ensure!((stats.requests, stats.repeated_requests, tap.count()) == (1_500, 0, 1_500), "{stats:?}");
    for service in services {
        world.finish(service).await?;
    }
    Ok(())
}

#[tokio::test]
async fn two_services_share_the_runs() -> Result<()> {
    let mut world = World::for_services(2, Behaviour { latency_ms: 20, ..Behaviour::default() }).await?;
    world.set("partner.in_flight", 20).set("partner.rate_per_second", 0).set("lanes.valuations.in_flight", 2);
    world.listings(400).await?;
    let services = [world.serve().await?, world.serve().await?];
    let homes = world.homes(400).await?;
    let mut ids = Vec::new();
    for number in 0..6 {
        let id = format!("run-{number}");
        let everything = json!({"zip_codes": null, "limit": null});
        let time = format!("2026-01-31T02:00:0{number}Z");
        world.put(Lane::Events, &event(&id, REFRESH, &time, everything).to_string()).await?;
        ids.push(id);
    }
    for id in &ids {
        world.published(id, LONG).await?;
    }
    world.quiet(LONG).await?;
    world.check_run("run-5", &homes).await?;
    ensure!(world.number("SELECT count(*) FROM valuations").await? == 2_400);
    ensure!(world.number("SELECT count(*) FROM runs WHERE attempts = 1 AND valued = 400").await? == 6);
    let stats = world.partner.stats();
    ensure!((stats.requests, stats.effects) == (2_400, 2_400), "{stats:?}");
    let mut calls = 0.0;
    for service in &services {
        let of_one = service.metric(r#"write_api_partner_requests_total{status="200"}"#).await?;
        ensure!(of_one > 0.0, "one service did everything");
        calls += of_one;
    }
    ensure!(calls == 2_400.0);
    for service in services {
        world.finish(service).await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_event_that_comes_again_after_its_end_changes_nothing() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.listings(100).await?;
    let tap = world.environment().tap()?;
    let service = world.serve().await?;
    let body = event("again", REFRESH, TIME, json!({"zip_codes": null, "limit": null})).to_string();
    world.put(Lane::Events, &body).await?;
    world.published("again", LONG).await?;
    let publication: String = sqlx::query_scalar("SELECT body FROM outbox").fetch_one(&world.database).await?;
    let rows = "SELECT jsonb_agg(r)::text FROM runs AS r";
    let before: String = sqlx::query_scalar(rows).fetch_one(&world.database).await?;

    world.put(Lane::Valuations, &body).await?;
    world.put(Lane::PostProcessing, &publication).await?;
    let seen =
        async |kind: &str| service.metric(&format!(r#"write_api_events_total{{kind="{kind}",outcome="done"}}"#)).await;
    until("both again", SOON, async || {
        let both = (seen("valuations.refresh").await?, seen("valuations.publish").await?);
        Ok((both == (2.0, 2.0)).then_some(()))
    })
    .await?;
    world.quiet(SOON).await?;
    let after: String = sqlx::query_scalar(rows).fetch_one(&world.database).await?;
    ensure!(before == after, "the run changed from {before} to {after}");
    ensure!(world.partner.stats().requests == 100, "{:?}", world.partner.stats());
    ensure!(tap.wait_for(100, SOON).await == 100);
    ensure!(world.number("SELECT count(*) FROM outbox").await? == 1);
    ensure!(world.number("SELECT attempts::bigint FROM publications").await? == 1);
    world.finish(service).await
}

#[tokio::test]
async fn a_run_published_again_by_hand_gives_the_same_bytes() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.listings(500).await?;
    let tap = world.environment().tap()?;
    let mut event = event("twice", REFRESH, TIME, json!({"zip_codes": null, "limit": null}));
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    event["traceparent"] = json!(traceparent);
    let service = world.serve().await?;
    world.put(Lane::Events, &event.to_string()).await?;
    world.published("twice", LONG).await?;
    ensure!(tap.wait_for(500, SOON).await == 500);
    // Not even what has changed since shows.
    world.sql("UPDATE listings SET list_price_cents = 1").await?;
    world.done(&["send", "publish", "twice"])?;
    world.publications("twice", 2, LONG).await?;
    ensure!(tap.wait_for(1_000, SOON).await == 1_000 && tap.distinct_ids() == 500);

    let mut first: BTreeMap<String, TapRecord> = BTreeMap::new();
    for record in tap.records() {
        ensure!(record.headers.get("traceparent").is_some_and(|text| text == traceparent), "{record:?}");
        match first.get(record.ce_id()) {
            None => drop(first.insert(record.ce_id().to_owned(), record)),
            Some(first) => {
                let (one, two) =
                    ((&first.key, &first.payload, &first.headers), (&record.key, &record.payload, &record.headers));
                ensure!(one == two && first.partition == record.partition, "{first:?}\nis not\n{record:?}");
            }
        }
    }
    world.quiet(SOON).await?;
    world.finish(service).await
}
