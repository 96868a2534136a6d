//! `local-stack partner`

use std::net::SocketAddr;
use std::str::FromStr;

use anyhow::Result;
use clap::Args;
use local_stack::partner::{RequiredHeader, RetryAfter};
use local_stack::{Behaviour, PartnerStub};

/// Everything but the address can be changed later: POST /control with `{"latency_ms": 20}`.
#[derive(Debug, Args)]
pub(super) struct Partner {
    /// Where to listen; port 0 chooses a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    #[command(flatten)]
    manners: Manners,
}

/// The flags that make a [`Behaviour`].
#[derive(Debug, Args)]
struct Manners {
    /// From a request's arrival to its answer, in milliseconds
    #[arg(long, default_value_t = 0)]
    latency_ms: u64,
    /// The most requests let through in any sliding second, 0 for no limit
    #[arg(long, default_value_t = 0)]
    rate_cap: u32,
    /// Answer this ratio of requests with an error, as STATUS=RATIO; may be repeated
    #[arg(long = "error", value_name = "STATUS=RATIO", value_parser = pair::<u16, f64>)]
    errors: Vec<(u16, f64)>,
    /// Answer a listing with an error always, as LISTING=STATUS; may be repeated
    #[arg(long = "forced", value_name = "LISTING=STATUS", value_parser = pair::<i64, u16>)]
    forced: Vec<(i64, u16)>,
    /// Never answer this ratio of requests
    #[arg(long, default_value_t = 0.0)]
    hang_ratio: f64,
    /// Answer this ratio of requests with nonsense
    #[arg(long, default_value_t = 0.0)]
    garbage_ratio: f64,
    /// Close the connection of this ratio of requests after the valuation is made
    #[arg(long, default_value_t = 0.0)]
    drop_ratio: f64,
    /// Retry-After of 429 and 503, in seconds
    #[arg(long, default_value_t = 1)]
    retry_after: u32,
    /// Give Retry-After as a date
    #[arg(long)]
    retry_after_date: bool,
    /// Answer 401 unless requests carry this header, as NAME=VALUE
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair::<String, String>)]
    required_header: Option<(String, String)>,
}

impl Partner {
    pub(super) async fn run(self) -> Result<()> {
        let stub = PartnerStub::start_on(self.listen, self.manners.into())?;
        println!("{}", stub.url());
        std::future::pending().await
    }
}

impl From<Manners> for Behaviour {
    fn from(manners: Manners) -> Self {
        let form = if manners.retry_after_date { RetryAfter::Date } else { RetryAfter::Seconds };
        Self {
            latency_ms: manners.latency_ms,
            rate_cap: manners.rate_cap,
            errors: manners.errors.into_iter().collect(),
            hang_ratio: manners.hang_ratio,
            garbage_ratio: manners.garbage_ratio,
            drop_ratio: manners.drop_ratio,
            forced: manners.forced.into_iter().collect(),
            retry_after: form(manners.retry_after),
            required_header: manners.required_header.map(|(name, value)| RequiredHeader { name, value }),
            // What has no flag can be ordered by POST /control.
            ..Self::default()
        }
    }
}

fn pair<L: FromStr, R: FromStr>(text: &str) -> Result<(L, R), String> {
    let parsed = text.split_once('=').and_then(|(left, right)| Some((left.parse().ok()?, right.parse().ok()?)));
    parsed.ok_or_else(|| "not of the form LEFT=RIGHT, or one side cannot be read".to_owned())
}
