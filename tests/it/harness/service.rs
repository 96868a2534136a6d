//! The service as a process: asked over HTTP, signalled, and its log read.

use std::fs;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use local_stack::{Process, http_client};
use serde_json::Value;

use super::{SOON, text, until};

/// The program at work. Killed when dropped.
pub struct Service {
    pub(super) process: Process,
    pub(super) log: PathBuf,
    pub(super) admin_url: String,
    pub(super) profiling_url: String,
    pub(super) errors_expected: std::cell::Cell<bool>,
    pub(super) ended_well: std::cell::Cell<bool>,
}

impl Service {
    /// Lines at level ERROR are what the test is about.
    pub fn expect_errors(&self) {
        self.errors_expected.set(true);
    }

    pub fn admin_url(&self) -> &str {
        &self.admin_url
    }

    pub fn profiling_url(&self) -> &str {
        &self.profiling_url
    }

    /// Waits until `/readyz` says yes.
    pub async fn ready(&self) -> Result<()> {
        let url = format!("{}/readyz", self.admin_url);
        let probe = async || http_client::get(&url).await.ok().filter(|(status, _)| status.is_success()).map(drop);
        self.process.ready(SOON, probe).await
    }

    /// Status and body of an admin page.
    pub async fn page(&self, path: &str) -> Result<(u16, String)> {
        let (status, body) = http_client::get(&format!("{}{path}", self.admin_url)).await?;
        Ok((status.as_u16(), text(&body)))
    }

    /// A sample of `/metrics`, by its name with labels as they are written there; 0 if it is not there.
    pub async fn metric(&self, sample: &str) -> Result<f64> {
        let (_, page) = self.page("/metrics").await?;
        let line = page.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        Ok(line.map(str::parse).transpose()?.unwrap_or(0.0))
    }

    /// The end that leaves no time for anything.
    pub async fn kill(self) -> Result<()> {
        self.process.signal(libc::SIGKILL);
        self.exit(SOON).await?;
        self.ended_well.set(true);
        Ok(())
    }

    pub fn signal(&self, signal: libc::c_int) {
        self.process.signal(signal);
    }

    /// Waits for the end.
    pub async fn exit(&self, limit: Duration) -> Result<ExitStatus> {
        let ended = until("the end of the service", limit, async || self.process.exited()).await;
        ended.with_context(|| format!("the end of its log:\n{}", self.process.log_tail()))
    }

    pub fn is_running(&self) -> Result<bool> {
        Ok(self.process.exited()?.is_none())
    }

    /// Everything that it wrote.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }

    /// SIGTERM, exit 0 within the grace period, and no ERROR in the log unless expected.
    pub async fn finish(self) -> Result<()> {
        self.signal(libc::SIGTERM);
        let status = self.exit(Duration::from_secs(25)).await?;
        let log = self.log()?;
        ensure!(status.code() == Some(0), "ended with {status}; its log:\n{log}");
        self.check_log()
    }

    /// No ERROR in the log unless expected, and JSON on every line.
    pub fn check_log(&self) -> Result<()> {
        for line in self.log()?.lines() {
            let entry: Value = serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))?;
            if entry["level"] == "ERROR" && !self.errors_expected.get() {
                bail!("an error in the log: {line}");
            }
        }
        self.ended_well.set(true);
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if !self.ended_well.get() {
            eprintln!("the end of {}:\n{}", self.log.display(), self.process.log_tail());
        }
    }
}
