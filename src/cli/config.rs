//! `write-api config`: every setting, as it is here or as a table for the documentation.

use std::fmt::Write as _;
use std::path::Path;

use clap::Args;

use crate::config::{self, ConfigError};

pub(super) const HELP: &str = "\
Needs: nothing; the configuration may be incomplete or wrong. What is wrong is told after the list, on stderr.

Examples:
  write-api config
  write-api config | grep -v 'the default'      what was changed, and where
  write-api config --markdown                   the manual of all settings

Exit codes: 0 done, 64 wrong usage, 78 something is wrong in the configuration.";

/// What to print.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Instead, a table of all settings with their defaults, ranges and meaning, in Markdown.
    #[arg(long)]
    markdown: bool,
}

/// Text for stdout, and what is wrong.
pub(super) fn run(
    options: &Options,
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
) -> (String, Vec<ConfigError>) {
    if options.markdown {
        return (config::markdown(), Vec::new());
    }
    let (settings, errors) = config::settings(file, environment);
    let width = |of: fn(&config::Setting) -> &str| settings.iter().map(|s| of(s).chars().count()).max().unwrap_or(0);
    let (keys, values) = (width(|setting| &setting.key), width(|setting| &setting.value));
    let mut text = String::new();
    for setting in &settings {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{:keys$}  {:values$}  {}", setting.key, setting.value, setting.source);
    }
    (text, errors)
}
