//! `write-api profile list`: the snapshots of a directory, or in S3.

use std::fmt::Write as _;

use anyhow::Context as _;
use clap::Args;
use serde_json::json;

use super::source::{Chosen, chosen_of, readable};
use super::text::{amount, moment, table};
use crate::cli::{count, print};
use crate::config::Config;
use crate::profiling::snapshots::{Record, Store, Stored};

pub(super) const HELP: &str = "\
Needs: a directory of snapshots, by default that of the settings, profiling.snapshots.directory; or of S3 the permissions \
s3:ListBucket and s3:GetObject.

Examples:
  write-api profile list
  write-api profile list /var/lib/write-api/snapshots --limit 100
  write-api profile list s3://profiles/write-api --host pod-1
  write-api profile list --json | jq -r '.[] | [.time_ms, .reason, .rss_bytes] | @tsv'

A line for each snapshot, by process; `write-api profile top DIRECTORY#SEQ` shows what was held then.

Exit codes: 0 listed, 1 failed, or there are none, 64 wrong usage, 78 wrong configuration.";

/// Which directory, and how much of it.
#[derive(Debug, Args)]
pub(in crate::cli) struct Options {
    /// The directory of snapshots, or s3://BUCKET/PREFIX.
    #[arg(value_name = "SOURCE")]
    source: Option<String>,
    #[command(flatten)]
    chosen: Chosen,
    /// At most this many, the newest.
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// A JSON document: an array of the records, each with its `profile`.
    #[arg(long)]
    json: bool,
}

/// The store that is named, or the directory of the settings.
pub(super) fn store(source: Option<&str>, config: &Config) -> anyhow::Result<Store> {
    let settings = &config.profiling.snapshots;
    let by_settings = || settings.directory.as_ref().map(|path| path.display().to_string());
    let place = source.map(str::to_owned).or_else(by_settings);
    let place = place.context("name a directory of snapshots, or set profiling.snapshots.directory")?;
    Store::open(&place, &settings.s3)
}

pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let store = store(options.source.as_deref(), config)?;
    let all = chosen_of(&store, &options.chosen).await?;
    let (number, bytes) = (all.len(), all.iter().map(|stored| stored.bytes).sum::<u64>());
    let newest = &all[number.saturating_sub(options.limit as usize)..];
    let records = newest.iter().zip(store.records(newest).await);
    let shown = readable(records.map(|(stored, record)| Ok((stored, record?))))?;
    if options.json {
        let documents = shown.iter().map(|(stored, record)| document(&store, stored, record));
        return print(format!("{}\n", serde_json::Value::from_iter(documents)));
    }
    let mut out = format!(
        "{} in {}, {}\n",
        count(number as u64, "snapshot"),
        store.place(""),
        amount(i64::try_from(bytes)?, "bytes")
    );
    for of_process in shown.chunk_by(|(one, _), (other, _)| one.name.process() == other.name.process()) {
        let name = &of_process[0].0.name;
        writeln!(
            out,
            "\n{} {}, build {}, on {} since {} UTC (--start {})",
            name.service,
            name.version,
            if name.build.is_empty() { "unknown" } else { &name.build },
            name.host,
            moment(name.start_ms),
            name.start_ms
        )?;
        let rows: Vec<Vec<String>> = of_process.iter().map(|(_, record)| row(record)).collect();
        out += &table(&["SEQ", "TIME (UTC)", "REASON", "RESIDENT", "ALLOCATED", "IN FLIGHT"], &[0, 3, 4], &rows);
    }
    if number > shown.len() {
        writeln!(out, "\nthe newest {} of {number}; --limit shows more", shown.len())?;
    }
    print(out)
}

fn row(record: &Record) -> Vec<String> {
    let in_flight: Vec<String> =
        record.events_in_flight.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let bytes = |bytes: u64| amount(i64::try_from(bytes).unwrap_or(i64::MAX), "bytes");
    vec![
        record.sequence.to_string(),
        moment(record.time_ms),
        record.reason.clone(),
        bytes(record.rss_bytes),
        bytes(record.jemalloc.allocated),
        if in_flight.is_empty() { "-".to_owned() } else { in_flight.join(", ") },
    ]
}

fn document(store: &Store, stored: &Stored, record: &Record) -> serde_json::Value {
    let mut document = json!(record);
    document["profile"] = json!(store.place(&stored.name.profile()));
    document["profile_bytes"] = json!(stored.bytes);
    document
}
