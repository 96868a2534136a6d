//! The command line: one file for each verb, with its options and what it does.
//!
//! Exit codes: 0 done, 1 failed, 64 usage (`EX_USAGE`), 78 configuration (`EX_CONFIG`), as in sysexits.h. `audit` has one
//! more: 3, the topic is truncated.

mod audit;
mod cancel;
mod check;
mod completions;
mod config;
mod dlq;
mod health;
mod migrate;
mod profile;
mod replay;
mod retry;
mod seed;
mod send;
mod serve;
mod setup;
mod status;
mod text;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

use crate::config::{Config, ConfigError, Section};

const USAGE: u8 = 64;
const CONFIGURATION: u8 = 78;

/// An SQS event worker: listings in, valuations from the partner, results to Kafka.
#[derive(Debug, Parser)]
#[command(
    name = "write-api",
    version,
    after_help = "Settings: a TOML file (--config) and WRITE_API_* variables; `write-api config --markdown` explains them \
all. The minimum for `serve`:\n  WRITE_API_DATABASE_URL=postgres://…  WRITE_API_PARTNER_BASE_URL=https://…  \
WRITE_API_KAFKA_BROKERS=host:9092\nAWS credentials come from the standard chain.\n\nExit codes: 0 done, 1 failed, \
64 wrong usage, 78 wrong configuration. Each verb's own --help says what it needs, with examples."
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
    ///
    /// This is the service: it receives events from the three queues, works on them, and serves health, metrics and
    /// profiles. Neighbours that are away are waited for. A first SIGTERM or Ctrl-C ends it in order, within
    /// shutdown.grace; a second one at once.
    #[command(after_long_help = serve::HELP)]
    Serve(serve::Options),
    /// Look whether everything that `serve` needs is there and as it should be.
    ///
    /// The settings first, then Postgres (server, schema, rights), the queues with their dead-letter queues, the Kafka
    /// topic, the partner, and whether a heap profile can be taken. Each is asked for real, all at once.
    #[command(after_long_help = check::HELP)]
    Check(check::Options),
    /// Print every setting with its value and where it came from; secrets stay hidden.
    #[command(after_long_help = config::HELP)]
    Config(config::Options),
    /// Ask the service of this machine whether it is alive, for container health checks.
    ///
    /// Prints the answer of its /livez, at admin.listen.
    #[command(after_long_help = health::HELP)]
    Health,
    /// Bring the database's schema up to date.
    ///
    /// Applies the migrations that are compiled in and not yet applied, in order, one process at a time.
    #[command(after_long_help = migrate::HELP)]
    Migrate,
    /// Migrate, and create the queues with their dead-letter queues and the Kafka topic where they are missing.
    ///
    /// What is there is left alone, so it may be repeated; `check` tells what is not as it should be.
    #[command(after_long_help = setup::HELP)]
    Setup,
    /// Load listings into the database: 21,436 real ones, and as many made from them as asked.
    ///
    /// Listings that exist stay as they are. For trials and measurements, not for production.
    #[command(after_long_help = seed::HELP)]
    Seed(seed::Options),
    /// Send an event to the queue that producers use; prints its id.
    #[command(subcommand)]
    Send(send::Options),
    /// Send recorded events to the queue that producers use.
    ///
    /// Every line is checked as the service would before the first is sent.
    #[command(after_long_help = replay::HELP)]
    Replay(replay::Options),
    /// Show how runs are: rows, rate, owner, post-processing.
    ///
    /// From their durable record alone, so it works whichever process has them, and if none has.
    #[command(after_long_help = status::HELP)]
    Status(status::Options),
    /// End a run, wherever it is worked on; what is done stays.
    ///
    /// Waits for the end: seconds where its worker lives, else until the worker's lease ends. The request stands even if
    /// this command is interrupted.
    #[command(after_long_help = cancel::HELP)]
    Cancel(cancel::Options),
    /// Let a cancelled or failed run go on where it was.
    ///
    /// Valued listings are not asked for again, and those recorded as failed stay so: `send refresh` makes a new run.
    #[command(after_long_help = retry::HELP)]
    Retry(retry::Options),
    /// Look into the dead-letter queues, send letters again, or delete them.
    #[command(subcommand)]
    Dlq(dlq::Options),
    /// Prove that the books balance: runs, valuations, current values, outbox, post-processing, and the records on Kafka.
    ///
    /// Counts everything anew from rows and records, with rules of its own, and lists every gap. Changes nothing, and may
    /// run beside the service.
    #[command(after_long_help = audit::HELP)]
    Audit(audit::Options),
    /// Show whose memory it is, what grew, and since when, from profiles and snapshots of the heap.
    #[command(subcommand)]
    Profile(profile::Options),
    /// Print the script with which a shell completes this command line.
    #[command(after_long_help = completions::HELP)]
    Completions(completions::Options),
}

impl Verb {
    /// The sections of the configuration that must be complete.
    fn needs(&self) -> &'static [Section] {
        match self {
            Verb::Serve(_) | Verb::Check(_) => &[Section::Database, Section::Partner, Section::Kafka],
            Verb::Migrate | Verb::Seed(_) | Verb::Status(_) | Verb::Cancel(_) | Verb::Retry(_) => &[Section::Database],
            Verb::Setup | Verb::Audit(_) => &[Section::Database, Section::Kafka],
            Verb::Dlq(dlq::Options::Redrive(_)) => &[Section::Database],
            Verb::Health
            | Verb::Send(_)
            | Verb::Replay(_)
            | Verb::Dlq(_)
            | Verb::Profile(_)
            | Verb::Config(_)
            | Verb::Completions(_) => &[],
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
    let checked = match &cli.verb {
        Verb::Replay(options) => options.check(),
        Verb::Dlq(options) => options.check(),
        _ => Ok(()),
    };
    if let Err(error) = checked {
        eprintln!("write-api: {error}");
        return ExitCode::from(USAGE);
    }
    // Empty is as good as unset: a manifest that may name a file need not name one.
    let by_variable = || std::env::var_os("WRITE_API_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
    let file = cli.config.or_else(by_variable);
    // These two need no good configuration.
    match &cli.verb {
        Verb::Completions(options) => return ended(print(completions::run(options, Cli::command()))),
        Verb::Config(options) => {
            let (text, errors) = config::run(options, file.as_deref(), environment());
            let printed = ended(print(text));
            return if errors.is_empty() { printed } else { refused(&errors) };
        }
        _ => {}
    }
    let config = match Config::load(file.as_deref(), environment(), cli.verb.needs()) {
        Ok(config) => config,
        Err(errors) => {
            let Verb::Check(options) = &cli.verb else { return refused(&errors) };
            // The errors are what `check` was asked for.
            let told = check::refuse(&errors, options);
            return if told.is_ok() { ExitCode::from(CONFIGURATION) } else { ended(told) };
        }
    };
    // What `check` finds is in its report; the libraries' own lines about it would bury that.
    let logging = if matches!(cli.verb, Verb::Check(_)) { Ok(()) } else { crate::telemetry::init(&config.log) };
    let mut code = ExitCode::SUCCESS;
    let done = ended(logging.and_then(|()| match cli.verb {
        Verb::Serve(options) => serve::run(config, options),
        Verb::Check(options) => block_on(check::run(&config, &options)),
        Verb::Health => block_on(health::run(&config)),
        Verb::Migrate => block_on(migrate::run(&config)),
        Verb::Setup => block_on(setup::run(&config)),
        Verb::Seed(options) => block_on(seed::run(&config, &options)),
        Verb::Send(options) => block_on(send::run(&config, &options)),
        Verb::Replay(options) => block_on(replay::run(&config, &options)),
        Verb::Status(options) => block_on(status::run(&config, &options)),
        Verb::Cancel(options) => block_on(cancel::run(&config, &options)),
        Verb::Retry(options) => block_on(retry::run(&config, &options)),
        Verb::Dlq(options) => block_on(dlq::run(&config, &options)),
        Verb::Profile(options) => block_on(profile::run(&config, &options)),
        Verb::Audit(options) => match block_on(audit::run(&config, &options)) {
            Ok(verdict) => {
                code = verdict.exit_code();
                Ok(())
            }
            Err(error) => Err(error),
        },
        Verb::Config(_) | Verb::Completions(_) => unreachable!("ended above"),
    }));
    if done == ExitCode::SUCCESS { code } else { done }
}

/// The exit code of a verb that was run; a failure is told.
fn ended(done: anyhow::Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("write-api: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Tells what is wrong with the configuration.
fn refused(errors: &[ConfigError]) -> ExitCode {
    eprintln!("write-api: {} in the configuration:", count(errors.len() as u64, "error"));
    for error in errors {
        eprintln!("  {error}");
    }
    ExitCode::from(CONFIGURATION)
}

/// Writes to stdout. A reader that has seen enough, such as `head`, is no failure.
fn print(text: impl AsRef<[u8]>) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_ref()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// The environment as text. A variable of ours that is not UTF-8 is passed on mangled, and refused by name as a value.
fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
}

fn block_on<T>(verb: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(verb);
    // A name look-up or a question to Kafka that hangs on a thread of its own must not keep a verb that is done.
    runtime.shutdown_background();
    done
}

fn count(number: u64, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_long_help_of_every_verb_is_enough_to_use_it() {
        fn look(command: &mut clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            if command.has_subcommands() {
                command.get_subcommands_mut().for_each(|verb| look(verb, &path));
                return;
            }
            let help = command.render_long_help().to_string();
            for part in ["Needs: ", "Example", "Exit codes: 0 "] {
                assert!(help.contains(part), "{path} --help has no {part:?}:\n{help}");
            }
            assert!(help.contains(&format!(" {path}")), "{path} --help has no example:\n{help}");
        }
        let mut command = Cli::command();
        command.get_subcommands_mut().for_each(|verb| look(verb, "write-api"));
    }
}
