//! Every error code that brokers answer our requests with, ten times each: nothing is lost and nothing given up for an
//! error that is over.

use futures::future::join_all;

use super::*;

const TIMES: usize = 10;
const RECORDS: usize = 5;

/// What a broker may answer a produce request with, and what each of the pages that meet it comes to at first: `None` if
/// librdkafka, or a second try of each record alone, gets over it.
///
/// Not 46, "duplicate sequence number": it says that the record is there already, so librdkafka reports it as delivered, and a
/// broker that says so of a record that it does not have lies.
const OF_PRODUCE: [(i32, Option<Verdict>); 29] = [
    (-195, None), // The mock cluster closes the connection for this one.
    (2, None),
    (3, None),
    (5, None),
    (6, None),
    (7, None),
    (8, None),
    (9, None),
    (10, None),
    (13, Some(Verdict::Retry)),
    (17, Some(Verdict::Retry)),
    (18, None),
    (19, None),
    (20, None),
    (21, Some(Verdict::Retry)),
    (29, Some(Verdict::NotAuthorized)),
    (31, Some(Verdict::NotAuthorized)),
    (32, Some(Verdict::Retry)),
    (35, Some(Verdict::Retry)),
    (43, Some(Verdict::Retry)),
    (44, None),
    (45, Some(Verdict::Restarted)),
    (47, Some(Verdict::Retry)),
    (49, Some(Verdict::Retry)),
    (56, None),
    (59, None),
    (74, Some(Verdict::Retry)),
    (87, None),
    (90, Some(Verdict::Retry)),
];
/// What a broker may answer a request for a producer's id with. Some are the end of that producer.
const OF_INIT: [(i32, Option<Verdict>); 12] = [
    (7, None),
    (13, None),
    (14, None),
    (15, None),
    (16, None),
    (31, Some(Verdict::Restarted)),
    (35, None),
    (42, None),
    (47, Some(Verdict::Restarted)),
    (51, None),
    (53, Some(Verdict::Restarted)),
    (90, Some(Verdict::Restarted)),
];
/// How long a page may take with all its attempts, on a machine that has other work too.
const PATIENCE: Duration = Duration::from_secs(30);
/// What a broker may say of a topic.
const OF_TOPIC: [i32; 7] = [3, 5, 6, 9, 17, 29, 56];

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

/// Publishes as an event does, attempt after attempt with a pause between them. Gives the verdicts of those that failed.
async fn until_published(what: &str, publisher: &Publisher, records: &[Record]) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    let begun = Instant::now();
    loop {
        match publisher.publish_page(records, Record::clone).await {
            Ok(published) => {
                assert_eq!(published, all(records.len()), "{what}");
                return verdicts;
            }
            Err(error) => {
                assert!(begun.elapsed() < PATIENCE, "{what}: {verdicts:?}, then {error}");
                verdicts.push(error.verdict);
                // As `/readyz` does.
                let _ = publisher.check(TIMEOUT).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

/// Every record is there, whatever was said of it on the way.
fn check(what: &str, kafka: &config::Kafka) {
    let expected = TIMES * RECORDS;
    let read = read_all(kafka, expected);
    let mut keys: Vec<usize> = read.iter().map(|(key, _)| key.parse().expect("a listing id")).collect();
    keys.sort_unstable();
    keys.dedup();
    assert!(keys.iter().copied().eq(0..expected), "{what}: {keys:?}");
}

/// The pages of a topic, each with other records.
fn pages() -> impl Iterator<Item = Vec<Record>> {
    let mut records = page((TIMES * RECORDS) as i64).into_iter();
    (0..TIMES).map(move |_| records.by_ref().take(RECORDS).collect())
}

fn each_time(expected: Option<Verdict>) -> Vec<Verdict> {
    expected.map_or_else(Vec::new, |verdict| vec![verdict; TIMES])
}

#[tokio::test]
async fn whatever_a_produce_request_is_answered_with_its_records_arrive() {
    join_all(OF_PRODUCE.map(async |(code, expected)| {
        let (cluster, kafka) = prepared();
        let (publisher, what) = (hasty(&kafka), format!("{code} of a produce request"));
        let mut verdicts = Vec::new();
        for records in pages() {
            // The next request meets it: no page can be reported of before.
            cluster.request_errors(RDKafkaApiKey::Produce, &[error(code)]);
            verdicts.extend(until_published(&what, &publisher, &records).await);
        }
        check(&what, &kafka);
        assert_eq!(verdicts, each_time(expected), "{what}");
    }))
    .await;
}

#[tokio::test]
async fn whatever_a_producers_first_request_is_answered_with_its_records_arrive() {
    join_all(OF_INIT.map(async |(code, expected)| {
        let (cluster, kafka) = prepared();
        let what = format!("{code} of a request for a producer's id");
        let mut verdicts = Vec::new();
        for records in pages() {
            cluster.request_errors(RDKafkaApiKey::InitProducerId, &[error(code)]);
            verdicts.extend(until_published(&what, &hasty(&kafka), &records).await);
        }
        check(&what, &kafka);
        assert_eq!(verdicts, each_time(expected), "{what}");
    }))
    .await;
}

#[tokio::test]
async fn whatever_is_said_of_the_topic_its_records_arrive_when_it_is_over() {
    join_all(OF_TOPIC.map(async |code| {
        let (cluster, kafka) = prepared();
        let what = format!("{code} of the topic");
        for records in pages() {
            let publisher = hasty(&kafka);
            cluster.topic_error(&kafka.topic, error(code)).expect("the topic is there");
            let over = async {
                let told = publisher.check(TIMEOUT).await.expect_err(&what).to_string();
                assert!(told.contains(&kafka.topic), "{what}: {told}");
                cluster.topic_error(&kafka.topic, error(0)).expect("the topic is there");
            };
            tokio::join!(until_published(&what, &publisher, &records), over);
        }
        check(&what, &kafka);
    }))
    .await;
}
