//! The verbs, one file each.

mod demo;
mod kafka;
mod partner;
mod up;
mod with_postgres;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// PostgreSQL, SQS, Kafka and the partner on one machine, without Docker.
#[derive(Debug, Parser)]
#[command(name = "local-stack", version)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Keep everything running until Ctrl-C, and write the variables for the service to a file
    Up(up::Up),
    /// Run a command with a PostgreSQL database of its own, which ends with it
    WithPostgres(with_postgres::WithPostgres),
    /// The whole job once: everything started, events sent, every count checked
    Demo(demo::Demo),
    /// Only a Kafka broker; its addresses are the first line of the output
    Kafka,
    /// Only the partner stub
    Partner(partner::Partner),
}

/// Runs a verb until it ends or a signal asks for the end, and stops everything it started.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    let filter = EnvFilter::try_from_env("LOCAL_STACK_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_target(false).with_writer(std::io::stderr).init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("local-stack: cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        let ended = end_asked_for()?;
        // On the heap: these hold a whole stack.
        match arguments.verb {
            Verb::Up(up) => Box::pin(until(ended, up.run())).await,
            Verb::Demo(demo) => Box::pin(demo.run(ended)).await,
            Verb::WithPostgres(with_postgres) => Box::pin(with_postgres.run(ended)).await,
            Verb::Kafka => until(ended, kafka::run()).await,
            Verb::Partner(partner) => until(ended, partner.run()).await,
        }
    });
    // An installation that is under way in a blocking thread is not waited for; its processes end with this one.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("local-stack: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Works until the end is asked for. Dropping the work drops what it started.
async fn until(ended: impl Future<Output = ()>, work: impl Future<Output = Result<()>>) -> Result<ExitCode> {
    tokio::select! {
        result = work => result.map(|()| ExitCode::SUCCESS),
        () = ended => Ok(ExitCode::SUCCESS),
    }
}

/// Completes at Ctrl-C, at SIGTERM and when the terminal closes.
fn end_asked_for() -> Result<impl Future<Output = ()>> {
    let listen = |kind| signal(kind).context("cannot listen for signals");
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Arguments::command().debug_assert();
    }
}
