//! Slow and fast events without a pause.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aws_sdk_sqs::types::SendMessageBatchRequestEntry;
use bench::event::{queue_url, send_refresh};
use local_stack::{Environment, Stack};
use serde_json::json;
use sqlx::postgres::{PgPool, PgPoolOptions};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Fast events: so many at once, this far apart.
const BATCH: u64 = 10;
const BETWEEN: Duration = Duration::from_millis(250);
const LOOK: Duration = Duration::from_millis(200);

/// What was sent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sent {
    pub(crate) refreshes: u64,
    pub(crate) upserts: u64,
}

/// The producers.
pub(crate) struct Load {
    client: aws_sdk_sqs::Client,
    queue: String,
    queue_url: String,
    database: PgPool,
    listings: u32,
    refreshes: AtomicU64,
    upserts: AtomicU64,
}

impl Load {
    pub(crate) async fn new(stack: &Stack, environment: &Environment, listings: u32) -> Result<Self> {
        let client = stack.sqs().client().await;
        let queue = environment.names().events_queue.clone();
        let queue_url = queue_url(&client, &queue).await?;
        let database = PgPoolOptions::new().max_connections(2).connect_lazy(environment.database_url())?;
        let (refreshes, upserts) = Default::default();
        Ok(Self { client, queue, queue_url, database, listings, refreshes, upserts })
    }

    /// Sends until it is told to stop: a slow event when the one before is published, fast ones at a pace.
    pub(crate) async fn run(&self, stop: &AtomicBool) -> Result<Sent> {
        let goes_on = || !stop.load(Ordering::Relaxed);
        let slow = async {
            while goes_on() {
                let id = uuid::Uuid::new_v4().to_string();
                send_refresh(&self.client, &self.queue, &id, json!({ "limit": self.listings })).await?;
                self.refreshes.fetch_add(1, Ordering::Relaxed);
                while goes_on() && !self.is_published(&id).await? {
                    tokio::time::sleep(LOOK).await;
                }
            }
            anyhow::Ok(())
        };
        let fast = async {
            while goes_on() {
                self.send_upserts().await?;
                tokio::time::sleep(BETWEEN).await;
            }
            Ok(())
        };
        tokio::try_join!(slow, fast)?;
        Ok(Sent { refreshes: self.refreshes.load(Ordering::Relaxed), upserts: self.upserts.load(Ordering::Relaxed) })
    }

    /// Waits until all slow events are published and no message is left.
    pub(crate) async fn done(&self, limit: Duration) -> Result<()> {
        let begun = Instant::now();
        loop {
            // What is being sent while the load is told to stop is counted when it is sent.
            let published: i64 = sqlx::query_scalar("SELECT count(*) FROM publications WHERE state = 'complete'")
                .fetch_one(&self.database)
                .await
                .context("the publications")?;
            let sent = self.refreshes.load(Ordering::Relaxed) as i64;
            if published >= sent {
                return Ok(());
            }
            ensure!(begun.elapsed() < limit, "{published} of {sent} slow events are done {limit:?} after the last");
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn is_published(&self, id: &str) -> Result<bool> {
        let published = "SELECT EXISTS (SELECT FROM publications WHERE run_id = $1 AND state = 'complete')";
        sqlx::query_scalar(published).bind(id).fetch_one(&self.database).await.context("the publications")
    }

    async fn send_upserts(&self) -> Result<()> {
        let first = self.upserts.fetch_add(BATCH, Ordering::Relaxed);
        let time = OffsetDateTime::now_utc().format(&Rfc3339)?;
        let mut entries = Vec::new();
        for number in first..first + BATCH {
            let body = json!({
                "specversion": "1.0", "id": format!("upsert-{number}"), "source": "/profiling-load", "time": time,
                "type": "writeapi.listing.upsert.v1",
                "data": {
                    "listing_id": 1 + number % 1_000, "zip_code": 98_001, "list_price_cents": 45_000_000, "bedrooms": 3,
                    "living_square_feet": 1_800, "description": "a home of many words ".repeat(70),
                },
            });
            let entry = SendMessageBatchRequestEntry::builder().id(number.to_string()).message_body(body.to_string());
            entries.push(entry.build()?);
        }
        let sent =
            self.client.send_message_batch().queue_url(&self.queue_url).set_entries(Some(entries)).send().await?;
        ensure!(sent.failed.is_empty(), "SQS took not all: {:?}", sent.failed);
        Ok(())
    }
}
