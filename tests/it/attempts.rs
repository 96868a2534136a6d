//! Attempts count work that was begun: what kills its process is quarantined, and nothing else is charged for it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use local_stack::Behaviour;
use serde_json::{Value, json};

use crate::bad_input::{REFRESH, UPSERT, event, listing};
use crate::harness::{LONG, Lane, SOON, Service, World, until};

const TIME: &str = "2026-01-31T02:00:00Z";

/// The log lines of events, by id, that ended like this.
fn ended(service: &Service, message: &str, event_id: &str) -> Result<Vec<Value>> {
    let mut found = Vec::new();
    for line in service.log()?.lines() {
        let entry: Value = serde_json::from_str(line).context("not JSON")?;
        if entry["message"] == message && entry["event_id"] == event_id {
            found.push(entry);
        }
    }
    Ok(found)
}

async fn upserted(world: &World, listing_id: i64) -> Result<bool> {
    Ok(world.number(&format!("SELECT count(*) FROM listings WHERE listing_id = {listing_id}")).await? == 1)
}

fn upsert(id: &str, listing_id: i64) -> String {
    event(id, UPSERT, TIME, listing(listing_id, 100)).to_string()
}

#[tokio::test]
async fn a_run_on_which_three_processes_die_is_quarantined_and_its_neighbours_are_done() -> Result<()> {
    const NEIGHBOURS: i64 = 200;
    // The first listing is asked about again and again, and the run that it belongs to never gets on.
    let forced = [(1, 409)].into();
    let mut world = World::new(Behaviour { latency_ms: 500, forced, ..Behaviour::default() }).await?;
    world.set("partner.in_flight", 10).set("partner.retry_base", "1m").set("partner.retry_cap", "5m");
    world.set("partner.total_timeout", "1h");
    world.listings_between(1, 1).await?;
    world.sql("UPDATE listings SET zip_code = 10001").await?;
    world.listings_between(2, NEIGHBOURS + 1).await?;
    let poison = event("poison", REFRESH, TIME, json!({"zip_codes": [10001], "limit": null})).to_string();
    let zip_codes: Vec<i32> = (98_000..98_010).collect();
    let neighbour = event("neighbour", REFRESH, TIME, json!({"zip_codes": zip_codes, "limit": null})).to_string();

    for death in 0..3 {
        let service = world.serve().await?;
        if death == 0 {
            world.put(Lane::Valuations, &neighbour).await?;
            world.run_until("neighbour", SOON, |run| run.valued > 0).await?;
            world.put(Lane::Valuations, &poison).await?;
        }
        world.run_until("poison", LONG, |run| run.owned && run.attempts == death + 1).await?;
        let deaths = "SELECT deaths::bigint FROM runs WHERE run_id = 'poison'";
        ensure!(world.number(deaths).await? == i64::from(death));
        let fast = 1_000 + i64::from(death);
        world.put(Lane::Events, &upsert(&format!("fast-{death}"), fast)).await?;
        if death < 2 {
            until("an upsert beside it", SOON, async || Ok(upserted(&world, fast).await?.then_some(()))).await?;
            until("its end", SOON, async || Ok((world.depth(Lane::Events).await? == (0, 0)).then_some(()))).await?;
        } else {
            // It is alone: what is received is kept and not begun.
            until("an upsert in hand", SOON, async || Ok((world.depth(Lane::Events).await? == (0, 1)).then_some(())))
                .await?;
            ensure!(!upserted(&world, fast).await?, "an event was begun beside a suspect");
        }
        service.kill().await?;
    }

    let service = world.serve().await?;
    let letters = world.wait_for_dead_letters(Lane::Valuations, 1).await?;
    ensure!(letters.len() == 1 && letters[0].body == poison && letters[0].code() == "quarantined", "{letters:?}");
    ensure!(letters[0].reason.contains("begun 3 times in a row") && letters[0].reason.contains(" began at 20"));
    let run = world.run("poison").await?.context("no run")?;
    ensure!((run.state.as_str(), run.attempts, run.valued, run.owned) == ("failed", 3, 0, false), "{run:?}");
    ensure!(run.last_error.is_some_and(|error| error.contains("3 attempts in a row died")));
    ensure!(world.done(&["status", "poison"])?.contains("write-api retry"));

    // The neighbours: done, and nothing to their names.
    world.published("neighbour", LONG).await?;
    for fast in 0..3 {
        until("the upserts", SOON, async || Ok(upserted(&world, 1_000 + fast).await?.then_some(()))).await?;
    }
    ensure!(ended(&service, "event done", "fast-2")?[0]["attempt"] == 2, "it was in the hands of the one that died");
    ensure!(world.number("SELECT deaths::bigint FROM runs WHERE run_id = 'neighbour'").await? == 0);
    world.quiet(LONG).await?;
    ensure!(world.number("SELECT count(*) FROM deliveries").await? == 0, "what has ended is forgotten");
    ensure!(
        world.dead_letters(Lane::Events).await?.is_empty() && world.dead_letters(Lane::Valuations).await?.is_empty()
    );

    // Delivered again it is refused again, until an operator lets it go on.
    let calls = world.partner.stats().requests;
    world.put(Lane::Valuations, &poison).await?;
    let letters = world.wait_for_dead_letters(Lane::Valuations, 1).await?;
    ensure!(letters[0].body == poison && letters[0].code() == "quarantined", "{letters:?}");
    ensure!(world.partner.stats().requests == calls);
    world.partner.control(|behaviour| behaviour.forced.clear())?;
    world.done(&["retry", "poison"])?;
    let run = world.published("poison", LONG).await?;
    ensure!((run.valued, run.attempts) == (1, 4), "{run:?}");
    ensure!(world.number("SELECT deaths::bigint FROM runs WHERE run_id = 'poison'").await? == 0);
    world.finish(service).await
}

#[tokio::test]
async fn an_upsert_on_which_processes_die_is_quarantined_and_its_neighbours_are_done() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.listings_between(1, 1).await?;
    let mut lock = world.database.begin().await?;
    sqlx::query("SELECT FROM listings WHERE listing_id = 1 FOR UPDATE").execute(&mut *lock).await?;
    let poison = event("poison", UPSERT, TIME, listing(1, 7)).to_string();
    // The first delivery of a fast event is not recorded, so its death is not seen.
    for death in 0..4 {
        let service = world.serve().await?;
        let neighbour = 100 + death;
        if death == 0 {
            world.put(Lane::Events, &poison).await?;
            let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid IN
                (SELECT pid FROM pg_stat_activity WHERE datname = current_database())";
            until("the upsert at work", SOON, async || Ok((world.number(waiting).await? > 0).then_some(()))).await?;
            ensure!(world.number("SELECT count(*) FROM deliveries").await? == 0, "a first delivery is recorded");
        } else {
            let begun = format!("SELECT count(*) FROM deliveries WHERE token IS NOT NULL AND deaths = {}", death - 1);
            until("the upsert begun", LONG, async || Ok((world.number(&begun).await? == 1).then_some(()))).await?;
        }
        world.put(Lane::Events, &upsert(&format!("neighbour-{death}"), neighbour)).await?;
        if death < 3 {
            until("a neighbour", SOON, async || Ok(upserted(&world, neighbour).await?.then_some(()))).await?;
            until("its end", SOON, async || Ok((world.depth(Lane::Events).await? == (0, 1)).then_some(()))).await?;
        } else {
            until("both in hand", SOON, async || Ok((world.depth(Lane::Events).await? == (0, 2)).then_some(())))
                .await?;
            ensure!(!upserted(&world, neighbour).await?, "an event was begun beside a suspect");
        }
        service.kill().await?;
    }
    let service = world.serve().await?;
    let letters = world.wait_for_dead_letters(Lane::Events, 1).await?;
    ensure!(letters.len() == 1 && letters[0].body == poison && letters[0].code() == "quarantined", "{letters:?}");
    ensure!(letters[0].reason.contains("begun 3 times in a row"), "{letters:?}");
    until("the last neighbour", SOON, async || Ok(upserted(&world, 103).await?.then_some(()))).await?;
    world.quiet(SOON).await?;
    // What the dead had sent to Postgres waits there for the lock, and would still be done.
    world.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'").await?;
    lock.rollback().await?;
    ensure!(world.number("SELECT list_price_cents FROM listings WHERE listing_id = 1").await? != 7);
    ensure!(world.number("SELECT count(*) FROM deliveries WHERE token IS NOT NULL").await? == 0);
    world.finish(service).await
}

#[tokio::test]
async fn progress_between_deaths_starts_the_count_anew() -> Result<()> {
    const LISTINGS: i64 = 60;
    let mut world = World::new(Behaviour { latency_ms: 700, ..Behaviour::default() }).await?;
    // A batch waits for long, but not the first one after a death.
    world.set("partner.in_flight", 4).set("refresh.batch_linger", "20s").set("refresh.page_size", 20);
    world.set("queue.visibility_timeout", "3s");
    world.listings(LISTINGS).await?;
    let mut valued = 0;
    for death in 0..5 {
        let service = world.serve().await?;
        if death == 0 {
            world.refresh(&["--id", "unlucky"])?;
        }
        world.run_until("unlucky", LONG, |run| run.owned && run.attempts == death + 1).await?;
        let deaths = world.number("SELECT deaths::bigint FROM runs").await?;
        ensure!(deaths <= 1, "{deaths} deaths, with progress between them");
        let run = world.run_until("unlucky", LONG, |run| run.valued > valued).await?;
        ensure!(world.number("SELECT deaths::bigint FROM runs").await? == 0, "progress and still charged");
        valued = run.valued;
        service.kill().await?;
    }
    world.partner.control(|behaviour| behaviour.latency_ms = 0)?;
    let service = world.serve().await?;
    world.published("unlucky", LONG).await?;
    world.check_run("unlucky", &world.homes(LISTINGS).await?).await?;
    world.finish(service).await
}

#[tokio::test]
async fn stops_are_no_deaths() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 600_000, ..Behaviour::default() }).await?;
    world.set("partner.request_timeout", "7m").set("partner.total_timeout", "1h").set("shutdown.grace", "3s");
    world.set("queue.wait_time", "1s");
    world.listings(20).await?;
    let mut lock = world.database.begin().await?;
    sqlx::query("SELECT FROM listings WHERE listing_id = 20 FOR UPDATE").execute(&mut *lock).await?;
    let stuck = event("stuck", UPSERT, "2026-03-01T00:00:00Z", listing(20, 7)).to_string();
    for stop in 0..5 {
        let service = world.serve().await?;
        if stop == 0 {
            world.refresh(&["--id", "patient", "--limit", "10"])?;
            world.put(Lane::Events, &stuck).await?;
        }
        world.run_until("patient", SOON, |run| run.owned && run.attempts == stop + 1).await?;
        let recorded = "SELECT count(*) FROM deliveries WHERE lane = 'events'";
        let wanted = i64::from(stop > 0);
        until("the upsert", SOON, async || Ok((world.number(recorded).await? == wanted).then_some(()))).await?;
        let in_flight = r#"write_api_events_in_flight{lane="events"}"#;
        until("the upsert at work", SOON, async || Ok((service.metric(in_flight).await? == 1.0).then_some(()))).await?;
        service.signal(libc::SIGTERM);
        let status = service.exit(SOON).await?;
        ensure!(status.code() == Some(0), "{status}");
        service.check_log()?;
        let charged = "SELECT (SELECT sum(deaths) FROM runs) + (SELECT count(*) FROM deliveries)";
        ensure!(world.number(charged).await? == 0, "stop {stop} was charged");
    }
    lock.rollback().await?;
    world.partner.control(|behaviour| behaviour.latency_ms = 0)?;
    let service = world.serve().await?;
    let run = world.published("patient", LONG).await?;
    ensure!(run.attempts == 6, "{run:?}");
    world.check_run("patient", &world.homes(10).await?).await?;
    ensure!(world.number("SELECT list_price_cents FROM listings WHERE listing_id = 20").await? == 7);
    world.finish(service).await
}

#[tokio::test]
async fn a_message_that_was_received_very_often_is_sent_anew() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    world.set("queue.most_receives", 3);
    world.sql("ALTER TABLE listings RENAME TO elsewhere").await?;
    let service = world.serve().await?;
    service.expect_errors();
    world.put(Lane::Events, &upsert("worn", 1)).await?;
    let resent = r#"write_api_events_resent_total{lane="events"}"#;
    until("two new messages", LONG, async || Ok((service.metric(resent).await? == 2.0).then_some(()))).await?;
    world.sql("ALTER TABLE elsewhere RENAME TO listings").await?;
    until("the end", SOON, async || Ok(upserted(&world, 1).await?.then_some(()))).await?;
    world.quiet(SOON).await?;
    let failed = ended(&service, "event failed and will be retried", "worn")?;
    let receives: Vec<u64> = failed.iter().filter_map(|line| line["attempt"].as_u64()).collect();
    ensure!(
        receives.starts_with(&[1, 2, 3, 1, 2, 3]) && receives.iter().all(|receives| *receives <= 3),
        "{receives:?}"
    );
    let mut messages: Vec<String> = failed.iter().map(|line| line["message_id"].to_string()).collect();
    messages.dedup();
    ensure!(messages.len() >= 2 && messages[0] != messages[1], "{messages:?}");
    ensure!(ended(&service, "event done", "worn")?.len() == 1);
    world.finish(service).await
}

#[tokio::test]
async fn an_id_means_one_upsert_for_ever() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let service = world.serve().await?;
    let of = |id: &str, time: &str, listing_id: i64, price: i64| event(id, UPSERT, time, listing(listing_id, price));
    const OLD: &str = "2026-01-01T00:00:00Z";
    const NEW: &str = "2026-02-01T00:00:00Z";
    // In the order of sending; whether it is refused, and the price of listing 1 afterwards.
    let steps = [
        (of("first", TIME, 1, 100), false, 100),
        (of("first", TIME, 1, 100), false, 100),
        (of("first", TIME, 1, 101), true, 100),
        (of("first", NEW, 1, 102), true, 100),
        (of("first", NEW, 2, 100), true, 100),
        (of("first", NEW, 1, 100), false, 100),
        (of("newer", NEW, 1, 200), false, 200),
        (of("first", "2026-03-01T00:00:00Z", 1, 103), true, 200),
        (of("first", TIME, 1, 100), false, 200),
        (of("older", OLD, 1, 300), false, 200),
        (of("older", "2026-03-01T00:00:00Z", 1, 301), true, 200),
        (of("older", OLD, 1, 300), false, 200),
    ];
    let count = async |outcome: &str| {
        service.metric(&format!(r#"write_api_events_total{{kind="listing.upsert",outcome="{outcome}"}}"#)).await
    };
    let mut ends = (0.0, 0.0);
    for (number, (event, is_refused, price)) in steps.iter().enumerate() {
        world.put(Lane::Events, &event.to_string()).await?;
        if *is_refused {
            ends.1 += 1.0
        } else {
            ends.0 += 1.0
        }
        until(&format!("step {number} to end, {is_refused}"), SOON, async || {
            Ok(((count("done").await?, count("dead_lettered").await?) == ends).then_some(()))
        })
        .await?;
        let found = world.number("SELECT list_price_cents FROM listings WHERE listing_id = 1").await?;
        ensure!(found == *price, "after step {number} the price is {found}, not {price}");
    }
    ensure!(!upserted(&world, 2).await?, "a refused event wrote another listing");
    let letters = world.wait_for_dead_letters(Lane::Events, 5).await?;
    for (event, _, _) in steps.iter().filter(|(_, is_refused, _)| *is_refused) {
        let body = event.to_string();
        let same = letters.iter().filter(|letter| letter.body == body && letter.code() == "id_reused");
        ensure!(same.count() == 1, "{event} in {letters:?}");
    }
    world.quiet(SOON).await?;
    world.finish(service).await
}

#[tokio::test]
async fn of_many_first_upserts_with_one_id_one_is_applied() -> Result<()> {
    const IDS: usize = 12;
    const EACH: usize = 6;
    let world = World::for_services(2, Behaviour::default()).await?;
    // All of them are in the queue before anybody works.
    for version in 0..EACH {
        for id in 0..IDS {
            let listing_id = (1 + id * 10 + version) as i64;
            world.put(Lane::Events, &upsert(&format!("same-{id}"), listing_id)).await?;
        }
    }
    let services = [world.start()?, world.start()?];
    let letters = world.wait_for_dead_letters(Lane::Events, IDS * (EACH - 1)).await?;
    world.quiet(SOON).await?;
    ensure!(letters.len() == IDS * (EACH - 1) && letters.iter().all(|letter| letter.code() == "id_reused"));
    ensure!(world.number("SELECT count(*) FROM listings").await? == IDS as i64);
    ensure!(world.number("SELECT count(DISTINCT event_id) FROM listings").await? == IDS as i64);
    for service in services {
        service.ready().await?;
        world.finish(service).await?;
    }
    Ok(())
}

/// A message may be hidden for 12 h from its receive, which is seconds here.
#[tokio::test]
async fn a_run_that_outlives_a_receive_is_handed_over_and_goes_on() -> Result<()> {
    const LISTINGS: i64 = 80;
    let mut world = World::new(Behaviour { latency_ms: 1_000, ..Behaviour::default() }).await?;
    world.set("queue.visibility_timeout", "3s").set("queue.receive_cap", "5s");
    world.set("partner.in_flight", 5).set("refresh.page_size", 20);
    world.listings(LISTINGS).await?;
    let service = world.serve().await?;
    let id = world.refresh(&["--id", "long"])?;
    let run = world.published(&id, LONG).await?;
    ensure!(run.attempts >= 3, "16 s of work in receives of 5 s: {run:?}");
    let released = r#"write_api_events_total{kind="valuations.refresh",outcome="released"}"#;
    ensure!(service.metric(released).await? == f64::from(run.attempts - 1));
    ensure!(world.number("SELECT deaths::bigint FROM runs").await? == 0);
    let stats = world.partner.stats();
    ensure!((stats.requests, stats.repeated_requests) == (LISTINGS as u64, 0), "{stats:?}");
    world.check_run(&id, &world.homes(LISTINGS).await?).await?;
    world.finish(service).await
}

/// What SQS says of a death is nothing: only the token in the row tells it.
#[tokio::test]
async fn a_publication_on_which_three_processes_die_is_quarantined() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let kafka = local_stack::Kafka::separate().await?;
    kafka.create_topic(&world.environment().names().topic, 12).await?;
    world.set("kafka.brokers", kafka.bootstrap()).set("queue.visibility_timeout", "3s");
    world.listings(20).await?;
    let first = world.serve().await?;
    first.expect_errors();
    kafka.order(&local_stack::kafka::Order::GoDown).await?;
    let id = world.refresh(&[])?;
    let attempts = async || world.number("SELECT coalesce(max(attempts), 0)::bigint FROM publications").await;
    until("a publication", LONG, async || Ok((attempts().await? == 1).then_some(()))).await?;
    first.kill().await?;
    for death in 1..3 {
        // Without Kafka it is not ready, and works all the same.
        let service = world.start()?;
        service.expect_errors();
        until("a publication", LONG, async || Ok((attempts().await? == death + 1).then_some(()))).await?;
        ensure!(world.number("SELECT deaths::bigint FROM publications").await? == death);
        service.kill().await?;
    }
    kafka.order(&local_stack::kafka::Order::ComeUp).await?;
    let service = world.serve().await?;
    let letters = world.wait_for_dead_letters(Lane::PostProcessing, 1).await?;
    ensure!(letters.len() == 1 && letters[0].code() == "quarantined", "{letters:?}");
    ensure!(world.number("SELECT count(*) FROM publications WHERE state = 'failed' AND owner IS NULL").await? == 1);
    // Since when, and why, is told.
    let status: serde_json::Value = serde_json::from_str(&world.done(&["status", &id, "--json"])?)?;
    ensure!(status["phase"] == "unpublished" && status["publication"]["failed_at"].is_string(), "{status}");
    let page = world.done(&["status", &id])?.split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(page.contains("quarantined at ") && page.contains("quarantined: 3 attempts in a row died"), "{page}");
    ensure!(attempts().await? == 3);
    // Published anew, by an event of its own.
    world.done(&["send", "publish", &id])?;
    world.publications(&id, 1, LONG).await?;
    world.quiet(Duration::from_secs(30)).await?;
    world.sql("DELETE FROM publications WHERE state = 'failed'").await?;
    world.finish(service).await
}
