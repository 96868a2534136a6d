//! The command line: one file for each verb, with its options and what it does.
//!
//! Exit codes: 0 done, 1 failed, 64 usage (`EX_USAGE`), 78 configuration (`EX_CONFIG`), as in sysexits.h.

mod health;
mod migrate;
mod seed;
mod send;
mod serve;
mod setup;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{Config, Section};

const USAGE: u8 = 64;
const CONFIGURATION: u8 = 78;

/// An SQS event worker: listings in, valuations from the partner, results to Kafka.
#[derive(Debug, Parser)]
#[command(
    name = "write-api",
    version,
    after_help = "Settings: a TOML file (--config) and WRITE_API_* variables; \
config/default.toml lists them all. The minimum for `serve`:\n  WRITE_API_DATABASE_URL=postgres://…  \
WRITE_API_PARTNER_BASE_URL=https://…  WRITE_API_KAFKA_BROKERS=host:9092"
)]
struct Cli {
    /// A TOML file with settings; the environment overrides it. Also WRITE_API_CONFIG.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Consume events until SIGTERM or Ctrl-C.
    Serve,
    /// Ask the service of this machine whether it is alive: exit 0 if its /livez says so. For container health checks.
    Health,
    /// Bring the database's schema up to date.
    Migrate,
    /// Migrate, and create the queues with their dead-letter queues and the Kafka topic where they are missing.
    Setup,
    /// Load listings into the database: 21,436 real ones, and as many made from them as asked.
    Seed(seed::Options),
    /// Send an event to the queue that producers use; prints its id.
    #[command(subcommand)]
    Send(send::Options),
}

impl Verb {
    /// The sections of the configuration that must be complete.
    fn needs(&self) -> &'static [Section] {
        match self {
            Verb::Serve => &[Section::Database, Section::Partner, Section::Kafka],
            Verb::Migrate | Verb::Seed(_) => &[Section::Database],
            Verb::Setup => &[Section::Database, Section::Kafka],
            Verb::Health | Verb::Send(_) => &[],
        }
    }
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let file = cli.config.or_else(|| std::env::var_os("WRITE_API_CONFIG").map(PathBuf::from));
    let config = match Config::load(file.as_deref(), environment(), cli.verb.needs()) {
        Ok(config) => config,
        Err(errors) => {
            eprintln!("write-api: {} in the configuration:", count(errors.len(), "error"));
            for error in errors {
                eprintln!("  {error}");
            }
            return ExitCode::from(CONFIGURATION);
        }
    };
    let done = crate::telemetry::init(&config.log).and_then(|()| match cli.verb {
        Verb::Serve => serve::run(config),
        Verb::Health => block_on(health::run(&config)),
        Verb::Migrate => block_on(migrate::run(&config)),
        Verb::Setup => block_on(setup::run(&config)),
        Verb::Seed(options) => block_on(seed::run(&config, &options)),
        Verb::Send(options) => block_on(send::run(&config, &options)),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("write-api: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The environment as text. A variable of ours that is not UTF-8 is passed on mangled, and refused by name as a value.
fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
}

fn block_on(verb: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(verb)
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
