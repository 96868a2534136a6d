//! `local-stack`: the servers around the service, from the command line.

mod cli;
mod demo;
mod variables_file;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    cli::run(cli::Arguments::parse())
}
