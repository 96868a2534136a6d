//! Bars of the process: 12 to 15.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bench::event::{queue_url, send_refresh};
use local_stack::Action;
use serde_json::json;

use crate::ground::{Ground, Service, until};
use crate::outcome::Outcome;

const NIGHTLY: u32 = 17_000;
/// Calls after which a process is stopped or killed: the middle of the event.
const MIDDLE: u64 = 8_500;
/// In flight and one batch: what may be asked a second time.
const REPEATS: f64 = 2_000.0;

/// Bar 12; the idle figures over so many seconds.
pub(crate) async fn start_and_idle(ground: &mut Ground, seconds: u64) -> Result<Vec<Outcome>> {
    ground.partner(20, 0)?;
    ground.seed(NIGHTLY).await?;
    let environment = ground.environment(&[]).await?;
    let receives = |ground: &Ground| ground.sqs_calls().get("ReceiveMessage").copied().unwrap_or(0);
    let program = local_stack::Program::new(None, environment.clone(), "bench")?;
    let before = receives(ground);
    let process = program.start(&["serve"])?;
    let start = until("the first receive", Duration::from_secs(30), async || Ok(receives(ground) > before)).await?;
    drop(process);

    let mut service = Service::start(environment).await?;
    service.refresh(ground, 1_000).await?;
    tokio::time::sleep(Duration::from_secs(20)).await;
    let calls = |ground: &Ground| ground.sqs_calls().values().sum::<u64>();
    let (before, cpu, began) = (calls(ground), service.sampler.cpu_seconds()?, Instant::now());
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let took = began.elapsed().as_secs_f64();
    let of_a_core = (service.sampler.cpu_seconds()? - cpu) / took * 100.0;
    let a_minute = (calls(ground) - before) as f64 / took * 60.0 / 3.0;
    let outcome = Outcome::new(12, "start, idle")
        .at_most("start to first receive, s", start.as_secs_f64(), 0.5)
        .at_most("idle, % of a core", of_a_core, 0.3)
        .at_most("SQS calls a minute and queue", a_minute, 3.3);
    Ok(vec![if seconds < 300 {
        outcome.not_measured(format!("300 s: looked on for {seconds} (--full)"))
    } else {
        outcome
    }])
}

/// Bar 13.
pub(crate) async fn stop(ground: &mut Ground) -> Result<Vec<Outcome>> {
    ground.seed(NIGHTLY).await?;
    ground.partner(500, 0)?;
    let environment = ground.environment(&[]).await?;
    let service = Service::start(environment.clone()).await?;
    let id = service.send(ground, NIGHTLY).await?;
    until("calls", Duration::from_secs(60), async || Ok(ground.partner.stats().requests >= MIDDLE)).await?;
    service.process.signal(libc::SIGTERM);
    let exit = until("the exit", Duration::from_secs(40), async || Ok(service.process.exited()?.is_some())).await?;
    let url = queue_url(&ground.client, &environment.names().valuations_queue).await?;
    // Shown and at once visible to the next.
    let look = async || {
        let answer = ground.client.receive_message().queue_url(&url).visibility_timeout(0).wait_time_seconds(0);
        Ok(!answer.send().await?.messages().is_empty())
    };
    let visible = until("the message", Duration::from_secs(120), look).await?;
    drop(service);
    let mut heir = Service::start(environment).await?;
    heir.published(&id).await?;
    Ok(vec![
        Outcome::new(13, "stop")
            .at_most("SIGTERM to exit, s", exit.as_secs_f64(), 5.0)
            .at_most("exit to the message being visible, s", visible.as_secs_f64(), 1.0)
            .at_most("calls repeated", ground.partner.stats().repeated_requests as f64, REPEATS),
    ])
}

/// Bar 14, with a visibility timeout as short as in tests and, if `full`, with that of the service.
pub(crate) async fn recovery(ground: &mut Ground, full: bool) -> Result<Vec<Outcome>> {
    let mut outcome = Outcome::new(14, "recovery");
    let timeouts: &[u32] = if full { &[5, 60] } else { &[5] };
    for seconds in timeouts {
        let (working, repeated) = recovery_within(ground, *seconds).await?;
        outcome = outcome
            .at_most(&format!("kill -9 to working again, visibility {seconds} s, s"), working, f64::from(seconds + 2))
            .at_most(&format!("calls repeated, visibility {seconds} s"), repeated, REPEATS);
    }
    Ok(vec![if full { outcome } else { outcome.not_measured("with 60 s, the default (--full)") }])
}

/// Seconds from a kill to the next call, and calls that were repeated.
async fn recovery_within(ground: &mut Ground, visibility_seconds: u32) -> Result<(f64, f64)> {
    ground.seed(NIGHTLY).await?;
    ground.partner(500, 0)?;
    let environment = ground.environment(&[("queue.visibility_timeout", &format!("{visibility_seconds}s"))]).await?;
    let service = Service::start(environment.clone()).await?;
    let id = service.send(ground, NIGHTLY).await?;
    until("calls", Duration::from_secs(60), async || Ok(ground.partner.stats().requests >= MIDDLE)).await?;
    service.process.signal(libc::SIGKILL);
    let killed = Instant::now();
    until("the end", Duration::from_secs(10), async || Ok(service.process.exited()?.is_some())).await?;
    let mut heir = Service::start(environment).await?;
    let before = ground.partner.stats().requests;
    until("calls again", Duration::from_secs(120), async || Ok(ground.partner.stats().requests > before)).await?;
    let working = killed.elapsed().as_secs_f64();
    heir.published(&id).await?;
    Ok((working, ground.partner.stats().repeated_requests as f64))
}

/// Bar 15; looked on for so many seconds.
pub(crate) async fn leases(ground: &mut Ground, seconds: u64) -> Result<Vec<Outcome>> {
    const MESSAGES: u32 = 1_000;
    /// Two times the visibility timeout: each message must have been kept hidden at least once, and again.
    const ENOUGH: u64 = 120;
    ground.seed(NIGHTLY).await?;
    ground.partner(300_000, 0)?;
    let settings = [("lanes.valuations.in_flight", "1000"), ("partner.request_timeout", "400s")];
    let settings = [&settings[..], &[("partner.total_timeout", "20m"), ("partner.max_attempts", "2")]].concat();
    let service = ground.service(&settings).await?;
    let queue = service.program.environment().names().events_queue.clone();
    let prefix = uuid::Uuid::new_v4().to_string();
    for message in 0..MESSAGES {
        send_refresh(&ground.client, &queue, &format!("{prefix}-{message}"), json!({ "limit": 1 })).await?;
    }
    let all = async || Ok(ground.partner.stats().in_flight >= u64::from(MESSAGES));
    until("1,000 messages at work", Duration::from_secs(120), all).await?;
    let extensions = |ground: &Ground| {
        let calls = ground.sqs_calls();
        calls
            .iter()
            .filter(|(action, _)| action.starts_with("ChangeMessageVisibility"))
            .map(|(_, count)| *count)
            .sum::<u64>()
    };
    let before = extensions(ground);
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let a_second = (extensions(ground) - before) as f64 / began.elapsed().as_secs_f64();
    let calls = ground.sqs.calls();
    let received = calls.iter().filter(|call| call.action == Action::Receive).flat_map(|call| &call.messages);
    let deliveries = received.filter(|message| message.body.contains(&prefix)).count() as f64;
    // Each comes once on the common lane, which forwards it, and once on its own.
    let once = f64::from(2 * MESSAGES);
    ensure!(deliveries >= once, "{deliveries} deliveries were seen, of {once} at the least");
    let outcome = Outcome::new(15, "leases")
        .at_most("extension calls a second for 1,000 messages", a_second, 4.0)
        .at_most("messages delivered again", deliveries - once, 0.0);
    Ok(vec![if seconds < ENOUGH {
        outcome.not_measured(format!("{ENOUGH} s: looked on for {seconds} (--full)"))
    } else {
        outcome
    }])
}
