//! `local-stack demo`: the nightly event, from SQS to Kafka, with every figure counted by somebody else than the service.
//!
//! - [`story`] starts everything and compares, [`watch`] sends the events and looks on;
//! - [`queues`] and [`database`] are where it looks;
//! - [`report`] holds the figures and says which are wrong;
//! - [`progress`] and [`summary`] are what a person sees.

mod database;
mod progress;
mod queues;
mod report;
mod story;
mod summary;
mod watch;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::pin::pin;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::Serialize;

/// Listings in the seed data; those loaded beyond are copies, and the fast events begin again after as many.
pub(crate) const REAL_LISTINGS: u32 = 21_436;

/// What the demo is asked to do.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Settings {
    /// Listings that the nightly event is limited to.
    pub(crate) limit: u32,
    /// Listings loaded before it.
    pub(crate) seed_count: u32,
    /// The partner's time from a request to its answer, in milliseconds.
    pub(crate) partner_latency_ms: u32,
    /// The most requests that the partner takes and the service sends in a second; 0: no limit.
    pub(crate) partner_rate_cap: u32,
    /// The most partner calls in flight.
    pub(crate) in_flight: u32,
    /// Events of the fast kind, sent while the slow one runs.
    pub(crate) upserts: u32,
    /// The service's program; `None`: the one built beside this.
    pub(crate) service_binary: Option<PathBuf>,
    /// End after the summary.
    #[serde(skip)]
    pub(crate) once: bool,
    /// Where all figures go.
    #[serde(skip)]
    pub(crate) json: Option<PathBuf>,
}

/// Tells the story until its summary, and stays until `ended` completes. Everything that was started is stopped.
pub(crate) async fn run(settings: Settings, ended: impl Future<Output = ()>) -> Result<ExitCode> {
    let mut ended = pin!(ended);
    // A path that cannot be written to is told before the work and not after it.
    let json = match &settings.json {
        Some(path) => Some((path, File::create(path).with_context(|| format!("cannot write {}", path.display()))?)),
        None => None,
    };
    let told = tokio::select! {
        told = story::tell(&settings) => told?,
        () = &mut ended => bail!("the demo was stopped before its summary"),
    };
    print!("{}", summary::text(&told.report));
    if let Some((path, mut file)) = json {
        let mut text = serde_json::to_vec_pretty(&told.report)?;
        text.push(b'\n');
        file.write_all(&text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("all figures: {}", path.display());
    }
    let wrong = told.report.wrong();
    if !settings.once {
        let variables = told.write_variables()?;
        print!("{}", summary::addresses(&told.addresses(variables.path())?));
        ended.await;
        println!("\nstopping");
    }
    let counts = told.report.checks.len();
    // The service first, then what it stands on.
    drop(told);
    if wrong.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    bail!("{} of {counts} counts are wrong:\n  {}", wrong.len(), wrong.join("\n  "))
}
