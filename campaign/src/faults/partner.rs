//! The partner at its worst.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use local_stack::Behaviour;
use local_stack::partner::{Mischief, RetryAfter, Stats};

use super::{Injection, Scene};
use crate::replica::LOOK;

/// Until there is work to be met.
const BUSY_LIMIT: Duration = Duration::from_secs(60);

/// What the partner does for some seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Schedule {
    /// 429 for everybody with Retry-After of two seconds, in which nobody may call.
    RetryAfter,
    /// 429, with all forms of Retry-After.
    TooMany,
    /// 500, 502 and 503 among good answers.
    Errors,
    /// 503 for everybody.
    Outage,
    /// No answer.
    Hang,
    /// Status 200 and nonsense.
    Garbage,
    /// The valuation is made and the connection closed.
    AnswerLost,
    /// Answers that no client should have to read: hanging, dripping, half closed, with bombs and ten thousand headers.
    Mischief,
    /// Ten times slower, step by step.
    Latency,
}

pub(super) async fn inject(scene: &mut Scene<'_>, schedule: Schedule) -> Result<Injection> {
    scene.world.busy(BUSY_LIMIT).await?;
    let good = current(scene)?;
    if schedule == Schedule::RetryAfter {
        return retry_after(scene, good).await;
    }
    let before = scene.world.partner.stats();
    let time = Duration::from_millis(match schedule {
        Schedule::Outage => scene.rng.u64(2_000..6_000),
        _ => scene.rng.u64(1_500..3_500),
    });
    // The absurd form is capped at five minutes, which no round has.
    let forms = [
        RetryAfter::None,
        RetryAfter::Seconds(0),
        RetryAfter::Seconds(1),
        RetryAfter::Date(2),
        RetryAfter::PastDate(60),
        RetryAfter::Nonsense,
    ];
    let mischief = scene.rng.choice([
        Mischief::HangInHeader,
        Mischief::HangInBody,
        Mischief::Drip,
        Mischief::HalfClose,
        Mischief::ManyHeaders,
        Mischief::HugeBody,
        Mischief::EndlessBody,
        Mischief::GzipBomb,
    ]);
    let retry_after = scene.rng.choice(forms).unwrap_or_default();
    let mut late = 0;
    let begun = Instant::now();
    while begun.elapsed() < time {
        let elapsed = begun.elapsed().as_secs_f64() / time.as_secs_f64();
        scene.world.partner.control(|behaviour| {
            change(behaviour, schedule, elapsed);
            behaviour.retry_after = retry_after;
            if schedule == Schedule::Mischief {
                behaviour.mischief = mischief.map(|one| (one, 0.1)).into_iter().collect();
            }
        })?;
        scene.world.check_alive()?;
        if schedule == Schedule::Latency {
            late = late.max(scene.world.partner.stats().in_flight);
        }
        // The work must not end before the fault does.
        if scene.world.idle().await? {
            scene.world.more(1).await?;
        }
        tokio::time::sleep(LOOK).await;
    }
    scene.world.partner.control(|behaviour| *behaviour = good)?;
    let hits = match schedule {
        Schedule::Latency => late,
        _ => count(schedule, &scene.world.partner.stats()) - count(schedule, &before),
    };
    let proof = match schedule {
        Schedule::Mischief => format!("{hits} calls in {time:?}, {mischief:?}"),
        _ => format!("{hits} calls in {time:?}, Retry-After {retry_after:?}"),
    };
    // The partner's client gives up late calls, whose connections are then lost.
    Ok(Injection {
        hits,
        hits_at_work: hits,
        proof,
        interruptions: u64::from(schedule == Schedule::Latency),
        ..Injection::new("partner")
    })
}

/// A pause that the partner asks for is kept by everybody.
async fn retry_after(scene: &mut Scene<'_>, good: Behaviour) -> Result<Injection> {
    /// What is on its way when the first 429 is given has arrived after this.
    const ON_THE_WAY: Duration = Duration::from_millis(700);
    /// Well before the pause is over.
    const WATCHED: Duration = Duration::from_millis(900);
    let before = count(Schedule::TooMany, &scene.world.partner.stats());
    scene.world.partner.control(|behaviour| {
        behaviour.errors = BTreeMap::from([(429, 1.0)]);
        behaviour.retry_after = RetryAfter::Seconds(2);
    })?;
    let begun = Instant::now();
    while count(Schedule::TooMany, &scene.world.partner.stats()) == before && begun.elapsed() < BUSY_LIMIT {
        tokio::time::sleep(LOOK).await;
    }
    let told = Instant::now();
    tokio::time::sleep(ON_THE_WAY).await;
    let first = scene.world.partner.stats();
    tokio::time::sleep(WATCHED).await;
    let second = scene.world.partner.stats();
    // On a machine that is busy, both looks may come too late to tell.
    let in_time = told.elapsed() < Duration::from_millis(1_900);
    scene.world.partner.control(|behaviour| *behaviour = good)?;
    let hits = count(Schedule::TooMany, &first) - before;
    let calls = second.requests - first.requests;
    if in_time && calls > 0 {
        scene.violation("retry-after", format!("{calls} calls in a pause of 2 s that the partner had asked for"));
    }
    let proof = format!("{hits} calls were told to wait 2 s, {calls} came in {WATCHED:?} of it");
    Ok(Injection { hits, hits_at_work: hits, proof, ..Injection::new("partner") })
}

fn current(scene: &Scene<'_>) -> Result<Behaviour> {
    let mut now = Behaviour::default();
    scene.world.partner.control(|behaviour| now = behaviour.clone())?;
    Ok(now)
}

fn change(behaviour: &mut Behaviour, schedule: Schedule, elapsed: f64) {
    match schedule {
        Schedule::TooMany => behaviour.errors = BTreeMap::from([(429, 0.3)]),
        Schedule::Errors => behaviour.errors = BTreeMap::from([(500, 0.1), (502, 0.1), (503, 0.1)]),
        Schedule::Outage => behaviour.errors = BTreeMap::from([(503, 1.0)]),
        Schedule::Hang => behaviour.hang_ratio = 0.2,
        Schedule::Garbage => behaviour.garbage_ratio = 0.3,
        Schedule::AnswerLost => behaviour.drop_ratio = 0.3,
        Schedule::Mischief | Schedule::RetryAfter => {}
        // 60 ms to 600 ms.
        Schedule::Latency => behaviour.latency_ms = 60 + (540.0 * elapsed) as u64,
    }
}

fn count(schedule: Schedule, stats: &Stats) -> u64 {
    let of = |statuses: &[u16]| statuses.iter().filter_map(|status| stats.by_status.get(status)).sum();
    match schedule {
        Schedule::TooMany | Schedule::RetryAfter => of(&[429]),
        Schedule::Errors | Schedule::Outage => of(&[500, 502, 503]),
        Schedule::Hang => stats.hung,
        Schedule::Garbage => stats.garbage,
        Schedule::AnswerLost => stats.dropped,
        Schedule::Mischief => stats.mischief.values().sum(),
        Schedule::Latency => 0,
    }
}
