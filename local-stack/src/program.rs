//! The service's program, run as a user would run it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::environment::Environment;
use crate::http_client;
use crate::machine;
use crate::process::{Ending, Process};
use anyhow::{Context, Result, ensure};

/// From the start of `serve` to its first "ready".
const READY_LIMIT: Duration = Duration::from_secs(60);
/// The service's own limit for stopping is 25 s.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How often the end of a child is looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// The program, with the variables that point it at the stack.
#[derive(Debug)]
pub struct Program {
    binary: PathBuf,
    environment: Environment,
    log: PathBuf,
    steps_log: PathBuf,
}

impl Program {
    /// The program at `binary`, by default the one built beside this. Its logs are kept under `name`; those of an earlier
    /// time are emptied.
    pub fn new(binary: Option<&Path>, environment: Environment, name: &str) -> Result<Self> {
        let binary = match binary {
            Some(binary) => binary.to_owned(),
            None => machine::workspace_binary("write-api")?,
        };
        // Through the directory this was started in, because the child has the same.
        ensure!(binary.is_file(), "{} is no file: --service-binary takes the path of write-api", binary.display());
        let binary = binary.canonicalize().with_context(|| format!("cannot resolve {}", binary.display()))?;
        let directory = machine::cache_directory()?;
        let (log, steps_log) =
            (directory.join(format!("{name}-serve.log")), directory.join(format!("{name}-steps.log")));
        for log in [&log, &steps_log] {
            std::fs::write(log, "").with_context(|| format!("cannot write {}", log.display()))?;
        }
        Ok(Self { binary, environment, log, steps_log })
    }

    /// Whether the program was built without optimising everything, going by where it lies.
    pub fn is_development_build(&self) -> bool {
        self.binary.parent().is_some_and(|directory| directory.ends_with("debug"))
    }

    /// Where the output of `serve` goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Where the program lies.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// The stack as the program sees it.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// Starts a verb and leaves it running.
    pub fn start(&self, arguments: &[&str]) -> Result<Process> {
        self.start_with(arguments, &self.steps_log)
    }

    fn start_with(&self, arguments: &[&str], log: &Path) -> Result<Process> {
        let mut command = Command::new(&self.binary);
        command.args(arguments);
        // Settings in the shell that this was started from would make it something else.
        let inherited = std::env::vars_os().map(|(name, _)| name);
        for name in inherited.filter(|name| {
            let name = name.to_string_lossy();
            name.starts_with("WRITE_API_") || name.starts_with("AWS_")
        }) {
            command.env_remove(name);
        }
        command.envs(self.environment.variables());
        let program = self.binary.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{program} {}", arguments.first().unwrap_or(&""));
        Process::spawn(&name, command, log, None, Ending::graceful(STOP_LIMIT))
    }

    /// Runs a verb to its end.
    pub async fn run(&self, arguments: &[&str]) -> Result<()> {
        let process = self.start(arguments)?;
        loop {
            if let Some(status) = process.exited()? {
                let (verb, tail) = (arguments.join(" "), process.log_tail());
                ensure!(status.success(), "write-api {verb} failed ({status}); the end of its log:\n{tail}");
                return Ok(());
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Starts `serve` and waits until it can work.
    pub async fn serve(&self) -> Result<Process> {
        self.serve_as(&["serve"]).await
    }

    /// Starts the program with these arguments, which make it a service, and waits until it can work.
    pub async fn serve_as(&self, arguments: &[&str]) -> Result<Process> {
        let process = self.start_with(arguments, &self.log)?;
        let url = format!("{}/readyz", self.environment.admin_url());
        let probe = async || http_client::get(&url).await.ok().filter(|(status, _)| status.is_success());
        process.ready(READY_LIMIT, probe).await?;
        Ok(process)
    }

    /// Lines of the log that are warnings or errors.
    pub fn warnings(&self) -> Result<u64> {
        let log = std::fs::read_to_string(&self.log).with_context(|| format!("cannot read {}", self.log.display()))?;
        Ok(count_warnings(&log))
    }
}

fn count_warnings(log: &str) -> u64 {
    let is_warning = |line: &&str| line.contains(r#""level":"WARN""#) || line.contains(r#""level":"ERROR""#);
    log.lines().filter(is_warning).count() as u64
}

/// Allows this process, and the children that it starts from now on, as many open files as may be: with 1,000 calls in
/// flight the partner stub here and the service there have more connections than the usual limit of 1,024.
pub fn allow_open_files() -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let failed = || std::io::Error::last_os_error();
    // SAFETY: both calls are given a valid structure.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) != 0 {
            return Err(failed()).context("cannot read the limit of open files");
        }
        limit.rlim_cur = limit.rlim_max;
        if libc::setrlimit(libc::RLIMIT_NOFILE, &limit) != 0 {
            return Err(failed()).context("cannot raise the limit of open files");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_counted_by_their_level() {
        let log =
            "{\"level\":\"INFO\",\"message\":\"ERROR is a word here\"}\n{\"level\":\"WARN\"}\n{\"level\":\"ERROR\"}\n";
        assert_eq!(count_warnings(log), 2);
    }
}
