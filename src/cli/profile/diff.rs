//! `write-api profile diff`: what grew from one profile to another.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::json;

use super::source::{Chosen, Found, SOURCES, Source};
use super::text::{amount, change, moment, table, taken_ms};
use super::{Shown, own_by_place, save};
use crate::cli::print;
use crate::config::Config;
use crate::profiling::growth::{by_kind, rank};
use crate::profiling::pprof::{ValueType, combine, difference_graph};
use crate::profiling::{EVENT_KIND, STAGE};

pub(super) const HELP: &str = "\
Needs: two profiles, each a file, a snapshot of a directory, or a running service.

Examples:
  write-api profile diff snapshots#first snapshots#last
  write-api profile diff monday.pb.gz http://127.0.0.1:6060 --output since-monday

Prints what grew by kind of event and by function, the most first, and writes NAME.svg, a flame graph as wide as the second \
profile, red where it grew and blue where it shrank, and NAME.pb.gz, the difference for `go tool pprof`.

Exit codes: 0 shown, 1 failed, 64 wrong usage, 78 wrong configuration.";

/// Which profiles, and where to.
#[derive(Debug, Args)]
#[command(after_help = SOURCES)]
pub(in crate::cli) struct Options {
    /// The earlier profile.
    #[arg(value_name = "BEFORE")]
    before: String,
    /// The later profile.
    #[arg(value_name = "AFTER")]
    after: String,
    #[command(flatten)]
    chosen: Chosen,
    #[command(flatten)]
    shown: Shown,
    /// The files to write, without .svg and .pb.gz.
    #[arg(long, short, value_name = "NAME", default_value = "diff")]
    output: PathBuf,
}

pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let before = Source::parse(&options.before, config)?.read(&options.chosen, "heap", None).await?;
    let after = Source::parse(&options.after, config)?.read(&options.chosen, "heap", None).await?;
    let index = options.shown.counted.index(&after.profile)?;
    let difference = combine(&[(&after.profile, 1), (&before.profile, -1)])
        .with_context(|| format!("{} and {}", before.name, after.name))?;
    let builds = [&before, &after].map(|found| found.profile.mappings.first().map(|program| &program.build_id));
    ensure!(
        builds[0] == builds[1],
        "{} and {} are of different builds of the program: their places in the code cannot be compared",
        before.name,
        after.name
    );
    let of = &after.profile.sample_types[index];
    let values = [&before, &after].map(|found| own_by_place(found, index));
    let functions = rank(&values);
    let kinds = rank(&[&before, &after].map(|found| by_kind(&found.profile, index)));
    let totals =
        [&before, &after].map(|found| by_kind(&found.profile, index).values().copied().fold(0, i64::saturating_add));
    let grew = totals[1].saturating_sub(totals[0]);

    let title = format!("{} {} at {} UTC", of.kind, change(grew, &of.unit), moment(taken_ms(&after)));
    let graph = difference_graph(&before.profile, &after.profile, index, &[EVENT_KIND, STAGE], &title);
    let (svg, pprof) = (with_suffix(&options.output, ".svg"), with_suffix(&options.output, ".pb.gz"));
    save(&svg, graph.svg().as_bytes())?;
    save(&pprof, &difference.encode())?;

    if options.shown.json {
        let kinds = kinds.iter().map(
            |kind| json!({"kind": kind.key, "grew": kind.grew, "before": kind.series[0], "after": kind.series[1]}),
        );
        let functions =
            functions.iter().filter(|place| place.grew != 0).take(options.shown.limit as usize).map(|place| {
                json!({"kind": place.key.kind, "function": place.key.function, "grew": place.grew,
                   "before": place.series[0], "after": place.series[1]})
            });
        let document = json!({
            "before": {"source": before.name, "time_ms": taken_ms(&before), "total": totals[0]},
            "after": {"source": after.name, "time_ms": taken_ms(&after), "total": totals[1]},
            "sample_type": of.kind, "unit": of.unit, "grew": grew,
            "kinds": kinds.collect::<Vec<_>>(), "functions": functions.collect::<Vec<_>>(),
            "svg": svg, "pprof": pprof,
        });
        return print(format!("{document}\n"));
    }
    let row = |grew: i64, series: &[i64]| {
        vec![change(grew, &of.unit), amount(series[0], &of.unit), amount(series[1], &of.unit)]
    };
    let kinds: Vec<_> =
        kinds.iter().map(|kind| row(kind.grew, &kind.series).into_iter().chain([kind.key.clone()]).collect()).collect();
    // What shrank most stands at the end, and is of interest as well where there is room.
    let moved = functions.iter().filter(|place| place.grew != 0).take(options.shown.limit as usize);
    let places: Vec<_> = moved
        .map(|place| {
            let names = [place.key.kind.clone(), place.key.function.clone()];
            row(place.grew, &place.series).into_iter().chain(names).collect()
        })
        .collect();
    print(format!(
        "{}\n\n{}\n{}\n{} and {} show it\n",
        summary(&before, &after, of, totals),
        table(&["GREW", "BEFORE", "AFTER", "EVENT KIND"], &[0, 1, 2], &kinds),
        table(&["GREW", "BEFORE", "AFTER", "EVENT KIND", "FUNCTION"], &[0, 1, 2], &places),
        svg.display(),
        pprof.display()
    ))
}

fn summary(before: &Found, after: &Found, of: &ValueType, totals: [i64; 2]) -> String {
    format!(
        "{}: {}, from {} at {} UTC to {} at {} UTC",
        of.kind,
        change(totals[1].saturating_sub(totals[0]), &of.unit),
        amount(totals[0], &of.unit),
        moment(taken_ms(before)),
        amount(totals[1], &of.unit),
        moment(taken_ms(after))
    )
}

/// A name may have dots in it, so that it has no extension to be changed.
fn with_suffix(name: &Path, suffix: &str) -> PathBuf {
    let mut name = name.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
