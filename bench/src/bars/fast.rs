//! Bars of the fast events: 7 and 8.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use local_stack::{Exposition, Histogram};

use crate::bare;
use crate::ground::{Ground, Service, until};
use crate::outcome::Outcome;

/// Events of the saturated case.
const SATURATED: u32 = 20_000;
/// Listings that the events are about.
const LISTINGS: u32 = 21_436;
/// Events a second of the open loop, and how many.
const RATE: u32 = 200;
const OPEN: u32 = 2_000;
/// Events of an open loop before it, after which connections and caches are there.
const WARM_UP: u32 = 400;
/// Slow events beside the fast ones, and the listings of each.
const SLOW: u32 = 20;
const NIGHTLY: u32 = 17_000;

async fn exposition(service: &Service) -> Result<Exposition> {
    Exposition::read(&service.program.environment().admin_url()).await
}

/// The time of 99 of 100 of so many fast events from the start of their task to the commit, in milliseconds, when `RATE` a
/// second come.
async fn open_loop(service: &Service, events: u32) -> Result<f64> {
    let before: Histogram = exposition(service).await?.fast_event_seconds();
    let done = exposition(service).await?.fast_events_done() + u64::from(events);
    service.program.run(&["send", "upsert", "--sample", &events.to_string(), "--rate", &RATE.to_string()]).await?;
    until("the fast events", Duration::from_secs(30), async || {
        Ok(exposition(service).await?.fast_events_done() >= done)
    })
    .await?;
    let seconds = exposition(service).await?.fast_event_seconds().since(&before).quantile(0.99);
    Ok(seconds.context("no fast event was timed")? * 1e3)
}

/// Bar 7.
pub(crate) async fn fast_events(ground: &mut Ground) -> Result<Vec<Outcome>> {
    ground.seed(LISTINGS).await?;
    let number = SATURATED.to_string();
    // The bare loop has a queue of its own with the same messages.
    let environment = ground.environment(&[]).await?;
    let program = local_stack::Program::new(None, environment.clone(), "bench")?;
    program.run(&["send", "upsert", "--sample", &number]).await?;
    let variables: Vec<(&str, &str)> = environment.variables().filter(|(name, _)| name.starts_with("AWS_")).collect();
    let endpoint = ground.sqs.endpoint();
    let bare = bare::run(&["receive", &endpoint, &environment.names().events_queue, &number], &variables).await?;

    let environment = ground.environment(&[]).await?;
    local_stack::Program::new(None, environment.clone(), "bench")?
        .run(&["send", "upsert", "--sample", &number])
        .await?;
    let calls = |ground: &Ground| ground.sqs_calls().values().sum::<u64>();
    let calls_before = calls(ground);
    let service = Service::start(environment).await?;
    // Rate and processor time are those between the first look that sees any done and the last one before the end, as of the
    // bare loop: neither has to start in them. Looks are seldom, for each costs the service as much as some events.
    let (mut first, mut last) = (None, None);
    until("the fast events", Duration::from_secs(300), async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let done = exposition(&service).await?.fast_events_done();
        if done > 0 && done < u64::from(SATURATED) {
            last = Some((Instant::now(), done, service.sampler.cpu_seconds()?));
            first = first.or(last);
        }
        Ok(done >= u64::from(SATURATED))
    })
    .await?;
    let (Some((began, already, cpu_before)), Some((ended, done, cpu_after))) = (first, last) else {
        bail!("no look saw fast events under way")
    };
    ensure!(done > already, "one look alone saw fast events under way: {done} of {SATURATED} were done");
    let rate = (done - already) as f64 / (ended - began).as_secs_f64();
    let calls_each = (calls(ground) - calls_before) as f64 / f64::from(SATURATED);
    let cpu_each = (cpu_after - cpu_before) / (done - already) as f64 * 1e3;
    let bare_cpu_each = bare.cpu_seconds / bare.count * 1e3;
    let p99 = open_loop(&service, OPEN).await?;
    Ok(vec![
        Outcome::new(7, "fast events")
            .at_least("throughput against the bare loop", rate / (bare.count / bare.seconds), 0.9)
            .at_most("SQS calls an event", calls_each, 0.25)
            .at_most("CPU, ms an event", cpu_each, bare_cpu_each + 0.08)
            .at_most("200 a second: p99 from task start to commit, ms", p99, 20.0)
            .beside("events a second", rate)
            .beside("bare loop, events a second", bare.count / bare.seconds)
            .beside("bare loop, CPU ms an event", bare_cpu_each),
    ])
}

/// As [`open_loop`], with `SLOW` events at work all the time.
async fn beside_slow(ground: &Ground, service: &mut Service) -> Result<f64> {
    let mut runs = Vec::new();
    for _ in 0..SLOW {
        runs.push(service.send(ground, NIGHTLY).await?);
    }
    let mut at_work = async || -> Result<i64> {
        // Each with answers of its own, and more to come.
        let of = "SELECT count(*) FROM runs WHERE run_id = ANY($1) AND owner IS NOT NULL AND completed_at IS NULL
                  AND valued > 0";
        Ok(sqlx::query_scalar(of).bind(&runs).fetch_one(&mut service.database).await?)
    };
    until("the slow events", Duration::from_secs(60), async || Ok(at_work().await? == i64::from(SLOW))).await?;
    ensure!(ground.partner.stats().in_flight >= 900, "the slow events have few calls in flight");
    let p99 = open_loop(service, OPEN).await?;
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM runs WHERE run_id = ANY($1) AND completed_at IS NULL")
        .bind(&runs)
        .fetch_one(&mut service.database)
        .await?;
    ensure!(left == i64::from(SLOW), "{left} of {SLOW} slow events were at work until the last fast one");
    Ok(p99)
}

/// Bar 8, by so many alternating pairs.
pub(crate) async fn fast_beside_slow(ground: &mut Ground, pairs: u32) -> Result<Vec<Outcome>> {
    ground.seed(LISTINGS).await?;
    let (mut idle, mut busy) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        // Who is first changes. Each is a service of its own, on the same data.
        for is_busy in [pair % 2 == 1, pair % 2 == 0] {
            ground.partner(500, 0)?;
            let mut service = ground.service(&[]).await?;
            open_loop(&service, WARM_UP).await?;
            if is_busy {
                busy.push(beside_slow(ground, &mut service).await?);
            } else {
                idle.push(open_loop(&service, OPEN).await?);
            }
        }
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let outcome = Outcome::new(8, "fast beside slow")
        .at_most("p99 beside 20 slow events - p99 without, ms", mean(&busy) - mean(&idle), 10.0)
        .beside("p99 without, ms", mean(&idle))
        .beside("p99 beside, ms", mean(&busy));
    Ok(vec![if pairs < 5 { outcome.not_measured(format!("{} of 5 pairs (--full)", 5 - pairs)) } else { outcome }])
}
