//! A process whose wall clock is wrong. Monotonic clocks go on as they are, as on a machine whose clock is set.
//!
//! By a library of a page of C that is loaded before the C library: libfaketime, which does more, cannot live beside an
//! allocator that asks for the time while the library begins.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Injection, Scene};
use crate::replica::LOOK;
use crate::world::World;

/// Until there is work to be met.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// Until a line of the log shows the wrong time.
const SEEN_LIMIT: Duration = Duration::from_secs(20);
/// Seconds: within and beyond the five minutes for which AWS takes a signature, and a day, both ways.
const SHIFTS: [i64; 8] = [-86_400, -3_600, -600, -60, 60, 600, 3_600, 86_400];
/// The library.
const SOURCE: &str = include_str!("clock.c");
/// The shift is in this file of the round's directory.
const FILE: &str = "clock";

/// Why there can be no library here, if so.
pub(super) fn refusal() -> Option<String> {
    let compiler = Command::new("gcc").arg("--version").output();
    compiler.err().map(|error| format!("gcc does not run: {error}"))
}

/// Has the processes that are started from now on add a file's seconds to their clock.
pub(super) fn prepare(world: &mut World) -> Result<()> {
    let directory = world.directory.canonicalize()?;
    let (source, library, file) = (directory.join("clock.c"), directory.join("clock.so"), directory.join(FILE));
    fs::write(&source, SOURCE)?;
    let compiled = Command::new("gcc").args(["-shared", "-fPIC", "-O2", "-o"]).arg(&library).arg(&source).output()?;
    ensure!(compiled.status.success(), "gcc: {}", String::from_utf8_lossy(&compiled.stderr));
    File::create(&file)?;
    set(&directory, 0)?;
    for (name, value) in [("LD_PRELOAD", library), ("CAMPAIGN_CLOCK", file)] {
        world.variables.push((name.to_owned(), value.display().to_string()));
    }
    Ok(())
}

/// In place: the processes have the file mapped.
fn set(directory: &Path, seconds: i64) -> Result<()> {
    let file = File::options().write(true).open(directory.join(FILE))?;
    Ok(file.write_all_at(&seconds.to_ne_bytes(), 0)?)
}

/// The clock jumps, work goes on for some seconds, and the clock jumps back.
pub(super) async fn shift(scene: &mut Scene<'_>) -> Result<Injection> {
    scene.world.busy(BUSY_LIMIT).await?;
    scene.pause(0..500).await;
    let seconds = scene.rng.choice(SHIFTS).unwrap_or(3_600);
    let time = Duration::from_millis(scene.rng.u64(3_000..7_000));
    set(&scene.world.directory, seconds)?;
    let begun = Instant::now();
    let (mut seen, mut at_work) = (None, false);
    while begun.elapsed() < time || (seen.is_none() && begun.elapsed() < SEEN_LIMIT) {
        scene.world.check_alive()?;
        let off = last_logged(&scene.world.replicas[0].log())? - OffsetDateTime::now_utc();
        // A line is up to some seconds old.
        if (off.whole_seconds() - seconds).abs() < seconds.abs() / 2 {
            let work = scene.world.at_work().await?;
            at_work |= work.runs + work.publishers > 0;
            seen = Some(off);
        }
        if scene.world.idle().await? {
            scene.world.more(1).await?;
        }
        tokio::time::sleep(LOOK).await;
    }
    set(&scene.world.directory, 0)?;
    let injection = Injection::new(format!("{seconds:+} s"));
    Ok(match seen {
        Some(off) => injection.hit(at_work, format!("its log was {off} off during {:?}", begun.elapsed())),
        None => injection,
    })
}

/// The time of the log's last whole line that has one.
fn last_logged(log: &Path) -> Result<OffsetDateTime> {
    let text = fs::read(log)?;
    let text = String::from_utf8_lossy(&text);
    let time = text.lines().rev().find_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        OffsetDateTime::parse(line["timestamp"].as_str()?, &Rfc3339).ok()
    });
    time.with_context(|| format!("no line of {} has a timestamp", log.display()))
}
