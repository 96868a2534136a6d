//! The job that the service exists for: 17,000 listings, a call each, and all that follows from it.

use anyhow::{Result, ensure};
use local_stack::Behaviour;

use crate::harness::{LONG, World};

#[tokio::test]
async fn seventeen_thousand_listings_are_valued_and_published() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 30, ..Behaviour::default() }).await?;
    world.set("partner.rate_per_second", 4_000);
    world.done(&["seed"])?;
    ensure!(world.number("SELECT count(*) FROM listings").await? == 21_436);
    let known = "SELECT list_price_cents FROM listings WHERE listing_id = 7129300520 AND zip_code = 98178";
    ensure!(world.number(known).await? == 22_190_000);
    let tap = world.environment().tap()?;

    let service = world.serve().await?;
    let id = world.refresh(&["--limit", "17000"])?;
    world.published(&id, LONG).await?;

    let homes = world.homes(17_000).await?;
    world.check_run(&id, &homes).await?;
    world.check_records(&tap, &id, &homes).await?;
    ensure!(tap.count() == 17_000, "{} records: none is sent twice when nothing goes wrong", tap.count());
    ensure!(world.number("SELECT count(*) FROM valuations").await? == 17_000);
    let stats = world.partner.stats();
    ensure!((stats.requests, stats.distinct_keys, stats.effects) == (17_000, 17_000, 17_000), "{stats:?}");
    ensure!(stats.max_in_flight <= 1_000, "{stats:?}");
    world.quiet(LONG).await?;
    world.finish(service).await
}

#[tokio::test]
async fn the_partner_is_never_asked_faster_than_agreed() -> Result<()> {
    // What the partner counts are arrivals. The service promises its writes, which a busy machine may hand over late and
    // so closer together: 50 ms of that are forgiven.
    const MOST: u32 = 1_050;
    let mut world = World::new(Behaviour { latency_ms: 40, rate_cap: MOST, ..Behaviour::default() }).await?;
    world.set("partner.rate_per_second", 1_000);
    world.listings(3_500).await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.published(&id, LONG).await?;
    world.check_run(&id, &world.homes(3_500).await?).await?;
    let stats = world.partner.stats();
    ensure!(!stats.by_status.contains_key(&429) && stats.requests == 3_500, "{stats:?}");
    ensure!(stats.max_in_one_second <= u64::from(MOST), "{stats:?}");
    world.finish(service).await
}
