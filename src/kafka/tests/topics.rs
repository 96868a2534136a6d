//! Looking at a topic and reading it.

use super::*;

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

#[tokio::test]
async fn a_reading_ends_where_the_topic_ended_when_it_began() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    publisher.publish_page(&page(2_500), Record::clone).await.expect("published");
    let reader = TopicReader::open(&kafka).await.expect("a topic");
    assert_eq!(reader.extents().values().map(|extent| extent.high - extent.low).sum::<i64>(), 2_500);
    publisher.publish_page(&page(100), Record::clone).await.expect("published");
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
