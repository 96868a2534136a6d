//! Listings that come at the same time share a statement, and nothing else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use local_stack::Behaviour;
use serde_json::Value;
use time::OffsetDateTime;
use write_api::config::Config;
use write_api::db::Database;
use write_api::db::upserts::{ListingEvent, Upsert};

use crate::bad_input::{UPSERT, event, listing};
use crate::harness::{DeadLetter, LONG, Lane, SOON, World, until};

const TIME: &str = "2026-02-01T00:00:00Z";
const LATER: &str = "2026-02-02T00:00:00Z";

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
    let of = |letter: &DeadLetter| -> Result<i64> {
        let event: Value = serde_json::from_str(&letter.body)?;
        Ok(event["id"].as_str().context("no id")?.parse()?)
    };
    for letter in &letters {
        let (home, code) = (of(letter)?, letter.code());
        ensure!(
            if home == 13 { code == "invalid_data" } else { home % 50 == 0 && code != "invalid_data" },
            "{letter:?}"
        );
    }
    ensure!(letters.iter().filter(|letter| letter.code() == "invalid_data").count() == 1, "{letters:?}");
    // The transaction that wrote a row.
    let statements = world.number("SELECT count(DISTINCT xmin::text) FROM listings").await?;
    ensure!(statements < LISTINGS / 2, "{statements} statements for {LISTINGS} listings");
    world.finish(service).await
}

/// Those that share a statement with a listing that is locked wait for half a second, and use no processor.
#[tokio::test]
async fn what_shares_a_statement_with_a_locked_listing_is_written_without_it() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.listings(100).await?;
    let mut locking = world.database.begin().await?;
    sqlx::query("SELECT FROM listings WHERE listing_id IN (12, 25, 37) FOR UPDATE").execute(&mut *locking).await?;
    for home in 1..=50 {
        world.put(Lane::Events, &event(&home.to_string(), UPSERT, TIME, listing(home, 7)).to_string()).await?;
    }
    // Another event of one that is locked, among others.
    world.put(Lane::Events, &event("again", UPSERT, LATER, listing(25, 8)).to_string()).await?;
    let service = world.serve().await?;
    let written = async || world.number("SELECT count(*) FROM listings WHERE list_price_cents = 7").await;
    until("the others", SOON, async || Ok((written().await? == 47).then_some(()))).await?;
    let used = async || service.metric("process_cpu_seconds_total").await;
    let (used_before, begun) = (used().await?, Instant::now());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let share = (used().await? - used_before) / begun.elapsed().as_secs_f64();
    ensure!(share < 0.3, "{share} of a processor for waiting");
    locking.rollback().await?;
    until("all", SOON, async || {
        let later =
            world.number("SELECT count(*) FROM listings WHERE listing_id = 25 AND list_price_cents = 8").await?;
        Ok((written().await? == 49 && later == 1).then_some(()))
    })
    .await?;
    world.quiet(SOON).await?;
    world.finish(service).await
}

/// The answers of a statement are in the order of its events, whatever came of each.
#[tokio::test]
async fn each_event_of_a_statement_has_its_own_answer() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let config = Config::load(
        None,
        world.environment().variables().map(|(name, value)| (name.to_owned(), value.to_owned())),
        &[],
    )
    .map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    let database = Database::new(&config.database)?;
    let said = |id: &str, home: i64, digest: u8, at: i64| -> Result<Arc<ListingEvent>> {
        let listing = serde_json::from_value(listing(home, 100 + home))?;
        let event_time = OffsetDateTime::from_unix_timestamp(at)?;
        Ok(Arc::new(ListingEvent { listing, event_time, event_id: id.to_owned(), digest: [digest; 32], size: 1 }))
    };
    for before in [said("m", 5, 1, 10)?, said("k", 9, 3, 10)?, said("l", 8, 2, 10)?] {
        ensure!(database.upsert_listing(&before).await? == Upsert::Written);
    }
    // In the order of neither the ids nor the listings.
    let together = [
        (said("z", 1, 1, 10)?, Upsert::Written),
        (said("b", 9, 1, 5)?, Upsert::Older),
        (said("m", 5, 1, 10)?, Upsert::Repeated),
        (said("a", 2, 1, 10)?, Upsert::Written),
        (said("k", 7, 1, 10)?, Upsert::OtherEvent),
        (said("l", 8, 2, 10)?, Upsert::Repeated),
    ];
    let events: Vec<_> = together.iter().map(|(event, _)| Arc::clone(event)).collect();
    let expected: Vec<Upsert> = together.iter().map(|(_, upsert)| *upsert).collect();
    let answers = database.upsert_listings(&events).await?;
    ensure!(answers == expected, "{answers:?} for {expected:?}");

    // One that waits for another with its id finds what that one wrote, which is younger than what its statement sees.
    let mut other = world.database.begin().await?;
    let insert = "INSERT INTO listing_events (event_id, digest) VALUES ('young', decode(repeat('03', 32), 'hex'))";
    sqlx::query(insert).execute(&mut *other).await?;
    let waiting = tokio::spawn({
        let (database, event) = (database.clone(), said("young", 11, 3, 10)?);
        async move { database.upsert_listing(&event).await }
    });
    waits_for_a_lock(&world).await?;
    other.commit().await?;
    ensure!(waiting.await?? == Upsert::Repeated);
    Ok(())
}

async fn waits_for_a_lock(world: &World) -> Result<()> {
    until("a statement that waits for a lock", SOON, async || {
        let waiting =
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
        Ok((world.number(waiting).await? == 1).then_some(()))
    })
    .await
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
    waits_for_a_lock(&world).await?;
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
