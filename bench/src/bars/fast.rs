//! Bars of the fast events: 7 and 8.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use local_stack::{Environment, Exposition, Histogram, Program};

use crate::bare;
use crate::ground::{Ground, Service, until};
use crate::outcome::{Outcome, median};

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

/// How often it is looked how many messages are deleted, and what the service has used.
const DELETED_LOOK: Duration = Duration::from_millis(20);

/// What was seen of a saturated case, by the service or by the bare loop.
struct Saturated {
    /// Events a second.
    rate: f64,
    /// Processor time an event, in milliseconds.
    cpu_ms: f64,
}

/// So many messages in a queue of its own, and the bare loop that takes them.
async fn bare_loop(ground: &Ground) -> Result<Saturated> {
    let environment = ground.environment(&[]).await?;
    fill(&environment).await?;
    let variables: Vec<(&str, &str)> = environment.variables().filter(|(name, _)| name.starts_with("AWS_")).collect();
    let arguments = ["receive", &ground.sqs.endpoint(), &environment.names().events_queue, &SATURATED.to_string()];
    let bare = bare::run(&arguments, &variables).await?;
    Ok(Saturated { rate: bare.count / bare.seconds, cpu_ms: bare.cpu_seconds / bare.count * 1e3 })
}

async fn fill(environment: &Environment) -> Result<()> {
    let program = Program::new(None, environment.clone(), "bench")?;
    program.run(&["send", "upsert", "--sample", &SATURATED.to_string()]).await
}

/// What was seen of the service with the same messages.
struct Ours {
    saturated: Saturated,
    /// SQS calls an event.
    calls: f64,
    /// Of the open loop, in milliseconds.
    p99_ms: f64,
}

/// The same messages by the service, which is started when they are there.
async fn ours(ground: &Ground) -> Result<Ours> {
    let environment = ground.environment(&[]).await?;
    fill(&environment).await?;
    let calls = || ground.sqs_calls().values().sum::<u64>();
    let (calls_before, deleted_before) = (calls(), ground.sqs.deleted());
    let service = Service::start(environment).await?;
    let started = Instant::now();
    let look = || {
        let deleted = ground.sqs.deleted() - deleted_before;
        anyhow::Ok((Instant::now(), deleted, service.sampler.cpu_seconds()?))
    };
    // From the first look that sees any deleted to the one that sees all of them, as of the bare loop: the emulator is the faster the
    // fewer messages it has left, so both ends must be in both.
    let mut began = None;
    let ended = loop {
        let seen = look()?;
        if seen.1 > 0 {
            began = began.or(Some(seen));
        }
        if seen.1 >= u64::from(SATURATED) {
            break seen;
        }
        let limit = Duration::from_secs(300);
        ensure!(started.elapsed() < limit, "after {limit:?} {} of {SATURATED} messages were deleted", seen.1);
        service.is_alive()?;
        tokio::time::sleep(DELETED_LOOK).await;
    };
    let began = began.context("no message was deleted")?;
    ensure!(began.1 <= u64::from(SATURATED) / 50, "the first look saw {} messages deleted", began.1);
    let done = exposition(&service).await?.fast_events_done();
    ensure!(done == u64::from(SATURATED), "{done} events were done for {SATURATED} messages");
    let events = (ended.1 - began.1) as f64;
    let rate = events / (ended.0 - began.0).as_secs_f64();
    let saturated = Saturated { rate, cpu_ms: (ended.2 - began.2) / events * 1e3 };
    let calls = (calls() - calls_before) as f64 / f64::from(SATURATED);
    Ok(Ours { saturated, calls, p99_ms: open_loop(&service, OPEN).await? })
}

/// Bar 7, by so many alternating pairs: the median of their ratios and differences, and the worst of what is no ratio.
pub(crate) async fn fast_events(ground: &mut Ground, pairs: u32) -> Result<Vec<Outcome>> {
    ground.seed(LISTINGS).await?;
    let mut all = Vec::new();
    for pair in 0..pairs {
        // Who is first changes.
        all.push(if pair % 2 == 0 {
            let bare = bare_loop(ground).await?;
            (bare, ours(ground).await?)
        } else {
            let ours = ours(ground).await?;
            (bare_loop(ground).await?, ours)
        });
    }
    let middle = |of: fn(&(Saturated, Ours)) -> f64| median(all.iter().map(of).collect(), |value| *value);
    let worst = |of: fn(&(Saturated, Ours)) -> f64| all.iter().map(of).fold(0.0, f64::max);
    let outcome = Outcome::new(7, "fast events")
        .at_least("throughput against the bare loop", middle(|(bare, ours)| ours.saturated.rate / bare.rate), 0.9)
        .at_most("SQS calls an event", worst(|(_, ours)| ours.calls), 0.25)
        .at_most(
            "CPU above the bare loop's, ms an event",
            middle(|(bare, ours)| ours.saturated.cpu_ms - bare.cpu_ms),
            0.08,
        )
        .at_most("200 a second: p99 from task start to commit, ms", worst(|(_, ours)| ours.p99_ms), 20.0)
        .beside("events a second", middle(|(_, ours)| ours.saturated.rate))
        .beside("bare loop, events a second", middle(|(bare, _)| bare.rate))
        .beside("CPU, ms an event", middle(|(_, ours)| ours.saturated.cpu_ms))
        .beside("bare loop, CPU ms an event", middle(|(bare, _)| bare.cpu_ms));
    Ok(vec![outcome])
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
