//! The job that the service exists for: 17,000 listings, a call each, and all that follows from it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use local_stack::kafka::Order;
use local_stack::{Behaviour, Kafka};
use serde_json::Value;

use crate::harness::{LONG, SOON, World, until};

#[tokio::test]
async fn seventeen_thousand_listings_are_valued_and_published() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 30, ..Behaviour::default() }).await?;
    world.set("partner.rate_per_second", 4_000);
    world.done(&["seed"])?;
    ensure!(world.number("SELECT count(*) FROM listings").await? == 21_436);
    let known = "SELECT list_price_cents FROM listings WHERE listing_id = 7129300520 AND zip_code = 98178";
    ensure!(world.number(known).await? == 22_190_000);
    let tap = world.environment().tap()?;

    let service = world.serve().await?;
    let id = world.refresh(&["--limit", "17000"])?;
    world.published(&id, LONG).await?;

    let homes = world.homes(17_000).await?;
    world.check_run(&id, &homes).await?;
    world.check_records(&tap, &id, &homes).await?;
    ensure!(tap.count() == 17_000, "{} records: none is sent twice when nothing goes wrong", tap.count());
    ensure!(world.number("SELECT count(*) FROM valuations").await? == 17_000);
    let stats = world.partner.stats();
    ensure!((stats.requests, stats.distinct_keys, stats.effects) == (17_000, 17_000, 17_000), "{stats:?}");
    ensure!(stats.max_in_flight <= 1_000, "{stats:?}");
    world.quiet(LONG).await?;
    world.finish(service).await
}

#[tokio::test]
async fn the_partner_is_never_asked_faster_than_agreed() -> Result<()> {
    // What the partner counts are arrivals. The service promises its writes, which a busy machine may hand over late and
    // so closer together: 50 ms of that are forgiven.
    const MOST: u32 = 1_050;
    let mut world = World::new(Behaviour { latency_ms: 40, rate_cap: MOST, ..Behaviour::default() }).await?;
    world.set("partner.rate_per_second", 1_000);
    world.listings(3_500).await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.published(&id, LONG).await?;
    world.check_run(&id, &world.homes(3_500).await?).await?;
    let stats = world.partner.stats();
    ensure!(!stats.by_status.contains_key(&429) && stats.requests == 3_500, "{stats:?}");
    ensure!(stats.max_in_one_second <= u64::from(MOST), "{stats:?}");
    world.finish(service).await
}

/// Records that are being sent hold the most memory, so of the pages in flight at most half are. A broker far away shows it: each
/// of its round trips delivers so many and no more. A late look only allows for more of them, so it can fail nothing.
#[tokio::test]
async fn at_most_half_of_the_pages_in_flight_are_being_sent() -> Result<()> {
    const PAGE: u64 = 20;
    const SENT: u64 = 2;
    const TRIPS: u64 = 5;
    const TRIP: Duration = Duration::from_secs(2);
    let mut world = World::new(Behaviour { latency_ms: 0, ..Behaviour::default() }).await?;
    let kafka = Kafka::separate().await?;
    // One partition, so one request for all that is handed over at a time.
    kafka.create_topic(&world.environment().names().topic, 1).await?;
    world.set("kafka.brokers", kafka.bootstrap()).set("kafka.page_size", PAGE).set("kafka.pages_in_flight", 2 * SENT);
    world.listings((TRIPS * SENT * PAGE) as i64).await?;
    let service = world.serve().await?;
    let delivered =
        async || anyhow::Ok(service.metric(r#"write_api_kafka_deliveries_total{result="ok"}"#).await? as u64);
    // What is asked of the brokers before the first record takes round trips of its own.
    let first = world.refresh(&["--limit", "1"])?;
    world.published(&first, LONG).await?;
    let before = delivered().await?;
    kafka.order(&Order::Delay { milliseconds: TRIP.as_millis() as u64 }).await?;
    let id = world.refresh(&[])?;
    let begun = format!("SELECT count(*) FROM publications WHERE run_id = '{id}'");
    let mut began = Instant::now();
    until("the publication", LONG, async || {
        let look = Instant::now();
        if world.number(&begun).await? == 0 {
            began = look;
            return Ok(None);
        }
        Ok(Some(()))
    })
    .await?;
    until("the records", LONG, async || {
        let delivered = delivered().await? - before;
        let trips = began.elapsed().as_secs() / TRIP.as_secs();
        ensure!(delivered <= trips * SENT * PAGE, "{delivered} records were delivered in {trips} round trips");
        Ok((delivered == TRIPS * SENT * PAGE).then_some(()))
    })
    .await?;
    kafka.order(&Order::Delay { milliseconds: 0 }).await?;
    world.published(&id, LONG).await?;
    world.finish(service).await
}

/// What a heap profile finds of an event after its end, connections to Postgres and their buffers included.
#[tokio::test]
async fn an_event_that_has_ended_holds_next_to_nothing() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 0, ..Behaviour::default() }).await?;
    world.set("partner.rate_per_second", 0);
    world.set_variable("MALLOC_CONF", "lg_prof_sample:10");
    world.listings(5_000).await?;
    let service = world.serve().await?;
    let run = world.refresh(&[])?;
    world.published(&run, LONG).await?;
    world.quiet(SOON).await?;
    let mut held = BTreeMap::new();
    let little = until("the memory of the events", SOON, async || {
        // Not more often than profiles may be asked for.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let top: Value = serde_json::from_str(&world.done(&["profile", "top", service.profiling_url(), "--json"])?)?;
        let kinds = top["kinds"].as_array().context("no kinds")?.iter();
        held = kinds.filter_map(|kind| Some((kind["kind"].as_str()?.to_owned(), kind["value"].as_i64()?))).collect();
        let of_events =
            held.iter().filter(|(kind, _)| kind.starts_with("valuations.")).map(|(_, bytes)| bytes).sum::<i64>();
        Ok((of_events < 192 * 1024).then_some(()))
    })
    .await;
    little.with_context(|| format!("bytes held: {held:?}"))?;
    world.finish(service).await
}
