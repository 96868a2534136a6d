//! What is printed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::Duration;

use crate::faults::Kind;
use crate::round::{Outcome, Spec};

/// Sums over all rounds.
#[derive(Debug, Default)]
pub struct Report {
    kinds: BTreeMap<&'static str, Sums>,
    points_hit: BTreeSet<String>,
    points_missed: BTreeSet<String>,
    rounds: u64,
    messages: u64,
    states: u64,
    records: u64,
    repeated: u64,
    repeats_explained: u64,
    /// Promises broken.
    pub violations: u64,
    /// Rounds that were played again because the machine was too busy for the emulators.
    pub starved: u64,
}

#[derive(Debug, Default)]
struct Sums {
    rounds: u64,
    injected: u64,
    hits: u64,
    hits_at_work: u64,
    violations: u64,
}

impl Report {
    /// Adds a round.
    pub fn add(&mut self, spec: &Spec, outcome: &Outcome) {
        self.rounds += 1;
        self.messages += outcome.messages;
        self.states += outcome.states;
        self.records += outcome.records;
        self.repeated += outcome.repeated;
        self.repeats_explained += outcome.repeats_explained;
        let violations = outcome.violations.len() as u64;
        self.violations += violations;
        for kind in &spec.kinds {
            let sums = self.kinds.entry(kind.name()).or_default();
            sums.rounds += 1;
            // Which of a round's kinds broke the promise can't be told.
            sums.violations += violations;
        }
        for injection in &outcome.injections {
            let sums = self.kinds.entry(injection.kind).or_default();
            sums.injected += 1;
            sums.hits += injection.hits;
            sums.hits_at_work += injection.hits_at_work;
            if injection.kind == Kind::CrashPoint.name() {
                let points = if injection.hits > 0 { &mut self.points_hit } else { &mut self.points_missed };
                points.insert(injection.target.clone());
            }
        }
    }

    /// Kinds of `wanted` that never hit in the middle of work.
    #[must_use]
    pub fn never_hit(&self, wanted: &[Kind]) -> Vec<&'static str> {
        let names = wanted.iter().map(|kind| kind.name());
        names.filter(|name| self.kinds.get(name).is_none_or(|sums| sums.hits_at_work == 0)).collect()
    }

    /// Faults that hit.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.kinds.values().map(|sums| sums.hits).sum()
    }

    /// A table in Markdown, and a few lines.
    #[must_use]
    pub fn text(&self, points: &[String], took: Duration) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "| fault | rounds | injected | hits proven | hits at work | violations |");
        let _ = writeln!(text, "|---|---:|---:|---:|---:|---:|");
        for (name, sums) in &self.kinds {
            let Sums { rounds, injected, hits, hits_at_work, violations } = sums;
            let _ = writeln!(text, "| {name} | {rounds} | {injected} | {hits} | {hits_at_work} | {violations} |");
        }
        let _ = writeln!(
            text,
            "\n{} rounds in {:.0} s: {} messages, {} listing states, {} records; {} faults hit; {} violations",
            self.rounds,
            took.as_secs_f64(),
            self.messages,
            self.states,
            self.records,
            self.hits(),
            self.violations
        );
        let _ = writeln!(
            text,
            "{} partner calls were made again; deaths and changes of owners alone explain up to {}",
            self.repeated, self.repeats_explained
        );
        if self.starved > 0 {
            let _ = writeln!(
                text,
                "{} rounds on a machine that was too busy were not judged but played again",
                self.starved
            );
        }
        if self.kinds.contains_key(Kind::CrashPoint.name()) {
            let missed: Vec<&str> =
                points.iter().filter(|point| !self.points_hit.contains(*point)).map(String::as_str).collect();
            let tried: Vec<&str> = missed.iter().copied().filter(|point| self.points_missed.contains(*point)).collect();
            let _ = writeln!(text, "crash points: {} of {} hit", points.len() - missed.len(), points.len());
            if !missed.is_empty() {
                let _ = writeln!(text, "not hit: {}; of these tried: {}", missed.join(", "), tried.join(", "));
            }
        }
        text
    }
}
