//! `write-api profile top`: whose memory it is.

use std::cmp::Reverse;

use clap::Args;
use serde_json::json;

use super::Shown;
use super::source::{Chosen, SOURCES, Source};
use super::text::{amount, moment, share, table, taken_ms};
use crate::cli::print;
use crate::config::Config;
use crate::profiling::growth::{PROGRAM, by_kind, by_place};

pub(super) const HELP: &str = "\
Needs: a profile: a file, a directory of snapshots, or a running service, by default that of this machine.

Examples:
  write-api profile top
  write-api profile top snapshots#peak --limit 30
  write-api profile top heap.pb.gz --sample alloc_space --json

First the kinds of events, then the functions of this program; what a library allocates belongs to the function that called \
it. WITH CALLEES counts what the functions called by it allocated as well. Profiles are samples, one in 512 KiB: small \
figures are rough.

Exit codes: 0 shown, 1 failed, 64 wrong usage, 78 wrong configuration.";

/// Which profile, and how much of it.
#[derive(Debug, Args)]
#[command(after_help = SOURCES)]
pub(in crate::cli) struct Options {
    /// A file, a directory of snapshots, or a running service.
    #[arg(value_name = "SOURCE")]
    source: Option<String>,
    #[command(flatten)]
    chosen: Chosen,
    #[command(flatten)]
    shown: Shown,
}

pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let source = Source::given(options.source.as_deref(), config)?;
    let found = source.read(&options.chosen, "heap", None).await?;
    let index = options.shown.counted.index(&found.profile)?;
    let sample_type = &found.profile.sample_types[index];
    let mut kinds: Vec<_> = by_kind(&found.profile, index).into_iter().filter(|(_, value)| *value != 0).collect();
    kinds.sort_by_key(|(_, value)| Reverse(*value));
    let mut places: Vec<_> = by_place(&found.profile, index, PROGRAM).into_iter().collect();
    places.retain(|(_, amount)| amount.own != 0 || amount.with_callees != 0);
    places.sort_by_key(|(_, amount)| Reverse((amount.own, amount.with_callees)));
    let total: i64 = kinds.iter().map(|(_, value)| *value).fold(0, i64::saturating_add);
    if options.shown.json {
        let kinds: Vec<_> = kinds.iter().map(|(kind, value)| json!({"kind": kind, "value": value})).collect();
        let functions = places.iter().take(options.shown.limit as usize).map(|(place, amount)| {
            json!({"kind": place.kind, "function": place.function, "value": amount.own, "with_callees": amount.with_callees})
        });
        let document = json!({
            "source": found.name, "time_ms": taken_ms(&found), "sample_type": sample_type.kind, "unit": sample_type.unit,
            "total": total, "kinds": kinds, "functions": functions.collect::<Vec<_>>(),
        });
        return print(format!("{document}\n"));
    }
    let shown = |value: i64| amount(value, &sample_type.unit);
    let kinds: Vec<_> =
        kinds.iter().map(|(kind, value)| vec![shown(*value), share(*value, total), kind.clone()]).collect();
    let rows: Vec<_> = places
        .iter()
        .take(options.shown.limit as usize)
        .map(|(place, amount)| {
            let figures = [shown(amount.own), share(amount.own, total), shown(amount.with_callees)];
            figures.into_iter().chain([place.kind.clone(), place.function.clone()]).collect()
        })
        .collect();
    print(format!(
        "{}: {} at {} UTC, {}\n\n{}\n{}",
        sample_type.kind,
        shown(total),
        moment(taken_ms(&found)),
        found.name,
        table(&["AMOUNT", "SHARE", "EVENT KIND"], &[0, 1], &kinds),
        table(&["AMOUNT", "SHARE", "WITH CALLEES", "EVENT KIND", "FUNCTION"], &[0, 1, 2], &rows)
    ))
}
