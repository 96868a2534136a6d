//! Child processes that never outlive this one, however it ends.
//!
//! Dropping a [`Process`] stops it. For the ends that run no code (SIGKILL, abort) the kernel is asked beforehand to
//! signal the child when its parent is gone.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How often a child's exit or readiness is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// How a child is told to end.
#[derive(Clone, Copy, Debug)]
pub struct Ending {
    /// The signal that [`Process::stop`] sends first.
    pub stop: libc::c_int,
    /// The signal that the kernel sends when this process is gone.
    pub orphaned: libc::c_int,
    /// How long after `stop` the child is killed.
    pub patience: Duration,
}

impl Ending {
    /// For a child that has nothing to put in order.
    pub const AT_ONCE: Self = Self { stop: libc::SIGKILL, orphaned: libc::SIGKILL, patience: Duration::from_secs(5) };

    /// SIGTERM, and `patience` for an orderly shutdown; a child without its parent is killed.
    #[must_use]
    pub const fn graceful(patience: Duration) -> Self {
        Self { stop: libc::SIGTERM, orphaned: libc::SIGKILL, patience }
    }
}

/// A child process. Stopped when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    id: u32,
    child: Mutex<Child>,
    ending: Ending,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its standard error, and its standard output unless that is redirected already by
    /// `output`, going to the file `log`.
    ///
    /// The child gets a process group of its own: Ctrl-C on a terminal reaches this process only, which then stops
    /// its children in order.
    pub fn spawn(name: &str, mut command: Command, log: &Path, output: Option<File>, ending: Ending) -> Result<Self> {
        let open_log = || File::options().create(true).append(true).open(log);
        let stderr = open_log().with_context(|| format!("cannot open the log file {} of {name}", log.display()))?;
        let stdout = match output {
            Some(file) => file,
            None => stderr.try_clone()?,
        };
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        let child = spawn_tied(command, ending.orphaned).with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), id: child.id(), child: Mutex::new(child), ending, log: log.to_owned() })
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The exit status, if the child has ended.
    pub fn exited(&self) -> Result<Option<ExitStatus>> {
        self.child().try_wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Sends `signal`, unless the child has ended.
    pub fn signal(&self, signal: libc::c_int) {
        let mut child = self.child();
        // A child that was waited for has no process id any more: it may belong to somebody else by now.
        if let (Ok(None), Ok(id)) = (child.try_wait(), libc::pid_t::try_from(self.id)) {
            // SAFETY: kill has no memory effects; the id is that of a child not yet waited for.
            unsafe { libc::kill(id, signal) };
        }
    }

    /// Waits up to `limit` for the child to end by itself.
    pub fn wait(&self, limit: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            let status = self.exited()?;
            if status.is_some() || Instant::now() >= deadline {
                return Ok(status);
            }
            thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Ends the child in the way chosen at its start, and waits for that. Doing it twice does no harm.
    pub fn stop(&self) {
        self.signal(self.ending.stop);
        if !matches!(self.wait(self.ending.patience), Ok(Some(_))) {
            self.signal(libc::SIGKILL);
            let _ = self.child().wait();
        }
    }

    /// Calls `probe` until it gives a value; fails when the child ends before that, or `limit` passes.
    pub async fn ready<T>(&self, limit: Duration, mut probe: impl AsyncFnMut() -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.exited()? {
                bail!("{} ended while starting ({status}); the end of its log:\n{}", self.name, self.log_tail());
            }
            // One probe may hang for ever on a child that accepts and never answers.
            if let Ok(Some(value)) = tokio::time::timeout(Duration::from_secs(2), probe()).await {
                return Ok(value);
            }
            let (name, tail) = (&self.name, || self.log_tail());
            ensure!(Instant::now() < deadline, "{name} is not ready after {limit:?}; the end of its log:\n{}", tail());
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// The last 2,000 bytes of the log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&log[log.len().saturating_sub(2_000)..]).into_owned()
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Runs `command` to its end and gives its standard output; an exit status other than 0 is an error that carries the
/// end of its standard error.
pub(crate) async fn run(what: &str, mut command: Command) -> Result<String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = spawn_tied(command, libc::SIGKILL).with_context(|| format!("cannot start {what}"))?;
    let Output { status, stdout, stderr } = tokio::task::spawn_blocking(|| child.wait_with_output())
        .await?
        .with_context(|| format!("cannot wait for {what}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    ensure!(status.success(), "{what} failed ({status}):\n{}\n{}", text(&stdout), text(&stderr));
    Ok(text(&stdout))
}

/// A command on its way to the spawning thread, and where its child goes.
struct SpawnRequest {
    command: Command,
    child: mpsc::SyncSender<io::Result<Child>>,
}

/// The thread that starts every child. The kernel's "parent is gone" means the *thread* that forked: a child started
/// from a short-lived thread would be killed with it. This thread lives as long as the process, because its queue is a
/// static.
static SPAWNER: LazyLock<io::Result<mpsc::Sender<SpawnRequest>>> = LazyLock::new(|| {
    let (sender, requests) = mpsc::channel::<SpawnRequest>();
    thread::Builder::new().name("spawner".into()).spawn(move || {
        for SpawnRequest { mut command, child } in requests {
            // Whoever asked may have been cancelled; a child nobody holds is not kept.
            if let Err(mpsc::SendError(Ok(mut unwanted))) = child.send(command.spawn()) {
                let _ = unwanted.kill();
                let _ = unwanted.wait();
            }
        }
    })?;
    Ok(sender)
});

/// Starts `command` in a process group of its own, signalled with `orphaned` when this process is gone.
fn spawn_tied(mut command: Command, orphaned: libc::c_int) -> io::Result<Child> {
    let parent = std::process::id();
    let die_with_parent = move || {
        // SAFETY: prctl and getppid are async-signal-safe and touch no memory.
        let (result, parent_now) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, orphaned), libc::getppid()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have gone before the line above; then nobody would send the signal.
        if u32::try_from(parent_now) == Ok(parent) { Ok(()) } else { Err(ErrorKind::BrokenPipe.into()) }
    };
    command.process_group(0);
    // SAFETY: the closure makes two system calls and allocates nothing. The standard library calls it after changing
    // the user, which matters, because a change of user clears the setting.
    unsafe { command.pre_exec(die_with_parent) };

    let spawner = SPAWNER.as_ref().map_err(|error| io::Error::new(error.kind(), error.to_string()))?;
    let gone = || io::Error::other("the thread that starts children is gone");
    let (sender, child) = mpsc::sync_channel(1);
    spawner.send(SpawnRequest { command, child: sender }).map_err(|_| gone())?;
    child.recv().map_err(|_| gone())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn log(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("local-stack-test-{}-{name}.log", std::process::id()))
    }

    #[tokio::test]
    async fn a_failed_command_says_what_it_wrote() {
        let error = run("the probe", shell("echo out; echo broken >&2; exit 3")).await.expect_err("must fail");
        let text = format!("{error:#}");
        assert!(text.contains("the probe") && text.contains("broken") && text.contains('3'), "{text}");
    }

    #[tokio::test]
    async fn a_child_that_ends_early_is_not_waited_for() -> Result<()> {
        let log = log("early");
        let child = Process::spawn("early", shell("echo no such thing; exit 1"), &log, None, Ending::AT_ONCE)?;
        let started = Instant::now();
        let error = child.ready(Duration::from_secs(30), async || None::<()>).await.expect_err("must fail");
        assert!(started.elapsed() < Duration::from_secs(5));
        assert!(format!("{error:#}").contains("no such thing"), "{error:#}");
        std::fs::remove_file(log)?;
        Ok(())
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it_and_ends_when_dropped() -> Result<()> {
        let log = log("thread");
        let path = log.clone();
        let ending = Ending::graceful(Duration::from_secs(5));
        let spawn = move || Process::spawn("sleep", shell("exec sleep 60"), &path, None, ending);
        let child = thread::spawn(spawn).join().expect("no panic")?;
        assert!(child.wait(Duration::from_millis(200))?.is_none(), "ended with the thread that asked for it");
        let id = child.id();
        drop(child);
        assert!(!Path::new(&format!("/proc/{id}")).exists());
        std::fs::remove_file(log)?;
        Ok(())
    }

    #[test]
    fn a_child_that_ignores_the_signal_is_killed() -> Result<()> {
        let log = log("deaf");
        let ending = Ending::graceful(Duration::from_millis(100));
        let child = Process::spawn("deaf", shell("trap '' TERM; sleep 60 & wait; wait"), &log, None, ending)?;
        thread::sleep(Duration::from_millis(100));
        let started = Instant::now();
        child.stop();
        assert!(started.elapsed() < Duration::from_secs(5));
        assert!(child.exited()?.is_some());
        std::fs::remove_file(log)?;
        Ok(())
    }
}
