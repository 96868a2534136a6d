//! Neighbours that hang or go away.

use std::time::Duration;

use anyhow::Result;
use local_stack::kafka::Order;
use local_stack::wire::{Flow, Wire};
use local_stack::{Behaviour, Kafka, PartnerStub, http_client};
use rdkafka::ClientConfig;
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
