//! What came of a round: everything that the checker is given, looked at once it is over.

use std::time::{Duration, Instant};

use anyhow::Result;
use aws_sdk_sqs::types::MessageSystemAttributeName;
use local_stack::TapRecord;

use super::World;
use crate::checker::{Letter, Observed, Valuation};
use crate::owners;
use crate::replica::LOOK;
use crate::workload::LANES;

impl World {
    /// Looks at everything. The dead-letter queues are emptied by it.
    pub async fn observe(&self) -> Result<Observed> {
        let database = &self.database;
        let valuations: Vec<Valuation> = sqlx::query_as(
            "SELECT run_id, listing_id, zip_code, list_price_cents, valuation_cents, confidence, failure FROM valuations",
        )
        .fetch_all(database)
        .await?;
        let records = self.records(valuations.iter().filter(|row| row.failure.is_none()).count() as u64).await;
        let mut replicas = Vec::new();
        for replica in &self.replicas {
            replicas.push(replica.figures().await?);
        }
        let mut left = Vec::new();
        for lane in LANES {
            let (visible, hidden) = self.depth(lane).await?;
            left.push((lane, visible, hidden));
        }
        Ok(Observed {
            runs: sqlx::query_as(
                "SELECT run_id, state, selected, valued, failed, attempts, event_time, event_data, completed_at,
                        (owner IS NOT NULL OR publisher IS NOT NULL OR lease_until IS NOT NULL) AS held,
                        (to_jsonb(runs) ->> 'deaths')::integer AS deaths
                 FROM runs",
            )
            .fetch_all(database)
            .await?,
            valuations,
            current: sqlx::query_as("SELECT listing_id, run_id, valuation_cents, confidence FROM listing_valuations")
                .fetch_all(database)
                .await?,
            listings: sqlx::query_as(
                "SELECT listing_id, zip_code, list_price_cents, event_id, event_time FROM listings",
            )
            .fetch_all(database)
            .await?,
            outbox: sqlx::query_as("SELECT event_id::text, lane, sent_at IS NOT NULL AS sent FROM outbox")
                .fetch_all(database)
                .await?,
            publications: sqlx::query_as("SELECT event_id, run_id, state, published, attempts FROM publications")
                .fetch_all(database)
                .await?,
            records,
            records_missed: self.tap.missed(),
            letters: self.letters().await?,
            sqs_calls: self.sqs_proxy.calls(),
            interruptions: self.interruptions.clone(),
            left,
            partner: self.partner.stats(),
            strangers: owners::strangers(database).await?,
            replicas,
            connections: self.connections().await?,
        })
    }

    /// Connections of the service that the database knows. The server's own workers, such as autovacuum's, are of a database too.
    pub async fn connections(&self) -> Result<i64> {
        self.number(
            "SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND backend_type = 'client backend'
               AND application_name <> 'campaign' AND pid <> pg_backend_pid()",
        )
        .await
    }

    /// The topic's records, once `distinct` different ones are there or no more come. Where the broker was away, the reader
    /// takes up to ten seconds to find it again.
    async fn records(&self, distinct: u64) -> Vec<TapRecord> {
        let mut last = (self.tap.count(), Instant::now());
        while self.tap.distinct_ids() < distinct && last.1.elapsed() < Duration::from_secs(25) {
            tokio::time::sleep(LOOK).await;
            if self.tap.count() != last.0 {
                last = (self.tap.count(), Instant::now());
            }
        }
        self.tap.records()
    }

    async fn letters(&self) -> Result<Vec<Letter>> {
        let mut letters = Vec::new();
        for lane in LANES {
            let url = &self.urls[&lane][1];
            loop {
                let request = self.sqs.receive_message().queue_url(url).max_number_of_messages(10);
                let request = request
                    .message_attribute_names("All")
                    .message_system_attribute_names(MessageSystemAttributeName::ApproximateReceiveCount);
                let messages = request.send().await?.messages.unwrap_or_default();
                if messages.is_empty() {
                    break;
                }
                for message in messages {
                    let receipt = message.receipt_handle.unwrap_or_default();
                    self.sqs.delete_message().queue_url(url).receipt_handle(receipt).send().await?;
                    let attributes = message.message_attributes.unwrap_or_default();
                    let reason = attributes.get("reason").and_then(|value| value.string_value.clone());
                    let (body, reason) = (message.body.unwrap_or_default(), reason.unwrap_or_default());
                    letters.push(Letter { lane, body, reason });
                }
            }
        }
        Ok(letters)
    }
}
