//! SQS at its worst, through a proxy.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use local_stack::SqsFault;

use super::{Injection, Scene};
use crate::replica::LOOK;

/// Until there is work to be met.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// Until the calls that a fault was ordered for have come.
const HIT_LIMIT: Duration = Duration::from_secs(20);
/// The partner's latency while extensions are to be met: a run then lasts for several of them.
const SLOW_PARTNER_MS: u64 = 1_500;

/// What SQS does. The names are the proxy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "each is the proxy's fault of the same name")]
pub enum Trouble {
    HungReceive,
    LateReceiveAnswer,
    DuplicateDelivery,
    ExtensionFails,
    ExtensionSlow,
    ExtensionRefused,
    TwelveHourRefusal,
    DeleteAnswerLost,
    DeleteFails,
    StaleReceipt,
    PartialBatchFailure,
    Throttle,
    ExpiredCredentials,
    SendAnswerLost,
    Down,
}

impl Trouble {
    /// The proxy's fault, and how often it is ordered at once; `None`: half of all calls for some time.
    fn order(self) -> (SqsFault, Option<u64>) {
        match self {
            Self::HungReceive => (SqsFault::HungReceive, Some(3)),
            // Past the client's limit of its wait and 2 s more, so that the messages are lost until they are visible.
            Self::LateReceiveAnswer => (SqsFault::LateReceiveAnswer(3_500), Some(3)),
            Self::DuplicateDelivery => (SqsFault::DuplicateDelivery, Some(6)),
            Self::ExtensionFails => (SqsFault::ExtensionFails, Some(2)),
            Self::ExtensionSlow => (SqsFault::ExtensionSlow(2_500), Some(2)),
            Self::ExtensionRefused => (SqsFault::ExtensionRefused, Some(1)),
            Self::TwelveHourRefusal => (SqsFault::TwelveHourRefusal, Some(1)),
            Self::DeleteAnswerLost => (SqsFault::DeleteAnswerLost, Some(3)),
            Self::DeleteFails => (SqsFault::DeleteFails, Some(3)),
            Self::StaleReceipt => (SqsFault::StaleReceipt, Some(3)),
            Self::PartialBatchFailure => (SqsFault::PartialBatchFailure, Some(4)),
            Self::SendAnswerLost => (SqsFault::SendAnswerLost, Some(3)),
            Self::Throttle => (SqsFault::Throttle, None),
            Self::ExpiredCredentials => (SqsFault::ExpiredCredentials, None),
            Self::Down => (SqsFault::Down, None),
        }
    }

    /// Whether it needs work that lasts for longer than a message stays hidden.
    fn is_of_extensions(self) -> bool {
        matches!(self, Self::ExtensionFails | Self::ExtensionSlow | Self::ExtensionRefused | Self::TwelveHourRefusal)
    }
}

pub(super) async fn inject(scene: &mut Scene<'_>, trouble: Trouble) -> Result<Injection> {
    if trouble.is_of_extensions() {
        scene.world.partner.control(|behaviour| behaviour.latency_ms = SLOW_PARTNER_MS)?;
    }
    scene.world.busy(BUSY_LIMIT).await?;
    let (fault, times) = trouble.order();
    let before = hits(scene, fault)?;
    let limit = match times {
        Some(times) => {
            proxy(scene)?.order(fault, times);
            HIT_LIMIT
        }
        None => {
            proxy(scene)?.set_ratio(fault, 0.5);
            Duration::from_millis(scene.rng.u64(2_000..5_000))
        }
    };
    let begun = Instant::now();
    // A hit counts as one at work if somebody was at work at the look before it or is after it: some faults end the work.
    let (mut at_work, mut counted, mut working) = (0, before, true);
    loop {
        scene.world.check_alive()?;
        let now = hits(scene, fault)?;
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
    proxy(scene)?.clear();
    if trouble.is_of_extensions() {
        scene.world.partner.control(|behaviour| behaviour.latency_ms = crate::world::LATENCY_MS)?;
    }
    let proof = format!("{hits} times by the proxy's count in {:?}, {at_work} of them at work", begun.elapsed());
    Ok(Injection { hits, hits_at_work: at_work, proof, ..Injection::new(fault.name()) })
}

fn proxy<'a>(scene: &'a Scene<'_>) -> Result<&'a local_stack::SqsProxy> {
    scene.world.sqs_proxy.as_ref().context("this world has no proxy before SQS")
}

fn hits(scene: &Scene<'_>, fault: SqsFault) -> Result<u64> {
    Ok(proxy(scene)?.hits().get(fault.name()).copied().unwrap_or(0))
}
