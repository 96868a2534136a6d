//! SQS at its worst, through a proxy.

use std::time::{Duration, Instant};

use anyhow::Result;
use local_stack::SqsFault;

use super::{Injection, Scene};
use crate::replica::LOOK;

/// Until there is work to be met.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// Until the calls that a fault was ordered for have come.
const HIT_LIMIT: Duration = Duration::from_secs(20);
/// The partner's latency while extensions are to be met: a run then lasts for several of them.
const SLOW_PARTNER_MS: u64 = 1_500;

/// How often a fault is ordered at once; `None`: half of all calls for some time.
fn times(fault: SqsFault) -> Option<u64> {
    match fault {
        SqsFault::ExtensionRefused | SqsFault::TwelveHourRefusal | SqsFault::SizeLimit(_) => Some(1),
        SqsFault::ExtensionFails | SqsFault::ExtensionSlow(_) => Some(2),
        SqsFault::HungReceive
        | SqsFault::LateReceiveAnswer(_)
        | SqsFault::DeleteAnswerLost
        | SqsFault::DeleteFails
        | SqsFault::StaleReceipt
        | SqsFault::SendAnswerLost
        | SqsFault::Hang
        | SqsFault::HangAnswer => Some(3),
        SqsFault::PartialBatchFailure => Some(4),
        SqsFault::DuplicateDelivery => Some(6),
        SqsFault::Throttle | SqsFault::ExpiredCredentials | SqsFault::Down => None,
    }
}

/// Whether it needs work that lasts for longer than a message stays hidden.
fn is_of_extensions(fault: SqsFault) -> bool {
    matches!(
        fault,
        SqsFault::ExtensionFails
            | SqsFault::ExtensionSlow(_)
            | SqsFault::ExtensionRefused
            | SqsFault::TwelveHourRefusal
    )
}

pub(super) async fn inject(scene: &mut Scene<'_>, fault: SqsFault) -> Result<Injection> {
    if is_of_extensions(fault) {
        scene.world.partner.control(|behaviour| behaviour.latency_ms = SLOW_PARTNER_MS)?;
    }
    scene.world.busy(BUSY_LIMIT).await?;
    let times = times(fault);
    let before = hits(scene, fault);
    let limit = match times {
        Some(times) => {
            scene.world.sqs_proxy.order(fault, times);
            HIT_LIMIT
        }
        None => {
            scene.world.sqs_proxy.set_ratio(fault, 0.5);
            Duration::from_millis(scene.rng.u64(2_000..5_000))
        }
    };
    let begun = Instant::now();
    // A hit counts as one at work if somebody was at work at the look before it or is after it: some faults end the work.
    let (mut at_work, mut counted, mut working) = (0, before, true);
    loop {
        scene.world.check_alive()?;
        let now = hits(scene, fault);
        let work = scene.world.at_work().await?;
        let works_on = work.runs + work.publishers > 0;
        if working || works_on {
            at_work += now - counted;
        }
        (counted, working) = (now, works_on);
        if begun.elapsed() >= limit || times.is_some_and(|times| now - before >= times) {
            break;
        }
        if scene.world.idle().await? {
            scene.world.more(1).await?;
        }
        tokio::time::sleep(LOOK).await;
    }
    let hits = counted - before;
    scene.world.sqs_proxy.clear();
    if is_of_extensions(fault) {
        scene.world.partner.control(|behaviour| behaviour.latency_ms = crate::world::LATENCY_MS)?;
    }
    let proof = format!("{hits} times by the proxy's count in {:?}, {at_work} of them at work", begun.elapsed());
    Ok(Injection { hits, hits_at_work: at_work, proof, ..Injection::new(fault.name()) })
}

fn hits(scene: &Scene<'_>, fault: SqsFault) -> u64 {
    scene.world.sqs_proxy.hits().get(fault.name()).copied().unwrap_or(0)
}
