//! Signals: kill -9, SIGTERM, SIGSTOP with SIGCONT.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Injection, Scene};
use crate::replica::LOOK;
use crate::workload::Lane;
use crate::world::{GRACE, VISIBILITY};

/// Until there is work to be met, on a busy machine and after a fault.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// A message given back must be there for others after this.
const VISIBLE_AGAIN: Duration = Duration::from_secs(5);
/// A process that goes on has ended what it had in hand after this: the limits of its calls are 2 and 3 s.
const CATCH_UP: Duration = Duration::from_secs(3);

/// kill -9 at a random instant of work; the platform starts the process again.
pub(super) async fn kill(scene: &mut Scene<'_>) -> Result<Injection> {
    scene.world.busy(BUSY_LIMIT).await?;
    scene.pause(0..1_000).await;
    spare_the_hopeless(scene).await?;
    let replica = scene.rng.usize(0..scene.world.replicas.len());
    let killed = Instant::now();
    scene.world.replicas[replica].signal(libc::SIGKILL)?;
    let status = scene.world.replicas[replica].exit(BUSY_LIMIT).await?;
    scene.world.interrupted(killed);
    // Before a new process can take it.
    let at_work = scene.world.at_work().await?;
    let hidden = scene.world.depth(Lane::Valuations).await?.1;
    note_death(scene).await?;
    scene.world.restart(replica).await?;
    let mut injection = Injection::new(&scene.world.replicas[replica].name);
    injection.interruptions = 1;
    injection.batches = u64::try_from(at_work.runs).ok();
    if status.signal() != Some(libc::SIGKILL) {
        return Ok(injection);
    }
    let proof = format!("{status}; left behind: {at_work:?}, {hidden} hidden refreshes");
    Ok(injection.hit(at_work.runs + at_work.publishers > 0, proof))
}

/// Progress of everything that is owned.
async fn owned(scene: &Scene<'_>) -> Result<BTreeMap<String, i64>> {
    let statement = "SELECT run_id, valued + failed FROM runs WHERE owner IS NOT NULL
                     UNION ALL
                     SELECT 'p ' || event_id, published FROM publications JOIN runs USING (run_id)
                     WHERE publisher IS NOT NULL AND publications.state = 'running'";
    let rows: Vec<(String, i64)> = sqlx::query_as(statement).fetch_all(&scene.world.database).await?;
    Ok(rows.into_iter().collect())
}

/// Waits while a run is owned that has died already since its last progress. Three such deaths in a row quarantine an event
/// by right; a kill at random is not what that is for, so no run gets more than two.
pub(super) async fn spare_the_hopeless(scene: &Scene<'_>) -> Result<()> {
    let deadline = Instant::now() + BUSY_LIMIT;
    loop {
        let owned = owned(scene).await?;
        let hopeless =
            owned.iter().find(|(id, progress)| scene.unproductive.get(*id).is_some_and(|(at, _)| at == *progress));
        let Some(hopeless) = hopeless else { return Ok(()) };
        ensure!(Instant::now() < deadline, "no progress since its last death: {hopeless:?}");
        tokio::time::sleep(LOOK).await;
    }
}

/// Remembers what was owned as a process died.
pub(super) async fn note_death(scene: &mut Scene<'_>) -> Result<()> {
    for (id, progress) in owned(scene).await? {
        let death = scene.unproductive.entry(id).or_insert((progress, 0));
        *death = if death.0 == progress { (progress, death.1 + 1) } else { (progress, 1) };
    }
    Ok(())
}

/// SIGTERM in the middle of work: an orderly end within the grace period, after which the work is free for others.
pub(super) async fn term(scene: &mut Scene<'_>) -> Result<Injection> {
    scene.world.busy(BUSY_LIMIT).await?;
    scene.pause(0..600).await;
    let replica = scene.rng.usize(0..scene.world.replicas.len());
    let before = scene.world.at_work().await?;
    scene.world.replicas[replica].signal(libc::SIGTERM)?;
    let signalled = Instant::now();
    let status = scene.world.replicas[replica].exit(GRACE * 3).await?;
    let took = signalled.elapsed();
    if status.code() != Some(0) || took > GRACE {
        scene.violation("term", format!("SIGTERM ended with {status} after {took:?}, the grace period is {GRACE:?}"));
    }
    if scene.world.replicas.len() == 1 {
        let after = scene.world.at_work().await?;
        if after.runs + after.publishers > 0 {
            scene.violation("term", format!("after an orderly end somebody is at work: {after:?}"));
        }
        let visible = visible_again(scene).await?;
        if visible > VISIBLE_AGAIN {
            scene.violation("term", format!("messages are still hidden {visible:?} after an orderly end"));
        }
    }
    scene.world.restart(replica).await?;
    let injection = Injection { interruptions: 1, ..Injection::new(&scene.world.replicas[replica].name) };
    Ok(injection.hit(before.runs > 0, format!("{status} after {took:?}, in the middle of {before:?}")))
}

/// How long it takes until no refresh is hidden; a little more than the limit if it takes longer.
async fn visible_again(scene: &Scene<'_>) -> Result<Duration> {
    let ended = Instant::now();
    loop {
        let hidden = scene.world.depth(Lane::Valuations).await?.1 + scene.world.depth(Lane::PostProcessing).await?.1;
        // A deferred message is hidden by right.
        let deferred = scene.world.number("SELECT count(*) FROM runs WHERE state = 'running'").await?;
        if hidden == 0 || deferred == 0 || ended.elapsed() > VISIBLE_AGAIN {
            return Ok(ended.elapsed());
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// SIGSTOP past the lease, and SIGCONT when another replica has the run: a zombie, which must write nothing.
pub(super) async fn stop(scene: &mut Scene<'_>) -> Result<Injection> {
    ensure!(scene.world.replicas.len() > 1, "a zombie needs a second replica");
    let deadline = Instant::now() + BUSY_LIMIT;
    let replica = loop {
        scene.world.busy(BUSY_LIMIT).await?;
        scene.pause(0..300).await;
        let mut owner = None;
        for (index, replica) in scene.world.replicas.iter().enumerate() {
            if replica.metric(r#"write_api_events_in_flight{lane="valuations"}"#).await? > 0.0 {
                owner = Some(index);
            }
        }
        if let Some(owner) = owner {
            break owner;
        }
        ensure!(Instant::now() < deadline, "no replica says that it works on a run");
    };
    let stopped = Instant::now();
    scene.world.replicas[replica].signal(libc::SIGSTOP)?;
    let before = owners(scene).await?;
    let limit = VISIBILITY * 6;
    let taken = loop {
        let taken =
            owners(scene).await?.into_iter().find(|(run, owner)| before.get(run).is_some_and(|old| old != owner));
        if taken.is_some() || stopped.elapsed() > limit {
            break taken;
        }
        tokio::time::sleep(LOOK).await;
    };
    // Sometimes the heir is in the middle of it, sometimes it is done.
    scene.pause(0..2_000).await;
    scene.world.replicas[replica].signal(libc::SIGCONT)?;
    // What it had in hand it still sends, and deletes in vain what others were given meanwhile.
    scene.world.interrupted_until(stopped, Instant::now() + CATCH_UP);
    let injection = Injection { interruptions: 2, ..Injection::new(&scene.world.replicas[replica].name) };
    Ok(match taken {
        Some((run, _)) => {
            let proof = format!("the run {run} had another owner when it went on after {:?}", stopped.elapsed());
            injection.hit(true, proof)
        }
        None => injection,
    })
}

async fn owners(scene: &Scene<'_>) -> Result<BTreeMap<String, String>> {
    let statement = "SELECT run_id, owner::text FROM runs WHERE owner IS NOT NULL";
    let rows: Vec<(String, String)> =
        sqlx::query_as(statement).fetch_all(&scene.world.database).await.context("cannot read the owners")?;
    Ok(rows.into_iter().collect())
}
