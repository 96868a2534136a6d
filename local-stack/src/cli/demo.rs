//! `local-stack demo`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, value_parser};

use crate::demo::{self, REAL_LISTINGS, Settings};

/// Starts everything, sends the nightly event and thousands of fast ones beside it, and compares what came of them with
/// what must. Exit code: 0 if every count is right, 1 if one is not.
#[derive(Debug, Args)]
pub(super) struct Demo {
    /// Listings that the nightly event is limited to
    #[arg(long, value_name = "N", default_value_t = 17_000)]
    limit: u32,
    /// Listings loaded before it; those beyond 21,436 are copies [default: 21,436, or the limit if that is more]
    #[arg(long, value_name = "N")]
    seed_count: Option<u32>,
    /// The partner's time from a request to its answer, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 250)]
    partner_latency_ms: u32,
    /// The most requests a second, both that the partner takes and that the service sends; 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 1000)]
    partner_rate_cap: u32,
    /// The most partner calls in flight
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = value_parser!(u32).range(1..=100_000))]
    in_flight: u32,
    /// listing.upsert events of existing listings, spread over the time that the nightly one takes
    #[arg(long, value_name = "N", default_value_t = 4000)]
    upserts: u32,
    /// End after the summary
    #[arg(long)]
    once: bool,
    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The service's program [default: write-api beside this program]
    #[arg(long, value_name = "FILE")]
    service_binary: Option<PathBuf>,
}

impl Demo {
    pub(super) async fn run(self, ended: impl Future<Output = ()>) -> Result<ExitCode> {
        let settings = Settings {
            limit: self.limit,
            seed_count: self.seed_count.unwrap_or(self.limit.max(REAL_LISTINGS)),
            partner_latency_ms: self.partner_latency_ms,
            partner_rate_cap: self.partner_rate_cap,
            in_flight: self.in_flight,
            upserts: self.upserts,
            service_binary: self.service_binary,
            once: self.once,
            json: self.json,
        };
        demo::run(settings, ended).await
    }
}
