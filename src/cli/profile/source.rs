//! Where the verbs take profiles from: a file, a directory or S3 with snapshots, or a running service.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;

use super::live::{Live, without_token};
use crate::config::Config;
use crate::profiling::pprof::Profile;
use crate::profiling::snapshots::{Record, Store, Stored};

/// What all verbs say of it.
pub(super) const SOURCES: &str = "\
A SOURCE is a profile's file; a directory of snapshots, or s3://BUCKET/PREFIX with them; or http://HOST:PORT, a running \
service with profiling.listen there (http://x:TOKEN@HOST:PORT, or the token of the settings). Of a directory it is the last \
snapshot; DIRECTORY#3 is the third, and there are #first, #last and #peak, the one with the most resident memory. Where \
several processes wrote to one directory, it is the one that started last unless --host or --start choose another. S3 is \
reached as profiling.snapshots.s3_endpoint_url and aws.region say, with credentials from the standard AWS chain.";

/// Which process of a directory.
#[derive(Debug, Default, Args)]
pub(super) struct Chosen {
    /// Of a directory of several processes: those of this host.
    #[arg(long, value_name = "HOST")]
    pub host: Option<String>,
    /// The one that started then, in milliseconds since 1970, as `list` shows it.
    #[arg(long, value_name = "MS")]
    pub start: Option<u64>,
}

/// A source as it was written.
#[derive(Debug)]
pub(super) enum Source {
    File(PathBuf),
    /// A directory; the last snapshot of it unless another is selected.
    Stored {
        store: Store,
        select: Option<Select>,
    },
    Live(Live),
}

/// Which snapshot of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Select {
    First,
    Last,
    Peak,
    Sequence(u64),
}

/// A profile that was read.
#[derive(Debug)]
pub(super) struct Found {
    /// Where it came from, for people.
    pub name: String,
    pub bytes: Vec<u8>,
    pub profile: Profile,
    /// What was noted with it, of a snapshot.
    pub record: Option<Record>,
}

impl Source {
    /// The source that is named, or the running service of this machine.
    pub fn given(text: Option<&str>, config: &Config) -> anyhow::Result<Self> {
        match text {
            Some(text) => Self::parse(text, config),
            None => {
                let address = crate::cli::health::from_here(config.profiling.listen);
                Ok(Source::Live(Live::parse(&format!("http://{address}"), config.profiling.token.as_ref())?))
            }
        }
    }

    pub fn parse(text: &str, config: &Config) -> anyhow::Result<Self> {
        if text.starts_with("http://") {
            return Ok(Source::Live(Live::parse(text, config.profiling.token.as_ref())?));
        }
        if text.starts_with("https://") {
            bail!(
                "{}: the service speaks no TLS; forward its port, then give http://127.0.0.1:PORT",
                without_token(text)
            );
        }
        // A file may have any name.
        if Path::new(text).is_file() {
            return Ok(Source::File(text.into()));
        }
        let (place, select) = match text.rsplit_once('#') {
            Some((place, select)) => (place, Some(Select::parse(select).with_context(|| text.to_owned())?)),
            None => (text, None),
        };
        Ok(Source::Stored { store: Store::open(place, &config.profiling.snapshots.s3)?, select })
    }

    /// One profile; `mode` and `seconds` are for a running service.
    pub async fn read(&self, chosen: &Chosen, mode: &str, seconds: Option<u32>) -> anyhow::Result<Found> {
        ensure!(
            matches!(self, Source::Stored { .. }) || (chosen.host.is_none() && chosen.start.is_none()),
            "--host and --start choose a process of a directory of snapshots; this is none"
        );
        match self {
            Source::File(path) => {
                let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
                found(path.display().to_string(), bytes, record_beside(path))
            }
            Source::Stored { store, select } => {
                let select = select.unwrap_or(Select::Last);
                let (stored, record) = select.of(store, of_process(store, chosen).await?).await?;
                stored_one(store, &stored, record).await
            }
            Source::Live(live) => {
                found(format!("http://{} {mode}", live.address), live.profile(mode, seconds).await?, None)
            }
        }
    }

    /// Profiles in the order of time: of a directory the snapshots of a process, of a running service `count` of them so far
    /// apart, of a file the one that it is. No more than `most`, evenly chosen.
    pub async fn series(
        &self,
        chosen: &Chosen,
        most: usize,
        (count, apart): (usize, Duration),
    ) -> anyhow::Result<Vec<Found>> {
        match self {
            Source::File(_) => Ok(vec![self.read(chosen, "heap", None).await?]),
            Source::Stored { store, select } => {
                ensure!(
                    select.is_none(),
                    "one snapshot is chosen of {}, where all are compared: leave out what is after #",
                    store.place("")
                );
                let stored = thinned(of_process(store, chosen).await?, most);
                let (records, profiles) = (store.records(&stored).await, store.profiles(&stored).await);
                let all = stored.iter().zip(records).zip(profiles);
                let read = all
                    .map(|((stored, record), bytes)| found(store.place(&stored.name.profile()), bytes?, Some(record?)));
                readable(read)
            }
            Source::Live(_) => {
                let mut all = Vec::new();
                for number in 0..count {
                    if number > 0 {
                        tokio::time::sleep(apart).await;
                    }
                    all.push(self.read(chosen, "heap", None).await?);
                }
                Ok(all)
            }
        }
    }
}

impl Select {
    fn parse(text: &str) -> anyhow::Result<Self> {
        Ok(match text {
            "first" => Select::First,
            "last" => Select::Last,
            "peak" => Select::Peak,
            number => Select::Sequence(
                number.parse().context("after # there may be first, last, peak, or the number of a snapshot")?,
            ),
        })
    }

    async fn of(self, store: &Store, all: Vec<Stored>) -> anyhow::Result<(Stored, Option<Record>)> {
        match self {
            Select::First => Ok((all.into_iter().next().expect("never empty"), None)),
            Select::Last => Ok((all.into_iter().next_back().expect("never empty"), None)),
            Select::Sequence(number) => {
                let (host, start) = all.first().expect("never empty").name.process();
                let gone = format!(
                    "there is no snapshot {number} of the process on {host} that started at {start}; `write-api profile \
                     list` shows what there is"
                );
                let found = all.into_iter().find(|stored| stored.name.sequence == number);
                Ok((found.context(gone)?, None))
            }
            Select::Peak => {
                let records = store.records(&all).await;
                let read = all.into_iter().zip(records).map(|(stored, record)| Ok((stored, record?)));
                let peak = readable(read)?.into_iter().max_by_key(|(_, record)| record.rss_bytes);
                let (stored, record) = peak.expect("never empty");
                Ok((stored, Some(record)))
            }
        }
    }
}

/// What could be read; a line on standard error names each that could not: one that is damaged, or that was removed meanwhile,
/// is no reason to show none. An error if nothing is left.
pub(super) fn readable<T>(all: impl IntoIterator<Item = anyhow::Result<T>>) -> anyhow::Result<Vec<T>> {
    let (mut read, mut failed) = (Vec::new(), Vec::new());
    all.into_iter().for_each(|one| match one {
        Ok(one) => read.push(one),
        Err(error) => failed.push(error),
    });
    if read.is_empty()
        && let Some(error) = failed.pop()
    {
        return Err(error);
    }
    failed.iter().for_each(|error| eprintln!("write-api: left out: {error:#}"));
    Ok(read)
}

/// The snapshots that are chosen, whatever process they are of.
pub(super) async fn chosen_of(store: &Store, chosen: &Chosen) -> anyhow::Result<Vec<Stored>> {
    let mut all = store.list().await?;
    let place = store.place("");
    ensure!(!all.is_empty(), "there are no snapshots in {place}; profiling.snapshots has the service write them");
    all.retain(|stored| {
        let (host, start) = stored.name.process();
        chosen.host.as_deref().is_none_or(|wanted| wanted == host) && chosen.start.is_none_or(|wanted| wanted == start)
    });
    ensure!(!all.is_empty(), "no snapshot in {place} is of that host and start; `write-api profile list` shows them");
    Ok(all)
}

/// The snapshots of one process in the order of time, one at least.
async fn of_process(store: &Store, chosen: &Chosen) -> anyhow::Result<Vec<Stored>> {
    let mut all = chosen_of(store, chosen).await?;
    let last = all.last().expect("never empty").name.clone();
    all.retain(|stored| stored.name.process() == last.process());
    Ok(all)
}

async fn stored_one(store: &Store, stored: &Stored, record: Option<Record>) -> anyhow::Result<Found> {
    let bytes = store.profile(&stored.name).await?;
    let record = match record {
        Some(record) => record,
        None => store.record(&stored.name).await?,
    };
    found(store.place(&stored.name.profile()), bytes, Some(record))
}

fn found(name: String, bytes: Vec<u8>, record: Option<Record>) -> anyhow::Result<Found> {
    let profile = Profile::decode(&bytes).with_context(|| name.clone())?;
    ensure!(!profile.sample_types.is_empty(), "{name}: a profile without sample types");
    Ok(Found { name, bytes, profile, record })
}

/// Of a snapshot that was named by its file.
fn record_beside(path: &Path) -> Option<Record> {
    let name = crate::profiling::snapshots::Name::of_profile(path.file_name()?.to_str()?)?;
    serde_json::from_slice(&std::fs::read(path.with_file_name(name.record())).ok()?).ok()
}

/// No more than `most`, the first and the last among them.
fn thinned<T: Clone>(all: Vec<T>, most: usize) -> Vec<T> {
    if all.len() <= most || most < 2 {
        return all;
    }
    (0..most).map(|index| all[index * (all.len() - 1) / (most - 1)].clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_series_is_thinned_and_keeps_its_ends() {
        assert_eq!(thinned((0..5).collect(), 9), [0, 1, 2, 3, 4]);
        assert_eq!(thinned((0..100).collect(), 4), [0, 33, 66, 99]);
    }

    #[test]
    fn a_snapshot_is_chosen_by_number_or_by_what_it_is() {
        assert_eq!(Select::parse("12").unwrap(), Select::Sequence(12));
        assert_eq!(Select::parse("peak").unwrap(), Select::Peak);
        let error = format!("{:#}", Select::parse("big").unwrap_err());
        assert!(error.contains("first, last, peak"), "{error}");
    }

    #[test]
    fn what_cannot_be_read_leaves_the_others() {
        let read = |all: Vec<anyhow::Result<u8>>| readable(all);
        assert_eq!(read(vec![Ok(1), Err(anyhow::anyhow!("damaged")), Ok(3)]).unwrap(), [1, 3]);
        assert_eq!(read(vec![Err(anyhow::anyhow!("damaged"))]).unwrap_err().to_string(), "damaged");
    }
}
