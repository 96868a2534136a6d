//! Listings that come at the same time share a statement, and nothing else.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use local_stack::Behaviour;

use crate::bad_input::{UPSERT, event, listing};
use crate::harness::{LONG, Lane, SOON, World, until};

const TIME: &str = "2026-02-01T00:00:00Z";

#[tokio::test]
async fn what_waits_together_is_written_together_and_each_event_has_its_own_end() -> Result<()> {
    const LISTINGS: i64 = 300;
    let world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    world.sql("ALTER TABLE listings ADD CONSTRAINT thirteen CHECK (listing_id <> 13)").await?;
    let put = async |id: &str, home: i64, price: i64| {
        world.put(Lane::Events, &event(id, UPSERT, TIME, listing(home, price)).to_string()).await
    };
    for home in 1..=LISTINGS {
        put(&home.to_string(), home, 1_000 + home).await?;
        // Each tenth once more; each fiftieth as another event with the same id.
        if home % 10 == 0 {
            put(&home.to_string(), home, 1_000 + home).await?;
        }
        if home % 50 == 0 {
            put(&home.to_string(), home, 1).await?;
        }
    }
    let service = world.serve().await?;
    service.expect_errors();
    world.quiet(LONG).await?;
    ensure!(world.number("SELECT count(*) FROM listings").await? == LISTINGS - 1);
    ensure!(world.number("SELECT count(*) FROM listing_events").await? == LISTINGS - 1);
    // Of two events with one id either may be the first.
    let as_said = "SELECT count(*) FROM listings WHERE list_price_cents IN (1000 + listing_id, 1)";
    ensure!(world.number(as_said).await? == LISTINGS - 1);
    let ends = async |outcome: &str| {
        service.metric(&format!(r#"write_api_events_total{{kind="listing.upsert",outcome="{outcome}"}}"#)).await
    };
    // The one that Postgres does not take; and of each id the event that was not the first, which may be there twice.
    let refused = ends("dead_lettered").await?;
    ensure!((7.0..=13.0).contains(&refused), "{refused} were refused");
    let letters = world.dead_letters(Lane::Events).await?;
    ensure!(letters.len() == refused as usize, "{letters:?}");
    ensure!(letters.iter().filter(|letter| letter.code() == "invalid_data").count() == 1, "{letters:?}");
    // The transaction that wrote a row.
    let statements = world.number("SELECT count(DISTINCT xmin::text) FROM listings").await?;
    ensure!(statements < LISTINGS / 2, "{statements} statements for {LISTINGS} listings");
    world.finish(service).await
}

/// Those that share a statement with a listing that is locked wait for it, and do nothing else.
#[tokio::test]
async fn whoever_waits_for_a_statement_uses_no_processor() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.listings(100).await?;
    // Not the first, which comes when nothing is under way and is written alone.
    let mut locking = world.database.begin().await?;
    sqlx::query("SELECT FROM listings WHERE listing_id = 25 FOR UPDATE").execute(&mut *locking).await?;
    for home in 1..=50 {
        world.put(Lane::Events, &event(&home.to_string(), UPSERT, TIME, listing(home, 7)).to_string()).await?;
    }
    let service = world.serve().await?;
    let written = async || world.number("SELECT count(*) FROM listings WHERE list_price_cents = 7").await;
    // Nothing more is written: what is left shares the statement of the one that is locked.
    let mut before = written().await?;
    let left = until("what waits", SOON, async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = written().await?;
        Ok((now > 0 && std::mem::replace(&mut before, now) == now).then_some(50 - now))
    })
    .await?;
    ensure!(left >= 2, "only the one that is locked was left");
    let used = async || service.metric("process_cpu_seconds_total").await;
    let (used_before, begun) = (used().await?, Instant::now());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let share = (used().await? - used_before) / begun.elapsed().as_secs_f64();
    ensure!(share < 0.3, "{share} of a processor for waiting");
    locking.rollback().await?;
    until("all", SOON, async || Ok((written().await? == 50).then_some(()))).await?;
    world.quiet(SOON).await?;
    world.finish(service).await
}

#[tokio::test]
async fn a_listing_that_is_locked_does_not_keep_the_others_waiting() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.listings(100).await?;
    let service = world.serve().await?;
    let mut locking = world.database.begin().await?;
    sqlx::query("SELECT FROM listings WHERE listing_id = 1 FOR UPDATE").execute(&mut *locking).await?;
    let put = async |home: i64| {
        world.put(Lane::Events, &event(&home.to_string(), UPSERT, TIME, listing(home, 7)).to_string()).await
    };
    put(1).await?;
    until("a statement that waits for the lock", SOON, async || {
        let waiting =
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
        Ok((world.number(waiting).await? == 1).then_some(()))
    })
    .await?;
    for home in 2..=50 {
        put(home).await?;
    }
    let written = "SELECT count(*) FROM listings WHERE list_price_cents = 7";
    until("the others", SOON, async || Ok((world.number(written).await? == 49).then_some(()))).await?;
    locking.rollback().await?;
    until("the one that was locked", SOON, async || Ok((world.number(written).await? == 50).then_some(()))).await?;
    world.quiet(SOON).await?;
    world.finish(service).await
}
