//! The publisher against librdkafka's mock cluster: real sockets, real protocol, failures on demand.

mod codes;
mod ending;
mod pages;
mod refusals;
mod topics;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::{Headers, Message};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use time::OffsetDateTime;

use super::*;
use crate::config;
use crate::metrics::Metrics;

const TOPIC: &str = "listing-valuations";
const PARTITIONS: i32 = 3;
const TIMEOUT: Duration = Duration::from_secs(10);

type Cluster = MockCluster<'static, DefaultProducerContext>;

fn cluster() -> (Cluster, config::Kafka) {
    let cluster = MockCluster::new(1).expect("a mock cluster");
    cluster.create_topic(TOPIC, PARTITIONS, 1).expect("a topic");
    let kafka = config::Kafka {
        brokers: cluster.bootstrap_servers(),
        topic: TOPIC.to_owned(),
        partitions: PARTITIONS as u32,
        replication_factor: 1,
        compression: "lz4",
        delivery_timeout: TIMEOUT,
        page_size: 1000,
        pages_in_flight: 2,
        tls: None,
        sasl: None,
    };
    (cluster, kafka)
}

fn publisher(kafka: &config::Kafka) -> (Publisher, Arc<Metrics>) {
    let metrics = Arc::new(Metrics::new());
    (Publisher::new(kafka, Arc::clone(&metrics)).expect("a producer"), metrics)
}

/// Records of the listings 0, 1, 2 and so on.
fn page(records: i64) -> Vec<Record> {
    let run = Records::new("run-1", OffsetDateTime::UNIX_EPOCH, None);
    let records = (0..records).map(move |listing_id| {
        run.record(&Valuation {
            listing_id,
            zip_code: 98_178,
            list_price_cents: 1_000_000,
            valuation_cents: 1_000_000 + listing_id,
            confidence: 0.5,
        })
    });
    records.collect()
}

/// Every record of a page delivered.
fn all(records: usize) -> Published {
    Published { records, refused: Vec::new() }
}

/// What the topic holds, by partition and offset: keys and `ce_id`s.
fn read_all(kafka: &config::Kafka, expected: usize) -> Vec<(String, BTreeMap<String, String>)> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &kafka.brokers)
        .set("group.id", "reader")
        .set("enable.auto.commit", "false")
        .create()
        .expect("a consumer");
    let mut partitions = TopicPartitionList::new();
    let number = if kafka.topic == TOPIC { PARTITIONS } else { 1 };
    for partition in 0..number {
        partitions.add_partition_offset(&kafka.topic, partition, Offset::Beginning).expect("an offset");
    }
    consumer.assign(&partitions).expect("an assignment");
    let mut read = Vec::new();
    let deadline = Instant::now() + TIMEOUT;
    // Reads on for a moment after the last one expected, so that one too many is seen.
    while Instant::now() < deadline {
        let wait = if read.len() < expected { Duration::from_secs(1) } else { Duration::from_millis(200) };
        match consumer.poll(wait) {
            Some(message) => {
                let message = message.expect("a message");
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
                let headers = message.headers().expect("headers");
                let headers = headers.iter().map(|h| (h.key.to_owned(), text(h.value.expect("a value")))).collect();
                read.push((text(message.key().expect("a key")), headers));
            }
            None if read.len() >= expected => break,
            None => {}
        }
    }
    read
}
