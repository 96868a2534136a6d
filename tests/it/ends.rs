//! The end of an attempt is not forgotten: whatever Postgres or the service itself is doing just then, work that ended in
//! order is not taken for work that died, and what it held is free for others.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use local_stack::wire::{Flow, Wire};
use local_stack::{Behaviour, PgFault, PostgresProxy};
use serde_json::Value;

use crate::bad_input::{UPSERT, event, listing};
use crate::harness::{LONG, Lane, SOON, Service, World, until};

const TIME: &str = "2026-01-31T02:00:00Z";

/// Log lines with this message.
fn lines(service: &Service, message: &str) -> Result<usize> {
    let mut found = 0;
    for line in service.log()?.lines() {
        let entry: Value = serde_json::from_str(line).context("not JSON")?;
        found += usize::from(entry["message"] == message);
    }
    Ok(found)
}

/// Receives the message of a lane and gives it back at once, so that the service's own receive is its second.
async fn receive_once(world: &World, lane: Lane) -> Result<()> {
    let url = world.sqs.get_queue_url().queue_name(world.queue_name(lane)).send().await?.queue_url;
    let url = url.context("no URL")?;
    until("the message", SOON, async || {
        let received = world.sqs.receive_message().queue_url(&url).visibility_timeout(0).send().await?;
        Ok(received.messages.is_some_and(|messages| messages.len() == 1).then_some(()))
    })
    .await
}

#[tokio::test]
async fn attempts_that_end_while_postgres_is_away_are_no_deaths() -> Result<()> {
    // The one listing is asked about again and again: no row is ever committed.
    let forced = [(1, 409)].into();
    let mut world = World::new(Behaviour { forced, ..Behaviour::default() }).await?;
    let proxy = PostgresProxy::start(world.environment().database_url())?;
    world.set("database.url", proxy.url()).set("queue.visibility_timeout", "3s").set("queue.receive_cap", "4s");
    world.set("partner.retry_base", "1m").set("partner.retry_cap", "5m").set("partner.total_timeout", "1h");
    world.listings(1).await?;
    let service = world.serve().await?;
    service.expect_errors();
    let id = world.refresh(&["--id", "outages"])?;
    // However it ends: one that is cut off while it begins fails.
    let ends = async || -> Result<f64> {
        let mut ends = 0.0;
        for outcome in ["released", "lost", "retried"] {
            let sample = format!(r#"write_api_events_total{{kind="valuations.refresh",outcome="{outcome}"}}"#);
            ends += service.metric(&sample).await?;
        }
        Ok(ends)
    };
    let (mut outages, mut attempts) = (0_usize, 0);
    while outages < 4 {
        let run = world.run_until(&id, LONG, |run| run.owned && run.attempts > attempts).await?;
        let deaths = world.number("SELECT deaths::bigint FROM runs").await?;
        ensure!(run.state == "running" && deaths == 0, "after {outages} outages {deaths} deaths: {run:?}");
        let before = ends().await?;
        proxy.order(PgFault::Cut, u64::MAX);
        proxy.cut();
        let run = until("the attempt's end", LONG, async || {
            let ended = ends().await? > before;
            let run = world.run(&id).await?.context("it was there")?;
            // One that gave its run back before Postgres was cut off may have been counted before that as well.
            Ok((ended || !run.owned).then_some(run))
        })
        .await?;
        ensure!(run.valued == 0, "there was progress: {run:?}");
        // Another attempt may have begun before the outage, which this was the end of.
        attempts = run.attempts;
        // Else that was no outage at an end.
        outages += usize::from(run.owned);
        proxy.clear();
    }
    ensure!(lines(&service, KEPT)? >= outages, "ends were taken while Postgres was away");
    // With time enough for a breaker that has opened meanwhile.
    service.finish().await?;
    world.partner.control(|behaviour| behaviour.forced.clear())?;
    world.set("queue.receive_cap", "1h");
    let service = world.serve().await?;
    let run = world.published(&id, LONG).await?;
    ensure!(run.attempts > attempts, "{run:?}");
    ensure!(world.number("SELECT deaths::bigint FROM runs").await? == 0);
    world.check_run(&id, &world.homes(1).await?).await?;
    world.finish(service).await
}

/// Nobody comes to this process again with the message: it is written all the same.
#[tokio::test]
async fn an_end_is_written_when_postgres_is_back() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let proxy = PostgresProxy::start(world.environment().database_url())?;
    world.set("database.url", proxy.url()).set("queue.retry_base", "10m").set("queue.retry_cap", "10m");
    world.listings(1).await?;
    world.expect_work_left();
    let mut lock = world.database.begin().await?;
    sqlx::query("SELECT FROM listings WHERE listing_id = 1 FOR UPDATE").execute(&mut *lock).await?;
    world.put(Lane::Events, &event("stuck", UPSERT, TIME, listing(1, 7)).to_string()).await?;
    receive_once(&world, Lane::Events).await?;
    let service = world.serve().await?;
    service.expect_errors();
    let recorded = "SELECT count(*) FROM deliveries WHERE token IS NOT NULL";
    until("the record", SOON, async || Ok((world.number(recorded).await? == 1).then_some(()))).await?;
    proxy.order(PgFault::Cut, u64::MAX);
    proxy.cut();
    let retried = r#"write_api_events_total{kind="listing.upsert",outcome="retried"}"#;
    until("the attempt's end", LONG, async || Ok((service.metric(retried).await? == 1.0).then_some(()))).await?;
    ensure!(world.number(recorded).await? == 1, "Postgres took the end");
    proxy.clear();
    until("the end written", SOON, async || Ok((world.number(recorded).await? == 0).then_some(()))).await?;
    ensure!(lines(&service, "Postgres did not take the end of an attempt; it is written later")? == 1);
    lock.rollback().await?;
    world.finish(service).await
}

/// A claim that Postgres took and whose answer never came may have made the run ours: it is held no longer than the attempt lasts.
#[tokio::test]
async fn an_attempt_that_never_hears_of_its_claim_gives_the_run_back() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let proxy = PostgresProxy::start(world.environment().database_url())?;
    world.set("database.url", proxy.url()).set("queue.retry_base", "10m").set("queue.retry_cap", "10m");
    world.listings(1).await?;
    world.expect_work_left();
    let service = world.serve().await?;
    service.expect_errors();
    let given_back = async |id: &str, kind: &str, table: &str| {
        let retried = format!(r#"write_api_events_total{{kind="{kind}",outcome="retried"}}"#);
        until("the attempt's end", LONG, async || Ok((service.metric(&retried).await? == 1.0).then_some(()))).await?;
        let claimed = format!("SELECT count(*) FROM {table} WHERE run_id = '{id}' AND attempts = 1 AND deaths = 0");
        ensure!(world.number(&claimed).await? == 1, "{kind}: the claim did not come about");
        let held = format!(
            "SELECT count(*) FROM runs LEFT JOIN publications AS p USING (run_id) WHERE run_id = '{id}'
             AND (runs.owner IS NOT NULL OR publisher IS NOT NULL OR p.owner IS NOT NULL)"
        );
        until("the run free again", SOON, async || Ok((world.number(&held).await? == 0).then_some(()))).await
    };
    let cut = |claim: &str| proxy.order(PgFault::CutAfterCommit { matching: claim.to_owned() }, u64::MAX);

    // Not before the run is there: the first look for it would be cut as well, and it would never be opened.
    let mut lock = world.database.begin().await?;
    sqlx::query("LOCK TABLE listings IN ACCESS EXCLUSIVE MODE").execute(&mut *lock).await?;
    world.refresh(&["--id", "first"])?;
    until("the opening", SOON, async || Ok((world.waiting_for_locks().await? > 0).then_some(()))).await?;
    cut("WITH found AS MATERIALIZED");
    lock.rollback().await?;
    given_back("first", "valuations.refresh", "runs").await?;
    proxy.clear();

    cut("UPDATE runs SET publisher = $2");
    world.refresh(&["--id", "second"])?;
    given_back("second", "valuations.publish", "publications").await?;
    proxy.clear();
    world.finish(service).await
}

/// From now on Postgres answers an update of a run to which `when` applies with this SQLSTATE. Sequences remember how often.
async fn refuse(world: &World, name: &str, when: &str, sqlstate: &str) -> Result<()> {
    world
        .sql(&format!(
            "CREATE SEQUENCE {name};
             CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS
                 $$BEGIN PERFORM nextval('{name}'); RAISE EXCEPTION 'refused' USING ERRCODE = '{sqlstate}'; END$$;
             CREATE TRIGGER {name} BEFORE UPDATE ON runs FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION {name}()"
        ))
        .await
}

/// That an attempt gives its run back.
const RELEASE: &str = "OLD.owner IS NOT NULL AND NEW.owner IS NULL AND NEW.state = 'running'";

const KEPT: &str = "Postgres did not take the end of an attempt; it is written later";
const DROPPED: &str = "Postgres refuses the end of an attempt; it is dropped and counts as a death";

/// Ends of runs that Postgres goes on not to take keep no end of a message from being written.
#[tokio::test]
async fn an_end_that_cannot_be_written_keeps_none_of_another_kind() -> Result<()> {
    // The one listing is asked about again and again, and the attempts end by the cap.
    let mut world = World::new(Behaviour { forced: [(1, 409)].into(), ..Behaviour::default() }).await?;
    world.set("queue.visibility_timeout", "3s").set("queue.receive_cap", "4s");
    world.set("partner.retry_base", "1m").set("partner.retry_cap", "5m").set("partner.total_timeout", "1h");
    world.listings(1).await?;
    world.expect_work_left();
    let proxy = PostgresProxy::start(world.environment().database_url())?;
    world.set("database.url", proxy.url()).set("queue.retry_base", "10m").set("queue.retry_cap", "10m");
    // Neither passing nor for good: an operator has to mend it.
    refuse(&world, "release", RELEASE, "P0001").await?;
    let mut lock = world.database.begin().await?;
    sqlx::query("SELECT FROM listings WHERE listing_id = 1 FOR UPDATE").execute(&mut *lock).await?;
    world.put(Lane::Events, &event("stuck", UPSERT, TIME, listing(1, 7)).to_string()).await?;
    receive_once(&world, Lane::Events).await?;
    world.refresh(&["--id", "restless"])?;
    let service = world.serve().await?;
    service.expect_errors();
    until("an end of the run that is kept", LONG, async || Ok((lines(&service, KEPT)? > 0).then_some(()))).await?;
    let recorded = "SELECT count(*) FROM deliveries WHERE token IS NOT NULL AND lane = 'events'";
    until("the record", SOON, async || Ok((world.number(recorded).await? == 1).then_some(()))).await?;
    proxy.order(PgFault::Cut, u64::MAX);
    proxy.cut();
    let retried = r#"write_api_events_total{kind="listing.upsert",outcome="retried"}"#;
    until("the message's end", LONG, async || Ok((service.metric(retried).await? == 1.0).then_some(()))).await?;
    ensure!(world.number(recorded).await? == 1, "Postgres took the end");
    proxy.clear();
    until("the end written", SOON, async || Ok((world.number(recorded).await? == 0).then_some(()))).await?;
    ensure!(world.number("SELECT count(*) FROM runs WHERE owner IS NOT NULL").await? == 1, "the run was released");
    ensure!(lines(&service, DROPPED)? == 0, "an end was dropped that somebody may mend");
    world.sql("DROP TRIGGER release ON runs").await?;
    lock.rollback().await?;
    world.finish(service).await
}

/// What Postgres will never take is not tried for ever, and an end that it takes without its text is no death.
#[tokio::test]
async fn an_end_that_postgres_refuses_for_good_is_dropped_and_told() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    world.set("queue.visibility_timeout", "3s");
    world.listings(1).await?;
    world.expect_work_left();
    // The run never gets to its end, and says why.
    refuse(&world, "completion", "NEW.state = 'complete'", "P0001").await?;
    refuse(&world, "told", &format!("{RELEASE} AND NEW.last_error IS NOT NULL"), "22021").await?;
    let id = world.refresh(&[])?;
    let service = world.serve().await?;
    service.expect_errors();
    world.run_until(&id, LONG, |run| run.attempts > 2).await?;
    ensure!(world.number("SELECT last_value FROM told").await? > 1, "nothing was refused");
    ensure!(world.number("SELECT deaths::bigint FROM runs").await? == 0, "an end without its text is an end");
    ensure!(lines(&service, DROPPED)? == 0);

    refuse(&world, "release", RELEASE, "23514").await?;
    until("an end that is dropped", LONG, async || Ok((lines(&service, DROPPED)? > 0).then_some(()))).await?;
    let deaths = "SELECT deaths::bigint FROM runs";
    until("the death", LONG, async || Ok((world.number(deaths).await? > 0).then_some(()))).await?;
    world.sql("DROP TRIGGER completion ON runs; DROP TRIGGER told ON runs; DROP TRIGGER release ON runs").await?;
    world.published(&id, LONG).await?;
    world.finish(service).await
}

/// What has begun to end when the stop comes, or is cut short by it, waits no longer for Postgres than there is time.
#[tokio::test]
async fn a_postgres_that_hangs_cannot_keep_a_stop_from_giving_recorded_work_back() -> Result<()> {
    const GRACE: Duration = Duration::from_secs(4);
    let mut world = World::new(Behaviour::default()).await?;
    let wire = Wire::to(world.environment().database_url())?;
    world.set("database.url", wire.url()).set("shutdown.grace", "4s").set("queue.visibility_timeout", "60s");
    world.set("queue.wait_time", "1s");
    world.listings(1).await?;
    world.expect_work_left();
    let mut lock = world.database.begin().await?;
    sqlx::query("SELECT FROM listings WHERE listing_id = 1 FOR UPDATE").execute(&mut *lock).await?;
    world.put(Lane::Events, &event("stuck", UPSERT, TIME, listing(1, 7)).to_string()).await?;
    receive_once(&world, Lane::Events).await?;
    let service = world.serve().await?;
    let recorded = "SELECT count(*) FROM deliveries WHERE token IS NOT NULL";
    until("the record", SOON, async || Ok((world.number(recorded).await? == 1).then_some(()))).await?;
    wire.set(Flow::Stalled);
    service.signal(libc::SIGTERM);
    let signalled = Instant::now();
    let status = service.exit(LONG).await?;
    let took = signalled.elapsed();
    ensure!(status.code() == Some(0) && took <= GRACE, "{status} after {took:?}");
    service.check_log()?;
    let depth = world.depth(Lane::Events).await?;
    ensure!(depth == (1, 0), "given back at once, it is (visible, hidden) {depth:?}");
    ensure!(lines(&service, "Postgres did not take the ends of attempts; each counts as a death")? == 1);
    lock.rollback().await?;
    Ok(())
}

/// Calls hold turns that others wait for, also while the last commit of their own run does not come through.
#[tokio::test]
async fn a_cancelled_run_whose_commit_hangs_holds_no_turns() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 1_000, ..Behaviour::default() }).await?;
    world.set("partner.in_flight", 4).set("partner.rate_per_second", 0).set("database.statement_timeout", "2m");
    world.listings(200).await?;
    let service = world.serve().await?;
    let mut lock = world.database.begin().await?;
    sqlx::query("LOCK TABLE valuations IN EXCLUSIVE MODE").execute(&mut *lock).await?;
    let first = world.refresh(&["--id", "first"])?;
    until("a commit that waits", SOON, async || Ok((world.waiting_for_locks().await? > 0).then_some(()))).await?;
    // The command waits for the end, which is far off.
    let mut cancel = world.command().args(["cancel", &first]).spawn()?;
    // It hears of it within a second or so, and begins no call after that.
    let mut seen = (0, Instant::now());
    until("no more calls", SOON, async || {
        let requests = world.partner.stats().requests;
        if requests != seen.0 {
            seen = (requests, Instant::now());
        }
        Ok((seen.1.elapsed() > Duration::from_secs(3)).then_some(()))
    })
    .await?;
    ensure!(world.waiting_for_locks().await? > 0, "the commit came through");
    let second = world.refresh(&["--id", "second", "--limit", "8"])?;
    until("calls of the second run", SOON, async || Ok((world.partner.stats().requests > seen.0).then_some(())))
        .await?;
    ensure!(world.run(&first).await?.is_some_and(|run| run.owned), "the first run has ended");
    lock.rollback().await?;
    world.run_until(&first, LONG, |run| run.state == "cancelled").await?;
    ensure!(cancel.wait()?.success(), "the cancel failed");
    world.published(&second, LONG).await?;
    world.check_run(&second, &world.homes(8).await?).await?;
    world.finish(service).await
}
