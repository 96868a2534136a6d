//! A service that dies, or only seems to, loses nothing and repeats little.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use local_stack::kafka::Order;
use local_stack::wire::{Flow, Wire};
use local_stack::{Behaviour, Kafka, KafkaTap};

use crate::harness::{LONG, Lane, SOON, VISIBILITY, World, until};

const IN_FLIGHT: u64 = 100;
const BATCH: u64 = 200;

/// Slow enough to be met in the middle of a run, and with small batches, so that the bound on repeats is narrow.
async fn slow_world(services: u32) -> Result<World> {
    let mut world = World::for_services(services, Behaviour { latency_ms: 100, ..Behaviour::default() }).await?;
    world.set("partner.in_flight", IN_FLIGHT).set("partner.rate_per_second", 0).set("refresh.page_size", BATCH);
    Ok(world)
}

#[tokio::test]
async fn a_killed_refresh_goes_on_where_it_was() -> Result<()> {
    const LISTINGS: i64 = 4_000;
    let world = slow_world(1).await?;
    world.listings(LISTINGS).await?;
    let first = world.serve().await?;
    let id = world.refresh(&[])?;
    until("a thousand results", SOON, async || {
        ensure!(world.passed_without_result(&id).await? == 0, "the cursor is ahead of the results");
        Ok(world.run(&id).await?.filter(|run| run.valued >= 1_000))
    })
    .await?;
    first.kill().await?;
    let killed = Instant::now();
    ensure!(world.passed_without_result(&id).await? == 0, "the cursor is ahead of the results");
    let left = world.run(&id).await?.expect("it was there");
    ensure!(left.state == "running" && left.valued < LISTINGS && left.cursor >= 800, "{left:?}");
    let calls = world.partner.stats().requests;

    let second = world.serve().await?;
    until("another call", LONG, async || Ok((world.partner.stats().requests > calls).then_some(()))).await?;
    let idle = killed.elapsed();
    ensure!(idle <= VISIBILITY + Duration::from_secs(2), "it took {idle:?} to work again");
    until("the end of the run", LONG, async || {
        ensure!(world.passed_without_result(&id).await? == 0, "the cursor is ahead of the results");
        Ok(world.run(&id).await?.filter(|run| run.state == "complete"))
    })
    .await?;
    world.published(&id, LONG).await?;

    world.check_run(&id, &world.homes(LISTINGS).await?).await?;
    let stats = world.partner.stats();
    ensure!(stats.effects == LISTINGS as u64 && stats.distinct_keys == stats.effects, "{stats:?}");
    ensure!(stats.repeated_requests <= IN_FLIGHT + BATCH, "{stats:?}");
    world.quiet(LONG).await?;
    world.finish(second).await
}

#[tokio::test]
async fn a_killed_publication_reaches_every_record() -> Result<()> {
    const LISTINGS: i64 = 2_000;
    const PAGE: u64 = 100;
    const IN_FLIGHT: u64 = 3;
    let mut world = World::new(Behaviour::default()).await?;
    // A broker far away: a page takes a while, so the middle of the publication can be met.
    let kafka = Kafka::separate().await?;
    let topic = world.environment().names().topic.clone();
    kafka.create_topic(&topic, 12).await?;
    world.set("kafka.brokers", kafka.bootstrap()).set("kafka.page_size", PAGE).set("kafka.pages_in_flight", IN_FLIGHT);
    world.set("partner.rate_per_second", 0);
    world.listings(LISTINGS).await?;
    let tap = KafkaTap::start(kafka.bootstrap(), &topic)?;
    let first = world.serve().await?;
    kafka.order(&Order::Delay { milliseconds: 100 }).await?;
    let id = world.refresh(&[])?;
    until("some records", LONG, async || {
        let published = "SELECT coalesce(sum(published), 0)::bigint FROM publications";
        Ok((world.number(published).await? >= 300).then_some(()))
    })
    .await?;
    first.kill().await?;
    ensure!(world.number("SELECT count(*) FROM publications WHERE state = 'complete'").await? == 0, "met too late");

    let second = world.serve().await?;
    world.published(&id, LONG).await?;
    world.check_records(&tap, &id, &world.homes(LISTINGS).await?).await?;
    let most = LISTINGS as u64 + IN_FLIGHT * PAGE;
    ensure!(tap.count() <= most, "{} records: more were sent again than were in flight", tap.count());
    ensure!(world.number("SELECT published FROM publications").await? == LISTINGS);
    world.finish(second).await
}

#[tokio::test]
async fn a_service_that_slept_past_its_lease_leaves_the_run_to_its_new_owner() -> Result<()> {
    const LISTINGS: i64 = 4_000;
    let world = slow_world(2).await?;
    world.listings(LISTINGS).await?;
    let sleeper = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 600).await?;
    sleeper.signal(libc::SIGSTOP);
    let heir = world.serve().await?;
    world.run_until(&id, LONG, |run| run.attempts == 2).await?;
    sleeper.signal(libc::SIGCONT);
    until("the sleeper to give up", SOON, async || {
        Ok((sleeper.metric(r#"write_api_events_total{kind="valuations.refresh",outcome="lost"}"#).await? == 1.0)
            .then_some(()))
    })
    .await?;
    world.published(&id, LONG).await?;
    world.check_run(&id, &world.homes(LISTINGS).await?).await?;
    let stats = world.partner.stats();
    ensure!(stats.effects == LISTINGS as u64, "{stats:?}");
    // What the sleeper had out when it stopped, and what it began between waking and noticing.
    ensure!(stats.repeated_requests <= 2 * IN_FLIGHT + BATCH, "{stats:?}");
    ensure!(world.run(&id).await?.is_some_and(|run| run.attempts == 2));
    world.quiet(LONG).await?;
    sleeper.finish().await?;
    world.finish(heir).await
}

/// The hardest case for the fence: the old owner's statement is on its way when the run changes hands.
#[tokio::test]
async fn a_batch_that_arrives_after_the_lease_is_not_written() -> Result<()> {
    const LISTINGS: i64 = 3_000;
    let mut world = slow_world(2).await?;
    world.set("refresh.page_size", 100);
    world.listings(LISTINGS).await?;
    // Who writes what, told by the roles of the two services.
    let role = format!("late_{}", world.environment().names().database);
    world
        .sql(&format!(
            "CREATE ROLE {role} SUPERUSER LOGIN;
             CREATE TABLE written (listing_id bigint, by_whom text, at timestamptz DEFAULT clock_timestamp());
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN INSERT INTO written (listing_id, by_whom) SELECT listing_id, session_user FROM new; RETURN NULL; END';
             CREATE TRIGGER note AFTER INSERT ON valuations REFERENCING NEW TABLE AS new
                 FOR EACH STATEMENT EXECUTE FUNCTION note();"
        ))
        .await?;
    let url = world.environment().database_url().to_owned();
    let wire = Wire::to(&url.replace("postgres@", &format!("{role}@")))?;
    world.set("database.url", wire.url());
    // Busy with this run, it does not take the message away from its heir when that comes again.
    world.set("lanes.valuations.in_flight", 1);
    let late = world.serve().await?;
    // Cut off from Postgres, it cannot take the message that comes again either.
    late.expect_errors();
    world.set("database.url", &url);
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 600).await?;
    wire.set(Flow::Stalled);
    let heir = world.serve().await?;
    world.run_until(&id, LONG, |run| run.attempts == 2).await?;
    let by_late = "SELECT count(*) FROM written WHERE by_whom LIKE 'late%'";
    let before = world.number(by_late).await?;
    wire.set(Flow::Open);
    world.published(&id, LONG).await?;
    ensure!(world.number(by_late).await? == before, "the old owner wrote after it had lost the run");
    ensure!(before >= 600, "the trigger saw {before} rows");
    world.check_run(&id, &world.homes(LISTINGS).await?).await?;
    ensure!(world.depth(Lane::Valuations).await?.0 == 0);
    world.quiet(LONG).await?;
    late.finish().await?;
    world.finish(heir).await?;
    world.database.close().await;
    Ok(())
}
