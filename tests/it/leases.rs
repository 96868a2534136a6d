//! Work that takes longer than a message may stay hidden: nobody else gets it, and nobody keeps what was taken away.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use local_stack::kafka::Order;
use local_stack::wire::{Flow, Wire};
use local_stack::{Behaviour, Kafka, KafkaTap, Scope, SqsFault, SqsProxy};
use serde_json::Value;

use crate::harness::{LONG, Lane, SOON, Service, World, until};

const VISIBILITY: Duration = Duration::from_secs(3);

/// How often each event that is done was received, as its log line says.
fn receives(service: &Service) -> Result<Vec<u64>> {
    receives_of(service, |_| true)
}

/// As [`receives`], of some kinds only.
fn receives_of(service: &Service, wanted: impl Fn(&Value) -> bool) -> Result<Vec<u64>> {
    let mut receives = Vec::new();
    for line in service.log()?.lines() {
        let entry: Value = serde_json::from_str(line).context("not JSON")?;
        if entry["message"] == "event done" && wanted(&entry["kind"]) {
            receives.push(entry["attempt"].as_u64().context("no attempt")?);
        }
    }
    Ok(receives)
}

#[tokio::test]
async fn an_event_of_several_visibility_timeouts_is_received_once() -> Result<()> {
    const LISTINGS: i64 = 90;
    let mut world = World::new(Behaviour { latency_ms: 1_000, ..Behaviour::default() }).await?;
    world.set("queue.visibility_timeout", "3s").set("partner.in_flight", 10).set("refresh.page_size", 20);
    world.listings(LISTINGS).await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    until(
        "the run's message hidden",
        SOON,
        async || Ok((world.depth(Lane::Valuations).await? == (0, 1)).then_some(())),
    )
    .await?;
    let begin = std::time::Instant::now();
    until("the end of the run", LONG, async || {
        let (visible, _) = world.depth(Lane::Valuations).await?;
        ensure!(visible == 0, "the message can be received after {:?}", begin.elapsed());
        Ok(world.run(&id).await?.filter(|run| run.state == "complete"))
    })
    .await?;
    ensure!(begin.elapsed() > 2 * VISIBILITY, "too short to tell: {:?}", begin.elapsed());
    world.published(&id, LONG).await?;
    world.quiet(LONG).await?;
    ensure!(receives(&service)?.iter().all(|receives| *receives == 1), "{:?}", receives(&service)?);
    ensure!(world.run(&id).await?.is_some_and(|run| run.attempts == 1));
    ensure!(world.partner.stats().requests == LISTINGS as u64);
    world.finish(service).await
}

/// The keeper shares no connection with the work: neither the fast events that fill the pool nor the run beside them
/// lose their messages or their lease.
#[tokio::test]
async fn a_full_pool_costs_no_lease() -> Result<()> {
    const UPSERTS: usize = 60;
    let mut world = World::new(Behaviour { latency_ms: 200, ..Behaviour::default() }).await?;
    world.set("queue.visibility_timeout", "3s").set("database.max_connections", 2).set("partner.in_flight", 2);
    world.set("database.acquire_timeout", "30s").set("refresh.batch_linger", "2s");
    world.done(&["seed", "--count", "60"])?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    until("calls", SOON, async || Ok((world.partner.stats().requests >= 4).then_some(()))).await?;

    let mut lock = world.database.begin().await?;
    sqlx::query("LOCK TABLE listings IN EXCLUSIVE MODE").execute(&mut *lock).await?;
    world.done(&["send", "upsert", "--sample", &UPSERTS.to_string()])?;
    let begin = std::time::Instant::now();
    until("two visibility timeouts with every event in hand", LONG, async || {
        let (visible, hidden) = world.depth(Lane::Events).await?;
        let in_hand = visible == 0 && hidden == UPSERTS as u64;
        ensure!(in_hand || begin.elapsed() < VISIBILITY, "{visible} of {UPSERTS} events can be received");
        ensure!(world.depth(Lane::Valuations).await? == (0, 1), "the run's message can be received");
        Ok((begin.elapsed() > VISIBILITY * 5 / 2).then_some(()))
    })
    .await?;
    let extended = service.metric(r#"write_api_visibility_extensions_total{result="ok"}"#).await?;
    let calls = r#"write_api_sqs_requests_total{action="ChangeMessageVisibilityBatch",result="ok"}"#;
    let calls = service.metric(calls).await?;
    ensure!(extended >= 2.0 * UPSERTS as f64, "{extended} extensions of {UPSERTS} messages");
    ensure!(calls <= extended / 4.0, "{extended} extensions took {calls} calls of up to ten");
    lock.rollback().await?;

    world.published(&id, LONG).await?;
    world.quiet(LONG).await?;
    ensure!(receives(&service)?.len() == UPSERTS + 2, "{:?}", receives(&service)?);
    ensure!(receives(&service)?.iter().all(|receives| *receives == 1), "{:?}", receives(&service)?);
    ensure!(world.run(&id).await?.is_some_and(|run| run.attempts == 1));
    ensure!(world.partner.stats().requests == 60, "{:?}", world.partner.stats());
    world.finish(service).await
}

#[tokio::test]
async fn work_on_a_message_that_was_taken_away_stops() -> Result<()> {
    const LISTINGS: i64 = 400;
    let mut world = World::new(Behaviour { latency_ms: 200, ..Behaviour::default() }).await?;
    world.set("queue.visibility_timeout", "3s").set("partner.in_flight", 5).set("refresh.page_size", 20);
    world.listings(LISTINGS).await?;
    let service = world.serve().await?;
    let id = world.refresh(&["--id", "taken-away"])?;
    world.run_until(&id, SOON, |run| run.valued >= 20).await?;

    let url = world.sqs.get_queue_url().queue_name(world.queue_name(Lane::Valuations)).send().await?;
    world.sqs.purge_queue().set_queue_url(url.queue_url).send().await?;
    let lost = r#"write_api_events_total{kind="valuations.refresh",outcome="lost"}"#;
    until("the work to stop", SOON, async || Ok((service.metric(lost).await? == 1.0).then_some(()))).await?;
    let refused = r#"write_api_visibility_extensions_total{result="refused"}"#;
    ensure!(service.metric(refused).await? == 1.0);
    let run = world.run(&id).await?.context("it was there")?;
    ensure!(run.state == "running" && run.valued < LISTINGS, "{run:?}");
    until("no call out", SOON, async || Ok((world.partner.stats().in_flight == 0).then_some(()))).await?;

    // Sent again, the event goes on with its run once the lease is over.
    world.partner.control(|behaviour| behaviour.latency_ms = 0)?;
    let event = world.refresh(&["--id", "taken-away"])?;
    ensure!(event == id);
    world.published(&id, LONG).await?;
    world.check_run(&id, &world.homes(LISTINGS).await?).await?;
    world.quiet(LONG).await?;
    world.finish(service).await
}

/// A publication reads and writes at the same time. Nothing that it begins may hold a connection while it waits for another.
#[tokio::test]
async fn publications_that_outnumber_the_connections_get_their_turn() -> Result<()> {
    const LISTINGS: i64 = 400;
    let mut world = World::new(Behaviour::default()).await?;
    world.set("database.max_connections", 2).set("database.acquire_timeout", "3s").set("kafka.page_size", 5);
    world.set("partner.rate_per_second", 0);
    world.listings(LISTINGS).await?;
    let service = world.serve().await?;
    let ids = (0..6).map(|_| world.refresh(&[])).collect::<Result<Vec<_>>>()?;
    for id in &ids {
        world.published(id, LONG).await?;
    }
    world.quiet(LONG).await?;
    // An event that did not get its connection in time has left an error in the log, which this looks for.
    world.finish(service).await
}

/// A page's cursor is written while the next page is sent. Here it hangs for as long as the test likes, and meanwhile the
/// message is taken away.
#[tokio::test]
async fn a_publication_that_is_taken_away_while_its_cursor_is_written_stops_and_writes_nothing() -> Result<()> {
    const LISTINGS: i64 = 200;
    const PAGE: u64 = 20;
    const IN_FLIGHT: u64 = 3;
    let mut world = World::new(Behaviour::default()).await?;
    world.set("queue.visibility_timeout", "3s").set("database.statement_timeout", "60s");
    world.set("kafka.page_size", PAGE).set("kafka.pages_in_flight", IN_FLIGHT);
    world.listings(LISTINGS).await?;
    let topic = world.environment().names().topic.clone();
    let tap = KafkaTap::start(local_stack::shared().await?.kafka().bootstrap(), &topic)?;
    let service = world.serve().await?;

    // What writes the cursor also writes this table, and nothing else that is under way does. It waits for the table before
    // it locks a row, so the keeper's renewals are free.
    let mut lock = world.database.begin().await?;
    sqlx::query("LOCK TABLE quarantined_records IN EXCLUSIVE MODE").execute(&mut *lock).await?;
    let locks = "SELECT count(*) FROM pg_locks WHERE relation = 'quarantined_records'::regclass";
    let writing = format!("{locks} AND NOT granted");
    let id = world.refresh(&[])?;
    until("the first page's cursor being written", LONG, async || {
        Ok((world.number(&writing).await? == 1).then_some(()))
    })
    .await?;
    // Others are sent meanwhile, as many as may be without a cursor.
    let in_flight = IN_FLIGHT * PAGE;
    until("the records of the pages in flight", SOON, async || Ok((tap.distinct_ids() >= in_flight).then_some(())))
        .await?;

    world.sqs.purge_queue().queue_url(world.queue_url_of(Lane::PostProcessing)).send().await?;
    let lost = r#"write_api_events_total{kind="valuations.publish",outcome="lost"}"#;
    until("the work to stop", SOON, async || Ok((service.metric(lost).await? == 1.0).then_some(()))).await?;
    ensure!(world.number("SELECT count(*) FROM runs WHERE publisher IS NOT NULL").await? == 0, "it still has the run");
    lock.rollback().await?;
    until("the end of the write", SOON, async || Ok((world.number(locks).await? == 0).then_some(()))).await?;
    let left = "SELECT count(*) FROM publications WHERE cursor < 1 AND published = 0 AND state <> 'complete'";
    ensure!(world.number(left).await? == 1, "the cursor was written after the run was given back");
    ensure!(tap.distinct_ids() == in_flight, "{} records", tap.distinct_ids());

    // Sent again, the event begins at the cursor: what Kafka has is there twice, the same to the letter.
    let event: String =
        sqlx::query_scalar("SELECT body FROM outbox WHERE lane = 'post_processing'").fetch_one(&world.database).await?;
    world.put(Lane::PostProcessing, &event).await?;
    world.published(&id, LONG).await?;
    world.check_records(&tap, &id, &world.homes(LISTINGS).await?).await?;
    ensure!(world.number("SELECT published FROM publications").await? == LISTINGS);
    ensure!(tap.count() <= LISTINGS as u64 + in_flight, "{} records: too many were sent again", tap.count());
    world.quiet(LONG).await?;
    world.finish(service).await
}

/// A Postgres that does not answer takes the leases of runs. Messages without a run need nothing of it to stay hidden.
#[tokio::test]
async fn a_postgres_that_hangs_costs_no_fast_event_its_message() -> Result<()> {
    const UPSERTS: usize = 120;
    let mut world = World::new(Behaviour::default()).await?;
    let kafka = Kafka::separate().await?;
    kafka.create_topic(&world.environment().names().topic, 12).await?;
    let wire = Wire::to(world.environment().database_url())?;
    world.set("database.url", wire.url()).set("kafka.brokers", kafka.bootstrap()).set("kafka.page_size", 10);
    world.set("partner.in_flight", 5).set("partner.rate_per_second", 0).set("refresh.page_size", 20);
    world.set("database.statement_timeout", "1s");
    world.listings(2_000).await?;
    let service = world.serve().await?;
    service.expect_errors();
    // One run that is published slowly and one that is refreshed slowly: both roles have a lease to renew.
    let first = world.refresh(&["--limit", "1000"])?;
    world.run_until(&first, SOON, |run| run.state == "complete").await?;
    kafka.order(&Order::Delay { milliseconds: 500 }).await?;
    world.partner.control(|behaviour| behaviour.latency_ms = 500)?;
    let second = world.refresh(&["--limit", "300"])?;
    world.run_until(&second, SOON, |run| run.valued > 0).await?;
    let publishing = "SELECT count(*) FROM runs WHERE publisher IS NOT NULL";
    ensure!(world.number(publishing).await? == 1, "the first run is published too fast");

    wire.set(Flow::Stalled);
    // Spread over more than a visibility timeout, so that some are due whenever the keeper is busy with the runs.
    let begin = std::time::Instant::now();
    world.done(&["send", "upsert", "--sample", &UPSERTS.to_string(), "--rate", "15"])?;
    ensure!(begin.elapsed() > Duration::from_secs(6), "they came too fast");
    wire.set(Flow::Open);
    kafka.order(&Order::Delay { milliseconds: 0 }).await?;
    world.partner.control(|behaviour| behaviour.latency_ms = 0)?;

    for run in [&first, &second] {
        world.published(run, LONG).await?;
    }
    world.quiet(LONG).await?;
    let receives = receives_of(&service, |kind| kind == "listing.upsert")?;
    ensure!(receives.len() == UPSERTS && receives.iter().all(|receives| *receives == 1), "{receives:?}");
    world.finish(service).await
}

/// SQS answers for each message of a batch by itself: one that it did not extend this time is asked for again in time.
#[tokio::test]
async fn a_message_whose_entry_of_a_batch_failed_is_extended_in_time() -> Result<()> {
    const LISTINGS: i64 = 90;
    const FAILURES: u64 = 6;
    let mut world = World::new(Behaviour { latency_ms: 1_000, ..Behaviour::default() }).await?;
    let endpoint = local_stack::shared().await?.sqs().endpoint();
    let proxy = SqsProxy::start(endpoint)?;
    world.set("aws.endpoint_url", proxy.endpoint());
    world.set("queue.visibility_timeout", "3s").set("partner.in_flight", 10).set("refresh.page_size", 20);
    world.listings(LISTINGS).await?;
    let scope = Scope { action: Some("ChangeMessageVisibilityBatch".to_owned()), queue: None };
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.owned).await?;
    // The run's message is alone on its lane, so the first entry is its own. Twice in a row, each time that it is due.
    for _ in 0..FAILURES / 2 {
        let before = proxy.hits().get("partial-batch-failure").copied().unwrap_or(0);
        proxy.order_in(scope.clone(), SqsFault::PartialBatchFailure, 2);
        until("two failures", SOON, async || {
            Ok((proxy.hits().get("partial-batch-failure").copied().unwrap_or(0) == before + 2).then_some(()))
        })
        .await?;
    }
    world.published(&id, LONG).await?;
    world.quiet(LONG).await?;
    let failed = r#"write_api_visibility_extensions_total{result="error"}"#;
    ensure!(service.metric(failed).await? == FAILURES as f64, "{} failed", service.metric(failed).await?);
    for result in ["refused", "late"] {
        let sample = format!(r#"write_api_visibility_extensions_total{{result="{result}"}}"#);
        ensure!(service.metric(&sample).await? == 0.0, "an extension was {result}");
    }
    ensure!(receives(&service)?.iter().all(|receives| *receives == 1), "{:?}", receives(&service)?);
    ensure!(world.run(&id).await?.is_some_and(|run| run.attempts == 1));
    ensure!(world.partner.stats().requests == LISTINGS as u64);
    world.finish(service).await
}
