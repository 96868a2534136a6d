//! `bench`: the figures that WriteApi holds itself to, measured.
//!
//! - [`ground`] is the stack that all of them stand on;
//! - [`slow`], [`fast`], [`life`] and [`profiler`] measure, [`bare`] has the loops that they measure by;
//! - [`processors`] tells what all processes together use;
//! - [`outcome`] says what came of a bar.

mod bare;
mod fast;
mod ground;
mod life;
mod outcome;
mod processors;
mod profiler;
mod slow;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bench::machine::{LOCK, Machine, SOURCES};
use clap::{Parser, value_parser};
use local_stack::Program;
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use ground::Ground;
use outcome::{Outcome, compare};

/// How much wider limits are in the quick profile, which runs on busy machines and unoptimised builds and looks for a
/// collapse.
const QUICK_SLACK: f64 = 4.0;
/// The bars of the quick profile: those of seconds.
const QUICK: [u32; 5] = [2, 4, 6, 10, 16];
/// A change that may be noise.
const NOISE: f64 = 0.10;

/// Measures the bars, tells which hold, and why the others do not or were not measured. Exit code: 0 unless one could not be
/// measured for an error; with --quick, 1 if one misses even its loose limit.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Arguments {
    /// The bars, by number [default: all]
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = value_parser!(u32).range(1..=16))]
    bars: Vec<u32>,
    /// Those that take seconds, with loose limits
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// As often and as long as the bars say: more than an hour
    #[arg(long)]
    full: bool,
    /// Write all figures to this file [default: bench.json in the build's target directory]
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Figures of an earlier time, to tell what changed beyond noise
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
}

/// The figures with what they were taken on.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    /// `--quick`, `--full` or neither.
    #[serde(default)]
    profile: String,
    machine: Machine,
    outcomes: Vec<Outcome>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("bench: cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = match arguments.split_first() {
        Some((first, rest)) if first == bare::ARGUMENT => {
            runtime.block_on(bare::main(rest)).map(|()| ExitCode::SUCCESS)
        }
        _ => runtime.block_on(async {
            tokio::select! {
                result = Box::pin(measure(Arguments::parse())) => result,
                _ = tokio::signal::ctrl_c() => anyhow::bail!("stopped"),
            }
        }),
    };
    result.unwrap_or_else(|error| {
        eprintln!("bench: {error:#}");
        ExitCode::FAILURE
    })
}

async fn measure(arguments: Arguments) -> Result<ExitCode> {
    let older: Option<Report> = match &arguments.compare {
        Some(file) => {
            let text = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            Some(serde_json::from_slice(&text).with_context(|| format!("{} is no report", file.display()))?)
        }
        None => None,
    };
    let Arguments { quick, full, .. } = arguments;
    let wanted: Vec<u32> = match (&arguments.bars[..], quick) {
        ([], true) => QUICK.to_vec(),
        ([], false) => (1..=16).collect(),
        (bars, _) => bars.to_vec(),
    };
    let began = Instant::now();
    let mut ground = Ground::start().await?;
    let program = Program::new(None, ground.base.clone(), "bench")?;
    let machine = Machine::of(ground.stack.postgres(), &program).await?;
    let profile = if quick {
        "quick"
    } else if full {
        "full"
    } else {
        "default"
    };
    println!("{}, {profile}\n", machine.text());
    let mut outcomes: Vec<Outcome> = Vec::new();
    let mut failed = Vec::new();
    for bar in &wanted {
        if outcomes.iter().any(|outcome| outcome.bar == *bar) {
            continue;
        }
        let ground = &mut ground;
        // On the heap: these hold whole services.
        let measured = match bar {
            1 => Box::pin(slow::rate_bound(ground)).await,
            2 | 4 | 6 => Box::pin(slow::latency_bound(ground, quick)).await,
            3 | 9 => Box::pin(slow::processor_time(ground, if full { 9 } else { 3 })).await,
            5 => Box::pin(slow::memory_against_rows(ground, full)).await,
            7 => Box::pin(fast::fast_events(ground, if full { 3 } else { 1 })).await,
            8 => Box::pin(fast::fast_beside_slow(ground, if full { 5 } else { 2 })).await,
            10 => Box::pin(slow::statements(ground)).await,
            11 => Box::pin(profiler::profiler_on(ground, if full { 30 } else { 5 })).await,
            12 => Box::pin(life::start_and_idle(ground, if full { 300 } else { 60 })).await,
            13 => Box::pin(life::stop(ground)).await,
            14 => Box::pin(life::recovery(ground, full)).await,
            15 => Box::pin(life::leases(ground, if full { 120 } else { 60 })).await,
            _ => build(full).await,
        };
        match measured {
            Ok(measured) => {
                for outcome in measured.into_iter().filter(|outcome| wanted.contains(&outcome.bar)) {
                    println!("{}", outcome.text());
                    outcomes.push(outcome);
                }
            }
            Err(error) => {
                println!("{bar:>2}  could not be measured: {error:#}\n");
                outcomes.push(Outcome::new(*bar, "").not_measured(format!("{error:#}")));
                failed.push(*bar);
            }
        }
    }
    outcomes.sort_by_key(|outcome| outcome.bar);
    println!("after {:.0} s:", began.elapsed().as_secs_f64());
    for outcome in &outcomes {
        println!("  {:>2}  {:<24} {}", outcome.bar, outcome.name, outcome.verdict());
    }
    if let Some(older) = &older {
        let changes = compare(&older.outcomes, &outcomes, NOISE);
        println!("\nolder: {}, {}", older.machine.text(), older.profile);
        println!("changed by more than {:.0} %: {}", NOISE * 100.0, if changes.is_empty() { "nothing" } else { "" });
        for change in changes {
            println!("  {change}");
        }
    }
    let collapsed: Vec<u32> =
        outcomes.iter().filter(|outcome| !outcome.holds(QUICK_SLACK)).map(|outcome| outcome.bar).collect();
    let file = match arguments.json {
        Some(file) => file,
        None => local_stack::cache_directory()?.with_file_name("bench.json"),
    };
    let text = serde_json::to_vec_pretty(&Report { profile: profile.to_owned(), machine, outcomes })?;
    std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    println!("\nall figures: {}", file.display());
    ensure!(failed.is_empty(), "could not be measured: {failed:?}");
    ensure!(!quick || collapsed.is_empty(), "even {QUICK_SLACK} times its limit is missed by: {collapsed:?}");
    Ok(ExitCode::SUCCESS)
}

/// Bar 16; the program is built anew if `full`.
async fn build(full: bool) -> Result<Vec<Outcome>> {
    let binary = local_stack::workspace_binary("write-api")?;
    let mib = std::fs::metadata(&binary)?.len() as f64 / 1024.0 / 1024.0;
    let mut outcome = Outcome::new(16, "build")
        .at_most("packages in the lock file", LOCK.matches("[[package]]").count() as f64, 420.0)
        .beside("the program, MiB", mib);
    let mut missing = Vec::new();
    if full {
        outcome = outcome.at_most("clean release build, minutes", clean_build().await?, 12.0);
    } else {
        missing.push("a clean release build (--full)".to_owned());
    }
    match image_bytes("write-api").await {
        Ok(bytes) => outcome = outcome.at_most("image write-api, MB", bytes as f64 / 1e6, 120.0),
        Err(error) => missing.push(format!("the image: {error:#} (docker build --tag write-api .)")),
    }
    Ok(vec![outcome.not_measured(missing.join("; "))])
}

/// Minutes that it takes to build everything from nothing but the sources of all packages.
async fn clean_build() -> Result<f64> {
    let target = tempfile::tempdir_in(local_stack::cache_directory()?)?;
    let began = Instant::now();
    let output = Command::new("cargo")
        .args(["build", "--release", "--locked", "--workspace", "--bins"])
        .current_dir(SOURCES)
        .env("CARGO_TARGET_DIR", target.path())
        // The metadata in .sqlx stand in for a database while compiling.
        .env_remove("DATABASE_URL")
        .kill_on_drop(true)
        .output()
        .await
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "no clean build: {}", String::from_utf8_lossy(&output.stderr));
    Ok(began.elapsed().as_secs_f64() / 60.0)
}

/// The size of an image, all of its layers together.
async fn image_bytes(name: &str) -> Result<u64> {
    let inspected = Command::new("docker").args(["image", "inspect", "--format", "{{.Size}}", name]).output().await;
    let output = inspected.context("docker cannot be run")?;
    ensure!(output.status.success(), "docker has none of the name {name}");
    String::from_utf8_lossy(&output.stdout).trim().parse().context("docker told no size")
}
