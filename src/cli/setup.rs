//! `write-api setup`: everything that the service needs to find. Looks first, creates what is missing, may be repeated.

use std::sync::Arc;
use std::time::Duration;

use super::migrate;
use crate::config::Config;
use crate::kafka;
use crate::metrics::Metrics;
use crate::queue::sqs::Sqs;

pub(super) const HELP: &str = "\
Needs: database.url of a user that may create tables, kafka.brokers that let this client create topics, and of SQS the \
permissions sqs:GetQueueUrl, GetQueueAttributes and CreateQueue.

Example:
  export WRITE_API_DATABASE_URL=postgres://…  WRITE_API_KAFKA_BROKERS=host:9092
  write-api setup

Exit codes: 0 everything is there, 1 failed, 64 wrong usage, 78 wrong configuration.";

/// How long Kafka may take to answer.
const KAFKA_TIMEOUT: Duration = Duration::from_secs(15);

/// Schema, queues, topic.
pub(super) async fn run(config: &Config) -> anyhow::Result<()> {
    migrate::run(config).await?;
    let sqs = Sqs::new(&config.aws, &config.queue, Arc::new(Metrics::new())).await;
    for lane in [&config.lanes.events, &config.lanes.valuations, &config.lanes.post_processing] {
        let created = sqs.ensure_queue(&lane.queue, config.queue.visibility_timeout).await?;
        if created.is_empty() {
            println!("queue {} and its dead-letter queue were there", lane.queue);
        } else {
            println!("created {}", created.join(" and "));
        }
    }
    let topic = kafka::ensure_topic(&config.kafka, KAFKA_TIMEOUT).await?;
    let how = if topic.created { "created" } else { "was there" };
    println!("topic {} with {} partitions {how}", config.kafka.topic, topic.partitions);
    Ok(())
}
