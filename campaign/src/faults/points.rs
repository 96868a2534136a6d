//! Named points in the service, where it can be made to die, to panic or to stand still.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Injection, Scene, redrive};
use crate::replica::LOOK;
use crate::world::{GRACE, LATENCY_MS};

/// Until a point is passed, with all kinds of work going on.
const PASSING_LIMIT: Duration = Duration::from_secs(20);
/// Until a message has worn out.
const WORN_LIMIT: Duration = Duration::from_secs(40);
/// The partner's latency while messages wear out: a run then lasts for several receives of its second message.
const SLOW_PARTNER_MS: u64 = 1_500;
/// As by default.
const MOST_RECEIVES: &str = "900";
/// How long a thread stands still: longer than a message stays hidden.
const STALL: Duration = Duration::from_secs(5);
/// Deaths after which an event is quarantined. The first one leaves no trace where nothing is written before the result,
/// and the one after that is known by the receive count.
const DEATHS: std::ops::RangeInclusive<u32> = 3..=4;

/// Names of the points in the Rust sources below `root`, sorted.
pub(super) fn find(root: &Path) -> Result<Vec<String>> {
    let mut found = BTreeSet::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.extend(named_in(&fs::read_to_string(&path)?));
            }
        }
    }
    Ok(found.into_iter().collect())
}

fn named_in(source: &str) -> Vec<String> {
    // Some places have a function of their own that makes the key of their points.
    let calls = source.split("fault").skip(1).filter_map(|rest| {
        let names = ["::point(", "_point(", "_points("];
        names.into_iter().find_map(|name| rest.strip_prefix(name))
    });
    calls.filter_map(|call| Some(call.trim_start().strip_prefix('"')?.split('"').next()?.to_owned())).collect()
}

/// The process ends itself, as by kill -9, at `point`.
pub(super) async fn crash(scene: &mut Scene<'_>, point: &str) -> Result<Injection> {
    if point.starts_with("redrive.") {
        return redrive::crash(scene, point).await;
    }
    rest(scene).await?;
    let passing = scene.rng.u32(1..=2);
    let is_of_worn = point.starts_with("resend.");
    if is_of_worn {
        wear(scene).await?;
    }
    exchange(scene, &format!("{point}=kill@{passing}")).await?;
    scene.world.environment.set("queue.most_receives", MOST_RECEIVES);
    let deadline = Instant::now() + if is_of_worn { WORN_LIMIT } else { PASSING_LIMIT };
    let mut lived = Instant::now();
    let status = loop {
        let looked = Instant::now();
        if let Some(status) = scene.world.replicas[0].exited()? {
            scene.world.interrupted(lived);
            break Some(status);
        }
        if Instant::now() > deadline {
            break None;
        }
        lived = looked;
        feed(scene).await?;
    };
    scene.world.partner.control(|behaviour| behaviour.latency_ms = LATENCY_MS)?;
    let at_work = scene.world.at_work().await?;
    let injected = scene.world.replicas[0].has_logged(&["fault injected", point])?;
    let mut injection = Injection::new(point);
    injection.interruptions = 2;
    match status {
        Some(status) if status.signal() == Some(libc::SIGKILL) && injected => {
            // A point is in the middle of work by its place.
            injection =
                injection.hit(true, format!("{status} at {point}, passing {passing}; left behind: {at_work:?}"));
        }
        Some(status) => scene.violation("crash", format!("ordered to die at {point}, it ended with {status}")),
        None => {}
    }
    if status.is_none() {
        stop(scene).await?;
    }
    scene.world.restart(0).await?;
    Ok(injection)
}

/// A message is sent anew when it nears the number of receives after which SQS takes it for dead. Makes that the second,
/// and sends a refresh twice: while the run is at work, its other message is received again and again.
async fn wear(scene: &mut Scene<'_>) -> Result<()> {
    scene.world.environment.set("queue.most_receives", "2");
    scene.world.partner.control(|behaviour| behaviour.latency_ms = SLOW_PARTNER_MS)?;
    let (_, message) = scene.world.workload.whole_refresh();
    scene.world.workload.inputs.messages += 1;
    scene.world.send(vec![message.clone(), message]).await
}

/// A panic at `point`: the event is tried again and all others go on.
pub(super) async fn panic(scene: &mut Scene<'_>, point: &str) -> Result<Injection> {
    rest(scene).await?;
    exchange(scene, &format!("{point}=panic@1")).await?;
    let (injection, since) = passed(scene, point).await?;
    scene.world.interrupted(since);
    rest(scene).await?;
    Ok(injection)
}

/// A thread of the runtime stands still for longer than messages are hidden: the keeper must not notice.
pub(super) async fn stall(scene: &mut Scene<'_>, point: &str) -> Result<Injection> {
    rest(scene).await?;
    let retaken = "SELECT coalesce(sum(attempts - 1), 0)::bigint FROM runs";
    exchange(scene, &format!("{point}=stall:{}@1", STALL.as_millis())).await?;
    let before = scene.world.number(retaken).await?;
    let (injection, _) = passed(scene, point).await?;
    tokio::time::sleep(STALL).await;
    let after = scene.world.number(retaken).await?;
    if after != before {
        let more = after - before;
        scene.violation("stall", format!("{more} runs were begun anew while a thread stood still at {point}"));
    }
    Ok(injection)
}

/// One event ends the process whenever it is begun; after three deaths it is quarantined.
pub(super) async fn poison(scene: &mut Scene<'_>) -> Result<Injection> {
    rest(scene).await?;
    let (id, message) = scene.world.workload.poison("quarantined");
    // What ends beside it ends slowly: it must not be charged for a death that meets its end.
    let orders = format!("events.begin[{id}]=kill,delivery.before_forget=stall:200");
    exchange(scene, &orders).await?;
    scene.world.more(2).await?;
    scene.world.send(vec![message]).await?;
    let deadline = Instant::now() + scene.world.size.recovery;
    let mut deaths = 0;
    let mut lived = Instant::now();
    loop {
        let looked = Instant::now();
        if let Some(status) = scene.world.replicas[0].exited()? {
            let ordered = scene.world.replicas[0].has_logged(&["fault injected", &id])?;
            if status.signal() != Some(libc::SIGKILL) || !ordered {
                scene.violation("poison", format!("it ended with {status}, not by the poison"));
            }
            deaths += 1;
            scene.world.interrupted(lived);
            scene.world.spawn(0, &orders)?;
        } else if scene.world.idle().await? {
            break;
        }
        if deaths > *DEATHS.end() || Instant::now() > deadline {
            break;
        }
        lived = looked;
        tokio::time::sleep(LOOK).await;
    }
    if !DEATHS.contains(&deaths) {
        scene.violation("poison", format!("the event {id} ended the process {deaths} times"));
    }
    if scene.world.replicas[0].exited()?.is_none() {
        scene.world.replicas[0].ready().await?;
    } else {
        scene.world.restart(0).await?;
    }
    let injection = Injection { interruptions: u64::from(deaths), ..Injection::new(id) };
    Ok(if deaths > 0 { injection.hit(true, format!("{deaths} deaths")) } else { injection })
}

/// All work done, so that no run meets its third death in a row by chance.
async fn rest(scene: &mut Scene<'_>) -> Result<()> {
    let recovery = scene.world.size.recovery;
    if let Some(left) = scene.world.rest(recovery).await? {
        scene.violation("I6", format!("not at rest {recovery:?} after a fault: {left}"));
    }
    Ok(())
}

/// Ends the process in order and starts one with orders, which may end as soon as it likes.
async fn exchange(scene: &mut Scene<'_>, orders: &str) -> Result<()> {
    stop(scene).await?;
    scene.world.spawn(0, orders)
}

pub(super) async fn stop(scene: &mut Scene<'_>) -> Result<()> {
    scene.world.replicas[0].signal(libc::SIGTERM)?;
    scene.world.replicas[0].exit(GRACE * 3).await?;
    Ok(())
}

/// More work of all kinds, if there is none left.
async fn feed(scene: &mut Scene<'_>) -> Result<()> {
    if scene.world.idle().await? {
        scene.world.more(1).await?;
    }
    tokio::time::sleep(LOOK).await;
    Ok(())
}

/// Waits until the point was passed by a process that lives on; when it was not yet, for the last time.
async fn passed(scene: &mut Scene<'_>, point: &str) -> Result<(Injection, Instant)> {
    scene.world.replicas[0].ready().await?;
    let deadline = Instant::now() + PASSING_LIMIT;
    let mut before = Instant::now();
    while Instant::now() < deadline {
        scene.world.check_alive()?;
        let looked = Instant::now();
        if scene.world.replicas[0].has_logged(&["fault injected", point])? {
            let injection = Injection { interruptions: 1, ..Injection::new(point) };
            return Ok((injection.hit(true, format!("passed {point}")), before));
        }
        before = looked;
        feed(scene).await?;
    }
    Ok((Injection::new(point), before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_found_wherever_their_calls_are_broken() {
        let source =
            "fault::point(\"a.b\", id);\ncrate::fault::point(\n    \"c.d\",\n    &id,\n);\nfault::point(name, key)";
        assert_eq!(named_in(source), ["a.b", "c.d"]);
        let wrapped = "fault_point(\"e.f\", run);\nfault_points(\n\"g.h\", rows);\nfn fault_point(name: &str) {";
        assert_eq!(named_in(wrapped), ["e.f", "g.h"]);
    }

    /// A part whose points were not found would be killed at none of them, and nothing else would say so.
    #[test]
    fn points_of_every_part_of_the_service_are_found() {
        let found = find(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../src")).unwrap();
        for part in [
            "delivery.",
            "events.",
            "partner.",
            "publication.",
            "publish.",
            "queue.",
            "redrive.",
            "relay.",
            "resend.",
            "run.",
            "upsert.",
        ] {
            assert!(found.iter().any(|point| point.starts_with(part)), "no point begins with {part:?}: {found:?}");
        }
    }
}
