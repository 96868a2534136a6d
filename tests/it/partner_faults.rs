//! A partner that answers badly, or not at all.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Result, ensure};
use local_stack::Behaviour;
use local_stack::partner::{RequiredHeader, RetryAfter};

use crate::harness::{LONG, SOON, World, until};
use crate::neighbours::missing;

#[tokio::test]
async fn faults_that_pass_fail_no_listing() -> Result<()> {
    let errors = BTreeMap::from([(429, 0.03), (500, 0.03), (503, 0.03), (408, 0.02)]);
    let mut world = World::new(Behaviour {
        latency_ms: 10,
        errors,
        garbage_ratio: 0.03,
        drop_ratio: 0.03,
        hang_ratio: 0.005,
        retry_after: RetryAfter::None,
        ..Behaviour::default()
    })
    .await?;
    world.set("partner.rate_per_second", 0).set("partner.in_flight", 100).set("partner.request_timeout", "1s");
    world.set("partner.max_attempts", 30).set("partner.retry_base", "10ms").set("partner.retry_cap", "100ms");
    world.listings(1_000).await?;
    let tap = world.environment().tap()?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.published(&id, LONG).await?;
    let homes = world.homes(1_000).await?;
    world.check_run(&id, &homes).await?;
    world.check_records(&tap, &id, &homes).await?;
    let stats = world.partner.stats();
    ensure!((stats.effects, stats.distinct_keys) == (1_000, 1_000), "{stats:?}");
    for status in [429, 500, 503, 408] {
        ensure!(stats.by_status.contains_key(&status), "{status} never came: {stats:?}");
    }
    ensure!(stats.garbage > 0 && stats.dropped > 0 && stats.hung > 0, "{stats:?}");
    ensure!(service.metric(r#"write_api_partner_requests_total{status="429"}"#).await? == stats.by_status[&429] as f64);
    world.quiet(SOON).await?;
    world.finish(service).await
}

#[tokio::test]
async fn a_refusal_is_the_listings_own_and_is_not_published() -> Result<()> {
    let forced = BTreeMap::from([(3, 422), (50, 404), (77, 400), (100, 410), (60, 500)]);
    let mut world = World::new(Behaviour { forced: forced.clone(), ..Behaviour::default() }).await?;
    world.set("partner.rate_per_second", 0).set("partner.max_attempts", 3);
    world.set("partner.retry_base", "10ms").set("partner.retry_cap", "100ms");
    world.listings(100).await?;
    let tap = world.environment().tap()?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    let run = world.published(&id, LONG).await?;
    ensure!((run.selected, run.valued, run.failed) == (100, 95, 5), "{run:?}");
    let failures: Vec<(i64, String)> =
        sqlx::query_as("SELECT listing_id, failure FROM valuations WHERE failure IS NOT NULL ORDER BY listing_id")
            .fetch_all(&world.database)
            .await?;
    ensure!(failures.len() == 5, "{failures:?}");
    for (listing_id, failure) in failures {
        let status = forced[&listing_id];
        ensure!(failure.starts_with(&format!("partner answered {status}")), "{listing_id}: {failure}");
        ensure!((status == 500) == failure.contains("tries: 3"), "{listing_id}: {failure}");
    }
    let mut published = world.homes(100).await?;
    published.retain(|home| !forced.contains_key(&home.listing_id));
    world.check_records(&tap, &id, &published).await?;
    ensure!(tap.count() == 95);
    ensure!(world.number("SELECT count(*) FROM listing_valuations").await? == 95);
    let stats = world.partner.stats();
    // One call for each, and two more for the one that was worth another try.
    ensure!(stats.requests == 102, "{stats:?}");
    world.quiet(SOON).await?;
    world.finish(service).await
}

#[tokio::test]
async fn a_refused_credential_stops_the_calls_and_a_new_one_lets_them_go_on() -> Result<()> {
    const LISTINGS: i64 = 600;
    let header = |value: &str| Some(RequiredHeader { name: "x-api-key".to_owned(), value: value.to_owned() });
    let behaviour = Behaviour { latency_ms: 50, required_header: header("first-secret"), ..Behaviour::default() };
    let mut world = World::new(behaviour).await?;
    let file = world.path("credential");
    fs::write(&file, "first-secret\n")?;
    world.set("partner.credential_header", "X-Api-Key").set("partner.credential_file", file.display());
    world.set("partner.rate_per_second", 0).set("partner.in_flight", 20).set("refresh.page_size", 100);
    world.listings(LISTINGS).await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 100).await?;

    // The partner takes another one from now on.
    world.partner.control(|behaviour| behaviour.required_header = header("second-secret"))?;
    let open = async || service.metric("write_api_partner_breaker_open").await;
    until("an open breaker", SOON, async || Ok((open().await? == 1.0).then_some(()))).await?;
    let waiting = world.run_until(&id, SOON, |run| run.owned && run.leased).await?;
    ensure!(waiting.state == "running" && waiting.failed == 0, "{waiting:?}");
    // It waits for longer than a lease, and keeps it.
    let calls = world.partner.stats().requests;
    until("a few probes", SOON, async || Ok((world.partner.stats().requests >= calls + 3).then_some(()))).await?;
    ensure!(world.partner.stats().requests <= calls + 40, "the partner is asked on and on");
    let log = service.log()?;
    ensure!(log.contains("401") && log.contains("partner.credential_file"), "nobody is told: {log}");

    fs::write(&file, "second-secret\n")?;
    let run = world.published(&id, LONG).await?;
    ensure!(run.attempts == 1 && open().await? == 0.0, "{run:?}");
    world.check_run(&id, &world.homes(LISTINGS).await?).await?;
    let stats = world.partner.stats();
    ensure!(stats.effects == LISTINGS as u64, "{stats:?}");
    let log = service.log()?;
    ensure!(!log.contains("first-secret") && !log.contains("second-secret"), "a credential is in the log");
    service.expect_errors();
    world.quiet(SOON).await?;
    world.finish(service).await
}

#[tokio::test]
async fn a_pause_that_the_partner_asks_for_is_kept_by_all_calls() -> Result<()> {
    let behaviour =
        Behaviour { latency_ms: 20, rate_cap: 100, retry_after: RetryAfter::Seconds(2), ..Behaviour::default() };
    let mut world = World::new(behaviour).await?;
    // The service is told a wrong limit, so that the partner has to defend itself.
    world.set("partner.rate_per_second", 200).set("partner.in_flight", 20);
    world.set("partner.max_attempts", 30).set("partner.total_timeout", "10m");
    world.listings(300).await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.published(&id, LONG).await?;
    world.check_run(&id, &world.homes(300).await?).await?;
    let stats = world.partner.stats();
    // A refusal reaches those in flight; without a common pause each listing would be refused again and again.
    let refused = stats.by_status.get(&429).copied().unwrap_or(0);
    ensure!(refused > 0 && refused <= 3 * 20 + 20, "{stats:?}");
    ensure!(stats.effects == 300, "{stats:?}");
    let log = service.log()?;
    ensure!(log.contains("asked for a pause"), "{log}");
    world.finish(service).await
}

#[tokio::test]
async fn a_partner_that_is_away_is_waited_for() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 20, ..Behaviour::default() }).await?;
    let wire = local_stack::wire::Wire::to(&world.partner.url())?;
    world.set("partner.base_url", wire.url()).set("partner.rate_per_second", 0).set("partner.in_flight", 20);
    world.set("partner.max_attempts", 2).set("refresh.page_size", 100);
    world.listings(1_000).await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 100).await?;
    wire.set(local_stack::wire::Flow::Cut);
    let open = async || service.metric("write_api_partner_breaker_open").await;
    until("an open breaker", SOON, async || Ok((open().await? == 1.0).then_some(()))).await?;
    until("readiness to name it", SOON, async || Ok((missing(&service).await? == ["partner"]).then_some(()))).await?;
    wire.set(local_stack::wire::Flow::Open);
    let run = world.published(&id, LONG).await?;
    // At most those that were out when the partner went away may have used up their two tries.
    ensure!(run.valued + run.failed == 1_000 && run.failed <= 20, "{run:?}");
    ensure!(run.attempts == 1, "{run:?}");
    service.expect_errors();
    world.quiet(SOON).await?;
    world.finish(service).await
}
