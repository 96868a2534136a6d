//! A database whose disk is full: its tables lie in a small file system of their own, which is filled and emptied.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use local_stack::Stack;
use sqlx::AssertSqlSafe;

use super::{Injection, Scene, postgres};
use crate::world::World;

/// Until there is work to be met.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// Room for the tables of a small world.
const MEGABYTES: u32 = 256;
/// What the server says when a file cannot grow.
const REFUSAL: &str = "No space left on device";

/// A file system in memory, unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    directory: PathBuf,
    /// The tablespace in it.
    pub tablespace: String,
}

impl SmallDisk {
    fn mount(directory: &Path, owner: u32, group: u32) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let options = format!("size={MEGABYTES}m,mode=0700,uid={owner},gid={group}");
        let mut mount = Command::new("mount");
        let done = mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(directory).output();
        let done = done.context("cannot run mount")?;
        ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr).trim());
        Ok(Self { directory: directory.to_owned(), tablespace: String::new() })
    }

    /// Writes until nothing more goes in.
    fn fill(&self) -> Result<()> {
        let mut file = File::create(self.filler())?;
        for size in [1 << 20, 4_096] {
            let piece = vec![1; size];
            while file.write(&piece).is_ok_and(|written| written > 0) {}
        }
        Ok(())
    }

    fn empty(&self) -> Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }

    fn filler(&self) -> PathBuf {
        self.directory.join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a server that is still ending may have files open.
        let done = Command::new("umount").arg("--lazy").arg(&self.directory).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("campaign: {} is still mounted: umount it", self.directory.display());
        }
    }
}

/// Why this machine lets nobody mount, if it does not.
pub(super) fn refusal() -> Option<String> {
    let directory = std::env::temp_dir().join(format!("campaign-mount-{}", std::process::id()));
    let tried = SmallDisk::mount(&directory, 0, 0).map(drop);
    let _ = fs::remove_dir(&directory);
    tried.err().map(|error| format!("no file system can be mounted here: {error:#}"))
}

/// Moves all tables and indexes of a world onto a small disk.
pub(super) async fn prepare(world: &mut World, stack: &Stack) -> Result<()> {
    // Below the server's own directory, where nobody else can go.
    let home = stack.directory().join("postgres");
    let owner = fs::metadata(&home).with_context(|| format!("cannot look at {}", home.display()))?;
    let tablespace = format!("small_{}", world.environment.names().database);
    let directory = home.join(&tablespace);
    let mut disk = SmallDisk::mount(&directory, owner.uid(), owner.gid())?;
    disk.tablespace = tablespace;
    let name = &disk.tablespace;
    let place = directory.display();
    for statement in [
        format!("CREATE TABLESPACE {name} LOCATION '{place}'"),
        format!("ALTER TABLE ALL IN TABLESPACE pg_default SET TABLESPACE {name}"),
        format!("ALTER INDEX ALL IN TABLESPACE pg_default SET TABLESPACE {name}"),
    ] {
        let done = sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&world.database).await;
        done.with_context(|| format!("cannot {statement}"))?;
    }
    world.small_disk = Some(disk);
    Ok(())
}

/// Fills the disk in the middle of work and frees it some seconds later. The service is not restarted.
pub(super) async fn full(scene: &mut Scene<'_>) -> Result<Injection> {
    scene.world.busy(BUSY_LIMIT).await?;
    scene.pause(0..500).await;
    let before = postgres::said(scene, REFUSAL)?;
    disk(scene)?.fill()?;
    let injection = postgres::until_said(scene, REFUSAL, before).await?;
    disk(scene)?.empty()?;
    Ok(Injection { target: "the tables' disk".to_owned(), ..injection })
}

fn disk<'a>(scene: &'a Scene<'_>) -> Result<&'a SmallDisk> {
    scene.world.small_disk.as_ref().context("this world has no small disk")
}
