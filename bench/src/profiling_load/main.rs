//! `profiling-load`: the service at work for half an hour while it is profiled in every way, with panics and a SIGTERM in
//! between. Nothing may crash, be late, or stay.
//!
//! - [`load`] keeps the service at work;
//! - [`asking`] asks for profiles and checks the answers;
//! - [`log`] reads what became of the messages;
//! - [`promises`] says which of them were kept.

mod asking;
mod load;
mod log;
mod promises;

use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, value_parser};
use local_stack::{
    Behaviour, Environment, Exposition, Names, PartnerStub, Process, Program, Sampler, Stack, StackOptions, peak,
};

use asking::Asking;
use load::Load;
use promises::Promises;

const LISTINGS: u32 = 17_000;
/// From the start of the load until memory is what it is under load.
const WARM_UP: Duration = Duration::from_secs(20);
/// After the last request, memory has so long to be as before.
const AFTER: Duration = Duration::from_secs(15);
/// Over so long memory under load is averaged: it comes and goes with each slow event.
const AVERAGED: Duration = Duration::from_secs(10);
/// From SIGTERM to the end; the service's own limit is 25 s.
const STOP: Duration = Duration::from_secs(30);
/// What is left at the end is done within this.
const REST: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(100);
/// Every so many events the handler of one panics.
const PANIC_EVERY: usize = 250;
const PANICS: usize = 200;

/// Profiles the service for minutes while it works: 50 requests a minute, all modes and forms in turn, snapshots every 10 s,
/// panics, and a SIGTERM in the middle. Exit code 1 if a promise was broken.
#[derive(Debug, Parser)]
#[command(name = "profiling-load", version)]
struct Arguments {
    /// How long profiles are asked for
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = value_parser!(u64).range(1..=1_440))]
    minutes: u64,
    /// The service, built with the feature `fault-injection`
    #[arg(long, value_name = "FILE")]
    program: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("profiling-load: cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(Box::pin(run(arguments))) {
        Ok(promises) => {
            println!("{}", promises.text());
            if promises.kept() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("profiling-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(Arguments { minutes, program }: Arguments) -> Result<Promises> {
    local_stack::allow_open_files()?;
    let partner = PartnerStub::start(Behaviour { latency_ms: 100, ..Behaviour::default() })?;
    let stack = Stack::start(StackOptions::default()).await?;
    let snapshots = stack.directory().join("snapshots");
    let mut environment = Environment::create(&stack, Names::standard(), &partner.url()).await?;
    let panics: Vec<String> = (1..=PANICS).map(|n| format!("events.begin=panic@{}", n * PANIC_EVERY)).collect();
    environment
        .set("profiling.snapshots.directory", &snapshots.display().to_string())
        .set("profiling.snapshots.interval", "10s")
        // An event of 17 s is extended twice or three times, so that there are extensions to be late.
        .set("queue.visibility_timeout", "12s")
        // So many requests cost more than the default allows, and what is looked for is harm, not thrift.
        .set("profiling.cpu_budget", "1s")
        .set_variable("WRITE_API_FAULTS", &panics.join(","));
    let program = Program::new(Some(&program), environment, "profiling-load")?;
    program.run(&["setup"]).await?;
    program.run(&["seed", "--count", &LISTINGS.to_string()]).await?;

    let stop = AtomicBool::new(false);
    let load = Load::new(&stack, program.environment(), LISTINGS).await?;
    let asked = async {
        let mut promises = Promises::new(minutes);
        let mut asking = Asking::new(program.environment(), &stack.directory().join("profile.pb.gz"));
        let half = Duration::from_secs(minutes * 30);
        for life in 1..=2 {
            let process = program.serve().await?;
            let sampler = Sampler::start(process.id())?;
            tokio::time::sleep(WARM_UP).await;
            let before = under_load(&sampler).await?;
            asking.ask(half, &process).await?;
            tokio::time::sleep(AFTER - AVERAGED / 2).await;
            let after = under_load(&sampler).await?;
            if life == 2 {
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
                load.done(REST).await?;
            }
            promises.memory(before, after, peak(&sampler.samples_from(0.0)).context("no sample")?.rss_mib);
            promises.late(&Exposition::read(&program.environment().admin_url()).await?);
            println!("SIGTERM after {life} of 2 halves");
            promises.ended(life, end(&process).await?);
        }
        promises.answers(asking.answers);
        anyhow::Ok(promises)
    };
    let (mut promises, sent) = tokio::try_join!(asked, load.run(&stop))?;
    promises.sent(sent);
    promises.messages(&log::read(program.log())?);
    promises.files(&snapshots)?;
    Ok(promises)
}

/// The mean resident memory of the next moments, in MiB.
async fn under_load(sampler: &Sampler) -> Result<f64> {
    let from = sampler.now();
    tokio::time::sleep(AVERAGED).await;
    let samples = sampler.samples_from(from);
    ensure!(!samples.is_empty(), "no sample of the memory: has the service ended?");
    Ok(samples.iter().map(|sample| sample.memory.rss_mib).sum::<f64>() / samples.len() as f64)
}

/// Ends the service by SIGTERM.
async fn end(process: &Process) -> Result<ExitStatus> {
    process.signal(libc::SIGTERM);
    let begun = Instant::now();
    while begun.elapsed() < STOP {
        if let Some(status) = process.exited()? {
            return Ok(status);
        }
        tokio::time::sleep(LOOK).await;
    }
    bail!("write-api serve has not ended {STOP:?} after SIGTERM; the end of its log:\n{}", process.log_tail())
}
