//! What ended long ago is removed; nothing else is.

use anyhow::{Result, ensure};
use local_stack::Behaviour;

use crate::harness::{LONG, SOON, World, text, until};

/// Runs `id` and all that belongs to them ended 31 days ago.
async fn age(world: &World, like: &str) -> Result<()> {
    world
        .sql(&format!(
            "UPDATE runs SET opened_at = opened_at - interval '31 days', completed_at = completed_at - interval '31 days',
                 progressed_at = progressed_at - interval '31 days', begun_at = begun_at - interval '31 days',
                 cancelled_at = cancelled_at - interval '31 days' WHERE run_id LIKE '{like}';
             UPDATE publications SET opened_at = opened_at - interval '31 days',
                 completed_at = completed_at - interval '31 days' WHERE run_id LIKE '{like}';
             UPDATE outbox SET sent_at = sent_at - interval '31 days' WHERE body LIKE '%{like}%'"
        ))
        .await
}

/// Cancelled runs that ended 31 days ago, with `rows` valuations each.
async fn old_runs(world: &World, runs: i64, rows: i64) -> Result<()> {
    let statements = format!(
        "INSERT INTO runs (run_id, digest, event_source, event_time, state, last_listing_id, selected, valued, event_data,
                           cancel_requested_at, cancelled_at)
         SELECT 'old-' || n, '', '/test', now(), 'cancelled', 1000000, 1000000, {rows}, '{{}}',
                now() - interval '31 days', now() - interval '31 days' + n * interval '1 s'
         FROM generate_series(1, {runs}) AS n;
         INSERT INTO valuations (run_id, listing_id, zip_code, list_price_cents, valuation_cents, confidence)
         SELECT 'old-' || n, id, 98000, 1, 1, 1 FROM generate_series(1, {runs}) AS n, generate_series(1, {rows}) AS id;
         INSERT INTO run_listings SELECT run_id, listing_id FROM valuations WHERE run_id LIKE 'old-%' AND listing_id <= 10;
         ANALYZE"
    );
    world.sql(&statements).await
}

async fn count(world: &World, table: &str, condition: &str) -> Result<i64> {
    world.number(&format!("SELECT count(*) FROM {table} WHERE {condition}")).await
}

#[tokio::test]
async fn old_runs_go_with_all_that_is_theirs_and_younger_ones_stay() -> Result<()> {
    const LISTINGS: i64 = 2_500;
    let mut world = World::new(Behaviour::default()).await?;
    world.set("partner.rate_per_second", 0);
    world.listings(LISTINGS).await?;
    let first = world.serve().await?;
    let mut ids = Vec::new();
    for id in ["run-old", "run-unpublished", "run-republished", "run-young"] {
        let codes: Vec<String> = (98_000..98_010).map(|code| code.to_string()).collect();
        let codes = codes.iter().flat_map(|code| ["--zip-code", code]);
        world.refresh(&["--id", id].into_iter().chain(codes).collect::<Vec<_>>())?;
        world.published(id, LONG).await?;
        ids.push(id);
    }
    world.quiet(LONG).await?;
    world.finish(first).await?;
    for id in &ids[..3] {
        age(&world, id).await?;
    }
    world
        .sql(
            "UPDATE publications SET state = 'running', completed_at = NULL WHERE run_id = 'run-unpublished';
             INSERT INTO publications (event_id, digest, run_id, state, completed_at, opened_at)
             VALUES ('by hand', '', 'run-republished', 'complete', now(), now());
             INSERT INTO quarantined_records (run_id, listing_id, event_id, code, reason)
             VALUES ('run-old', 1, 'x', 'x', 'x'), ('run-young', 1, 'x', 'x', 'x')",
        )
        .await?;
    world.expect_work_left();
    ensure!(count(&world, "valuations", "run_id = 'run-old'").await? == LISTINGS);

    let second = world.serve().await?;
    until("the old run to be gone", SOON, async || {
        Ok((count(&world, "runs", "run_id = 'run-old'").await? == 0).then_some(()))
    })
    .await?;
    until("the line about it", SOON, async || Ok(second.log()?.contains("old rows were removed").then_some(())))
        .await?;
    for table in ["valuations", "run_listings", "publications", "quarantined_records"] {
        ensure!(count(&world, table, "run_id = 'run-old'").await? == 0, "{table} has rows of it");
    }
    for id in &ids[1..] {
        let left = (
            count(&world, "runs", &format!("run_id = '{id}' AND pruned_since IS NULL")).await?,
            count(&world, "valuations", &format!("run_id = '{id}'")).await?,
            count(&world, "run_listings", &format!("run_id = '{id}'")).await?,
        );
        ensure!(left == (1, LISTINGS, LISTINGS), "{id}: {left:?}");
    }
    ensure!(count(&world, "quarantined_records", "run_id = 'run-young'").await? == 1);
    ensure!(count(&world, "listing_valuations", "true").await? == LISTINGS, "current values are gone");
    // Sent events are old by themselves, whatever became of their runs.
    ensure!(count(&world, "outbox", "true").await? == 1, "{}", count(&world, "outbox", "true").await?);
    for (table, rows) in [("valuations", LISTINGS), ("run_listings", LISTINGS), ("runs", 1), ("outbox", 3)] {
        let counted = second.metric(&format!("write_api_pruned_rows_total{{table=\"{table}\"}}")).await?;
        ensure!(counted == rows as f64, "{counted} rows of {table} were counted");
    }
    ensure!(second.page("/livez").await?.1.contains("\"retention\""), "{}", second.page("/livez").await?.1);
    world.finish(second).await
}

#[tokio::test]
async fn a_removal_that_is_killed_goes_on_and_its_run_stays_closed() -> Result<()> {
    const ROWS: i64 = 30_000;
    let world = World::new(Behaviour::default()).await?;
    old_runs(&world, 1, ROWS).await?;
    let first = world.serve().await?;
    until("the middle", SOON, async || {
        let left = count(&world, "valuations", "true").await?;
        ensure!(left > 0, "met too late");
        Ok((left < ROWS).then_some(()))
    })
    .await?;
    first.kill().await?;
    let left = count(&world, "valuations", "true").await?;
    ensure!(left > 0 && left < ROWS && left % 1_000 == 0, "{left} rows are left");
    let retried = world.cli(&["retry", "old-1"])?;
    ensure!(retried.status.code() == Some(1), "half of a run was opened again: {retried:?}");
    ensure!(text(&retried.stderr).contains("is being removed"), "{}", text(&retried.stderr));
    ensure!(world.done(&["status", "old-1"])?.contains("it is being removed"));

    let second = world.serve().await?;
    until("its end", SOON, async || Ok((count(&world, "runs", "true").await? == 0).then_some(()))).await?;
    for table in ["valuations", "run_listings"] {
        ensure!(count(&world, table, "true").await? == 0, "{table} has rows without a run");
    }
    world.finish(second).await
}

#[tokio::test]
async fn two_services_remove_every_row_once() -> Result<()> {
    const RUNS: i64 = 60;
    const ROWS: i64 = 1_500;
    let world = World::for_services(2, Behaviour::default()).await?;
    old_runs(&world, RUNS, ROWS).await?;
    let services = [world.start()?, world.start()?];
    for service in &services {
        service.ready().await?;
    }
    until("their end", LONG, async || Ok((count(&world, "runs", "true").await? == 0).then_some(()))).await?;
    for (table, rows) in [("valuations", RUNS * ROWS), ("run_listings", RUNS * 10), ("runs", RUNS)] {
        let mut counted = Vec::new();
        for service in &services {
            counted.push(service.metric(&format!("write_api_pruned_rows_total{{table=\"{table}\"}}")).await?);
        }
        println!("{table}: {counted:?}");
        ensure!(counted.iter().sum::<f64>() == rows as f64, "{rows} rows of {table} were counted as {counted:?}");
    }
    for table in ["valuations", "run_listings"] {
        ensure!(count(&world, table, "true").await? == 0, "{table} has rows without a run");
    }
    for service in services {
        world.finish(service).await?;
    }
    Ok(())
}

/// With many rows, none of the statements of a round that finds little reads a table from end to end.
#[tokio::test]
async fn every_statement_goes_along_an_index() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    old_runs(&world, 20_000, 5).await?;
    world
        .sql(
            "INSERT INTO outbox (event_id, lane, body, sent_at)
             SELECT gen_random_uuid(), 'x', 'x', now() - n * interval '1 s' FROM generate_series(1, 20000) AS n;
             INSERT INTO publications (event_id, digest, run_id, state, completed_at)
             SELECT run_id, '', run_id, 'complete', now() FROM runs;
             INSERT INTO quarantined_records (run_id, listing_id, event_id, code, reason)
             SELECT run_id, 1, 'x', 'x', 'x' FROM runs;
             UPDATE runs SET cancelled_at = now() WHERE run_id <> 'old-1';
             UPDATE publications SET completed_at = now() - interval '31 days' WHERE run_id = 'old-1';
             ANALYZE",
        )
        .await?;
    // What the connections of this test have read so far must be in the figures before they are compared.
    world.database.close().await;
    let world = world.with_new_connections()?;
    let scans = "SELECT coalesce(sum(seq_scan), 0)::bigint FROM pg_stat_user_tables
                 WHERE relname IN ('runs', 'valuations', 'run_listings', 'quarantined_records', 'publications', 'outbox')";
    let before = world.number(scans).await?;
    let service = world.serve().await?;
    let removed = r#"write_api_pruned_rows_total{table="runs"}"#;
    until("the old run to be gone", SOON, async || Ok((service.metric(removed).await? == 1.0).then_some(()))).await?;
    // Its connections tell their figures at the latest when they are closed.
    service.finish().await?;
    let after = world.number(scans).await?;
    ensure!(after == before, "{} scans from end to end", after - before);
    Ok(())
}
