//! An operator's `write-api dlq redrive` that dies in its middle, while the service works.

use std::os::unix::process::ExitStatusExt;
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Injection, Scene};
use crate::replica::LOOK;
use crate::workload::LANES;
use crate::world::VISIBILITY;

/// Until what a dead redrive had received is visible again, on a busy machine.
const VISIBLE_LIMIT: Duration = Duration::from_secs(20);
/// A redrive waits for what others hold.
const ENDS_WITHIN: Duration = Duration::from_secs(60);

/// Kills a redrive at `point` and runs another to its end. Every letter is refused again, so the same must be there.
pub(super) async fn crash(scene: &mut Scene<'_>, point: &str) -> Result<Injection> {
    // Letters to redrive come with every burst.
    scene.world.more(1).await?;
    letters(scene).await?;
    let passing = scene.rng.u32(1..=3);
    let killed = redrive(scene, &format!("{point}=kill@{passing}")).await?;
    // It died at the end of this.
    scene.world.interrupted(Instant::now());
    let said = String::from_utf8_lossy(&killed.stderr).into_owned();
    visible(scene).await?;
    let again = redrive(scene, "").await?;
    // 1: letters were left, those that the service refused again meanwhile among them.
    if !matches!(again.status.code(), Some(0 | 1)) {
        let words = String::from_utf8_lossy(&again.stderr).into_owned();
        scene.violation("redrive", format!("after a death at {point} a redrive ended with {}: {words}", again.status));
    }
    visible(scene).await?;
    let injection = Injection::new(point);
    if killed.status.signal() != Some(libc::SIGKILL) || !said.contains("fault injected") {
        return Ok(injection);
    }
    Ok(injection.hit(true, format!("{} at {point}, passing {passing}; the next one: {}", killed.status, again.status)))
}

async fn redrive(scene: &Scene<'_>, orders: &str) -> Result<Output> {
    let mut command = scene.world.command(&["dlq", "redrive", "--all", "--force", "--rate", "1000"]);
    command.env("WRITE_API_FAULTS", orders);
    let ended = tokio::task::spawn_blocking(move || command.output());
    let ended = tokio::time::timeout(ENDS_WITHIN, ended).await;
    ended.with_context(|| format!("a redrive has not ended after {ENDS_WITHIN:?}"))??.context("cannot run a redrive")
}

/// Waits until there are letters.
async fn letters(scene: &Scene<'_>) -> Result<()> {
    let begun = Instant::now();
    loop {
        let mut found = 0;
        for lane in LANES {
            found += scene.world.letters_waiting(lane).await?.0;
        }
        if found > 2 {
            return Ok(());
        }
        ensure!(begun.elapsed() < VISIBLE_LIMIT, "{found} dead letters after {VISIBLE_LIMIT:?}");
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until nobody holds a letter.
async fn visible(scene: &Scene<'_>) -> Result<()> {
    let begun = Instant::now();
    loop {
        let mut held = 0;
        for lane in LANES {
            held += scene.world.letters_waiting(lane).await?.1;
        }
        if held == 0 {
            return Ok(());
        }
        ensure!(begun.elapsed() < VISIBLE_LIMIT, "{held} dead letters are hidden; they are for {VISIBILITY:?}");
        tokio::time::sleep(LOOK).await;
    }
}
