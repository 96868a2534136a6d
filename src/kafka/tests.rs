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

/// One partition, and batches of at most `batch` records that wait until they are full: what a broker answers to the
/// first request is about known records. Alone a record waits as long.
fn in_batches(batch: u32) -> (Cluster, config::Kafka, Publisher) {
    let (cluster, mut kafka) = cluster();
    kafka.topic = "one-partition".to_owned();
    cluster.create_topic(&kafka.topic, 1, 1).expect("a topic");
    let mut settings = client::producer(&kafka);
    settings.set("linger.ms", "200").set("batch.num.messages", batch.to_string());
    let publisher = Publisher::with_client(&kafka, settings, Arc::new(Metrics::new())).expect("a producer");
    (cluster, kafka, publisher)
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

#[tokio::test]
async fn a_page_is_delivered_whole_and_can_be_read_back() {
    let (_cluster, kafka) = cluster();
    let (publisher, metrics) = publisher(&kafka);
    assert_eq!(publisher.publish_page(&page(500)).await, Ok(all(500)));
    assert_eq!(metrics.kafka_deliveries.with_label_values(&["ok"]).get(), 500);

    let read = read_all(&kafka, 500);
    let ids: BTreeMap<&str, &str> = read.iter().map(|(key, h)| (h["ce_id"].as_str(), key.as_str())).collect();
    assert_eq!((read.len(), ids.len()), (500, 500));
    for (key, headers) in &read {
        let sent = page(500).into_iter().find(|record| record.key == *key).expect("a record that was sent");
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
    assert_eq!(publisher.publish_page(&page(0)).await, Ok(all(0)));
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
    assert_eq!(publisher.publish_page(&page(100)).await, Ok(all(100)));
    assert_eq!(read_all(&kafka, 100).len(), 100);
}

const TOO_LARGE: RDKafkaRespErr = RDKafkaRespErr::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE;
const NOT_AUTHORIZED: RDKafkaRespErr = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;

fn refused(keys: &[&str], code: RDKafkaErrorCode) -> Vec<RefusedRecord> {
    keys.iter().map(|key| RefusedRecord { key: (*key).to_owned(), code }).collect()
}

/// Keys that the topic holds, sorted, repeats included.
fn keys(kafka: &config::Kafka, expected: usize) -> Vec<u64> {
    let mut keys: Vec<u64> =
        read_all(kafka, expected).iter().map(|(key, _)| key.parse().expect("a listing id")).collect();
    keys.sort_unstable();
    keys
}

#[tokio::test]
async fn a_batch_refused_for_one_record_costs_only_that_record() {
    let (cluster, kafka, publisher) = in_batches(10);
    // The batch, then records 0, 1 and 2 alone; the broker takes all but the third.
    let none = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;
    cluster.request_errors(RDKafkaApiKey::Produce, &[TOO_LARGE, none, none, TOO_LARGE]);
    let published = publisher.publish_page(&page(10)).await.expect("the others flow");
    assert_eq!(published.refused, refused(&["2"], RDKafkaErrorCode::MessageSizeTooLarge));
    assert_eq!(published.records, 9);
    assert_eq!(keys(&kafka, 9), [0, 1, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(publisher.publish_page(&page(10)).await, Ok(all(10)));
}

#[tokio::test]
async fn a_refusal_that_is_not_repeated_is_none() {
    let (cluster, kafka, publisher) = in_batches(10);
    cluster.request_errors(RDKafkaApiKey::Produce, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_RECORD_LIST_TOO_LARGE]);
    assert_eq!(publisher.publish_page(&page(10)).await, Ok(all(10)));
    assert_eq!(keys(&kafka, 10), (0..10).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_record_larger_than_the_client_allows_is_refused_alone() {
    let (_cluster, kafka) = cluster();
    let (publisher, metrics) = publisher(&kafka);
    let mut records = page(10);
    records[7].value.resize(2_000_000, b' ');
    let published = publisher.publish_page(&records).await.expect("the others flow");
    assert_eq!(published.refused, refused(&["7"], RDKafkaErrorCode::MessageSizeTooLarge));
    assert_eq!(published.records, 9);
    assert_eq!(read_all(&kafka, 9).len(), 9);
    assert_eq!(metrics.kafka_deliveries.with_label_values(&["ok"]).get(), 9);
}

#[tokio::test]
async fn a_topic_that_is_closed_to_us_refuses_no_record_for_good() {
    let (cluster, kafka, publisher) = in_batches(5);
    cluster.request_errors(RDKafkaApiKey::Produce, &[NOT_AUTHORIZED; 2]);
    let error = publisher.publish_page(&page(10)).await.expect_err("no right to write");
    assert_eq!((error.verdict, error.code), (Verdict::NotAuthorized, RDKafkaErrorCode::TopicAuthorizationFailed));
    assert_eq!((error.delivered, error.failed), (0, 10));
    let text = error.to_string();
    assert!(text.contains("one-partition") && text.contains("right to write"), "{text}");
    // Given the right, the same producer goes on as soon as it has looked at the topic, as `/readyz` has it do.
    publisher.check(TIMEOUT).await.expect("the topic");
    assert_eq!(publisher.publish_page(&page(10)).await, Ok(all(10)));
    assert_eq!(keys(&kafka, 10), (0..10).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_topic_that_closes_in_the_middle_of_a_page_refuses_no_record_for_good() {
    let (cluster, _kafka, publisher) = in_batches(5);
    // Half of the page is taken; the first of the others is refused alone as well, and then one that was taken before.
    let none = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;
    cluster.request_errors(RDKafkaApiKey::Produce, &[none, NOT_AUTHORIZED, NOT_AUTHORIZED, NOT_AUTHORIZED]);
    let error = publisher.publish_page(&page(10)).await.expect_err("no right to write");
    assert_eq!(error.verdict, Verdict::NotAuthorized);
}

#[tokio::test]
async fn a_record_that_alone_lacks_rights_is_refused_where_the_topic_takes_another() {
    let (cluster, kafka, publisher) = in_batches(5);
    let none = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;
    cluster.request_errors(RDKafkaApiKey::Produce, &[none, NOT_AUTHORIZED, NOT_AUTHORIZED]);
    let published = publisher.publish_page(&page(10)).await.expect("the others flow");
    let key = published.refused.first().expect("one is refused").key.clone();
    assert_eq!(published.refused, refused(&[&key], RDKafkaErrorCode::TopicAuthorizationFailed));
    assert_eq!(published.records, 9);
    // The one that proved the topic to be open is there twice.
    let mut found = keys(&kafka, 10);
    assert_eq!(found.len(), 10);
    found.dedup();
    let key: u64 = key.parse().expect("a listing id");
    assert_eq!(found, (0..10).filter(|listing| *listing != key).collect::<Vec<_>>());
}

/// Every error that a broker may answer a produce request with (Kafka's protocol guide and its ProduceResponse), and those
/// that librdkafka reports by itself.
#[test]
fn every_code_of_a_delivery_report_has_its_class() {
    use RDKafkaErrorCode::*;
    use delivery::Failure::{Passing, Record, Rights};
    for (codes, class) in [
        (
            &[
                MessageSizeTooLarge,
                MessageBatchTooLarge,
                InvalidMessage,
                InvalidMessageSize,
                InvalidRecord,
                InvalidTimestamp,
                PolicyViolation,
            ][..],
            Record,
        ),
        (&[TopicAuthorizationFailed, ClusterAuthorizationFailed], Rights),
        // Leaders move, replicas are away, brokers are slow or full: librdkafka has retried until the time was over.
        (
            &[
                UnknownTopicOrPartition,
                LeaderNotAvailable,
                NotLeaderForPartition,
                RequestTimedOut,
                BrokerNotAvailable,
                ReplicaNotAvailable,
                NetworkException,
                NotEnoughReplicas,
                NotEnoughReplicasAfterAppend,
                KafkaStorageError,
                FencedLeaderEpoch,
                UnknownLeaderEpoch,
                ThrottlingQuotaExceeded,
                NotController,
                UnknownTopicId,
                StaleBrokerEpoch,
            ],
            Passing,
        ),
        // The topic or a setting is at fault, whatever the record: an operator mends it, and the page goes out.
        (
            &[
                InvalidTopic,
                InvalidRequiredAcks,
                UnsupportedVersion,
                UnsupportedForMessageFormat,
                UnsupportedCompressionType,
                InvalidRequest,
                SaslAuthenticationFailed,
                SecurityDisabled,
            ],
            Passing,
        ),
        // The producer is at fault. Where librdkafka cannot mend that by a new epoch, it says that its end has come.
        (
            &[
                OutOfOrderSequenceNumber,
                DuplicateSequenceNumber,
                InvalidProducerEpoch,
                UnknownProducerId,
                ProducerFenced,
                InvalidProducerIdMapping,
                InvalidTransactionalState,
                TransactionalIdAuthorizationFailed,
                Fatal,
            ],
            Passing,
        ),
        // librdkafka's own.
        (
            &[
                MessageTimedOut,
                OperationTimedOut,
                BrokerTransportFailure,
                AllBrokersDown,
                UnknownTopic,
                UnknownPartition,
                Authentication,
                PurgeQueue,
                PurgeInflight,
                BrokerDestroy,
                QueueFull,
                Unknown,
            ],
            Passing,
        ),
    ] {
        for code in codes {
            assert_eq!(delivery::Failure::of(*code), class, "{code:?}");
        }
    }
}

/// The broker stored the records and its answer was late: they are sent again, and counted once.
#[tokio::test]
async fn a_lost_delivery_report_is_waited_for_and_repeats_have_the_same_ids() {
    let (cluster, kafka) = cluster();
    let mut settings = client::producer(&kafka);
    settings.set("socket.timeout.ms", "500");
    let publisher = Publisher::with_client(&kafka, settings, Arc::new(Metrics::new())).expect("a producer");
    assert_eq!(publisher.publish_page(&page(1)).await, Ok(all(1)));
    // librdkafka looks for timeouts once a second: it gives the answer up within 1.5 s.
    cluster.broker_round_trip_time(-1, Duration::from_secs(4)).expect("a delay");
    let records = page(100);
    let (published, ()) = tokio::join!(publisher.publish_page(&records), async {
        tokio::time::sleep(Duration::from_millis(1_200)).await;
        cluster.broker_round_trip_time(-1, Duration::ZERO).expect("no delay");
    });
    assert_eq!(published, Ok(all(100)));
    let read = read_all(&kafka, 102);
    let ids: BTreeMap<&str, &str> = read.iter().map(|(key, h)| (h["ce_id"].as_str(), key.as_str())).collect();
    assert_eq!(ids.len(), 100);
    // The mock cluster does not recognise a repeat, so it shows that there was one.
    assert!(read.len() > 101, "no report was lost: {}", read.len());
}

#[tokio::test]
async fn a_broker_that_comes_back_gets_everything() {
    let (cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    assert_eq!(publisher.publish_page(&page(1)).await, Ok(all(1)));
    cluster.broker_down(-1).expect("down");
    let records = page(100);
    let (result, ()) = tokio::join!(publisher.publish_page(&records), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        cluster.broker_up(-1).expect("up");
    });
    assert_eq!(result, Ok(all(100)));
    assert_eq!(read_all(&kafka, 101).len(), 101);
}

#[tokio::test]
async fn a_broker_that_stays_away_is_an_error_to_retry_within_the_delivery_timeout() {
    let (cluster, mut kafka) = cluster();
    kafka.delivery_timeout = Duration::from_secs(1);
    let (publisher, _) = publisher(&kafka);
    cluster.broker_down(-1).expect("down");
    let begin = Instant::now();
    let error = publisher.publish_page(&page(5)).await.expect_err("nobody there");
    assert_eq!((error.verdict, error.code), (Verdict::Retry, RDKafkaErrorCode::MessageTimedOut));
    assert_eq!((error.delivered, error.failed), (0, 5));
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    cluster.broker_up(-1).expect("up");
    let delivered = async { while publisher.publish_page(&page(5)).await != Ok(all(5)) {} };
    tokio::time::timeout(TIMEOUT, delivered).await.expect("the same page goes out once the broker is back");
}

#[tokio::test]
async fn a_full_queue_makes_the_page_wait_and_drops_nothing() {
    let (_cluster, kafka) = cluster();
    let mut tiny = client::producer(&kafka);
    tiny.set("queue.buffering.max.messages", "10");
    let publisher = Publisher::with_client(&kafka, tiny, Arc::new(Metrics::new())).expect("a producer");
    assert_eq!(publisher.publish_page(&page(300)).await, Ok(all(300)));
    assert_eq!(read_all(&kafka, 300).len(), 300);
}

#[tokio::test]
async fn a_producer_at_its_end_is_replaced() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    assert_eq!(publisher.publish_page(&page(1)).await, Ok(all(1)));
    // SAFETY: the producer lives as long as the publisher, and the reason is a text that ends in zero.
    unsafe {
        rdkafka::bindings::rd_kafka_test_fatal_error(
            publisher.native(),
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER,
            c"for the test".as_ptr(),
        );
    }
    let error = publisher.publish_page(&page(5)).await.expect_err("the end");
    assert_eq!((error.verdict, error.failed), (Verdict::Restarted, 5));
    assert_eq!(publisher.publish_page(&page(5)).await, Ok(all(5)));
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
    let error = publisher.publish_page(&page(1)).await.expect_err("no id");
    assert_eq!(error.verdict, Verdict::Restarted);
    assert_eq!(publisher.publish_page(&page(1)).await, Ok(all(1)));
}

#[tokio::test]
async fn pages_of_several_runs_are_counted_apart() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    let (first, second) = (page(200), page(300));
    let (a, b) = tokio::join!(publisher.publish_page(&first), publisher.publish_page(&second));
    assert_eq!((a, b), (Ok(all(200)), Ok(all(300))));
}

#[tokio::test]
async fn an_abandoned_page_is_flushed() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    let abandoned = tokio::time::timeout(Duration::ZERO, publisher.publish_page(&page(50))).await;
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
    send(publisher.publish_page(&page(1)));
}

#[tokio::test]
async fn a_reading_ends_where_the_topic_ended_when_it_began() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    publisher.publish_page(&page(2_500)).await.expect("published");
    let reader = TopicReader::open(&kafka).await.expect("a topic");
    assert_eq!(reader.extents().values().map(|extent| extent.high - extent.low).sum::<i64>(), 2_500);
    publisher.publish_page(&page(100)).await.expect("published");
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
