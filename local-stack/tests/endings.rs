//! However `local-stack up` ends, nothing that it started is left.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// `local-stack up` with a temporary directory of its own. Killed when dropped.
struct Up {
    child: Child,
    home: PathBuf,
}

impl Up {
    fn start(home: &Path) -> Result<Self> {
        let child = Command::new(env!("CARGO_BIN_EXE_local-stack"))
            .args(["up", "--env-file"])
            .arg(home.join("env"))
            .env("TMPDIR", home)
            .stdout(Stdio::null())
            .spawn()?;
        let mut up = Self { child, home: home.to_owned() };
        let env_file = home.join("env");
        wait_until("the file of variables", Duration::from_secs(120), || {
            ensure!(up.child.try_wait()?.is_none(), "local-stack ended");
            Ok(env_file.exists())
        })?;
        Ok(up)
    }

    fn signal(&self, signal: libc::c_int) -> Result<()> {
        // SAFETY: the id is that of a child not yet waited for.
        ensure!(unsafe { libc::kill(self.child.id().cast_signed(), signal) } == 0, "cannot send signal {signal}");
        Ok(())
    }

    /// All processes below this one, with the start times that tell them from later ones with the same id.
    fn descendants(&self) -> Result<BTreeSet<Process>> {
        let all = processes()?;
        let mut found = BTreeSet::new();
        let mut parents = vec![self.child.id()];
        while let Some(parent) = parents.pop() {
            for (process, its_parent) in &all {
                if *its_parent == parent && found.insert(*process) {
                    parents.push(process.id);
                }
            }
        }
        Ok(found)
    }

    /// The stacks' directories.
    fn directories(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(&self.home)?.collect::<Result<Vec<_>, _>>()?;
        let is_stack = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().contains("local-stack-");
        Ok(entries.iter().filter(|entry| is_stack(entry)).map(fs::DirEntry::path).collect())
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Process {
    id: u32,
    started: u64,
}

/// Every process of the machine with its parent's id.
fn processes() -> Result<Vec<(Process, u32)>> {
    let ids = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let describe = |id: u32| {
        // After the command in parentheses: state, parent, and as the 20th field the start time.
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        (*fields.first()? != "Z").then_some(())?;
        Some((Process { id, started: fields.get(19)?.parse().ok()? }, fields.get(1)?.parse().ok()?))
    };
    Ok(ids.filter_map(describe).collect())
}

fn none_is_left(of: &BTreeSet<Process>) -> Result<bool> {
    Ok(processes()?.iter().all(|(process, _)| !of.contains(process)))
}

fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !condition()? {
        ensure!(Instant::now() < deadline, "waited {limit:?} for {what}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn home(name: &str) -> Result<PathBuf> {
    let home = std::env::temp_dir().join(format!("endings-{}-{name}", std::process::id()));
    fs::create_dir_all(&home)?;
    Ok(home)
}

#[test]
fn a_kill_leaves_no_process_and_the_next_start_sweeps_the_files() -> Result<()> {
    let home = home("kill")?;
    let mut up = Up::start(&home)?;
    let started = up.descendants()?;
    // Three servers at least; PostgreSQL has processes of its own.
    ensure!(started.len() > 3, "found only {started:?}");
    let left_behind = up.directories()?;
    ensure!(left_behind.len() == 1, "{left_behind:?}");

    up.signal(libc::SIGKILL)?;
    up.child.wait()?;
    wait_until("the servers to end", Duration::from_secs(10), || none_is_left(&started))?;

    fs::remove_file(home.join("env"))?;
    let up = Up::start(&home)?;
    let directories = up.directories()?;
    ensure!(directories.len() == 1 && directories != left_behind, "not swept: {directories:?}");
    drop(up);
    fs::remove_dir_all(home)?;
    Ok(())
}

#[test]
fn a_signal_ends_everything_in_order() -> Result<()> {
    let home = home("signal")?;
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let mut up = Up::start(&home)?;
        let started = up.descendants()?;
        up.signal(signal)?;
        let status = up.child.wait()?;
        ensure!(status.success(), "signal {signal}: {status}");
        ensure!(none_is_left(&started)?, "signal {signal}: a server outlived local-stack");
        ensure!(up.directories()?.is_empty(), "signal {signal}: files are left: {:?}", up.directories()?);
        ensure!(!home.join("env").exists(), "signal {signal}: the file of variables is left");
    }
    fs::remove_dir_all(&home).with_context(|| format!("cannot remove {}", home.display()))?;
    Ok(())
}
