//! What was promised and what was found.

use std::fmt::Write;
use std::path::Path;
use std::process::ExitStatus;

use anyhow::{Context, Result};
use local_stack::Exposition;

use crate::asking::Answers;
use crate::load::Sent;
use crate::log::Messages;

/// Memory that may be more 15 s after the last request than before the first.
const MORE_MIB: f64 = 20.0;
/// Of 50 requests a minute; those that take longer than their turn make the others late.
const A_MINUTE: u64 = 45;
/// Snapshots of 6 a minute.
const SNAPSHOTS_A_MINUTE: u64 = 5;

/// The findings, a line each; those that break a promise apart.
#[derive(Debug)]
pub(crate) struct Promises {
    minutes: u64,
    lines: Vec<String>,
    broken: Vec<String>,
}

impl Promises {
    pub(crate) fn new(minutes: u64) -> Self {
        Self { minutes, lines: Vec::new(), broken: Vec::new() }
    }

    pub(crate) fn kept(&self) -> bool {
        self.broken.is_empty()
    }

    /// A figure, and whether it is as promised.
    fn add(&mut self, name: &str, figure: impl std::fmt::Display, as_promised: bool) {
        let line = format!("{name:<44} {figure}");
        if !as_promised {
            self.broken.push(line.clone());
        }
        self.lines.push(line);
    }

    pub(crate) fn answers(&mut self, answers: Answers) {
        let mut all = 0;
        for (mode, by_status) in &answers.by_mode {
            all += by_status.values().sum::<u64>();
            let text: Vec<String> = by_status.iter().map(|(status, count)| format!("{count} x {status}")).collect();
            self.add(&format!("requests for {mode}"), text.join(", "), by_status.keys().all(|status| *status == 200));
        }
        self.add("requests", all, all >= A_MINUTE * self.minutes);
        self.add("  the longest, s", format!("{:.1}", answers.longest.as_secs_f64()), true);
        self.add("  read by go tool pprof as well", answers.read_by_go, answers.read_by_go > 0);
        self.add("  wrong answers", answers.wrong.len(), answers.wrong.is_empty());
        self.lines.extend(answers.wrong.iter().take(10).map(|wrong| format!("    {wrong}")));
    }

    pub(crate) fn memory(&mut self, before: f64, after: f64, peak: f64) {
        self.add("RSS at its peak, MiB", format!("{peak:.1}"), true);
        let text = format!("{before:.1} -> {after:.1}");
        self.add("  before the first request, 15 s after the last", text, after - before <= MORE_MIB);
    }

    /// By the service's own account, just before its end.
    pub(crate) fn late(&mut self, metrics: &Exposition) {
        let extensions = |result: &str| {
            let label = format!("result=\"{result}\"");
            metrics.sum("write_api_visibility_extensions_total", &[&label]) as u64
        };
        // Where none was in time, none was counted either.
        let (in_time, late, refused) = (extensions("ok"), extensions("late"), extensions("refused"));
        self.add("leases in time", in_time, in_time > 0);
        self.add("leases late", late, late == 0);
        self.add("leases refused", refused, refused == 0);
        let snapshots =
            |result: &str| metrics.sum("write_api_snapshots_total", &[&format!("result=\"{result}\"")]) as u64;
        let (written, failed) = (snapshots("written"), snapshots("failed"));
        self.add("snapshots written", written, written > 0);
        self.add("snapshots failed", failed, failed == 0);
    }

    pub(crate) fn ended(&mut self, life: u32, status: ExitStatus) {
        self.add(&format!("end of process {life} by SIGTERM"), status, status.code() == Some(0));
    }

    pub(crate) fn sent(&mut self, sent: Sent) {
        self.add("slow events sent", sent.refreshes, sent.refreshes > 0);
        self.add("fast events sent", sent.upserts, sent.upserts > 0);
    }

    pub(crate) fn messages(&mut self, messages: &Messages) {
        for (outcome, count) in &messages.by_outcome {
            let is_loss = ["lost", "dead_lettered"].contains(&outcome.as_str());
            self.add(&format!("events {outcome}"), count, !is_loss);
        }
        self.add("handlers that panicked", messages.panics, messages.panics > 0);
        self.add("messages delivered again while at work", messages.redelivered, messages.redelivered == 0);
    }

    pub(crate) fn files(&mut self, snapshots: &Path) -> Result<()> {
        let files = std::fs::read_dir(snapshots).with_context(|| format!("cannot read {}", snapshots.display()))?;
        let mut names = Vec::new();
        for file in files {
            names.push(file?.file_name().to_string_lossy().into_owned());
        }
        let of = |end: &str| names.iter().filter(|name| name.ends_with(end)).count() as u64;
        let (all, last) = (of(".pb.gz"), of("_stop.pb.gz"));
        self.add("snapshots on disk", all, all >= SNAPSHOTS_A_MINUTE * self.minutes);
        self.add("  of them the last ones of their process", last, last == 2);
        let halves = of(".tmp");
        self.add("  halves", halves, halves == 0);
        Ok(())
    }

    pub(crate) fn text(&self) -> String {
        let mut text = format!("\n{}\n\n", self.lines.join("\n"));
        match self.broken.is_empty() {
            true => text += "every promise was kept",
            false => {
                let _ = write!(text, "BROKEN:\n  {}", self.broken.join("\n  "));
            }
        }
        text
    }
}
