//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// How much is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// Each kind of fault once, without those that take long; for every change.
    Ci,
    /// 500 listings a world, until the time is over.
    Small,
    /// 17,000 listings a world, until the time is over.
    Full,
}

/// Breaks the service and its neighbours on purpose, again and again, and checks that every promise held.
#[derive(Clone, Debug, Parser)]
#[command(name = "campaign", version)]
pub struct Options {
    /// The service, built with the feature `fault-injection`
    #[arg(long, value_name = "FILE")]
    pub program: PathBuf,
    /// Sources to find the fault points in
    #[arg(long, value_name = "DIRECTORY", default_value = "src")]
    pub sources: PathBuf,
    /// Where logs and fault logs of broken rounds are kept
    #[arg(long, value_name = "DIRECTORY", default_value = "target/campaign")]
    pub artefacts: PathBuf,
    /// How much is done
    #[arg(long, value_enum, default_value = "small")]
    pub profile: Profile,
    /// Begin no round after this time
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub minutes: u64,
    /// Where all choices come from; by default another each time
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Kinds of faults, separated by commas; by default all
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub faults: Vec<String>,
    /// Only this round of the seed
    #[arg(long, value_name = "N")]
    pub round: Option<u64>,
    /// Worlds at the same time, each with servers of its own
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub parallel: usize,
    /// Make the mistakes on purpose, one after the other, and count those that are found out
    #[arg(long)]
    pub planted: bool,
    /// With --planted: only these mistakes, separated by commas
    #[arg(long, value_name = "LIST", value_delimiter = ',', requires = "planted")]
    pub mistakes: Vec<String>,
    /// Plant a leak, and see that the profiler names it. With --profile ci, this comes after the rounds
    #[arg(long, conflicts_with = "planted")]
    pub leak: bool,
    /// Print the kinds of faults and the fault points, and end
    #[arg(long)]
    pub list: bool,
}
