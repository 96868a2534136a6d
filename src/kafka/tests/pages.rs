//! Pages reach the topic, whatever becomes of brokers, answers and producers.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

#[tokio::test]
async fn a_page_is_delivered_whole_and_can_be_read_back() {
    let (_cluster, kafka) = cluster();
    let (publisher, metrics) = publisher(&kafka);
    assert_eq!(publisher.publish_page(&page(500), Record::clone).await, Ok(all(500)));
    assert_eq!(metrics.kafka_deliveries.with_label_values(&["ok"]).get(), 500);

    let read = read_all(&kafka, 500);
    let ids: BTreeMap<&str, &str> = read.iter().map(|(key, h)| (h["ce_id"].as_str(), key.as_str())).collect();
    assert_eq!((read.len(), ids.len()), (500, 500));
    for (key, headers) in &read {
        let sent = page(500).into_iter().find(|record| record.key == *key).expect("a record that was sent");
        let sent: BTreeMap<String, String> = sent
            .headers()
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
    assert_eq!(publisher.publish_page(&page(0), Record::clone).await, Ok(all(0)));
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
    assert_eq!(publisher.publish_page(&page(100), Record::clone).await, Ok(all(100)));
    assert_eq!(read_all(&kafka, 100).len(), 100);
}

/// The broker stored the records and its answer was late: they are sent again, and counted once.
#[tokio::test]
async fn a_lost_delivery_report_is_waited_for_and_repeats_have_the_same_ids() {
    let (cluster, kafka) = cluster();
    let mut settings = client::producer(&kafka);
    settings.set("socket.timeout.ms", "500");
    let publisher = Publisher::with_client(&kafka, settings, Arc::new(Metrics::new())).expect("a producer");
    assert_eq!(publisher.publish_page(&page(1), Record::clone).await, Ok(all(1)));
    // librdkafka looks for timeouts once a second: it gives the answer up within 1.5 s, and later on a busy machine.
    cluster.broker_round_trip_time(-1, Duration::from_secs(4)).expect("a delay");
    let records = page(100);
    let (published, ()) = tokio::join!(publisher.publish_page(&records, Record::clone), async {
        tokio::time::sleep(Duration::from_millis(3_000)).await;
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
    assert_eq!(publisher.publish_page(&page(1), Record::clone).await, Ok(all(1)));
    cluster.broker_down(-1).expect("down");
    let records = page(100);
    let (result, ()) = tokio::join!(publisher.publish_page(&records, Record::clone), async {
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
    let error = publisher.publish_page(&page(5), Record::clone).await.expect_err("nobody there");
    assert_eq!((error.verdict, error.code), (Verdict::Retry, RDKafkaErrorCode::MessageTimedOut));
    assert_eq!((error.delivered, error.failed), (0, 5));
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    cluster.broker_up(-1).expect("up");
    let delivered = async { while publisher.publish_page(&page(5), Record::clone).await != Ok(all(5)) {} };
    tokio::time::timeout(TIMEOUT, delivered).await.expect("the same page goes out once the broker is back");
}

#[tokio::test]
async fn a_full_queue_makes_the_page_wait_and_drops_nothing() {
    let (_cluster, kafka) = cluster();
    let mut tiny = client::producer(&kafka);
    tiny.set("queue.buffering.max.messages", "10");
    let publisher = Publisher::with_client(&kafka, tiny, Arc::new(Metrics::new())).expect("a producer");
    assert_eq!(publisher.publish_page(&page(300), Record::clone).await, Ok(all(300)));
    assert_eq!(read_all(&kafka, 300).len(), 300);
}

/// What waits for room is not made yet: a page of records is never held beside librdkafka's copies of them.
#[tokio::test]
async fn a_record_is_made_when_it_is_handed_over() {
    let (cluster, kafka) = cluster();
    let mut tiny = client::producer(&kafka);
    tiny.set("queue.buffering.max.messages", "10");
    let publisher = Publisher::with_client(&kafka, tiny, Arc::new(Metrics::new())).expect("a producer");
    assert_eq!(publisher.publish_page(&page(1), Record::clone).await, Ok(all(1)));
    cluster.broker_down(-1).expect("down");
    let made = AtomicUsize::new(0);
    let records = page(300);
    let count = |record: &Record| {
        made.fetch_add(1, Ordering::Relaxed);
        record.clone()
    };
    let (published, ()) = tokio::join!(publisher.publish_page(&records, count), async {
        // Its first poll goes on until there is no room.
        while made.load(Ordering::Relaxed) < 11 {
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(made.load(Ordering::Relaxed), 11);
        cluster.broker_up(-1).expect("up");
    });
    assert_eq!((published, made.into_inner()), (Ok(all(300)), 300));
}

#[tokio::test]
async fn a_producer_at_its_end_is_replaced() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    assert_eq!(publisher.publish_page(&page(1), Record::clone).await, Ok(all(1)));
    // SAFETY: the producer lives as long as the publisher, and the reason is a text that ends in zero.
    unsafe {
        rdkafka::bindings::rd_kafka_test_fatal_error(
            publisher.native(),
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER,
            c"for the test".as_ptr(),
        );
    }
    let error = publisher.publish_page(&page(5), Record::clone).await.expect_err("the end");
    assert_eq!((error.verdict, error.failed), (Verdict::Restarted, 5));
    assert_eq!(publisher.publish_page(&page(5), Record::clone).await, Ok(all(5)));
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
    let error = publisher.publish_page(&page(1), Record::clone).await.expect_err("no id");
    assert_eq!(error.verdict, Verdict::Restarted);
    assert_eq!(publisher.publish_page(&page(1), Record::clone).await, Ok(all(1)));
}

#[tokio::test]
async fn pages_of_several_runs_are_counted_apart() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    let (first, second) = (page(200), page(300));
    let (a, b) =
        tokio::join!(publisher.publish_page(&first, Record::clone), publisher.publish_page(&second, Record::clone));
    assert_eq!((a, b), (Ok(all(200)), Ok(all(300))));
}

#[tokio::test]
async fn an_abandoned_page_is_flushed() {
    let (_cluster, kafka) = cluster();
    let (publisher, _) = publisher(&kafka);
    let abandoned = tokio::time::timeout(Duration::ZERO, publisher.publish_page(&page(50), Record::clone)).await;
    assert!(abandoned.is_err());
    assert!(publisher.flush(TIMEOUT).await);
    assert_eq!(read_all(&kafka, 50).len(), 50);
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
    send(publisher.publish_page(&page(1), Record::clone));
}
