//! `write-api profile fetch`: a profile into a file.

use std::path::PathBuf;

use anyhow::ensure;
use clap::{Args, ValueEnum};

use super::save;
use super::source::{Chosen, SOURCES, Source};
use super::text::{amount, moment, taken_ms};
use crate::cli::print;
use crate::config::Config;

pub(super) const HELP: &str = "\
Needs: a running service, by default that of this machine, or a directory of snapshots. Nothing of the settings but \
profiling.listen and its token.

Examples:
  write-api profile fetch                                      the heap of the service of this machine
  write-api profile fetch http://pod-1:6060 --mode profile     its CPU time, for 30 s
  write-api profile fetch snapshots#peak --output peak.pb.gz

The file is whole or not there, readable by its owner only, and in the format of `go tool pprof`.

Exit codes: 0 saved, 1 failed, 64 wrong usage, 78 wrong configuration.";

/// Which profile, and where to.
#[derive(Debug, Args)]
#[command(after_help = SOURCES)]
pub(in crate::cli) struct Options {
    /// A running service, a directory of snapshots, or a file.
    #[arg(value_name = "SOURCE")]
    source: Option<String>,
    #[command(flatten)]
    chosen: Chosen,
    /// Of a running service: which of its profiles; heap unless given.
    #[arg(long, value_name = "MODE")]
    mode: Option<Mode>,
    /// Of a running service: what changed within so many seconds; for `profile`, how long it samples.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    seconds: Option<u32>,
    /// The file to write. Without it, one in the current directory named after the mode and the time.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// The profiles that a service has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Heap,
    Allocs,
    Profile,
    Goroutine,
    Block,
    Mutex,
    Threadcreate,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Heap => "heap",
            Mode::Allocs => "allocs",
            Mode::Profile => "profile",
            Mode::Goroutine => "goroutine",
            Mode::Block => "block",
            Mode::Mutex => "mutex",
            Mode::Threadcreate => "threadcreate",
        }
    }
}

pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let source = Source::given(options.source.as_deref(), config)?;
    ensure!(
        matches!(source, Source::Live(_))
            || (matches!(options.mode, None | Some(Mode::Heap)) && options.seconds.is_none()),
        "--mode and --seconds are for a running service; snapshots and files are what they are"
    );
    let mode = options.mode.unwrap_or(Mode::Heap).name();
    let found = source.read(&options.chosen, mode, options.seconds).await?;
    let by_time = || {
        let time = moment(taken_ms(&found)).replace(' ', "T").replace(':', "");
        PathBuf::from(format!("{mode}-{time}Z.pb.gz"))
    };
    let file = options.output.clone().unwrap_or_else(by_time);
    save(&file, &found.bytes)?;
    let bytes = amount(i64::try_from(found.bytes.len())?, "bytes");
    print(format!("{} saved as {}, {bytes}\n", found.name, file.display()))
}
