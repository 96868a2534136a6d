//! Neighbours that hang or go away.

use std::time::Duration;

use anyhow::Result;
use local_stack::kafka::{Order, Request};
use local_stack::wire::{Flow, Wire};
use local_stack::{Behaviour, Kafka, PartnerStub, http_client};
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureProducer, FutureRecord};
use sqlx::{Connection, PgConnection};
use tokio::time::timeout;

const SHORT: Duration = Duration::from_millis(300);

#[tokio::test]
async fn a_wire_carries_stalls_and_cuts() -> Result<()> {
    let postgres = local_stack::shared().await?.postgres();
    let wire = Wire::to(&postgres.admin_url())?;
    let mut connection = PgConnection::connect(wire.url()).await?;
    connection.ping().await?;

    wire.set(Flow::Stalled);
    assert!(timeout(SHORT, connection.ping()).await.is_err(), "an answer came through");
    wire.set(Flow::Open);
    let mut connection = PgConnection::connect(wire.url()).await?;
    connection.ping().await?;

    wire.set(Flow::Cut);
    assert!(timeout(SHORT, connection.ping()).await?.is_err());
    assert!(timeout(SHORT, PgConnection::connect(wire.url())).await?.is_err());
    wire.set(Flow::Open);
    PgConnection::connect(wire.url()).await?.ping().await?;
    Ok(())
}

#[tokio::test]
async fn a_stranded_connection_stays_and_carries_nothing() -> Result<()> {
    let postgres = local_stack::shared().await?.postgres();
    let wire = Wire::to(&postgres.admin_url())?;
    let mut stranded = PgConnection::connect(wire.url()).await?;
    wire.strand();
    assert!(timeout(SHORT, stranded.ping()).await.is_err(), "an answer came through");
    PgConnection::connect(wire.url()).await?.ping().await?;
    wire.set(Flow::Open);
    assert!(timeout(SHORT, stranded.ping()).await.is_err(), "an answer came through");
    Ok(())
}

#[tokio::test]
async fn a_dropped_wire_is_gone() -> Result<()> {
    let partner = PartnerStub::start(Behaviour::default())?;
    let wire = Wire::to(&partner.url())?;
    let stats = format!("{}/stats", wire.url());
    assert!(http_client::get(&stats).await?.0.is_success());
    drop(wire);
    assert!(http_client::get(&stats).await.is_err());
    Ok(())
}

#[tokio::test]
async fn a_broker_of_ones_own_goes_down_and_comes_back() -> Result<()> {
    let kafka = Kafka::separate().await?;
    kafka.create_topic("records", 1).await?;
    let producer: FutureProducer =
        ClientConfig::new().set("bootstrap.servers", kafka.bootstrap()).set("message.timeout.ms", "20000").create()?;

    kafka.order(&Order::GoDown).await?;
    let mut delivery = producer.send_result(FutureRecord::to("records").key("k").payload("v")).map_err(|(e, _)| e)?;
    assert!(timeout(Duration::from_secs(1), &mut delivery).await.is_err(), "delivered to a broker that is away");
    kafka.order(&Order::ComeUp).await?;
    delivery.await?.map_err(|(error, _)| error)?;
    Ok(())
}

#[tokio::test]
async fn a_broker_fails_requests_with_the_codes_it_was_given() -> Result<()> {
    let kafka = Kafka::separate().await?;
    kafka.create_topic("records", 1).await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka.bootstrap())
        .set("message.timeout.ms", "20000")
        .set("retry.backoff.ms", "10")
        .create()?;
    let send = async || {
        let delivery = producer.send_result(FutureRecord::to("records").key("k").payload("v")).map_err(|(e, _)| e)?;
        match timeout(Duration::from_secs(20), delivery).await {
            Ok(Ok(Ok(_))) => Ok(()),
            Ok(Ok(Err((error, _)))) => Err(error),
            _ => Err(KafkaError::Canceled),
        }
    };
    // Final codes reach the sender, one request each. (Others, such as "not authorized", the client remembers for the topic.)
    let codes = [(10, RDKafkaErrorCode::MessageSizeTooLarge), (87, RDKafkaErrorCode::InvalidRecord)];
    kafka.order(&Order::Fail { request: Request::Produce, codes: codes.map(|(code, _)| code).to_vec() }).await?;
    for (_, expected) in codes {
        assert_eq!(send().await, Err(KafkaError::MessageProduction(expected)));
    }
    send().await?;

    // One that clients retry does not; forgiven errors are gone.
    kafka.order(&Order::Fail { request: Request::Produce, codes: vec![6, 7] }).await?;
    send().await?;
    kafka.order(&Order::Fail { request: Request::Produce, codes: vec![10; 5] }).await?;
    kafka.order(&Order::Forgive { request: Request::Produce }).await?;
    send().await?;
    assert!(kafka.order(&Order::Fail { request: Request::InitProducerId, codes: vec![-1] }).await.is_err());
    assert!(kafka.order(&Order::Fail { request: Request::InitProducerId, codes: vec![30_000] }).await.is_err());
    Ok(())
}

#[tokio::test]
async fn a_topic_fails_until_it_does_not() -> Result<()> {
    let kafka = Kafka::separate().await?;
    kafka.create_topic("records", 1).await?;
    // A client of its own each time: one that was refused remembers it.
    let send = async || {
        let producer: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", kafka.bootstrap())
            .set("message.timeout.ms", "10000")
            .create()?;
        // A client that has looked at the topic by then refuses the record by itself, one that has not hears of it later.
        let delivery = match producer.send_result(FutureRecord::to("records").key("k").payload("v")) {
            Ok(delivery) => delivery,
            Err((error, _)) => return Ok(Err(error)),
        };
        anyhow::Ok(delivery.await?.map(drop).map_err(|(error, _)| error))
    };
    kafka.order(&Order::FailTopic { name: "records".into(), code: 29 }).await?;
    let refused = send().await?.expect_err("delivered to a topic that nobody may write");
    assert_eq!(refused.rdkafka_error_code(), Some(RDKafkaErrorCode::TopicAuthorizationFailed));
    kafka.order(&Order::FailTopic { name: "records".into(), code: 0 }).await?;
    send().await??;
    Ok(())
}
