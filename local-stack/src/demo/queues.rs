//! The producer's side of the queues, and what is left in them.

use anyhow::{Context, Result};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::QueueAttributeName;
use local_stack::{Names, Stack};
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Messages of a queue, whatever their state.
const COUNTS: [QueueAttributeName; 3] = [
    QueueAttributeName::ApproximateNumberOfMessages,
    QueueAttributeName::ApproximateNumberOfMessagesNotVisible,
    QueueAttributeName::ApproximateNumberOfMessagesDelayed,
];

/// A client of the stack's queues.
#[derive(Debug)]
pub(super) struct Queues {
    client: Client,
    names: Names,
}

impl Queues {
    pub(super) async fn new(stack: &Stack, names: Names) -> Self {
        Self { client: stack.sqs().client().await, names }
    }

    /// Sends the nightly event. Written out here, as another team's scheduler would, and not by the service's `send`: the
    /// moment of sending counts, and a program's start takes longer than the way to the first call.
    pub(super) async fn send_refresh(&self, run_id: &str, limit: u32) -> Result<()> {
        let event = json!({
            "specversion": "1.0",
            "id": run_id,
            "source": "/scheduler",
            "type": "writeapi.valuations.refresh.v1",
            "time": OffsetDateTime::now_utc().format(&Rfc3339)?,
            "datacontenttype": "application/json",
            "data": { "limit": limit },
        });
        let name = &self.names.events_queue;
        let sent = self.client.send_message().queue_url(self.url(name).await?).message_body(event.to_string()).send();
        sent.await.with_context(|| format!("cannot send to the queue {name}"))?;
        Ok(())
    }

    /// Messages in the three queues.
    pub(super) async fn left(&self) -> Result<u64> {
        self.count("").await
    }

    /// Messages in the three dead-letter queues.
    pub(super) async fn dead_letters(&self) -> Result<u64> {
        self.count("-dlq").await
    }

    async fn count(&self, suffix: &str) -> Result<u64> {
        let mut messages = 0;
        for queue in [&self.names.events_queue, &self.names.valuations_queue, &self.names.post_processing_queue] {
            let name = format!("{queue}{suffix}");
            let request = self.client.get_queue_attributes().queue_url(self.url(&name).await?);
            let answer = request.set_attribute_names(Some(COUNTS.to_vec())).send().await;
            let answer = answer.with_context(|| format!("cannot ask for the messages of the queue {name}"))?;
            for (_, count) in answer.attributes().into_iter().flatten() {
                messages += count.parse::<u64>().with_context(|| format!("{count:?} is no count of messages"))?;
            }
        }
        Ok(messages)
    }

    async fn url(&self, name: &str) -> Result<String> {
        let answer = self.client.get_queue_url().queue_name(name).send().await;
        let answer = answer.with_context(|| format!("there is no queue {name}: has `write-api setup` run?"))?;
        answer.queue_url.with_context(|| format!("SQS gave no URL for the queue {name}"))
    }
}
