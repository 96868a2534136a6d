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

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use clap::Subcommand;

use crate::config::Config;
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

/// The index of the sample type that is asked for by name, or of the default one.
fn sample_type(profile: &Profile, asked: Option<&str>) -> anyhow::Result<usize> {
    profile.sample_type(asked.unwrap_or_default()).with_context(|| {
        let kinds: Vec<&str> = profile.sample_types.iter().map(|sample_type| sample_type.kind.as_str()).collect();
        format!("the profile has no {}; it has {}", asked.unwrap_or("sample type"), kinds.join(", "))
    })
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
