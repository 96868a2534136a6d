//! Records that Kafka refuses: for good, they are quarantined and the others flow; else they wait.

use std::time::Duration;

use anyhow::{Result, ensure};
use local_stack::kafka::{Order, ProduceError};
use local_stack::{Behaviour, Kafka, KafkaTap};
use uuid::Uuid;
use write_api::config::Config;
use write_api::db::Database;
use write_api::db::ledger::WorkLedger;
use write_api::db::publications::{PublicationClaim, PublishedRange, Quarantined};

use crate::harness::{LONG, World};

const LISTINGS: i64 = 20;
const QUARANTINED: &str = "SELECT count(*) FROM quarantined_records";

/// A broker of its own, and one record after another, so that what it answers first is about listings 1 and 2.
async fn world_with_kafka() -> Result<(World, Kafka, KafkaTap)> {
    let mut world = World::new(Behaviour::default()).await?;
    let kafka = Kafka::separate().await?;
    let topic = world.environment().names().topic.clone();
    kafka.create_topic(&topic, 12).await?;
    world.set("kafka.brokers", kafka.bootstrap()).set("kafka.page_size", 1).set("kafka.pages_in_flight", 1);
    world.listings(LISTINGS).await?;
    let tap = KafkaTap::start(kafka.bootstrap(), &topic)?;
    Ok((world, kafka, tap))
}

#[tokio::test]
async fn a_record_refused_for_good_is_quarantined_until_a_publication_delivers_it() -> Result<()> {
    let (world, kafka, tap) = world_with_kafka().await?;
    let service = world.serve().await?;
    service.expect_errors();
    // Each is refused once with others, of which there are none, and once alone.
    kafka.order(&Order::FailProduce { errors: vec![ProduceError::TooLarge; 4] }).await?;
    let id = world.refresh(&[])?;
    world.published(&id, LONG).await?;
    let found: Vec<(i64, String, String, String)> =
        sqlx::query_as("SELECT listing_id, run_id, code, reason FROM quarantined_records ORDER BY listing_id")
            .fetch_all(&world.database)
            .await?;
    let listings: Vec<i64> = found.iter().map(|found| found.0).collect();
    ensure!(listings == [1, 2], "{found:?}");
    for (_, run, code, reason) in &found {
        ensure!(*run == id && code == "MessageSizeTooLarge" && reason.contains("too large"), "{found:?}");
    }
    let publication: (i64, i64) =
        sqlx::query_as("SELECT published, quarantined FROM publications").fetch_one(&world.database).await?;
    ensure!(publication == (LISTINGS - 2, 2), "(published, quarantined) is {publication:?}");
    let others: Vec<_> = world.homes(LISTINGS).await?.into_iter().skip(2).collect();
    world.check_records(&tap, &id, &others).await?;
    ensure!(service.metric("write_api_kafka_quarantined_records_total").await? == 2.0);
    let status = world.done(&["status", &id])?;
    ensure!(status.contains("18 of 20 records, 2 quarantined"), "{status}");
    let log = service.log()?;
    for listing in listings {
        let first = format!("\"first_listing_id\":{listing},");
        let told = |line: &str| line.contains("Kafka refuses records for good") && line.contains(&first);
        ensure!(log.lines().any(|line| told(line) && line.contains(&id)), "{log}");
    }

    world.done(&["send", "publish", &id])?;
    world.publications(&id, 2, LONG).await?;
    ensure!(world.number(QUARANTINED).await? == 0, "it was delivered and is still quarantined");
    world.check_records(&tap, &id, &world.homes(LISTINGS).await?).await?;
    world.finish(service).await
}

#[tokio::test]
async fn a_topic_that_may_not_be_written_to_makes_the_publication_wait() -> Result<()> {
    let (world, kafka, tap) = world_with_kafka().await?;
    let service = world.serve().await?;
    service.expect_errors();
    kafka.order(&Order::FailProduce { errors: vec![ProduceError::NotAuthorized; 2] }).await?;
    let id = world.refresh(&[])?;
    world.published(&id, LONG).await?;
    let retried = r#"write_api_events_total{kind="valuations.publish",outcome="retried"}"#;
    ensure!(service.metric(retried).await? == 2.0, "it was not refused twice");
    ensure!(service.log()?.contains("give this client the right to write to the topic"));
    ensure!(world.number("SELECT published FROM publications").await? == LISTINGS);
    ensure!(world.number(QUARANTINED).await? == 0);
    world.check_records(&tap, &id, &world.homes(LISTINGS).await?).await?;
    world.finish(service).await
}

/// The very calls that are made again where the answer to a commit was lost.
#[tokio::test]
async fn what_is_written_of_a_publication_twice_counts_once() -> Result<()> {
    let (world, _kafka, _tap) = world_with_kafka().await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.published(&id, LONG).await?;
    world.finish(service).await?;

    let variables = world.environment().variables().map(|(name, value)| (name.to_string(), value.to_string()));
    let config = Config::load(None, variables, &[]).map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    let database = Database::new(&config.database)?;
    let claim = async |event: &'static str| match database
        .claim_publication(event, &[0; 32], &id, Uuid::new_v4(), Duration::from_secs(60), false)
        .await
    {
        Ok(PublicationClaim::Owned(publication)) => Ok((publication.token, publication.used)),
        other => Err(anyhow::anyhow!("the claim gave {other:?}")),
    };
    // Published, quarantined, and of what was used the polls.
    let counts = async |event: &str| -> Result<(i64, i64, i64)> {
        let counts = "SELECT published, quarantined, coalesce((used->>'polls')::bigint, 0)
                      FROM publications WHERE event_id = $1";
        Ok(sqlx::query_as(counts).bind(event).fetch_one(&world.database).await?)
    };
    let used = |polls| WorkLedger { polls, ..WorkLedger::default() };
    let refused = |listing_id| Quarantined { listing_id, code: "InvalidRecord".into(), reason: "no".into() };
    let page = PublishedRange { after: i64::MIN, last: 10, published: 8, quarantined: vec![refused(3), refused(7)] };

    let (first, before) = claim("again").await?;
    ensure!(before == used(0), "{before:?}");
    let stranger = uuid::Uuid::new_v4();
    ensure!(!database.advance_publication("again", stranger, &page, &used(1)).await?, "a stranger moved the cursor");
    ensure!((counts("again").await?, world.number(QUARANTINED).await?) == ((0, 0, 0), 0));
    for _ in 0..2 {
        ensure!(database.advance_publication("again", first, &page, &used(5)).await?);
        ensure!((counts("again").await?, world.number(QUARANTINED).await?) == ((8, 2, 5), 2));
    }
    for _ in 0..2 {
        database.release_publishers(std::slice::from_ref(&id), &[first], &[None], &[Some(used(7))]).await?;
        ensure!(counts("again").await? == (8, 2, 7));
    }
    // The next attempt has what the one before it used, which writes no more.
    let (second, before) = claim("again").await?;
    ensure!(before == used(7), "{before:?}");
    let page = PublishedRange { after: 10, last: 20, published: 10, quarantined: Vec::new() };
    ensure!(database.advance_publication("again", second, &page, &used(9)).await?);
    ensure!(!database.advance_publication("again", first, &page, &used(6)).await?);
    ensure!(!database.complete_publication("again", &id, first, &used(6)).await?);
    database.release_publishers(std::slice::from_ref(&id), &[first], &[None], &[Some(used(6))]).await?;
    ensure!((counts("again").await?, world.number(QUARANTINED).await?) == ((18, 2, 9), 2));
    for polls in [11, 12] {
        ensure!(database.complete_publication("again", &id, second, &used(polls)).await?);
        ensure!(counts("again").await? == (18, 2, 11));
    }

    // Another publication delivers one of them; the other stays, with its name.
    let (third, before) = claim("third").await?;
    ensure!(before == used(0), "{before:?}");
    let page = PublishedRange { after: i64::MIN, last: 20, published: 19, quarantined: vec![refused(7)] };
    ensure!(database.advance_publication("third", third, &page, &used(3)).await?);
    ensure!((counts("third").await?, counts("again").await?) == ((19, 1, 3), (18, 2, 11)));
    let left = "SELECT count(*) FROM quarantined_records WHERE listing_id = 7 AND event_id = 'third'";
    ensure!((world.number(QUARANTINED).await?, world.number(left).await?) == (1, 1));
    // An end that does not know what was used leaves it as it is.
    database.release_publishers(std::slice::from_ref(&id), &[third], &[None], &[None]).await?;
    ensure!(counts("third").await? == (19, 1, 3));
    Ok(())
}
