//! What Kafka refuses for good, and what it only refuses for now.

use super::*;

const TOO_LARGE: RDKafkaRespErr = RDKafkaRespErr::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE;
const NOT_AUTHORIZED: RDKafkaRespErr = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;

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
    let published = publisher.publish_page(&page(10), Record::clone).await.expect("the others flow");
    assert_eq!(published.refused, refused(&["2"], RDKafkaErrorCode::MessageSizeTooLarge));
    assert_eq!(published.records, 9);
    assert_eq!(keys(&kafka, 9), [0, 1, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(publisher.publish_page(&page(10), Record::clone).await, Ok(all(10)));
}

#[tokio::test]
async fn a_refusal_that_is_not_repeated_is_none() {
    let (cluster, kafka, publisher) = in_batches(10);
    cluster.request_errors(RDKafkaApiKey::Produce, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_RECORD_LIST_TOO_LARGE]);
    assert_eq!(publisher.publish_page(&page(10), Record::clone).await, Ok(all(10)));
    assert_eq!(keys(&kafka, 10), (0..10).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_record_larger_than_the_client_allows_is_refused_alone() {
    let (_cluster, kafka) = cluster();
    let (publisher, metrics) = publisher(&kafka);
    let mut records = page(10);
    records[7].value.resize(2_000_000, b' ');
    let published = publisher.publish_page(&records, Record::clone).await.expect("the others flow");
    assert_eq!(published.refused, refused(&["7"], RDKafkaErrorCode::MessageSizeTooLarge));
    assert_eq!(published.records, 9);
    assert_eq!(read_all(&kafka, 9).len(), 9);
    assert_eq!(metrics.kafka_deliveries.with_label_values(&["ok"]).get(), 9);
}

#[tokio::test]
async fn a_topic_that_is_closed_to_us_refuses_no_record_for_good() {
    let (cluster, kafka, publisher) = in_batches(5);
    cluster.request_errors(RDKafkaApiKey::Produce, &[NOT_AUTHORIZED; 2]);
    let error = publisher.publish_page(&page(10), Record::clone).await.expect_err("no right to write");
    assert_eq!((error.verdict, error.code), (Verdict::NotAuthorized, RDKafkaErrorCode::TopicAuthorizationFailed));
    assert_eq!((error.delivered, error.failed), (0, 10));
    let text = error.to_string();
    assert!(text.contains("one-partition") && text.contains("right to write"), "{text}");
    // Given the right, the same producer goes on as soon as it has looked at the topic, as `/readyz` has it do.
    publisher.check(TIMEOUT).await.expect("the topic");
    assert_eq!(publisher.publish_page(&page(10), Record::clone).await, Ok(all(10)));
    assert_eq!(keys(&kafka, 10), (0..10).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_topic_that_closes_in_the_middle_of_a_page_refuses_no_record_for_good() {
    let (cluster, _kafka, publisher) = in_batches(5);
    // Half of the page is taken; the first of the others is refused alone as well, and then one that was taken before.
    let none = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;
    cluster.request_errors(RDKafkaApiKey::Produce, &[none, NOT_AUTHORIZED, NOT_AUTHORIZED, NOT_AUTHORIZED]);
    let error = publisher.publish_page(&page(10), Record::clone).await.expect_err("no right to write");
    assert_eq!(error.verdict, Verdict::NotAuthorized);
}

#[tokio::test]
async fn a_record_that_alone_lacks_rights_is_refused_where_the_topic_takes_another() {
    let (cluster, kafka, publisher) = in_batches(5);
    let none = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;
    cluster.request_errors(RDKafkaApiKey::Produce, &[none, NOT_AUTHORIZED, NOT_AUTHORIZED]);
    let published = publisher.publish_page(&page(10), Record::clone).await.expect("the others flow");
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
        // The topic, a setting or a clock is at fault, whatever the record: an operator mends it, and the page goes out.
        (
            &[
                InvalidTopic,
                InvalidTimestamp,
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
