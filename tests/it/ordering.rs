//! Older never over newer, and a run's set is what was there when it began.

use anyhow::{Result, ensure};
use local_stack::Behaviour;
use serde_json::json;

use crate::bad_input::{REFRESH, UPSERT, event, listing};
use crate::harness::{Home, LONG, Lane, SOON, World, until};

const NEW: &str = "2026-02-01T00:00:00Z";
const OLD: &str = "2026-01-01T00:00:00Z";

#[tokio::test]
async fn an_older_listing_does_not_replace_a_newer_one() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let service = world.serve().await?;
    // In the order of sending, one after another. Of the same time, the greater id wins: byte by byte, so that b > Z.
    let steps = [
        ("m", NEW, 200, 200),
        ("zz", OLD, 100, 200),
        ("m", NEW, 200, 200),
        ("b", NEW, 300, 200),
        ("n", NEW, 400, 400),
        ("Z", NEW, 500, 400),
        ("a", "2026-02-01T00:00:00.000001Z", 600, 600),
        // The same instant in another zone, and then a little later.
        ("A", "2026-02-01T02:00:00.000001+02:00", 700, 600),
        ("c", "2026-02-01T02:00:00.000001+02:00", 800, 800),
    ];
    let done = r#"write_api_events_total{kind="listing.upsert",outcome="done"}"#;
    for (number, (id, time, price, expected)) in steps.into_iter().enumerate() {
        world.put(Lane::Events, &event(id, UPSERT, time, listing(1, price)).to_string()).await?;
        until("the event", SOON, async || Ok((service.metric(done).await? == (number + 1) as f64).then_some(())))
            .await?;
        let found = world.number("SELECT list_price_cents FROM listings WHERE listing_id = 1").await?;
        ensure!(found == expected, "after {id} of {time} the price is {found}, not {expected}");
    }
    world.quiet(SOON).await?;
    world.finish(service).await
}

#[tokio::test]
async fn many_versions_at_once_leave_the_newest() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let service = world.serve().await?;
    let mut versions: Vec<(i64, i64)> = (1..=5).flat_map(|home| (0..20).map(move |version| (home, version))).collect();
    fastrand::Rng::with_seed(7).shuffle(&mut versions);
    for (home, version) in versions {
        let time = format!("2026-01-31T02:00:{version:02}Z");
        let id = format!("{home}-{version}");
        world.put(Lane::Events, &event(&id, UPSERT, &time, listing(home, 1_000 + version)).to_string()).await?;
    }
    world.quiet(LONG).await?;
    ensure!(world.number("SELECT count(*) FROM listings WHERE list_price_cents = 1019").await? == 5);
    ensure!(world.number("SELECT count(*) FROM listings").await? == 5);
    world.finish(service).await
}

#[tokio::test]
async fn an_older_refresh_does_not_replace_the_valuations_of_a_newer_one() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.listings(300).await?;
    let service = world.serve().await?;
    let everything = json!({"zip_codes": null, "limit": null});
    let run = async |id: &str, time: &str| {
        world.put(Lane::Events, &event(id, REFRESH, time, everything.clone()).to_string()).await?;
        world.published(id, LONG).await
    };
    run("newer", NEW).await?;
    let of_newer = world.homes(300).await?;
    // Another price makes another valuation.
    world.sql("UPDATE listings SET list_price_cents = list_price_cents * 2").await?;
    let late = run("older", OLD).await?;
    ensure!(late.valued == 300, "an old run is worked on all the same: {late:?}");
    run("new", NEW).await?;
    ensure!(world.number("SELECT count(*) FROM listing_valuations WHERE run_id = 'newer'").await? == 300);
    world.check_run("newer", &of_newer).await?;
    run("newest", NEW).await?;
    world.check_run("newest", &world.homes(300).await?).await?;
    ensure!(world.number("SELECT count(*) FROM valuations").await? == 1_200);
    world.quiet(SOON).await?;
    world.finish(service).await
}

#[tokio::test]
async fn what_appears_during_a_run_is_not_part_of_it() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 100, ..Behaviour::default() }).await?;
    world.set("partner.in_flight", 20).set("refresh.page_size", 50);
    world.listings_between(1, 200).await?;
    world.listings_between(401, 600).await?;
    let before = world.homes(600).await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    let limited = world.refresh(&["--limit", "250"])?;
    for id in [&id, &limited] {
        world.run_until(id, SOON, |run| run.valued > 0).await?;
    }
    // In the middle of the set, and beyond its end.
    world.listings_between(201, 400).await?;
    world.listings_between(601, 700).await?;
    for id in [&id, &limited] {
        let open = world.run(id).await?;
        ensure!(open.as_ref().is_some_and(|run| run.state == "running"), "too late: {open:?}");
    }
    for id in [&id, &limited] {
        world.published(id, LONG).await?;
    }
    let valued = async |id: &str| -> Result<Vec<Home>> {
        let valued = "SELECT listing_id, zip_code, list_price_cents FROM valuations WHERE run_id = $1 ORDER BY 1";
        Ok(sqlx::query_as(valued).bind(id.to_owned()).fetch_all(&world.database).await?)
    };
    ensure!(valued(&id).await? == before);
    ensure!(valued(&limited).await? == before[..250]);
    world.quiet(SOON).await?;
    world.finish(service).await
}

/// Listings move from one zip code to another. A run has those that matched when it was opened, wherever they are now.
#[tokio::test]
async fn a_listing_that_moves_stays_in_the_set_that_it_was_in() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 100, ..Behaviour::default() }).await?;
    world.set("partner.in_flight", 5).set("refresh.page_size", 10);
    world.listings(400).await?;
    let matching = "SELECT listing_id FROM listings WHERE zip_code IN (98003, 98007) ORDER BY 1 LIMIT 60";
    let before: Vec<i64> = sqlx::query_scalar(matching).fetch_all(&world.database).await?;
    let service = world.serve().await?;
    let id = world.refresh(&["--zip-code", "98003", "--zip-code", "98007", "--limit", "60"])?;
    world.run_until(&id, SOON, |run| run.valued > 0).await?;
    // Some leave, and others come in their place; none of them was read yet.
    world.sql("UPDATE listings SET zip_code = 98001 WHERE zip_code = 98003 AND listing_id > 200").await?;
    world.sql("UPDATE listings SET zip_code = 98007 WHERE zip_code = 98004 AND listing_id > 200").await?;
    let open = world.run(&id).await?;
    ensure!(open.as_ref().is_some_and(|run| run.state == "running" && run.cursor < 200), "too late: {open:?}");
    let run = world.published(&id, LONG).await?;
    ensure!((run.selected, run.valued) == (60, 60), "{run:?}");
    let valued = "SELECT listing_id FROM valuations ORDER BY 1";
    let valued: Vec<i64> = sqlx::query_scalar(valued).fetch_all(&world.database).await?;
    ensure!(valued == before, "{valued:?}\ninstead of\n{before:?}");
    world.quiet(SOON).await?;
    world.finish(service).await
}
