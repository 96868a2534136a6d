//! Neighbours that go away and come back.

use std::time::Duration;

use anyhow::{Result, ensure};
use local_stack::wire::{Flow, Wire};
use local_stack::{Behaviour, Kafka, KafkaTap, kafka::Order};

use crate::bad_input::{UPSERT, event, listing};
use crate::harness::{LONG, Lane, SOON, Service, World, until};

const LISTINGS: i64 = 1_500;

async fn slow_world() -> Result<World> {
    let mut world = World::new(Behaviour { latency_ms: 100, ..Behaviour::default() }).await?;
    world.set("partner.in_flight", 50).set("partner.rate_per_second", 0).set("refresh.page_size", 100);
    world.set("database.acquire_timeout", "2s");
    world.set("queue.request_timeout", "2s");
    world.listings(LISTINGS).await?;
    Ok(world)
}

/// What `/readyz` names as missing.
pub(crate) async fn missing(service: &Service) -> Result<Vec<String>> {
    let (status, page) = service.page("/readyz").await?;
    let page: serde_json::Value = serde_json::from_str(&page)?;
    let names = page["not_ready"].as_array().into_iter().flatten();
    let names: Vec<String> = names.filter_map(|entry| entry["name"].as_str().map(str::to_owned)).collect();
    ensure!((status == 200) == names.is_empty(), "{status} with {page}");
    Ok(names)
}

/// The answers of all runs may come at the same moment. Committing them takes half of the connections at most, however long it
/// takes, and fast events go on with the others.
#[tokio::test]
async fn commits_of_answers_leave_connections_for_fast_events() -> Result<()> {
    const RUNS: u64 = 6;
    const ROWS: u64 = 200;
    const CONNECTIONS: i64 = 4;
    let mut world = World::new(Behaviour { latency_ms: 0, ..Behaviour::default() }).await?;
    world.set("database.max_connections", CONNECTIONS).set("database.statement_timeout", "60s");
    world.set("partner.rate_per_second", 0);
    world.listings(ROWS as i64).await?;
    let service = world.serve().await?;
    // What commits answers writes this table too, and nothing else does.
    let mut lock = world.database.begin().await?;
    sqlx::query("LOCK TABLE listing_valuations IN EXCLUSIVE MODE").execute(&mut *lock).await?;
    let commits = "SELECT count(*) FROM pg_locks WHERE relation = 'listing_valuations'::regclass AND NOT granted";
    let runs = (0..RUNS).map(|_| world.refresh(&[])).collect::<Result<Vec<_>>>()?;
    until("the answers of all runs", LONG, async || Ok((world.partner.stats().requests >= RUNS * ROWS).then_some(())))
        .await?;
    until("the commits", SOON, async || Ok((world.number(commits).await? >= CONNECTIONS / 2).then_some(()))).await?;

    world.done(&["send", "upsert", "--sample", "20"])?;
    let done = r#"write_api_events_total{kind="listing.upsert",outcome="done"}"#;
    until("the fast events", SOON, async || Ok((service.metric(done).await? == 20.0).then_some(()))).await?;
    ensure!(world.number(commits).await? == CONNECTIONS / 2, "the commits have not waited, or too many have");
    lock.rollback().await?;
    for run in &runs {
        world.published(run, LONG).await?;
    }
    world.quiet(LONG).await?;
    world.finish(service).await
}

/// Breaks a wire in the middle of a run, mends it later, and wants every effect once.
async fn outage(world: &World, service: Service, wire: &Wire, flow: Flow, length: Duration) -> Result<()> {
    service.expect_errors();
    let tap = world.environment().tap()?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 300).await?;
    wire.set(flow);
    // Its length is what the outage is; nothing is waited for.
    tokio::time::sleep(length).await;
    let before = world.run(&id).await?.expect("it was there");
    ensure!(before.state == "running", "too late: {before:?}");
    ensure!(service.page("/livez").await?.0 == 200, "a neighbour's outage is no reason for a restart");
    wire.set(Flow::Open);
    world.published(&id, LONG).await?;
    let homes = world.homes(LISTINGS).await?;
    world.check_run(&id, &homes).await?;
    world.check_records(&tap, &id, &homes).await?;
    let stats = world.partner.stats();
    ensure!(stats.effects == LISTINGS as u64, "{stats:?}");
    world.quiet(LONG).await?;
    service.ready().await?;
    world.finish(service).await
}

#[tokio::test]
async fn postgres_goes_away_and_comes_back() -> Result<()> {
    let mut world = slow_world().await?;
    let wire = Wire::to(world.environment().database_url())?;
    world.set("database.url", wire.url());
    let service = world.serve().await?;
    outage(&world, service, &wire, Flow::Cut, Duration::from_millis(1_500)).await?;
    // An outage shorter than the patience of a statement costs no call.
    ensure!(world.partner.stats().repeated_requests == 0, "{:?}", world.partner.stats());
    Ok(())
}

#[tokio::test]
async fn postgres_hangs_for_longer_than_a_lease() -> Result<()> {
    let mut world = slow_world().await?;
    let wire = Wire::to(world.environment().database_url())?;
    world.set("database.url", wire.url()).set("database.statement_timeout", "1s");
    let service = world.serve().await?;
    outage(&world, service, &wire, Flow::Stalled, Duration::from_secs(7)).await
}

#[tokio::test]
async fn sqs_goes_away_and_comes_back() -> Result<()> {
    let mut world = slow_world().await?;
    let wire = Wire::to(local_stack::shared().await?.sqs().endpoint())?;
    world.set("aws.endpoint_url", wire.url());
    let service = world.serve().await?;
    // The sending by hand goes the other way round.
    outage(&world, service, &wire, Flow::Cut, Duration::from_millis(1_500)).await
}

/// A receive that hangs, as the SDK's can: the service gives it up and asks again.
#[tokio::test]
async fn a_receive_that_hangs_does_not_end_the_polling() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let endpoint = local_stack::shared().await?.sqs().endpoint();
    let wire = Wire::to(endpoint)?;
    world.listings(50).await?;
    world.set("aws.endpoint_url", wire.url()).set("queue.wait_time", "1s").set("queue.request_timeout", "1s");
    let service = world.serve().await?;
    world.set("aws.endpoint_url", endpoint);
    wire.set(Flow::Stalled);
    let hung = r#"write_api_sqs_requests_total{action="ReceiveMessage",result="timeout"}"#;
    until("every lane to give up twice", SOON, async || Ok((service.metric(hung).await? >= 6.0).then_some(()))).await?;
    let waiting = missing(&service).await?;
    ensure!(waiting.len() == 3 && waiting.iter().all(|name| name.starts_with("queue ")), "{waiting:?}");
    ensure!(service.page("/livez").await?.0 == 200);
    let id = world.refresh(&[])?;
    wire.set(Flow::Open);
    world.published(&id, LONG).await?;
    world.check_run(&id, &world.homes(50).await?).await?;
    service.ready().await?;
    world.finish(service).await
}

#[tokio::test]
async fn it_starts_before_its_neighbours_and_says_what_it_waits_for() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let kafka = Kafka::separate().await?;
    let topic = world.environment().names().topic.clone();
    kafka.create_topic(&topic, 12).await?;
    kafka.order(&Order::GoDown).await?;
    let postgres = Wire::to(world.environment().database_url())?;
    let sqs = Wire::to(local_stack::shared().await?.sqs().endpoint())?;
    let partner = Wire::to(&world.partner.url())?;
    world.set("partner.base_url", partner.url());
    world.set("database.url", postgres.url()).set("kafka.brokers", kafka.bootstrap());
    world.listings(50).await?;
    let id = world.refresh(&[])?;
    world.set("aws.endpoint_url", sqs.url());
    postgres.set(Flow::Cut);
    sqs.set(Flow::Cut);
    partner.set(Flow::Cut);

    let service = world.start()?;
    service.expect_errors();
    let [one, two, three] =
        [Lane::Events, Lane::Valuations, Lane::PostProcessing].map(|lane| format!("queue {}", world.queue_name(lane)));
    let names = [one, two, three, "database".to_owned(), "kafka".to_owned()];
    until("a start", SOON, async || Ok(service.page("/livez").await.is_ok().then_some(()))).await?;
    ensure!(service.page("/livez").await?.0 == 200);
    let waiting = missing(&service).await?;
    for name in &names {
        ensure!(waiting.contains(name), "{name} is not among {waiting:?}");
    }
    let (_, page) = service.page("/readyz").await?;
    ensure!(!page.contains("postgres@") && page.contains("since"), "{page}");

    sqs.set(Flow::Open);
    until("the queues", SOON, async || {
        Ok((!missing(&service).await?.iter().any(|name| name.starts_with("queue"))).then_some(()))
    })
    .await?;
    ensure!(missing(&service).await?.contains(&"database".to_owned()));
    postgres.set(Flow::Open);
    until("the run to wait for the partner", LONG, async || {
        Ok(missing(&service).await?.contains(&"partner".to_owned()).then_some(()))
    })
    .await?;
    partner.set(Flow::Open);
    world.run_until(&id, LONG, |run| run.state == "complete").await?;
    kafka.order(&Order::ComeUp).await?;
    let tap = KafkaTap::start(kafka.bootstrap(), &topic)?;
    world.published(&id, LONG).await?;
    world.check_records(&tap, &id, &world.homes(50).await?).await?;
    service.ready().await?;
    world.finish(service).await
}

/// A new program on yesterday's schema: it says so and receives nothing that it could only fail at.
#[tokio::test]
async fn it_receives_nothing_before_the_schema_has_every_migration() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let unapply = "UPDATE _sqlx_migrations SET version = version + 9000 WHERE version = 4";
    sqlx::query(unapply).execute(&world.database).await?;
    let body = event("u-1", UPSERT, "2026-01-31T02:00:00Z", listing(1, 101));
    world.put(Lane::Events, &body.to_string()).await?;
    let service = world.start()?;
    let reason = "the schema lacks migration 0004_runs_operated; run `write-api migrate`";
    until("the reason", SOON, async || match service.page("/readyz").await {
        Ok((503, page)) => Ok(page.contains(reason).then_some(())),
        _ => Ok(None),
    })
    .await?;
    until("the queues", SOON, async || Ok((missing(&service).await? == ["database"]).then_some(()))).await?;
    // Nothing hidden, nothing deleted: nobody has received it.
    ensure!(world.depth(Lane::Events).await? == (1, 0), "{:?}", world.depth(Lane::Events).await?);
    let apply = "UPDATE _sqlx_migrations SET version = version - 9000 WHERE version > 9000";
    sqlx::query(apply).execute(&world.database).await?;
    service.ready().await?;
    world.quiet(LONG).await?;
    let done =
        service.log()?.lines().filter(|line| line.contains("\"event done\"")).map(str::to_owned).collect::<Vec<_>>();
    ensure!(done.len() == 1 && done[0].contains(r#""attempt":1,"#), "not at the first receive: {done:?}");
    world.finish(service).await
}

#[tokio::test]
async fn an_upsert_waits_for_postgres() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let wire = Wire::to(world.environment().database_url())?;
    world.set("database.url", wire.url());
    let service = world.serve().await?;
    service.expect_errors();
    wire.set(Flow::Cut);
    for id in 1..=30 {
        let body = event(&format!("u-{id}"), UPSERT, "2026-01-31T02:00:00Z", listing(id, 100 + id));
        world.put(Lane::Events, &body.to_string()).await?;
    }
    until("all to be tried", SOON, async || {
        Ok((service.metric(r#"write_api_events_in_flight{lane="events"}"#).await? == 30.0).then_some(()))
    })
    .await?;
    wire.set(Flow::Open);
    world.quiet(LONG).await?;
    ensure!(world.number("SELECT count(*) FROM listings WHERE list_price_cents = 100 + listing_id").await? == 30);
    world.finish(service).await
}
