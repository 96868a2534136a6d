//! One process of the service.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use local_stack::{Ending, Environment, Process, free_port, http_client};

use crate::checker::Figures;

/// From the start of a process to its first "ready", on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How often something is looked at.
pub const LOOK: Duration = Duration::from_millis(20);
/// Gauges that are 0 when nothing is to be done.
const ZERO_AT_REST: [&str; 3] =
    ["write_api_events_in_flight", "write_api_partner_in_flight", "write_api_outbox_pending"];

/// A replica: a process that is started again when it has died, as a platform does it.
#[derive(Debug)]
pub struct Replica {
    /// Its name in reports.
    pub name: String,
    program: PathBuf,
    directory: PathBuf,
    process: Option<Process>,
    admin_url: String,
    incarnations: u32,
    at_first: Figures,
}

impl Replica {
    /// A replica that does not run yet. Its logs go to `directory`.
    #[must_use]
    pub fn new(number: usize, program: &Path, directory: &Path) -> Self {
        Self {
            name: format!("replica-{number}"),
            program: program.to_owned(),
            directory: directory.to_owned(),
            process: None,
            admin_url: String::new(),
            incarnations: 0,
            at_first: Figures::default(),
        }
    }

    /// Starts a process with more variables than the environment's, and waits for nothing.
    pub fn spawn(&mut self, environment: &Environment, variables: &[(String, String)]) -> Result<()> {
        self.incarnations += 1;
        let (admin, profiling) = (free_port()?, free_port()?);
        let mut environment = environment.clone();
        environment.set("admin.listen", &format!("127.0.0.1:{admin}"));
        environment.set("profiling.listen", &format!("127.0.0.1:{profiling}"));
        let mut command = Command::new(&self.program);
        command.arg("serve").envs(environment.variables()).envs(variables.iter().map(|(name, value)| (name, value)));
        self.process = Some(Process::spawn(&self.name, command, &self.log(), None, Ending::AT_ONCE)?);
        self.admin_url = format!("http://127.0.0.1:{admin}");
        Ok(())
    }

    /// Waits until `/readyz` says yes.
    pub async fn ready(&mut self) -> Result<()> {
        let url = format!("{}/readyz", self.admin_url);
        let probe = async || http_client::get(&url).await.ok().filter(|(status, _)| status.is_success()).map(drop);
        self.process()?.ready(START_LIMIT, probe).await?;
        let (descriptors, threads, resident) = self.appetite()?;
        self.at_first = Figures {
            name: self.name.clone(),
            not_at_rest: Vec::new(),
            descriptors: (descriptors, 0),
            threads: (threads, 0),
            resident: (resident, 0),
        };
        Ok(())
    }

    /// The log of the present process.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.directory.join(format!("{}-{}.log", self.name, self.incarnations))
    }

    /// Whether the log of the present process has a line with all of `parts`.
    pub fn has_logged(&self, parts: &[&str]) -> Result<bool> {
        let log = fs::read(self.log()).with_context(|| format!("cannot read {}", self.log().display()))?;
        let log = String::from_utf8_lossy(&log);
        Ok(log.lines().any(|line| parts.iter().all(|part| line.contains(part))))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: libc::c_int) -> Result<()> {
        self.process()?.signal(signal);
        Ok(())
    }

    /// The process id.
    pub fn id(&self) -> Result<u32> {
        Ok(self.process()?.id())
    }

    /// How the present process has ended, if it has.
    pub fn exited(&self) -> Result<Option<ExitStatus>> {
        self.process()?.exited()
    }

    /// Waits for the end of the present process.
    pub async fn exit(&self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "{} has not ended after {limit:?}", self.name);
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Status and body of an admin page.
    pub async fn page(&self, path: &str) -> Result<(u16, String)> {
        let (status, body) = http_client::get(&format!("{}{path}", self.admin_url)).await?;
        Ok((status.as_u16(), String::from_utf8_lossy(&body).into_owned()))
    }

    /// A sample of `/metrics` by its name and labels as written there; 0 if it is not there.
    pub async fn metric(&self, sample: &str) -> Result<f64> {
        let (_, page) = self.page("/metrics").await?;
        let value = page.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        Ok(value.map(str::parse).transpose()?.unwrap_or(0.0))
    }

    /// What it holds on to.
    pub async fn figures(&self) -> Result<Figures> {
        let (_, page) = self.page("/metrics").await?;
        let busy = |line: &&str| {
            let is_it = |name: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
            let gauge = ZERO_AT_REST.iter().any(is_it);
            gauge && line.rsplit_once(' ').is_some_and(|(_, value)| value != "0")
        };
        let not_at_rest = page.lines().filter(busy).map(str::to_owned).collect();
        let (descriptors, threads, resident) = self.appetite()?;
        Ok(Figures {
            not_at_rest,
            descriptors: (self.at_first.descriptors.0, descriptors),
            threads: (self.at_first.threads.0, threads),
            resident: (self.at_first.resident.0, resident),
            ..self.at_first.clone()
        })
    }

    /// Open descriptors, threads, and resident bytes, by Linux.
    fn appetite(&self) -> Result<(u64, u64, u64)> {
        let process = PathBuf::from(format!("/proc/{}", self.id()?));
        let count = |what| anyhow::Ok(fs::read_dir(process.join(what))?.count() as u64);
        let status = fs::read_to_string(process.join("status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        let resident: u64 = resident.context("no VmRSS")?.parse()?;
        Ok((count("fd")?, count("task")?, resident * 1_024))
    }

    fn process(&self) -> Result<&Process> {
        self.process.as_ref().with_context(|| format!("{} was never started", self.name))
    }
}
