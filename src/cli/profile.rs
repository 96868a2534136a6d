//! `write-api profile`: what the service's profiles say, without other tools. From files, directories of snapshots, and
//! running services.

mod diff;
mod fetch;
mod flamegraph;
mod grew;
mod list;
mod live;
mod source;
mod text;
mod top;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use clap::{Args, Subcommand};

use self::source::Found;
use crate::config::Config;
use crate::profiling::growth::{PROGRAM, Place, by_place};
use crate::profiling::pprof::Profile;

/// Which verb.
#[derive(Debug, Subcommand)]
pub(super) enum Options {
    /// List snapshots: when, why, memory, events in flight.
    #[command(after_long_help = list::HELP)]
    List(list::Options),
    /// Save a profile to a file.
    #[command(after_long_help = fetch::HELP)]
    Fetch(fetch::Options),
    /// Show whose memory it is: by kind of event, and by function.
    #[command(after_long_help = top::HELP)]
    Top(top::Options),
    /// Show what grew from one profile to another, with a flame graph of the difference.
    #[command(after_long_help = diff::HELP)]
    Diff(diff::Options),
    /// Draw a profile as a flame graph, for any browser.
    #[command(after_long_help = flamegraph::HELP)]
    Flamegraph(flamegraph::Options),
    /// Rank what grew over many snapshots, the kind of event first.
    ///
    /// What grew over the weekend? It is what the last quarter of the snapshots never fell below, compared with the middle of
    /// the first quarter, so that an event which came and went is no growth.
    #[command(after_long_help = grew::HELP)]
    Grew(grew::Options),
}

/// What of a profile is counted.
#[derive(Debug, Args)]
struct Counted {
    /// What to count, such as alloc_space; by default what the profile itself begins with: inuse_space, for the heap.
    #[arg(long, value_name = "TYPE")]
    sample: Option<String>,
}

/// What of profiles is counted, and how it is shown.
#[derive(Debug, Args)]
struct Shown {
    #[command(flatten)]
    counted: Counted,
    /// At most this many functions.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// A JSON document.
    #[arg(long)]
    json: bool,
}

impl Counted {
    /// The index of the sample type that is asked for by name, or of the default one.
    fn index(&self, profile: &Profile) -> anyhow::Result<usize> {
        let asked = self.sample.as_deref();
        profile.sample_type(asked.unwrap_or_default()).with_context(|| {
            let kinds: Vec<&str> = profile.sample_types.iter().map(|sample_type| sample_type.kind.as_str()).collect();
            format!("the profile has no {}; it has {}", asked.unwrap_or("sample type"), kinds.join(", "))
        })
    }
}

/// Runs the verb.
pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    match options {
        Options::List(options) => list::run(config, options).await,
        Options::Fetch(options) => fetch::run(config, options).await,
        Options::Top(options) => top::run(config, options).await,
        Options::Diff(options) => diff::run(config, options).await,
        Options::Flamegraph(options) => flamegraph::run(config, options).await,
        Options::Grew(options) => grew::run(config, options).await,
    }
}

/// What each function asked for itself, of the sample type at that index.
fn own_by_place(found: &Found, sample_type: usize) -> BTreeMap<Place, i64> {
    let places = by_place(&found.profile, sample_type, PROGRAM).into_iter();
    places.map(|(place, amount)| (place, amount.own)).collect()
}

/// Writes a file so that it is whole or not there, for its owner only.
fn save(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let written = tempfile::NamedTempFile::new_in(directory).and_then(|mut file| {
        file.write_all(content)?;
        file.as_file().sync_data()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    });
    written.with_context(|| format!("cannot write {}", path.display()))
}
