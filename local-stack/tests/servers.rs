//! Every server does what it is there for.

use std::time::Duration;

use anyhow::{Context, Result};
use local_stack::kafka::{Order, ProduceError};
use local_stack::{Behaviour, KafkaTap, PartnerStub};
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use sqlx::{Connection, PgConnection};

#[tokio::test]
async fn each_environment_has_a_database_of_its_own() -> Result<()> {
    let stack = local_stack::shared().await?;
    let partner = PartnerStub::start(Behaviour::default())?;
    let (one, two) = (stack.environment(&partner).await?, stack.environment(&partner).await?);

    let mut first = PgConnection::connect(one.database_url()).await?;
    sqlx::query("CREATE TABLE mine (id int)").execute(&mut first).await?;
    let mut second = PgConnection::connect(two.database_url()).await?;
    assert!(sqlx::query("SELECT id FROM mine").execute(&mut second).await.is_err());

    let url = one.variables().find(|(name, _)| *name == "WRITE_API_DATABASE_URL").context("no database URL")?.1;
    assert_eq!(url, one.database_url());
    Ok(())
}

#[tokio::test]
async fn postgres_tells_its_settings_and_refuses_strange_names() -> Result<()> {
    let postgres = local_stack::shared().await?.postgres();
    let settings = postgres.settings().await?;
    assert!(settings.contains(&("fsync".to_owned(), "off".to_owned())), "{settings:?}");
    assert!(postgres.create_database("x; DROP DATABASE postgres").await.is_err());
    Ok(())
}

#[tokio::test]
async fn a_message_waits_in_the_queue_until_it_is_deleted() -> Result<()> {
    let client = local_stack::shared().await?.sqs().client().await;
    let queue = client.create_queue().queue_name("servers-test").send().await?;
    let queue = queue.queue_url().context("no queue URL")?;
    client.send_message().queue_url(queue).message_body("hello").send().await?;

    for _ in 0..2 {
        let received =
            client.receive_message().queue_url(queue).visibility_timeout(0).wait_time_seconds(2).send().await?;
        let message = received.messages().first().context("no message")?;
        assert_eq!(message.body(), Some("hello"));
    }
    let received = client.receive_message().queue_url(queue).send().await?;
    let handle = received.messages().first().and_then(|message| message.receipt_handle()).context("no message")?;
    client.delete_message().queue_url(queue).receipt_handle(handle).send().await?;
    assert!(client.receive_message().queue_url(queue).send().await?.messages().is_empty());
    Ok(())
}

#[tokio::test]
async fn records_are_read_with_their_headers_and_repeats_are_told_apart() -> Result<()> {
    let kafka = local_stack::shared().await?.kafka();
    kafka.create_topic("servers-test", 12).await?;
    kafka.create_topic("servers-test", 12).await.context("a topic that exists is left alone")?;
    let tap = KafkaTap::start(kafka.bootstrap(), "servers-test")?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.bootstrap())
        .set("enable.idempotence", "true")
        .set("compression.type", "lz4")
        // The mock stores a batch again whose answer was lost with the connection: so no other request is out when the
        // connection is closed below, or the count would depend on the machine.
        .set("max.in.flight.requests.per.connection", "1")
        .create()?;

    // The first request of each connection fails in a way that clients retry.
    kafka.order(&Order::FailProduce { errors: vec![ProduceError::NotLeader, ProduceError::Disconnect] }).await?;
    for listing in (0..300).chain(0..10) {
        let (key, id) = (format!("{listing}"), format!("id-{listing}"));
        let headers = OwnedHeaders::new()
            .insert(Header { key: "ce_id", value: Some(&id) })
            .insert(Header { key: "ce_type", value: Some("test") });
        let record = FutureRecord::to("servers-test").key(&key).payload("{}").headers(headers);
        drop(producer.send_result(record).map_err(|(error, _)| error)?);
    }

    let count = tap.wait_for(310, Duration::from_secs(20)).await;
    assert_eq!((count, tap.distinct_ids(), tap.missed()), (310, 300, 0));
    let records = tap.records();
    let of_seven: Vec<_> = records.iter().filter(|record| record.key == "7").collect();
    assert_eq!(of_seven.len(), 2);
    assert_eq!(of_seven[0].partition, of_seven[1].partition, "one key, one partition");
    assert_eq!((of_seven[0].ce_id(), of_seven[0].ce_type(), &of_seven[0].payload[..]), ("id-7", "test", &b"{}"[..]));
    Ok(())
}

#[tokio::test]
async fn a_tap_names_a_topic_that_is_not_there() -> Result<()> {
    let kafka = local_stack::shared().await?.kafka();
    let error = KafkaTap::start(kafka.bootstrap(), "no-such-topic").expect_err("must fail");
    assert!(error.to_string().contains("no-such-topic"), "{error:#}");
    Ok(())
}
