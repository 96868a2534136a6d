//! `write-api replay`: recorded events, sent again to the queue that producers use.
//!
//! The files are read twice: once to check every line as the service would, before anything is sent, and once to send.
//! Neither holds more than a few batches in memory. How far the second reading has come is kept in a state file, where
//! that is asked for.

mod input;
mod meter;
mod pace;
mod report;
mod sending;
mod state;
mod survey;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, ensure};
use clap::Args;

use self::input::Input;
use self::meter::Meter;
use self::pace::Pace;
use self::report::Refusals;
use self::sending::Sending;
use self::state::State;
use self::survey::Survey;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::queue::sqs::Sqs;

pub(super) const HELP: &str = "\
Needs: of SQS the permissions sqs:GetQueueUrl and sqs:SendMessage on the queue that producers use; with --dry-run nothing.

Examples:
  write-api replay --dry-run night.ndjson.gz      what is in it, what would be refused, what the partner would have to do
  write-api replay --resume night.ndjson.gz       interrupted? the same command goes on
  write-api replay --speed 60 night.ndjson.gz     the recorded gaps, an hour a minute
  write-api replay --new-ids --rate 500 -         from stdin, as events that never were

Events are what `write-api serve --record FILE` writes. The same id again is the same event, so a replay of what was done \
already changes nothing unless --new-ids.

Exit codes: 0 everything sent, or nothing to object to, 1 a line that cannot be read or an event that SQS did not take, \
64 wrong usage, 78 wrong configuration.";

/// What to replay, and how.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// CloudEvents, one JSON document a line, plain or gzip; `-` is stdin. Several files follow each other. What cannot be
    /// read twice, stdin among it, is kept in a temporary file meanwhile.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// At most this many events a second; without it, as fast as SQS takes them.
    #[arg(long, value_name = "N", conflicts_with = "speed", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// Keep the gaps between the events' times, X times faster. The order is that of the file: an event that is older than
    /// one before it follows that one at once.
    #[arg(long, value_name = "X", value_parser = speed)]
    speed: Option<f64>,
    /// Check every line as the service would, tell what would be sent and what the partner would have to do, and send
    /// nothing. Needs no SQS.
    #[arg(long, conflicts_with_all = ["resume", "state"])]
    dry_run: bool,
    /// Keep the place in FILE.progress, beside the first file, and go on from there if it exists. After a crash the last few
    /// batches are sent again, which their ids absorb.
    #[arg(long, conflicts_with = "state")]
    resume: bool,
    /// As --resume, with the place in this file.
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Leave out lines that cannot be read. Without it, one of them ends the replay before anything is sent.
    #[arg(long)]
    skip_invalid: bool,
    /// Give each event a new id and the present time, so that the same file can be replayed once more: otherwise ids
    /// absorb what was sent before. Events that share an id in the file share the new one.
    #[arg(long)]
    new_ids: bool,
}

/// From a thousandth of the recorded speed to a million times.
fn speed(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(speed) if (0.001..=1e6).contains(&speed) => Ok(speed),
        _ => Err("give a number from 0.001 to 1000000, such as 60 for an hour in a minute".to_owned()),
    }
}

impl Options {
    /// What the parser cannot see.
    pub(super) fn check(&self) -> Result<(), String> {
        let stdin = Path::new("-");
        if self.files.iter().filter(|file| *file == stdin).count() > 1 {
            return Err("stdin (`-`) can be read once only".to_owned());
        }
        if self.resume && self.files.first().is_some_and(|file| file == stdin) {
            return Err(
                "--resume keeps its place beside the first file, and that is stdin: use --state FILE".to_owned()
            );
        }
        Ok(())
    }

    fn state_file(&self) -> Option<PathBuf> {
        let beside = || {
            let mut name: OsString = self.files.first()?.into();
            name.push(".progress");
            Some(name.into())
        };
        self.state.clone().or_else(|| self.resume.then(beside).flatten())
    }

    fn pace(&self) -> Pace {
        match (self.rate, self.speed) {
            (Some(rate), _) => Pace::rate(rate),
            (None, Some(speed)) => Pace::recorded(speed),
            (None, None) => Pace::Free,
        }
    }
}

/// Events by kind.
type Kinds = BTreeMap<&'static str, u64>;

/// Checks everything, then sends, or tells what it would send.
pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let inputs = options.files.iter().map(|file| Input::open(file)).collect::<anyhow::Result<Vec<_>>>()?;
    if options.dry_run { dry_run(config, options, &inputs) } else { replay(config, options, &inputs).await }
}

fn dry_run(config: &Config, options: &Options, inputs: &[Input]) -> anyhow::Result<()> {
    let mut refusals = Refusals::told_at_once();
    let survey = Survey::of(inputs, None, &mut refusals, &mut Meter::new("checked", None, None))?;
    print!("{}", report::dry_run(&survey, &config.partner, options.pace()));
    let refused = refusals.count();
    ensure!(
        refused == 0 || options.skip_invalid,
        "{} would be refused; --skip-invalid leaves them out",
        super::count(refused, "line")
    );
    Ok(())
}

async fn replay(config: &Config, options: &Options, inputs: &[Input]) -> anyhow::Result<()> {
    let sqs = Sqs::new(&config.aws, &config.queue, Arc::new(Metrics::new())).await;
    let name = &config.lanes.events.queue;
    let queue = sqs.queue(name).await.with_context(|| format!("is there a queue {name}? `write-api setup`"))?;
    let mut state = State::open(options.state_file(), &queue.url, options.new_ids)?;

    let mut refusals = Refusals::kept();
    let survey = Survey::of(inputs, state.place(), &mut refusals, &mut Meter::new("checked", None, None))?;
    if refusals.count() > 0 && !options.skip_invalid {
        anyhow::bail!("{refusals}\nnothing was sent; --skip-invalid leaves such lines out");
    }
    if state.events > 0 {
        println!("{} were sent before, up to line {}", super::count(state.events, "event"), state.lines);
    }
    // Before the first event: where the state cannot be kept, nothing is sent.
    state.save()?;
    let sent = Sending { sqs: &sqs, queue: &queue, inputs, survey: &survey, options }.run(&mut state).await?;
    print!("{sent}");
    if refusals.count() > 0 {
        println!("left out {} that cannot be read", super::count(refusals.count(), "line"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_is_a_number_in_range() {
        assert_eq!(speed("2.5"), Ok(2.5));
        for wrong in ["0", "-1", "fast", "NaN", "inf", "1e7"] {
            assert!(speed(wrong).is_err(), "{wrong}");
        }
    }
}
