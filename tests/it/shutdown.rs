//! SIGTERM: what is under way is finished, the rest is given back at once.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use local_stack::kafka::Order;
use local_stack::wire::{Flow, Wire};
use local_stack::{Behaviour, Kafka};

use crate::bad_input::{UPSERT, event, listing};
use crate::harness::{LONG, Lane, SOON, World, until};
use crate::neighbours::missing;

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_stop_in_the_middle_of_a_refresh_finishes_what_is_out_and_gives_the_rest_back() -> Result<()> {
    const LISTINGS: i64 = 6_000;
    let mut world = World::new(Behaviour { latency_ms: 500, ..Behaviour::default() }).await?;
    world.set("partner.in_flight", 500).set("partner.rate_per_second", 0);
    // Longer than the stop may take, so that the message cannot come back by itself.
    world.set("queue.visibility_timeout", "60s");
    // SQS does not notice when a poll is given up, and hides from all what it would have brought: polls end soon here.
    world.set("queue.wait_time", "1s");
    world.listings(LISTINGS).await?;
    let first = world.serve().await?;
    let id = world.refresh(&[])?;
    until("calls", SOON, async || Ok((world.partner.stats().requests >= 1_200).then_some(()))).await?;
    first.signal(libc::SIGTERM);
    let signalled = Instant::now();
    let status = first.exit(LONG).await?;
    let took = signalled.elapsed();
    ensure!(status.code() == Some(0) && took <= 5 * SECOND, "{status} after {took:?}");
    first.check_log()?;
    until("the message", SECOND, async || Ok((world.depth(Lane::Valuations).await? == (1, 0)).then_some(()))).await?;

    let run = world.run(&id).await?.expect("it was there");
    ensure!(!run.owned && !run.leased && run.state == "running" && run.last_error.is_none(), "{run:?}");
    let stats = world.partner.stats();
    ensure!(run.valued as u64 == stats.requests && stats.abandoned == 0, "answers were lost: {run:?}, {stats:?}");
    ensure!(stats.requests < LISTINGS as u64, "stopped too late: {stats:?}");

    let second = world.serve().await?;
    // Free for others, and not only counted as visible.
    world.run_until(&id, 5 * SECOND, |run| run.attempts == 2).await?;
    world.published(&id, LONG).await?;
    world.check_run(&id, &world.homes(LISTINGS).await?).await?;
    let stats = world.partner.stats();
    ensure!(stats.repeated_requests == 0, "{stats:?}");
    ensure!(world.run(&id).await?.is_some_and(|run| run.attempts == 2));
    world.quiet(LONG).await?;
    world.finish(second).await
}

#[tokio::test]
async fn a_partner_that_does_not_answer_cannot_hold_up_a_stop() -> Result<()> {
    const IN_FLIGHT: i64 = 50;
    let mut world = World::new(Behaviour { latency_ms: 60_000, ..Behaviour::default() }).await?;
    world.set("shutdown.grace", "4s").set("partner.in_flight", IN_FLIGHT).set("queue.visibility_timeout", "60s");
    world.set("queue.wait_time", "1s");
    world.set("partner.request_timeout", "2m").set("partner.total_timeout", "20m");
    world.listings(200).await?;
    let first = world.serve().await?;
    let id = world.refresh(&[])?;
    until("calls", SOON, async || Ok((world.partner.stats().in_flight == IN_FLIGHT as u64).then_some(()))).await?;
    first.signal(libc::SIGTERM);
    let signalled = Instant::now();
    let status = first.exit(LONG).await?;
    ensure!(status.code() == Some(0) && signalled.elapsed() <= 4 * SECOND, "{status} after {:?}", signalled.elapsed());
    first.check_log()?;
    until("the message", SECOND, async || Ok((world.depth(Lane::Valuations).await? == (1, 0)).then_some(()))).await?;
    let run = world.run(&id).await?.expect("it was there");
    ensure!(!run.owned && !run.leased && run.valued == 0, "{run:?}");

    world.partner.control(|behaviour| behaviour.latency_ms = 0)?;
    let second = world.serve().await?;
    // Free for others, and not only counted as visible.
    world.run_until(&id, 5 * SECOND, |run| run.attempts == 2).await?;
    world.published(&id, LONG).await?;
    world.check_run(&id, &world.homes(200).await?).await?;
    ensure!(world.partner.stats().repeated_requests <= IN_FLIGHT as u64, "{:?}", world.partner.stats());
    world.finish(second).await
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 60_000, ..Behaviour::default() }).await?;
    world.set("partner.request_timeout", "2m").set("partner.total_timeout", "20m");
    world.listings(20).await?;
    let service = world.serve().await?;
    world.refresh(&[])?;
    until("calls", SOON, async || Ok((world.partner.stats().in_flight == 20).then_some(()))).await?;
    service.signal(libc::SIGTERM);
    until("draining", SOON, async || Ok(service.page("/readyz").await?.1.contains("draining").then_some(()))).await?;
    ensure!(service.is_running()?, "it did not wait for its calls");
    service.signal(libc::SIGTERM);
    let signalled = Instant::now();
    let status = service.exit(SOON).await?;
    ensure!(status.code() == Some(1) && signalled.elapsed() <= SECOND, "{status} after {:?}", signalled.elapsed());
    service.check_log()?;
    world.check_dead_letters().await
}

#[tokio::test]
async fn an_idle_service_stops_in_no_time() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let service = world.serve().await?;
        service.signal(signal);
        let signalled = Instant::now();
        let status = service.exit(LONG).await?;
        let took = signalled.elapsed();
        ensure!(status.code() == Some(0) && took < 2 * SECOND, "{status} after {took:?}");
        service.check_log()?;
    }
    Ok(())
}

#[tokio::test]
async fn an_idle_service_whose_postgres_hangs_stops_in_seconds() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let wire = Wire::to(world.environment().database_url())?;
    world.set("database.url", wire.url());
    let service = world.serve().await?;
    wire.set(Flow::Stalled);
    until("the hang to be seen", SOON, async || {
        Ok(missing(&service).await?.contains(&"database".to_owned()).then_some(()))
    })
    .await?;
    service.signal(libc::SIGTERM);
    let signalled = Instant::now();
    let status = service.exit(LONG).await?;
    let took = signalled.elapsed();
    ensure!(status.code() == Some(0) && took < 6 * SECOND, "{status} after {took:?}");
    service.check_log()
}

/// SQS hands a message to whoever polled first, and that may be a service that was just told to stop.
#[tokio::test]
async fn what_is_sent_as_an_idle_service_stops_goes_to_another_at_once() -> Result<()> {
    const UPSERTS: i64 = 6;
    let mut world = World::for_services(2, Behaviour::default()).await?;
    world.set("queue.visibility_timeout", "60s");
    let first = world.serve().await?;
    let second = world.serve().await?;
    first.signal(libc::SIGTERM);
    let signalled = Instant::now();
    for id in 1..=UPSERTS {
        let body = event(&format!("u-{id}"), UPSERT, "2026-01-31T02:00:00Z", listing(id, 100 + id));
        world.put(Lane::Events, &body.to_string()).await?;
    }
    ensure!(signalled.elapsed() < SECOND, "too slow to tell: {:?}", signalled.elapsed());
    let status = first.exit(5 * SECOND).await?;
    ensure!(status.code() == Some(0), "{status}");
    first.check_log()?;
    until("all done", 10 * SECOND, async || {
        Ok((world.number("SELECT count(*) FROM listings").await? == UPSERTS).then_some(()))
    })
    .await?;
    world.finish(second).await
}

#[tokio::test]
async fn a_kafka_that_is_away_cannot_keep_a_stop_from_giving_a_publication_back() -> Result<()> {
    const LISTINGS: i64 = 50;
    let mut world = World::new(Behaviour::default()).await?;
    let kafka = Kafka::separate().await?;
    kafka.create_topic(&world.environment().names().topic, 12).await?;
    world.set("kafka.brokers", kafka.bootstrap()).set("kafka.page_size", 10);
    world.set("shutdown.grace", "6s").set("queue.visibility_timeout", "60s").set("queue.wait_time", "1s");
    world.listings(LISTINGS).await?;
    let first = world.serve().await?;
    first.expect_errors();
    kafka.order(&Order::GoDown).await?;
    let id = world.refresh(&[])?;
    let publishers = "SELECT count(*) FROM runs WHERE publisher IS NOT NULL";
    until("a publisher", SOON, async || Ok((world.number(publishers).await? == 1).then_some(()))).await?;
    first.signal(libc::SIGTERM);
    let signalled = Instant::now();
    let status = first.exit(LONG).await?;
    ensure!(status.code() == Some(0) && signalled.elapsed() <= 6 * SECOND, "{status} after {:?}", signalled.elapsed());
    first.check_log()?;
    until("the message", SECOND, async || Ok((world.depth(Lane::PostProcessing).await? == (1, 0)).then_some(())))
        .await?;
    ensure!(world.number(publishers).await? == 0, "the run still has its publisher");
    ensure!(world.number("SELECT published FROM publications").await? == 0, "the page counts as published");

    kafka.order(&Order::ComeUp).await?;
    let second = world.serve().await?;
    world.published(&id, 10 * SECOND).await?;
    world.finish(second).await
}

/// Fast events that cannot end in time: none is lost, and none has to wait for its visibility timeout.
#[tokio::test]
async fn upserts_that_a_stop_cuts_short_are_free_for_others_at_once() -> Result<()> {
    const UPSERTS: u64 = 40;
    let mut world = World::new(Behaviour::default()).await?;
    world.set("shutdown.grace", "4s").set("queue.visibility_timeout", "60s").set("database.max_connections", 4);
    let first = world.serve().await?;
    let mut lock = world.database.begin().await?;
    sqlx::query("LOCK TABLE listings IN EXCLUSIVE MODE").execute(&mut *lock).await?;
    world.done(&["send", "upsert", "--sample", &UPSERTS.to_string()])?;
    let in_flight = r#"write_api_events_in_flight{lane="events"}"#;
    until("all in hand", SOON, async || Ok((first.metric(in_flight).await? == UPSERTS as f64).then_some(()))).await?;
    first.signal(libc::SIGTERM);
    let signalled = Instant::now();
    let status = first.exit(LONG).await?;
    ensure!(status.code() == Some(0) && signalled.elapsed() <= 4 * SECOND, "{status} after {:?}", signalled.elapsed());
    first.check_log()?;
    until("the messages", SECOND, async || Ok((world.depth(Lane::Events).await? == (UPSERTS, 0)).then_some(())))
        .await?;

    lock.rollback().await?;
    let second = world.serve().await?;
    let done = r#"write_api_events_total{kind="listing.upsert",outcome="done"}"#;
    until("all done", 5 * SECOND, async || Ok((second.metric(done).await? == UPSERTS as f64).then_some(()))).await?;
    ensure!(world.number("SELECT count(*) FROM listings").await? == UPSERTS as i64);
    world.finish(second).await
}

#[tokio::test]
async fn upserts_that_end_in_time_are_done_and_gone() -> Result<()> {
    const UPSERTS: u64 = 40;
    let mut world = World::new(Behaviour::default()).await?;
    world.set("queue.visibility_timeout", "60s");
    let service = world.serve().await?;
    let mut lock = world.database.begin().await?;
    sqlx::query("LOCK TABLE listings IN EXCLUSIVE MODE").execute(&mut *lock).await?;
    world.done(&["send", "upsert", "--sample", &UPSERTS.to_string()])?;
    let in_flight = r#"write_api_events_in_flight{lane="events"}"#;
    until("all in hand", SOON, async || Ok((service.metric(in_flight).await? == UPSERTS as f64).then_some(()))).await?;
    service.signal(libc::SIGTERM);
    until("draining", SOON, async || Ok(service.page("/readyz").await?.1.contains("draining").then_some(()))).await?;
    ensure!(world.number("SELECT count(*) FROM listings").await? == 0 && service.is_running()?);
    lock.rollback().await?;
    let status = service.exit(5 * SECOND).await?;
    ensure!(status.code() == Some(0), "{status}");
    service.check_log()?;
    ensure!(world.depth(Lane::Events).await? == (0, 0), "{:?} are left", world.depth(Lane::Events).await?);
    ensure!(world.number("SELECT count(*) FROM listings").await? == UPSERTS as i64);
    world.check_dead_letters().await
}

/// Records that Kafka does not take and events that wait in the outbox share what is left of the time to stop.
#[tokio::test]
async fn a_kafka_that_is_away_does_not_cost_the_outbox_its_last_turn() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let kafka = Kafka::separate().await?;
    kafka.create_topic(&world.environment().names().topic, 12).await?;
    world.set("kafka.brokers", kafka.bootstrap()).set("shutdown.grace", "5s").set("queue.wait_time", "1s");
    // Only a commit of this process or the stop itself makes the relay look.
    world.set("outbox.poll_interval", "1m").set("queue.visibility_timeout", "15s");
    world.listings(50).await?;
    let service = world.serve().await?;
    service.expect_errors();
    kafka.order(&Order::GoDown).await?;
    let id = world.refresh(&[])?;
    let publishers = "SELECT count(*) FROM runs WHERE publisher IS NOT NULL";
    until("a publisher", SOON, async || Ok((world.number(publishers).await? == 1).then_some(()))).await?;
    let waits = uuid::Uuid::new_v4();
    sqlx::query(
        "INSERT INTO outbox (event_id, lane, body)
         SELECT $1, lane, replace(body, event_id::text, $1::text) FROM outbox LIMIT 1",
    )
    .bind(waits)
    .execute(&world.database)
    .await?;
    service.signal(libc::SIGTERM);
    let signalled = Instant::now();
    let status = service.exit(LONG).await?;
    let took = signalled.elapsed();
    ensure!(status.code() == Some(0) && took <= 5 * SECOND, "{status} after {took:?}");
    service.check_log()?;
    let log = service.log()?;
    ensure!(log.contains("Kafka did not take every record in time"), "Kafka took the records");
    ensure!(!log.contains("the outbox was not relayed a last time") && !log.contains("did not end in time"), "{log}");
    ensure!(world.number("SELECT count(*) FROM outbox WHERE sent_at IS NULL").await? == 0, "an event still waits");
    until("both messages", SECOND, async || Ok((world.depth(Lane::PostProcessing).await? == (2, 0)).then_some(())))
        .await?;

    kafka.order(&Order::ComeUp).await?;
    let second = world.serve().await?;
    world.publications(&id, 2, LONG).await?;
    world.finish(second).await
}
