//! A process that has run out of file descriptors: it keeps what is open and can open nothing more.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use local_stack::Sampler;

use super::{Injection, Scene, postgres};
use crate::replica::LOOK;

/// Until there is work to be met.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// Lower than the number of any that it would open.
const NONE: &str = "3";
/// Until connections that were cut are gone from the server.
const GONE: Duration = Duration::from_secs(2);
/// Of a processor. Who tries to open something again and again without a pause takes all of it.
const BUSY: f64 = 0.5;

/// Takes the process' connections to the database away, and with them its means to get others, for some seconds.
pub(super) async fn run_out(scene: &mut Scene<'_>) -> Result<Injection> {
    scene.world.busy(BUSY_LIMIT).await?;
    scene.pause(0..500).await;
    let time = Duration::from_millis(scene.rng.u64(2_000..6_000));
    let (name, id) = (scene.world.replicas[0].name.clone(), scene.world.replicas[0].id()?);
    let before = prlimit(id, &["--nofile", "--output=SOFT", "--noheadings"])?;
    prlimit(id, &[&format!("--nofile={NONE}:")])?;
    postgres::proxy(scene)?.cut();
    let gone = Instant::now() + GONE;
    while scene.world.connections().await? > 0 {
        scene.world.check_alive()?;
        ensure!(Instant::now() < gone, "connections that were cut are still there after {GONE:?}");
        tokio::time::sleep(LOOK).await;
    }
    let work = scene.world.at_work().await?;
    let sampler = Sampler::start(id)?;
    let (begun, cpu) = (Instant::now(), sampler.cpu_seconds()?);
    let mut opened = 0;
    while begun.elapsed() < time {
        scene.world.check_alive()?;
        opened = opened.max(scene.world.connections().await?);
        tokio::time::sleep(LOOK).await;
    }
    let share = (sampler.cpu_seconds()? - cpu) / begun.elapsed().as_secs_f64();
    prlimit(id, &[&format!("--nofile={}:", before.trim())])?;
    if share > BUSY {
        scene.violation("F3", format!("{name} took {share:.2} of a processor while it could open nothing"));
    }
    let injection = Injection { interruptions: 1, ..Injection::new(name) };
    let proof =
        format!("in {time:?} it opened no connection in the middle of {work:?}, and took {share:.2} of a processor");
    Ok(if opened == 0 { injection.hit(work.runs + work.publishers > 0, proof) } else { injection })
}

fn prlimit(id: u32, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("prlimit");
    let done = command.arg("--pid").arg(id.to_string()).args(arguments).output().context("cannot run prlimit")?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr).trim());
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}
