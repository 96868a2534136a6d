//! Every error code that brokers answer our requests with, ten times each: nothing is lost and nothing given up for an
//! error that is over.

use futures::future::join_all;

use super::*;

const TIMES: i64 = 10;
const RECORDS: i64 = 5;
/// Attempts at a page for one error: the one that meets it, and for want of rights one that finds out that they are there.
const ATTEMPTS: usize = 3;

/// What a broker may answer a produce request with. Not 46, "duplicate sequence number": it says that the record is there
/// already, so librdkafka reports it as delivered, and a broker that says so of a record that it does not have lies.
const OF_PRODUCE: [i32; 29] = [
    -195, // librdkafka's mock cluster closes the connection for this one.
    2, 3, 5, 6, 7, 8, 9, 10, 13, 17, 18, 19, 20, 21, 29, 31, 32, 35, 43, 44, 45, 47, 49, 56, 59, 74, 87, 90,
];
/// What a broker may answer a request for a producer's id with.
const OF_INIT: [i32; 12] = [7, 13, 14, 15, 16, 31, 35, 42, 47, 51, 53, 90];
/// What a broker may say of a topic.
const OF_METADATA: [i32; 7] = [3, 5, 6, 9, 17, 29, 56];

fn error(code: i32) -> RDKafkaRespErr {
    RDKafkaRespErr::try_from(code).expect("a code that librdkafka knows")
}

/// A topic of one partition, so that each page is one request, and a client that looks and tries again soon.
fn prepared() -> (Cluster, config::Kafka) {
    let (cluster, mut kafka) = cluster();
    kafka.topic = "one-partition".to_owned();
    cluster.create_topic(&kafka.topic, 1, 1).expect("a topic");
    (cluster, kafka)
}

fn hasty(kafka: &config::Kafka) -> Publisher {
    let mut settings = client::producer(kafka);
    settings
        .set("linger.ms", "20")
        .set("retry.backoff.ms", "10")
        .set("retry.backoff.max.ms", "50")
        .set("topic.metadata.refresh.fast.interval.ms", "10");
    Publisher::with_client(kafka, settings, Arc::new(Metrics::new())).expect("a producer")
}

/// Publishes as an event does, attempt after attempt. Gives the verdicts of those that failed.
async fn until_published(what: &str, publisher: &Publisher, records: &[Record]) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    loop {
        match publisher.publish_page(records).await {
            Ok(published) => {
                assert_eq!(published, all(records.len()), "{what}");
                return verdicts;
            }
            Err(error) => {
                assert!(verdicts.len() + 1 < ATTEMPTS, "{what}: {verdicts:?}, then {error}");
                if error.verdict == Verdict::NotAuthorized {
                    publisher.check(TIMEOUT).await.expect("the topic is there");
                }
                verdicts.push(error.verdict);
            }
        }
    }
}

/// Every record is there, whatever was said of it on the way.
fn check(what: &str, kafka: &config::Kafka) {
    let expected = TIMES * RECORDS;
    let mut keys: Vec<i64> = read_all(kafka, expected as usize)
        .iter()
        .map(|(key, _)| key.parse().expect("a listing id"))
        .collect();
    keys.sort_unstable();
    keys.dedup();
    assert!(keys.iter().copied().eq(0..expected), "{what}: {keys:?}");
}

/// The pages of a topic, each with other records.
fn pages() -> Vec<Vec<Record>> {
    let mut records = page(TIMES * RECORDS).into_iter();
    (0..TIMES).map(|_| records.by_ref().take(RECORDS as usize).collect()).collect()
}

#[tokio::test]
async fn whatever_a_produce_request_is_answered_with_its_records_arrive() {
    let verdicts = join_all(OF_PRODUCE.map(async |code| {
        let (cluster, kafka) = prepared();
        let (publisher, what) = (hasty(&kafka), format!("{code} of a produce request"));
        let mut verdicts = Vec::new();
        for records in pages() {
            // The next request meets it: no page can be reported of before.
            cluster.request_errors(RDKafkaApiKey::Produce, &[error(code)]);
            verdicts.extend(until_published(&what, &publisher, &records).await);
        }
        check(&what, &kafka);
        (code, verdicts)
    }))
    .await;
    eprintln!("{verdicts:?}");
}

#[tokio::test]
async fn whatever_a_producers_first_request_is_answered_with_its_records_arrive() {
    let verdicts = join_all(OF_INIT.map(async |code| {
        let (cluster, kafka) = prepared();
        let what = format!("{code} of a request for a producer's id");
        let mut verdicts = Vec::new();
        for records in pages() {
            cluster.request_errors(RDKafkaApiKey::InitProducerId, &[error(code)]);
            verdicts.extend(until_published(&what, &hasty(&kafka), &records).await);
        }
        check(&what, &kafka);
        (code, verdicts)
    }))
    .await;
    eprintln!("{verdicts:?}");
}

#[tokio::test]
async fn whatever_is_said_of_the_topic_its_records_arrive_when_it_is_over() {
    let verdicts = join_all(OF_METADATA.map(async |code| {
        let (cluster, kafka) = prepared();
        let what = format!("{code} of the topic");
        let mut verdicts = Vec::new();
        for records in pages() {
            let publisher = hasty(&kafka);
            cluster.topic_error(&kafka.topic, error(code)).expect("the topic is there");
            let over = async {
                let told = publisher.check(TIMEOUT).await.expect_err(&what).to_string();
                assert!(told.contains(&kafka.topic), "{what}: {told}");
                cluster.topic_error(&kafka.topic, error(0)).expect("the topic is there");
            };
            verdicts.extend(tokio::join!(until_published(&what, &publisher, &records), over).0);
        }
        check(&what, &kafka);
        (code, verdicts)
    }))
    .await;
    eprintln!("{verdicts:?}");
}
