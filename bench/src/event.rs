//! The slow event, as another team's scheduler sends it.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Sends a `valuations.refresh` with this id and these data.
pub async fn send_refresh(client: &aws_sdk_sqs::Client, queue: &str, id: &str, data: Value) -> Result<()> {
    let body = json!({
        "specversion": "1.0",
        "id": id,
        "source": "/scheduler",
        "type": "writeapi.valuations.refresh.v1",
        "time": OffsetDateTime::now_utc().format(&Rfc3339)?,
        "datacontenttype": "application/json",
        "data": data,
    });
    let url = queue_url(client, queue).await?;
    client
        .send_message()
        .queue_url(url)
        .message_body(body.to_string())
        .send()
        .await
        .with_context(|| queue.to_owned())?;
    Ok(())
}

/// The address of a queue.
pub async fn queue_url(client: &aws_sdk_sqs::Client, queue: &str) -> Result<String> {
    let found = client.get_queue_url().queue_name(queue).send().await;
    found.with_context(|| format!("the queue {queue}"))?.queue_url.with_context(|| format!("no URL for {queue}"))
}
