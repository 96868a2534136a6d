//! A process that gets no more memory.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Injection, Scene, process};
use crate::replica::LOOK;
use crate::world::GRACE;

/// Until there is work to be met.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// How long the cap stays where the process lives with it.
const CAPPED: Duration = Duration::from_secs(10);

/// Caps the data of a process at what it has, so that the next memory it asks for is refused. It dies of that or lives
/// without; the cap is taken away and the books must balance either way. A kernel that kills a whole process for its
/// memory does the same as `kill`.
pub(super) async fn cap(scene: &mut Scene<'_>) -> Result<Injection> {
    scene.world.busy(BUSY_LIMIT).await?;
    let replica = scene.rng.usize(0..scene.world.replicas.len());
    // A process that has worked has room to go on in; one that just started has to ask for it.
    scene.world.replicas[replica].signal(libc::SIGTERM)?;
    scene.world.replicas[replica].exit(GRACE * 3).await?;
    scene.world.restart(replica).await?;
    process::spare_the_hopeless(scene).await?;
    let id = scene.world.replicas[replica].id()?;
    let data = data(id)?;
    limit(id, &data.to_string())?;
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = scene.world.replicas[replica].exited()? {
            break Some(status);
        }
        if begun.elapsed() > CAPPED {
            break None;
        }
        if scene.world.idle().await? {
            scene.world.more(2).await?;
        }
        tokio::time::sleep(LOOK).await;
    };
    let injection = Injection { interruptions: 2, ..Injection::new(&scene.world.replicas[replica].name) };
    let Some(status) = status else {
        limit(id, "unlimited")?;
        return Ok(injection);
    };
    // Before a new process can take it.
    let at_work = scene.world.at_work().await?;
    process::note_death(scene).await?;
    // An allocation, or the stack of a thread.
    let log = &scene.world.replicas[replica];
    let refused =
        log.has_logged(&["memory allocation of"])? || log.has_logged(&["Resource temporarily unavailable"])?;
    scene.world.restart(replica).await?;
    let proof =
        format!("{status} after {:?} with no more than {data} bytes; left behind: {at_work:?}", begun.elapsed());
    if !refused {
        scene.violation("memory-cap", format!("it ended without a word of memory: {proof}"));
    }
    Ok(injection.hit(at_work.runs + at_work.publishers > 0, proof))
}

/// Private writable memory of a process in bytes, as the kernel counts it for the limit.
fn data(id: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    let data = status.lines().find_map(|line| line.strip_prefix("VmData:")?.trim().strip_suffix(" kB"));
    let kilobytes: u64 = data.with_context(|| format!("no VmData of the process {id}"))?.parse()?;
    Ok(kilobytes * 1_024)
}

/// Sets the soft limit, so that it can be raised again without any right.
fn limit(id: u32, bytes: &str) -> Result<()> {
    let done = Command::new("prlimit").args(["--pid", &id.to_string(), &format!("--data={bytes}:")]).output();
    let done = done.context("cannot run prlimit (Debian's package util-linux)")?;
    ensure!(done.status.success(), "prlimit --data={bytes}: {}", String::from_utf8_lossy(&done.stderr).trim());
    Ok(())
}
