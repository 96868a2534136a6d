//! A process that gets no more memory: a control group of the kernel caps it in the middle of work, and the kernel kills it
//! when it wants more.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Injection, Scene, process};
use crate::replica::LOOK;

/// Until there is work to be met.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// Until it wants more memory, with work coming in all the time.
const HIT_LIMIT: Duration = Duration::from_secs(20);
/// How much more than it has a process gets: less than a page of listings and the calls for it take.
const MORE: u64 = 256 << 10;
/// Where the first version of control groups has those for memory.
const GROUPS: &str = "/sys/fs/cgroup/memory";

/// A control group for memory. Removed when dropped, once no process is in it.
#[derive(Debug)]
struct Group(PathBuf);

impl Group {
    fn create(name: &str) -> Result<Self> {
        let directory = PathBuf::from(GROUPS).join(name);
        fs::create_dir(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        Ok(Self(directory))
    }

    fn write(&self, file: &str, value: u64) -> Result<()> {
        let path = self.0.join(file);
        fs::write(&path, value.to_string()).with_context(|| format!("cannot write {value} to {}", path.display()))
    }

    fn read(&self, file: &str) -> Result<String> {
        let path = self.0.join(file);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// How often the kernel killed a process of the group for its memory.
    fn kills(&self) -> Result<u64> {
        let control = self.read("memory.oom_control")?;
        let kills = control.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(kills.context("memory.oom_control has no oom_kill")?.trim().parse()?)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("campaign: {} is still there: {error}", self.0.display());
        }
    }
}

/// Why this machine lets nobody cap a process, if it does not.
pub(super) fn refusal() -> Option<String> {
    let tried = Group::create(&format!("campaign-{}-try", std::process::id()))
        .and_then(|group| group.write("memory.limit_in_bytes", 1 << 30).and_then(|()| group.kills()));
    tried.err().map(|error| format!("no control group of version 1 for memory: {error:#}"))
}

/// Exchanges a process for one whose memory is counted from its start, and caps that at little more than it has.
pub(super) async fn cap(scene: &mut Scene<'_>) -> Result<Injection> {
    let group = Group::create(&format!("campaign-{}", scene.world.environment.names().database))?;
    super::points::stop(scene).await?;
    scene.world.spawn(0, "")?;
    group.write("cgroup.procs", scene.world.replicas[0].id()?.into())?;
    scene.world.replicas[0].ready().await?;
    scene.world.busy(BUSY_LIMIT).await?;
    scene.pause(0..500).await;
    process::spare_the_hopeless(scene).await?;
    let has: u64 = group.read("memory.usage_in_bytes")?.trim().parse()?;
    group.write("memory.limit_in_bytes", has + MORE)?;
    let begun = Instant::now();
    let mut lived = begun;
    let status = loop {
        let looked = Instant::now();
        if let Some(status) = scene.world.replicas[0].exited()? {
            scene.world.interrupted(lived);
            break Some(status);
        }
        if begun.elapsed() > HIT_LIMIT {
            break None;
        }
        lived = looked;
        if scene.world.idle().await? {
            scene.world.more(2).await?;
        }
        tokio::time::sleep(LOOK).await;
    };
    let injection = Injection { interruptions: 1, ..Injection::new(&scene.world.replicas[0].name) };
    let Some(status) = status else {
        // It lives with what it has.
        super::points::stop(scene).await?;
        scene.world.restart(0).await?;
        return Ok(injection);
    };
    // Before a new process can take it.
    let at_work = scene.world.at_work().await?;
    process::note_death(scene).await?;
    let kills = group.kills()?;
    if kills == 0 {
        scene.violation("memory-cap", format!("it ended with {status}, and the kernel did not kill it for its memory"));
    }
    scene.world.restart(0).await?;
    let proof = format!(
        "{status}, killed by the kernel for its memory {:?} after a cap at {} KiB; left behind: {at_work:?}",
        begun.elapsed(),
        (has + MORE) >> 10
    );
    Ok(injection.hit(at_work.runs + at_work.publishers > 0, proof))
}
