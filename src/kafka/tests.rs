//! The publisher against librdkafka's mock cluster: real sockets, real protocol, failures on demand.

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
fn page(records: i64) -> impl Iterator<Item = Record> {
    let run = Records::new("run-1", OffsetDateTime::UNIX_EPOCH, None);
    (0..records).map(move |listing_id| {
        run.record(&Valuation {
            listing_id,
            zip_code: 98_178,
            list_price_cents: 1_000_000,
            valuation_cents: 1_000_000 + listing_id,
            confidence: 0.5,
        })
    })
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
    for partition in 0..PARTITIONS {
        partitions.add_partition_offset(TOPIC, partition, Offset::Beginning).expect("an offset");
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

#[tokio::test]
async fn a_page_is_delivered_whole_and_can_be_read_back() {
    let (_cluster, kafka) = cluster();
    let (publisher, metrics) = publisher(&kafka);
    assert_eq!(publisher.publish_page(page(500)).await, Ok(Published { records: 500 }));
    assert_eq!(metrics.kafka_deliveries.with_label_values(&["ok"]).get(), 500);

    let read = read_all(&kafka, 500);
    let ids: BTreeMap<&str, &str> = read.iter().map(|(key, h)| (h["ce_id"].as_str(), key.as_str())).collect();
    assert_eq!((read.len(), ids.len()), (500, 500));
    for (key, headers) in &read {
        let sent = page(500).find(|record| record.key == *key).expect("a record that was sent");
        let sent: BTreeMap<String, String> = sent
            .headers
            .iter()
            .map(|h| (h.key.to_owned(), String::from_utf8_lossy(h.value.expect("a value")).into_owned()))
            .collect();
        assert_eq!(*headers, sent);
    }
}

#[tokio::test]
async fn an_empty_page_is_delivered_at_once() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    assert_eq!(publisher.publish_page([]).await, Ok(Published { records: 0 }));
}

#[tokio::test]
async fn errors_that_pass_are_retried_and_nothing_is_stored_twice() {
    let (cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    let passing = [
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR__TRANSPORT,
    ];
    cluster.request_errors(RDKafkaApiKey::Produce, &passing);
    assert_eq!(publisher.publish_page(page(100)).await, Ok(Published { records: 100 }));
    assert_eq!(read_all(&kafka, 100).len(), 100);
}

#[tokio::test]
async fn a_record_that_is_too_large_is_named_and_the_others_flow() {
    let (cluster, kafka) = cluster();
    let (publisher, metrics) = publisher(&kafka);
    assert_eq!(publisher.publish_page(page(1)).await, Ok(Published { records: 1 }));
    cluster.request_errors(RDKafkaApiKey::Produce, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE]);
    let error = publisher.publish_page(page(1)).await.expect_err("too large");
    assert_eq!(error.verdict, Verdict::Refused);
    assert_eq!(error.code, RDKafkaErrorCode::MessageSizeTooLarge);
    assert_eq!((error.delivered, error.failed, error.key.as_str()), (0, 1, "0"));
    let text = error.to_string();
    assert!(text.contains(TOPIC) && text.contains("key 0") && text.contains("1 of 1"), "{text}");
    assert_eq!(metrics.kafka_deliveries.with_label_values(&["error"]).get(), 1);
    assert_eq!(publisher.publish_page(page(10)).await, Ok(Published { records: 10 }));
}

#[tokio::test]
async fn a_record_larger_than_the_client_allows_fails_alone() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    let records = page(10).map(|mut record| {
        if record.key == "7" {
            record.value.resize(2_000_000, b' ');
        }
        record
    });
    let error = publisher.publish_page(records).await.expect_err("too large");
    assert_eq!((error.delivered, error.failed, error.key.as_str()), (9, 1, "7"));
    assert_eq!(error.verdict, Verdict::Refused);
}

#[tokio::test]
async fn a_broker_that_comes_back_gets_everything() {
    let (cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    assert_eq!(publisher.publish_page(page(1)).await, Ok(Published { records: 1 }));
    cluster.broker_down(-1).expect("down");
    let (result, ()) = tokio::join!(publisher.publish_page(page(100)), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        cluster.broker_up(-1).expect("up");
    });
    assert_eq!(result, Ok(Published { records: 100 }));
    assert_eq!(read_all(&kafka, 101).len(), 101);
}

#[tokio::test]
async fn a_broker_that_stays_away_is_an_error_to_retry_within_the_delivery_timeout() {
    let (cluster, mut kafka) = cluster();
    kafka.delivery_timeout = Duration::from_secs(1);
    let (publisher, _) = publisher(&kafka);
    cluster.broker_down(-1).expect("down");
    let begin = Instant::now();
    let error = publisher.publish_page(page(5)).await.expect_err("nobody there");
    assert_eq!((error.verdict, error.code), (Verdict::Retry, RDKafkaErrorCode::MessageTimedOut));
    assert_eq!((error.delivered, error.failed), (0, 5));
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_full_queue_makes_the_page_wait_and_drops_nothing() {
    let (_cluster, kafka) = cluster();
    let mut tiny = client::producer(&kafka);
    tiny.set("queue.buffering.max.messages", "10");
    let publisher = Publisher::with_client(&kafka, tiny, Arc::new(Metrics::new())).expect("a producer");
    assert_eq!(publisher.publish_page(page(300)).await, Ok(Published { records: 300 }));
    assert_eq!(read_all(&kafka, 300).len(), 300);
}

#[tokio::test]
async fn a_producer_at_its_end_is_replaced() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    assert_eq!(publisher.publish_page(page(1)).await, Ok(Published { records: 1 }));
    // SAFETY: the producer lives as long as the publisher, and the reason is a text that ends in zero.
    unsafe {
        rdkafka::bindings::rd_kafka_test_fatal_error(
            publisher.native(),
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER,
            c"for the test".as_ptr(),
        );
    }
    let error = publisher.publish_page(page(5)).await.expect_err("the end");
    assert_eq!((error.verdict, error.failed), (Verdict::Restarted, 5));
    assert_eq!(publisher.publish_page(page(5)).await, Ok(Published { records: 5 }));
}

#[tokio::test]
async fn the_producer_is_idempotent() {
    let (cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    // Only an idempotent producer asks for an id, and it sends nothing without one.
    cluster.request_errors(
        RDKafkaApiKey::InitProducerId,
        &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED],
    );
    let error = publisher.publish_page(page(1)).await.expect_err("no id");
    assert_eq!(error.verdict, Verdict::Restarted);
    assert_eq!(publisher.publish_page(page(1)).await, Ok(Published { records: 1 }));
}

#[tokio::test]
async fn pages_of_several_runs_are_counted_apart() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    let (a, b) = tokio::join!(publisher.publish_page(page(200)), publisher.publish_page(page(300)));
    assert_eq!((a, b), (Ok(Published { records: 200 }), Ok(Published { records: 300 })));
}

#[tokio::test]
async fn an_abandoned_page_is_flushed() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    let abandoned = tokio::time::timeout(Duration::ZERO, publisher.publish_page(page(50))).await;
    assert!(abandoned.is_err());
    assert!(publisher.flush(TIMEOUT).await);
    assert_eq!(read_all(&kafka, 50).len(), 50);
}

#[tokio::test]
async fn looking_at_a_topic_tells_its_partitions_and_creates_nothing() {
    let (cluster, mut kafka) = cluster();
    let (here, _) = publisher(&kafka);
    assert_eq!(here.check(TIMEOUT).await, Ok(TopicInfo { partitions: 3, created: false }));
    assert_eq!(ensure_topic(&kafka, TIMEOUT).await, Ok(TopicInfo { partitions: 3, created: false }));

    kafka.topic = "no-such-topic".to_owned();
    let (missing, _) = publisher(&kafka);
    for _ in 0..2 {
        let error = missing.check(TIMEOUT).await.expect_err("it does not exist").to_string();
        for word in ["no-such-topic", kafka.brokers.as_str(), "does not exist", "write-api setup"] {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    }
    drop(cluster);
}

#[tokio::test]
async fn an_absent_broker_is_told_with_its_address_in_time() {
    let (cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    cluster.broker_down(-1).expect("down");
    let begin = Instant::now();
    let timeout = Duration::from_millis(500);
    let error = publisher.check(timeout).await.expect_err("nobody there").to_string();
    assert!(error.contains(&kafka.brokers) && error.contains("no answer within 500ms"), "{error}");
    let error = ensure_topic(&kafka, timeout).await.expect_err("nobody there").to_string();
    assert!(error.contains(&kafka.brokers), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

/// What cannot be built in silently, because nothing would be missed until it is deployed.
#[test]
fn the_library_was_built_with_tls_and_sasl() {
    let native = ClientConfig::new().create_native_config().expect("librdkafka's defaults");
    let features = native.get("builtin.features").expect("a setting of librdkafka");
    let features: Vec<&str> = features.trim_end_matches('\0').split(',').collect();
    for needed in ["ssl", "sasl_plain", "sasl_scram", "lz4"] {
        assert!(features.contains(&needed), "{needed} is not among {features:?}");
    }
}

#[test]
fn pages_are_published_from_any_thread() {
    fn send<T: Send>(_: T) {}
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    send(publisher.publish_page(page(1)));
}

#[tokio::test]
async fn a_reading_ends_where_the_topic_ended_when_it_began() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    publisher.publish_page(page(2_500)).await.expect("published");
    let reader = TopicReader::open(&kafka).await.expect("a topic");
    assert_eq!(reader.extents().values().map(|extent| extent.high - extent.low).sum::<i64>(), 2_500);
    publisher.publish_page(page(100)).await.expect("published");
    let mut batches = reader.read(TIMEOUT);
    let mut keys = Vec::new();
    while let Some(batch) = batches.recv().await {
        for record in batch.expect("readable") {
            assert_eq!(record.headers.len(), 6);
            assert!(record.timestamp_ms.is_some() && record.value.is_some());
            keys.push(String::from_utf8(record.key.expect("a key")).expect("UTF-8").parse::<i64>().expect("a number"));
        }
    }
    keys.sort_unstable();
    assert!(keys.into_iter().eq(0..2_500), "every record once, and none that came later");
}
