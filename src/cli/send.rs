//! `write-api send`: events, as a producer would send them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::seed;
use crate::config::Config;
use crate::events::envelope::{LISTING_UPSERT, VALUATIONS_PUBLISH, VALUATIONS_REFRESH};
use crate::events::outgoing;
use crate::metrics::Metrics;
use crate::queue::batch::BATCH;
use crate::queue::sqs::{Queue, Sent, Sqs};

const REFRESH_HELP: &str = "\
Needs: the queue lanes.events.queue, AWS credentials with sqs:GetQueueUrl and sqs:SendMessage, and a service that works.

Examples:
  write-api send refresh --limit 17000
  write-api send refresh --zip-code 98002 --zip-code 98004

Exit codes: 0 sent, 1 failed, 64 wrong usage, 78 wrong configuration.";

const PUBLISH_HELP: &str = "\
Needs: as `write-api send refresh`. The records are the same as the first time, so consumers know them by ce_id.

Example:
  write-api send publish 5f0c4e1e-8a55-4a43-9d0c-6a4b3d2f7a10

Exit codes: 0 sent, 1 failed, 64 wrong usage, 78 wrong configuration.";

const UPSERT_HELP: &str = "\
Needs: as `write-api send refresh`.

Examples:
  write-api send upsert --sample 1000 --rate 200
  write-api send upsert --listing '{\"listing_id\": 1, \"zip_code\": 98002, \"list_price_cents\": 45000000, \"bedrooms\": 3, \
\"living_square_feet\": 1800}'

Exit codes: 0 sent, 1 failed, 64 wrong usage, 78 wrong configuration.";

/// Which event.
#[derive(Debug, Subcommand)]
pub(super) enum Options {
    /// Ask the partner for the valuation of listings, by default of all.
    #[command(after_long_help = REFRESH_HELP)]
    Refresh {
        /// Only listings of this zip code; may be repeated.
        #[arg(long = "zip-code", value_name = "CODE")]
        zip_codes: Vec<i32>,
        /// At most this many listings, in the order of their ids.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(0..))]
        limit: Option<i64>,
        #[command(flatten)]
        identity: Identity,
    },
    /// Publish the valuations of a complete run to Kafka, once more.
    #[command(after_long_help = PUBLISH_HELP)]
    Publish {
        /// Id of the refresh event.
        run_id: String,
        #[command(flatten)]
        identity: Identity,
    },
    /// Write listings.
    #[command(after_long_help = UPSERT_HELP)]
    Upsert {
        /// JSON of one listing, with list_price_cents; see the columns of `listings`.
        #[arg(long, value_name = "JSON", conflicts_with = "sample", required_unless_present = "sample")]
        listing: Option<String>,
        /// Instead, the first N listings of the seed data, as they are there; beyond their end from the start again.
        #[arg(long, value_name = "N", conflicts_with = "id")]
        sample: Option<usize>,
        /// At most this many events a second; without it, as fast as SQS takes them.
        #[arg(long, value_name = "R", requires = "sample", value_parser = clap::value_parser!(u32).range(1..))]
        rate: Option<u32>,
        #[command(flatten)]
        identity: Identity,
    },
}

/// What identifies an event.
#[derive(Debug, Args)]
pub(super) struct Identity {
    /// Event id; a random one by default. The same id again is the same event.
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Event time, RFC 3339; now by default. The newer of two events wins.
    #[arg(long, value_name = "TIME", value_parser = |text: &str| OffsetDateTime::parse(text, &Rfc3339))]
    time: Option<OffsetDateTime>,
}

impl Identity {
    fn event(&self, kind: &str, data: &Value) -> (String, String) {
        let id = self.id.clone().unwrap_or_else(|| Uuid::new_v4().to_string());
        let time = self.time.unwrap_or_else(OffsetDateTime::now_utc);
        let body = outgoing::cloud_event(&id, kind, time, None, data);
        (id, body)
    }
}

/// Sends what was asked for and prints the id of each event.
pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let sqs = Sqs::new(&config.aws, &config.queue, Arc::new(Metrics::new())).await;
    let name = &config.lanes.events.queue;
    let queue = sqs.queue(name).await.with_context(|| format!("is there a queue {name}? `write-api setup`"))?;
    let (id, body) = match options {
        Options::Refresh { zip_codes, limit, identity } => {
            let zip_codes = (!zip_codes.is_empty()).then_some(zip_codes);
            identity.event(VALUATIONS_REFRESH, &json!({"zip_codes": zip_codes, "limit": limit}))
        }
        Options::Publish { run_id, identity } => identity.event(VALUATIONS_PUBLISH, &json!({"run_id": run_id})),
        Options::Upsert { listing: Some(listing), identity, .. } => {
            let listing: Value = serde_json::from_str(listing).context("--listing is not JSON")?;
            identity.event(LISTING_UPSERT, &listing)
        }
        Options::Upsert { sample, rate, identity, .. } => {
            return send_sample(&sqs, &queue, sample.unwrap_or_default(), *rate, identity).await;
        }
    };
    sqs.send(&queue, &body).await?;
    println!("{id}");
    Ok(())
}

async fn send_sample(
    sqs: &Sqs,
    queue: &Queue,
    number: usize,
    rate: Option<u32>,
    identity: &Identity,
) -> anyhow::Result<()> {
    let listings = seed::king_county()?;
    let mut ticks = rate.map(|rate| tokio::time::interval(Duration::from_secs(1) * BATCH as u32 / rate));
    let mut sent = 0;
    while sent < number {
        if let Some(ticks) = &mut ticks {
            ticks.tick().await;
        }
        let batch: Vec<(String, String)> = (sent..number.min(sent + BATCH))
            .map(|index| {
                let listing = &listings[index % listings.len()];
                let day = listing.listed_on.map(|day| day.to_string());
                let data = json!({
                    "listing_id": listing.listing_id,
                    "zip_code": listing.zip_code,
                    "list_price_cents": listing.list_price_cents,
                    "listed_on": day,
                    "bedrooms": listing.bedrooms,
                    "bathrooms": listing.bathrooms,
                    "living_square_feet": listing.living_square_feet,
                    "lot_square_feet": listing.lot_square_feet,
                    "floors": listing.floors,
                    "waterfront": listing.waterfront,
                    "view_rating": listing.view_rating,
                    "condition_rating": listing.condition_rating,
                    "grade_rating": listing.grade_rating,
                    "year_built": listing.year_built,
                    "year_renovated": listing.year_renovated,
                    "latitude": listing.latitude,
                    "longitude": listing.longitude,
                });
                identity.event(LISTING_UPSERT, &data)
            })
            .collect();
        let bodies: Vec<&str> = batch.iter().map(|(_, body)| body.as_str()).collect();
        let accepted = sqs.send_batch(queue, &bodies).await?;
        for ((id, _), accepted) in batch.iter().zip(accepted) {
            if let Sent::Refused(why) | Sent::Failed(why) = accepted {
                anyhow::bail!("SQS did not accept event {id} ({why}); {sent} events were sent before it");
            }
            sent += 1;
            println!("{id}");
        }
    }
    Ok(())
}
