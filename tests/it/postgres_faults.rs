//! Postgres that is there and does not do what is asked: connections that lead nowhere, no writes, locks, no room.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use local_stack::wire::Wire;
use local_stack::{Behaviour, Postgres, PostgresOptions};
use serde_json::json;
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;
use write_api::config::Config;
use write_api::db::Database;
use write_api::db::publications::PublicationClaim;

use crate::bad_input::{REFRESH, UPSERT, event, listing};
use crate::harness::{LONG, Lane, SOON, Service, World, until};
use crate::neighbours::missing;

const LISTINGS: i64 = 1_500;

/// A run of ten seconds and short bounds. What statements fail of is logged.
async fn slow_world() -> Result<World> {
    let mut world = World::new(Behaviour { latency_ms: 100, ..Behaviour::default() }).await?;
    world.set("partner.in_flight", 20).set("partner.rate_per_second", 0).set("refresh.page_size", 100);
    world.set("database.acquire_timeout", "2s").set("database.statement_timeout", "1s");
    world.set("log.level", "info,write_api::db=debug");
    world.listings(LISTINGS).await?;
    Ok(world)
}

/// What the service has of Postgres, without the service.
fn database(world: &World) -> Result<Database> {
    let variables = world.environment().variables().map(|(name, value)| (name.to_owned(), value.to_owned()));
    let config = Config::load(None, variables, &[]).map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    Database::new(&config.database)
}

/// The run ends right, at its first attempt, and the log shows that it met what it was meant to.
async fn ends_right(world: &World, service: Service, id: &str, met: &str) -> Result<()> {
    let run = world.published(id, LONG).await?;
    ensure!(run.attempts == 1, "{run:?}");
    world.check_run(id, &world.homes(LISTINGS).await?).await?;
    let stats = world.partner.stats();
    ensure!((stats.effects, stats.repeated_requests) == (LISTINGS as u64, 0), "{stats:?}");
    ensure!(service.log()?.contains(met), "no statement met {met:?}");
    world.finish(service).await
}

#[tokio::test]
async fn half_open_connections_are_noticed_and_their_slots_are_free_again() -> Result<()> {
    let mut world = slow_world().await?;
    let wire = Wire::to(world.environment().database_url())?;
    // As few as there may be, so that one slot that stays taken is felt.
    world.set("database.url", wire.url()).set("database.max_connections", 2);
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 300).await?;
    // The server's bound, the client's margin, the bound on closing, and a try or two.
    let bound = Duration::from_secs(1 + 2 + 5 + 4);
    for _ in 0..2 {
        let before = world.run(&id).await?.expect("it was there").valued;
        wire.strand();
        let stranded = Instant::now();
        world.run_until(&id, bound, |run| run.valued > before + 100).await?;
        println!("the run went on {:?} after its connections were half-open", stranded.elapsed());
    }
    ends_right(&world, service, &id, "no answer within 3s").await?;

    // Idle connections, some of which the health check meets first.
    let service = world.serve().await?;
    wire.strand();
    for id in 1..=30 {
        let body = event(&format!("u-{id}"), UPSERT, "2026-01-31T02:00:00Z", listing(id, 100 + id));
        world.put(Lane::Events, &body.to_string()).await?;
    }
    until("all to be written", bound, async || {
        let written = "SELECT count(*) FROM listings WHERE list_price_cents = 100 + listing_id";
        Ok((world.number(written).await? == 30).then_some(()))
    })
    .await?;
    service.ready().await?;
    world.finish(service).await
}

/// What is given up in the middle of a statement goes back to the pool without having answered, as the health check's does.
#[tokio::test]
async fn a_half_open_connection_that_is_given_up_does_not_keep_its_slot() -> Result<()> {
    let mut world = slow_world().await?;
    let wire = Wire::to(world.environment().database_url())?;
    world.set("database.url", wire.url()).set("database.max_connections", 2);
    let database = database(&world)?;
    let both = async || tokio::join!(database.ping(), database.ping());
    ensure!(matches!(both().await, (Ok(()), Ok(()))), "the pool does not open its connections");
    wire.strand();
    ensure!(matches!(both().await, (Err(_), Err(_))), "the pool had other connections");
    // The bound on giving a connection back, and a try or two.
    until("a free slot", Duration::from_secs(5 + 4), async || Ok(database.ping().await.ok())).await?;
    ensure!(matches!(both().await, (Ok(()), Ok(()))), "one slot stays taken");
    Ok(())
}

#[tokio::test]
async fn a_server_that_takes_no_writes_is_noticed_and_its_connections_are_replaced() -> Result<()> {
    let world = slow_world().await?;
    let database = &world.environment().names().database;
    let mut admin = PgConnection::connect(&local_stack::shared().await?.postgres().admin_url()).await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 300).await?;
    for statement in [
        format!("ALTER DATABASE {database} SET default_transaction_read_only = on"),
        format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = '{database}' AND application_name = 'write-api'"
        ),
    ] {
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut admin).await?;
    }
    until("the service to notice", SOON, async || {
        Ok(missing(&service).await?.contains(&"database".to_owned()).then_some(()))
    })
    .await?;
    ensure!(service.page("/readyz").await?.1.contains("takes no writes"), "{}", service.page("/readyz").await?.1);
    let before = world.run(&id).await?.expect("it was there");
    ensure!(before.state == "running" && before.valued < LISTINGS, "a false success: {before:?}");
    let reset = format!("ALTER DATABASE {database} RESET default_transaction_read_only");
    sqlx::raw_sql(AssertSqlSafe(reset)).execute(&mut admin).await?;
    service.ready().await?;
    // Its lease can have run out meanwhile: no owner can renew it.
    service.expect_errors();
    world.published(&id, LONG).await?;
    world.check_run(&id, &world.homes(LISTINGS).await?).await?;
    ensure!(world.partner.stats().effects == LISTINGS as u64, "{:?}", world.partner.stats());
    ensure!(service.log()?.contains("read-only transaction"));
    world.finish(service).await
}

/// As after a switch of roles: nobody closes the connections, and what is asked on them is refused from one moment to the
/// next.
#[tokio::test]
async fn a_server_that_takes_no_writes_any_more_on_the_connections_there_are_loses_nothing() -> Result<()> {
    let mut world = slow_world().await?;
    // A setting of the whole server, so it must be nobody else's.
    let postgres = Postgres::separate(PostgresOptions { durable: false, ..PostgresOptions::default() }).await?;
    let url = postgres.create_database("app").await?;
    world.database = PgPoolOptions::new().max_connections(3).connect_lazy(&url)?;
    world.set("database.url", &url).set("database.max_connections", 2);
    world.done(&["migrate"])?;
    world.listings(LISTINGS).await?;
    let mut admin = PgConnection::connect(&postgres.admin_url()).await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 300).await?;
    let pids = "SELECT pid FROM pg_stat_activity WHERE datname = 'app' AND application_name = 'write-api'";
    let before: Vec<i32> = sqlx::query_scalar(pids).fetch_all(&mut admin).await?;
    for statement in ["ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()"] {
        sqlx::raw_sql(statement).execute(&mut admin).await?;
    }
    until("the service to notice", SOON, async || {
        Ok(service.page("/readyz").await?.1.contains("takes no writes").then_some(()))
    })
    .await?;
    until("other connections", SOON, async || {
        let now: Vec<i32> = sqlx::query_scalar(pids).fetch_all(&mut admin).await?;
        Ok((!before.is_empty() && !before.iter().any(|pid| now.contains(pid))).then_some(()))
    })
    .await?;
    for id in 1..=30 {
        let body = event(&format!("u-{id}"), UPSERT, "2026-01-31T02:00:00Z", listing(LISTINGS + id, 100 + id));
        world.put(Lane::Events, &body.to_string()).await?;
    }
    let run = world.run(&id).await?.expect("it was there");
    ensure!(run.state == "running" && run.valued < LISTINGS, "a false success: {run:?}");
    for statement in ["ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()"] {
        sqlx::raw_sql(statement).execute(&mut admin).await?;
    }
    service.ready().await?;
    // Its lease can have run out meanwhile: no owner can renew it.
    service.expect_errors();
    world.published(&id, LONG).await?;
    world.quiet(LONG).await?;
    world.check_run(&id, &world.homes(LISTINGS).await?).await?;
    ensure!(world.partner.stats().effects == LISTINGS as u64, "{:?}", world.partner.stats());
    let written = format!("SELECT count(*) FROM listings WHERE listing_id > {LISTINGS}");
    ensure!(world.number(&written).await? == 30, "an upsert is lost");
    ensure!(world.number("SELECT coalesce(max(deaths), 0)::bigint FROM runs").await? == 0);
    world.finish(service).await
}

#[tokio::test]
async fn a_table_locked_for_longer_than_a_statement_may_take_is_waited_for() -> Result<()> {
    let world = slow_world().await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 300).await?;
    let mut lock = world.database.begin().await?;
    sqlx::query("LOCK TABLE valuations IN ACCESS EXCLUSIVE MODE").execute(&mut *lock).await?;
    // The length of the lock is what is tested; nothing is waited for.
    tokio::time::sleep(Duration::from_secs(4)).await;
    lock.rollback().await?;
    ends_right(&world, service, &id, "timeout").await
}

#[tokio::test]
async fn a_deadlock_is_retried() -> Result<()> {
    let mut world = slow_world().await?;
    // Longer than the second after which the server looks for deadlocks.
    world.set("database.statement_timeout", "5s");
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 300).await?;
    let deadlocks = async || -> Result<i64> {
        world.number("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()").await
    };
    let before = deadlocks().await?;
    let mut other = world.database.begin().await?;
    // A row that the run will write, then the run's own row, which its commit locks first. The run is the one that notices.
    sqlx::raw_sql("SET LOCAL deadlock_timeout = '1min'; SET LOCAL statement_timeout = 0").execute(&mut *other).await?;
    sqlx::query("INSERT INTO listing_valuations SELECT id, 'x', '2000-01-01Z', 1, 1 FROM generate_series(301, $1) AS id ON CONFLICT (listing_id) DO NOTHING")
        .bind(LISTINGS)
        .execute(&mut *other)
        .await?;
    until("the run to wait", SOON, async || Ok((world.waiting_for_locks().await? > 0).then_some(()))).await?;
    sqlx::query("UPDATE runs SET last_error = last_error WHERE run_id = $1").bind(&id).execute(&mut *other).await?;
    other.rollback().await?;
    until("the deadlock", SOON, async || Ok((deadlocks().await? > before).then_some(()))).await?;
    ends_right(&world, service, &id, "deadlock detected").await
}

#[tokio::test]
async fn serialization_failures_are_retried() -> Result<()> {
    let mut world = slow_world().await?;
    let database = world.environment().names().database.clone();
    world.sql(&format!("ALTER DATABASE {database} SET default_transaction_isolation = 'serializable'")).await?;
    world.set("partner.in_flight", 200).set("database.statement_timeout", "5s");
    let service = world.serve().await?;
    // Whether two batches meet is luck, so it is tried until they did.
    for round in 0..10 {
        let ids = ["first", "second", "third"].map(|id| format!("{id}-{round}"));
        for id in &ids {
            let time = format!("2026-01-31T02:00:0{round}Z");
            let body = event(id, REFRESH, &time, json!({"zip_codes": null, "limit": null}));
            world.put(Lane::Valuations, &body.to_string()).await?;
        }
        for id in &ids {
            let run = world.run_until(id, LONG, |run| run.state == "complete").await?;
            ensure!((run.attempts, run.valued) == (1, LISTINGS), "{run:?}");
        }
        world.quiet(LONG).await?;
        // The last of them by time and id has all current values.
        world.check_run(&ids[2], &world.homes(LISTINGS).await?).await?;
        if service.log()?.contains("could not serialize access") {
            return world.finish(service).await;
        }
    }
    bail!("nothing was retried")
}

#[tokio::test]
async fn a_server_without_room_for_the_whole_pool_is_enough() -> Result<()> {
    let mut world = slow_world().await?;
    let user = format!("{}_narrow", world.environment().names().database);
    world
        .sql(&format!(
            "CREATE ROLE {user} LOGIN CONNECTION LIMIT 3; GRANT ALL ON ALL TABLES IN SCHEMA public TO {user}"
        ))
        .await?;
    let url = world.environment().database_url().replace("postgres@", &format!("{user}@"));
    world.set("database.url", &url);
    let service = world.serve().await?;
    service.expect_errors();
    let id = world.refresh(&[])?;
    for id in 1..=60 {
        let body = event(&format!("u-{id}"), UPSERT, "2026-01-31T02:00:00Z", listing(id, 100 + id));
        world.put(Lane::Events, &body.to_string()).await?;
    }
    let run = world.published(&id, LONG).await?;
    ensure!(run.valued == LISTINGS, "{run:?}");
    world.quiet(LONG).await?;
    ensure!(world.number("SELECT count(*) FROM listings WHERE list_price_cents = 100 + listing_id").await? == 60);
    ensure!(world.partner.stats().effects == LISTINGS as u64);
    world.finish(service).await
}

/// A connection is used again as its work left it: a transaction that came to nothing would go on, with its locks.
#[tokio::test]
async fn work_that_ends_inside_of_a_transaction_leaves_none_behind() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.listings(1).await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.published(&id, LONG).await?;
    world.finish(service).await?;
    let database = database(&world)?;
    let claim = async |event: &str, run: &str| {
        database.claim_publication(event, &[0; 32], run, Uuid::new_v4(), Duration::from_secs(60), false).await
    };
    ensure!(matches!(claim("first", &id).await?, PublicationClaim::Owned(_)));
    for _ in 0..5 {
        ensure!(matches!(claim("second", &id).await?, PublicationClaim::Busy(_)));
        ensure!(matches!(claim("second", "no such run").await?, PublicationClaim::RunUnknown));
    }
    // Nobody uses a connection any more, which would end what it was left in.
    until("all transactions to end", SOON, async || {
        let open = "SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND application_name = 'write-api' AND state LIKE 'idle in %'";
        Ok((world.number(open).await? == 0).then_some(()))
    })
    .await?;
    // What was begun and came to nothing left no row.
    ensure!(world.number("SELECT count(*) FROM publications WHERE event_id = 'second'").await? == 0);
    Ok(())
}
