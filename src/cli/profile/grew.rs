//! `write-api profile grew`: what grew over many snapshots.

use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::json;

use super::list;
use super::source::{Chosen, Found, SOURCES, Source};
use super::text::{amount, change, moment, table, taken_ms};
use super::{Shown, own_by_place};
use crate::cli::text::span;
use crate::cli::{count, print};
use crate::config::Config;
use crate::profiling::growth::{Grown, Place, by_kind, rank};

/// More would take minutes to read and tell the same.
const MOST: usize = 100;

pub(super) const HELP: &str = "\
Needs: two profiles at least: a directory of snapshots, by default that of the settings; files in the order of time; or a \
running service, which is asked --count times.

Examples:
  write-api profile grew
  write-api profile grew /var/lib/write-api/snapshots --start 1764295201000
  write-api profile grew friday.pb.gz saturday.pb.gz sunday.pb.gz
  write-api profile grew http://127.0.0.1:6060 --count 5 --every 60

The first line names the kind of event and the function that hold most of the growth. ROSE counts in how many of the steps \
from snapshot to snapshot there was more than before: a leak rises in most of them. Of more than 100 snapshots 100 are read.

Exit codes: 0 shown, 1 failed, 64 wrong usage, 78 wrong configuration.";

/// Which profiles, and how much of them.
#[derive(Debug, Args)]
#[command(after_help = SOURCES)]
pub(in crate::cli) struct Options {
    /// A directory of snapshots, a running service, or files in the order of time.
    #[arg(value_name = "SOURCE")]
    sources: Vec<String>,
    #[command(flatten)]
    chosen: Chosen,
    #[command(flatten)]
    shown: Shown,
    /// Of a running service: how many profiles; 5 unless given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=100))]
    count: Option<u32>,
    /// Of a running service: how many seconds apart; 10 unless given.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    every: Option<u32>,
}

pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let mut sources = Vec::new();
    for source in &options.sources {
        sources.push(Source::parse(source, config)?);
    }
    if sources.is_empty() {
        sources.push(Source::Stored { store: list::store(None, config)?, select: None });
    }
    ensure!(
        matches!(&sources[..], [Source::Live(_)]) || (options.count.is_none() && options.every.is_none()),
        "--count and --every are for one running service; snapshots and files are what they are"
    );
    let live = (options.count.unwrap_or(5) as usize, Duration::from_secs(options.every.unwrap_or(10).into()));
    let mut found = Vec::new();
    match &sources[..] {
        [one] => found = one.series(&options.chosen, MOST, live).await?,
        many => {
            for source in many {
                found.push(source.read(&options.chosen, "heap", None).await?);
            }
        }
    }
    ensure!(found.len() >= 2, "{} is one profile; what grew shows in two or more", found[0].name);
    let first = &found[0];
    let index = options.shown.counted.index(&first.profile)?;
    for other in &found {
        ensure!(
            other.profile.sample_types == first.profile.sample_types,
            "{} and {} measure different things",
            first.name,
            other.name
        );
    }
    let kinds = rank(&found.iter().map(|found| by_kind(&found.profile, index)).collect::<Vec<_>>());
    let places = rank(&found.iter().map(|found| own_by_place(found, index)).collect::<Vec<_>>());
    let growth = Growth { found: &found, unit: &first.profile.sample_types[index].unit, kinds, places };
    match options.shown.json {
        true => print(format!(
            "{}\n",
            growth.document(&first.profile.sample_types[index].kind, options.shown.limit as usize)
        )),
        false => print(growth.text(options.shown.limit as usize)?),
    }
}

/// What there is to tell.
struct Growth<'a> {
    found: &'a [Found],
    unit: &'a str,
    kinds: Vec<Grown<String>>,
    places: Vec<Grown<Place>>,
}

impl Growth<'_> {
    /// The kind that grew most, and the function of that kind that did; none where its memory goes from one to another.
    fn first(&self) -> Option<(&Grown<String>, Option<&Grown<Place>>)> {
        let kind = self.kinds.first().filter(|kind| kind.grew > 0)?;
        Some((kind, self.places.iter().find(|place| place.key.kind == kind.key && place.grew > 0)))
    }

    fn text(&self, limit: usize) -> anyhow::Result<String> {
        let (from, to) = self.times();
        let over = span(to.saturating_sub(from) as f64 / 1e3);
        let head = match self.first() {
            Some((kind, None)) => {
                format!(
                    "{} grew most, by {} in {over}; no function of it by itself",
                    kind.key,
                    amount(kind.grew, self.unit)
                )
            }
            Some((kind, Some(place))) => format!(
                "{} grew most, by {} in {over}; of that {} in\n  {}",
                kind.key,
                amount(kind.grew, self.unit),
                amount(place.grew, self.unit),
                place.key.function
            ),
            None => format!("nothing grew in {over}"),
        };
        let row = |grew: i64, rose: usize, series: &[i64]| {
            let (first, last) = (series.first().context("a series")?, series.last().context("a series")?);
            anyhow::Ok(vec![
                change(grew, self.unit),
                amount(*first, self.unit),
                amount(*last, self.unit),
                format!("{rose}/{}", series.len() - 1),
            ])
        };
        let mut kinds = Vec::new();
        for kind in &self.kinds {
            kinds.push([row(kind.grew, kind.rose, &kind.series)?, vec![kind.key.clone()]].concat());
        }
        let mut places = Vec::new();
        for place in self.places.iter().filter(|place| place.grew > 0).take(limit) {
            let names = vec![place.key.kind.clone(), place.key.function.clone()];
            places.push([row(place.grew, place.rose, &place.series)?, names].concat());
        }
        let mut text = format!(
            "{head}\n\n{} from {} to {} UTC, {} to {}\n\n{}",
            count(self.found.len() as u64, "profile"),
            moment(from),
            moment(to),
            self.found[0].name,
            self.found[self.found.len() - 1].name,
            table(&["GREW", "FIRST", "LAST", "ROSE", "EVENT KIND"], &[0, 1, 2, 3], &kinds),
        );
        if !places.is_empty() {
            text += "\n";
            text += &table(&["GREW", "FIRST", "LAST", "ROSE", "EVENT KIND", "FUNCTION"], &[0, 1, 2, 3], &places);
        }
        Ok(text)
    }

    fn document(&self, sample_type: &str, limit: usize) -> serde_json::Value {
        let (from, to) = self.times();
        let kinds = self
            .kinds
            .iter()
            .map(|kind| json!({"kind": kind.key, "grew": kind.grew, "rose": kind.rose, "series": kind.series}));
        let places = self.places.iter().filter(|place| place.grew > 0).take(limit).map(|place| {
            json!({"kind": place.key.kind, "function": place.key.function, "grew": place.grew, "rose": place.rose,
                   "series": place.series})
        });
        json!({
            "profiles": self.found.len(), "from_ms": from, "to_ms": to, "sample_type": sample_type, "unit": self.unit,
            "kinds": kinds.collect::<Vec<_>>(), "functions": places.collect::<Vec<_>>(),
        })
    }

    fn times(&self) -> (u64, u64) {
        (taken_ms(&self.found[0]), taken_ms(&self.found[self.found.len() - 1]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grown<K>(key: K, grew: i64) -> Grown<K> {
        Grown { key, grew, rose: 1, series: vec![0, grew] }
    }

    fn place(kind: &str, function: &str, grew: i64) -> Grown<Place> {
        grown(Place { kind: kind.to_owned(), function: function.to_owned() }, grew)
    }

    /// Memory that goes from one function of a kind to another is the kind's growth and none of theirs.
    #[test]
    fn a_kind_is_named_also_where_no_function_of_it_grew() {
        let named = |places: Vec<Grown<Place>>| {
            let kinds = vec![grown("refresh".to_owned(), 700), grown("service".to_owned(), 5)];
            let growth = Growth { found: &[], unit: "bytes", kinds, places };
            growth.first().map(|(kind, place)| (kind.key.clone(), place.map(|place| place.key.function.clone())))
        };
        let others = || vec![place("service", "tables", 5), place("refresh", "pages", 0)];
        assert_eq!(named(others()), Some(("refresh".to_owned(), None)));
        let with_one = [others(), vec![place("refresh", "answers", 3)]].concat();
        assert_eq!(named(with_one), Some(("refresh".to_owned(), Some("answers".to_owned()))));
    }

    #[test]
    fn where_nothing_grew_nothing_is_named() {
        let kinds = vec![grown("refresh".to_owned(), 0)];
        assert!(Growth { found: &[], unit: "bytes", kinds, places: Vec::new() }.first().is_none());
    }
}
