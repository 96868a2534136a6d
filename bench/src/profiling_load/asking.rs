//! Requests for profiles: every mode in every form, one after another, and what came of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use local_stack::{Environment, Process, http_client};
use tokio::time::interval;
use write_api::profiling::pprof::Profile;

/// 50 a minute.
const BETWEEN: Duration = Duration::from_millis(1_200);
/// Every so many profiles are read by Go's own tool as well.
const BY_GO: u64 = 10;
/// The modes that can be subtracted and have a text.
const STATES: [&str; 6] = ["heap", "allocs", "goroutine", "threadcreate", "block", "mutex"];
const FORMS: [&str; 5] = ["", "debug=1", "seconds=1", "format=svg", "format=collapsed"];
const OTHERS: [&str; 6] = [
    "profile?seconds=1&hz=99",
    "profile?seconds=1&hz=99&format=svg",
    "profile?seconds=1&hz=99&format=collapsed",
    "goroutine?debug=2",
    "heap?gc=1",
    "trace?seconds=1",
];

/// What came of the requests.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    /// How many, by mode and status; status 0 for none.
    pub(crate) by_mode: BTreeMap<String, BTreeMap<u16, u64>>,
    /// What was wrong with answers.
    pub(crate) wrong: Vec<String>,
    /// How many were also read by Go's tool.
    pub(crate) read_by_go: u64,
    /// The longest that one took.
    pub(crate) longest: Duration,
}

/// Whoever asks.
pub(crate) struct Asking {
    url: String,
    /// Where Go's tool reads from.
    file: PathBuf,
    /// All there is to ask, in turn.
    targets: Vec<String>,
    asked: u64,
    profiles: u64,
    pub(crate) answers: Answers,
}

impl Asking {
    pub(crate) fn new(environment: &Environment, file: &Path) -> Self {
        let url = format!("{}/debug/pprof", environment.profiling_url());
        let states = FORMS.iter().flat_map(|form| STATES.iter().map(move |mode| format!("{mode}?{form}")));
        let targets = states.chain(OTHERS.map(str::to_owned)).collect();
        Self { url, file: file.to_owned(), targets, asked: 0, profiles: 0, answers: Answers::default() }
    }

    /// Asks for so long. An error means that the service is no more.
    pub(crate) async fn ask(&mut self, time: Duration, process: &Process) -> Result<()> {
        let begun = Instant::now();
        let mut ticks = interval(BETWEEN);
        while begun.elapsed() < time {
            ticks.tick().await;
            if let Some(status) = process.exited()? {
                bail!("write-api serve crashed ({status}); the end of its log:\n{}", process.log_tail());
            }
            let target = self.targets[self.asked as usize % self.targets.len()].clone();
            self.asked += 1;
            self.ask_for(&target).await;
        }
        Ok(())
    }

    async fn ask_for(&mut self, target: &str) {
        let begun = Instant::now();
        let answer = http_client::get(&format!("{}/{target}", self.url)).await;
        self.answers.longest = self.answers.longest.max(begun.elapsed());
        let status = answer.as_ref().map_or(0, |(status, _)| status.as_u16());
        let (mode, _) = target.split_once('?').unwrap_or((target, ""));
        *self.answers.by_mode.entry(mode.to_owned()).or_default().entry(status).or_default() += 1;
        let checked = match answer {
            Ok((status, body)) if status.is_success() => self.check(target, &body),
            Ok((status, body)) => Err(anyhow::anyhow!("{status}: {}", String::from_utf8_lossy(&body))),
            Err(error) => Err(error),
        };
        if let Err(error) = checked {
            self.answers.wrong.push(format!("{target}: {error:#}"));
        }
    }

    fn check(&mut self, target: &str, body: &[u8]) -> Result<()> {
        if target.starts_with("trace") {
            serde_json::from_slice::<serde_json::Value>(body).context("no JSON")?;
        } else if target.contains("debug=") || target.contains("format=") {
            let text = std::str::from_utf8(body).context("no text")?;
            // Where nothing waited for a lock or ran at the moment of a sample, there is no stack that did.
            let may_be_empty = ["mutex?", "profile?"].iter().any(|mode| target.starts_with(mode));
            ensure!(!text.is_empty() || may_be_empty, "an empty answer");
            ensure!(!target.contains("format=svg") || text.contains("<svg"), "no picture");
        } else {
            let profile = Profile::decode(body)?;
            let is_never_empty = ["heap?", "allocs?", "goroutine?", "threadcreate?"].contains(&target);
            ensure!(!profile.samples.is_empty() || !is_never_empty, "no sample");
            self.profiles += 1;
            if self.profiles % BY_GO == 1 {
                self.read_by_go(body)?;
            }
        }
        Ok(())
    }

    fn read_by_go(&mut self, body: &[u8]) -> Result<()> {
        std::fs::write(&self.file, body).with_context(|| format!("cannot write {}", self.file.display()))?;
        let directory = self.file.parent().context("a file in a directory")?;
        let mut go = Command::new("go");
        go.args(["tool", "pprof", "-top"]).arg(&self.file);
        go.env("HOME", directory).env("PPROF_TMPDIR", directory).env("GOFLAGS", "").env("GOTOOLCHAIN", "local");
        let output =
            go.output().context("cannot run `go`, which reads the profiles: install Go (Debian: golang-go)")?;
        ensure!(output.status.success(), "go tool pprof: {}", String::from_utf8_lossy(&output.stderr));
        self.answers.read_by_go += 1;
        Ok(())
    }
}
