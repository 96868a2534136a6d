//! `write-api profile flamegraph`: a profile as a picture.

use std::path::PathBuf;

use clap::Args;

use super::source::{Chosen, SOURCES, Source};
use super::text::{amount, moment, taken_ms};
use super::{Counted, save};
use crate::cli::print;
use crate::config::Config;
use crate::profiling::pprof::flame_graph;
use crate::profiling::{EVENT_KIND, STAGE};

pub(super) const HELP: &str = "\
Needs: a profile: a file, a directory of snapshots, or a running service, by default that of this machine.

Examples:
  write-api profile flamegraph
  write-api profile flamegraph snapshots#peak --output peak.svg
  write-api profile flamegraph heap.pb.gz --sample alloc_space

The kind of event and its stage are the lowest boxes, the functions stand on them; a click zooms.

Exit codes: 0 written, 1 failed, 64 wrong usage, 78 wrong configuration.";

/// Which profile, and where to.
#[derive(Debug, Args)]
#[command(after_help = SOURCES)]
pub(in crate::cli) struct Options {
    /// A file, a directory of snapshots, or a running service.
    #[arg(value_name = "SOURCE")]
    source: Option<String>,
    #[command(flatten)]
    chosen: Chosen,
    #[command(flatten)]
    counted: Counted,
    /// The SVG file to write.
    #[arg(long, short, value_name = "FILE", default_value = "flamegraph.svg")]
    output: PathBuf,
}

pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let source = Source::given(options.source.as_deref(), config)?;
    let found = source.read(&options.chosen, "heap", None).await?;
    let index = options.counted.index(&found.profile)?;
    let kind = &found.profile.sample_types[index];
    let total: i64 = found.profile.samples.iter().map(|sample| sample.values[index]).fold(0, i64::saturating_add);
    let what = format!("{} {} at {} UTC", kind.kind, amount(total, &kind.unit), moment(taken_ms(&found)));
    save(&options.output, flame_graph(&found.profile, index, &[EVENT_KIND, STAGE], &what).svg().as_bytes())?;
    print(format!("{what}, {}: {}\n", found.name, options.output.display()))
}
