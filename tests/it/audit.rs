//! The audit: balanced books are proven, and each thing that is broken on purpose is named.

use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use local_stack::Behaviour;
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::Value;

use crate::harness::{LONG, SOON, World, text, until};

const LISTINGS: i64 = 30;

/// The audit's document, and its exit code.
fn audit(world: &World, options: &[&str]) -> Result<(Option<i32>, Value)> {
    let Output { status, stdout, stderr } = world.cli(&[&["audit", "--json"], options].concat())?;
    let document = serde_json::from_slice(&stdout).with_context(|| format!("{status}: {}", text(&stderr)))?;
    Ok((status.code(), document))
}

fn balanced(world: &World, options: &[&str]) -> Result<Value> {
    let (code, document) = audit(world, options)?;
    ensure!(code == Some(0) && document["verdict"] == "balanced", "{code:?}: {document:#}");
    Ok(document)
}

/// The gaps of a run, or of the topic, as `kind: count: examples`.
fn gaps(of: &Value) -> Vec<String> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let examples = |gap: &Value| {
        list(&gap["first"]).iter().filter_map(Value::as_str).map(str::to_owned).collect::<Vec<_>>().join(", ")
    };
    list(&of["gaps"])
        .iter()
        .map(|gap| format!("{}: {}: {}", gap["kind"].as_str().unwrap_or_default(), gap["count"], examples(gap)))
        .collect()
}

/// A world with a run that is complete and published.
async fn published_world(behaviour: Behaviour) -> Result<(World, String)> {
    let world = World::new(behaviour).await?;
    world.listings(LISTINGS).await?;
    // There for long: none of them can have been committed in the moment of an opening.
    world.sql("UPDATE listings SET created_at = created_at - interval '1 day'").await?;
    let id = publish_a_run(&world, &["--id", "night-1"]).await?;
    Ok((world, id))
}

async fn publish_a_run(world: &World, options: &[&str]) -> Result<String> {
    let service = world.serve().await?;
    let id = world.refresh(options)?;
    world.published(&id, LONG).await?;
    world.finish(service).await?;
    Ok(id)
}

#[tokio::test]
async fn balanced_books_are_proven_whatever_was_sent_twice() -> Result<()> {
    let world = World::new(Behaviour { forced: [(7, 422)].into(), ..Behaviour::default() }).await?;
    world.listings(LISTINGS).await?;
    ensure!(world.done(&["audit"])?.contains("the books balance: 0 runs"), "no run at all");
    let service = world.serve().await?;
    let all = world.refresh(&["--id", "all"])?;
    world.published(&all, LONG).await?;
    let some = world.refresh(&["--id", "some", "--zip-code", "98003", "--zip-code", "98007"])?;
    world.published(&some, LONG).await?;
    let limited = world.refresh(&["--id", "limited", "--limit", "4"])?;
    world.published(&limited, LONG).await?;
    let none = world.refresh(&["--id", "none", "--zip-code", "1"])?;
    world.published(&none, LONG).await?;
    // A listing that appears later, or moves, is of no run's set.
    world.listings_between(LISTINGS + 1, LISTINGS + 5).await?;
    world.sql("UPDATE listings SET zip_code = 98003 WHERE listing_id = 1").await?;
    world.done(&["send", "publish", &limited])?;
    world.quiet(LONG).await?;
    world.finish(service).await?;

    let document = balanced(&world, &["--settled"])?;
    let figures = |id: &str| {
        let runs = document["runs"].as_array().cloned().unwrap_or_default();
        let run = runs.into_iter().find(|run| run["run_id"] == id).unwrap_or_default();
        ["selected", "valued", "failed", "records", "repeated_records"].map(|figure| run[figure].as_i64())
    };
    let expect = |figures: [i64; 5]| figures.map(Some);
    ensure!(figures("all") == expect([30, 29, 1, 29, 0]), "{document:#}");
    ensure!(figures("some") == expect([6, 5, 1, 5, 0]), "{document:#}");
    ensure!(figures("limited") == expect([4, 4, 0, 4, 4]), "{document:#}");
    ensure!(figures("none") == expect([0, 0, 0, 0, 0]), "{document:#}");
    let output = world.cli(&["audit", "--settled"])?;
    println!("{}", text(&output.stdout));
    ensure!(!text(&output.stderr).contains("EOF"), "the end of a partition is no warning: {}", text(&output.stderr));
    let one = world.done(&["audit", "--run", "some"])?;
    ensure!(one.contains("balanced    some") && !one.contains("limited"), "{one}");
    let wrong = world.cli(&["audit", "--since", "yesterday"])?;
    ensure!(
        wrong.status.code() == Some(64) && text(&wrong.stderr).contains("such as 2026-01-31T02:00:00Z"),
        "{wrong:?}"
    );
    let unknown = world.cli(&["audit", "--run", "nobody"])?;
    ensure!(unknown.status.code() == Some(1) && text(&unknown.stderr).contains("nobody"), "{unknown:?}");
    Ok(())
}

#[tokio::test]
async fn each_break_in_the_database_is_named() -> Result<()> {
    let (world, id) = published_world(Behaviour::default()).await?;
    balanced(&world, &["--settled"])?;
    let derived = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, b"night-1:publish");
    let of_outbox = format!("outbox_missing: 1: no row {derived}");
    for (broken, mended, expected) in [
        (
            "CREATE TABLE kept AS SELECT * FROM valuations WHERE listing_id IN (3, 5);
             DELETE FROM valuations WHERE listing_id IN (3, 5)",
            "INSERT INTO valuations SELECT * FROM kept; DROP TABLE kept",
            &[
                "count_mismatch: 1: runs says 30 valued and 0 failed, valuations has 28 and 0",
                "passed_without_row: 2: 3, 5",
                "incomplete: 1: 30 were selected and 28 have a row",
                "publication_mismatch",
                "record_without_valuation: 2: ",
            ][..],
        ),
        (
            "UPDATE runs SET valued = valued - 1",
            "UPDATE runs SET valued = valued + 1",
            &["count_mismatch: 1: runs says 29 valued"],
        ),
        (
            "UPDATE runs SET cursor = 10",
            "UPDATE runs SET cursor = 30",
            &["incomplete: 1: the cursor is 10, the set ends at 30"],
        ),
        (
            "UPDATE runs SET selected = 29",
            "UPDATE runs SET selected = 30",
            &["excess: 1: 29 were selected and 30 have a row"],
        ),
        (
            "CREATE TABLE kept AS SELECT * FROM publications; DELETE FROM publications",
            "INSERT INTO publications SELECT * FROM kept; DROP TABLE kept",
            &["publication_missing: 1: 30 records on Kafka"],
        ),
        ("UPDATE runs SET last_listing_id = 29", "UPDATE runs SET last_listing_id = 30", &["outside_the_set: 1: 30"]),
        ("UPDATE runs SET owner = gen_random_uuid()", "UPDATE runs SET owner = NULL", &["owned_after_its_end"]),
        (
            "CREATE TABLE kept AS SELECT * FROM outbox; DELETE FROM outbox",
            "INSERT INTO outbox SELECT * FROM kept; DROP TABLE kept",
            &[of_outbox.as_str()],
        ),
        (
            "INSERT INTO outbox (event_id, lane, body) SELECT gen_random_uuid(), lane, body FROM outbox",
            "DELETE FROM outbox WHERE sent_at IS NULL",
            &["outbox_wrong: 1: 2 rows announce its post-processing, 1 of them"],
        ),
        (
            "INSERT INTO outbox (event_id, lane, body, sent_at)
             SELECT gen_random_uuid(), lane, 'no JSON ' || body, now() FROM outbox",
            "DELETE FROM outbox WHERE body LIKE 'no JSON%'",
            &["outbox_wrong: 1: row "],
        ),
        (
            "UPDATE outbox SET lane = 'valuations'",
            "UPDATE outbox SET lane = 'post_processing'",
            &["outbox_wrong: 1: row "],
        ),
        (
            "UPDATE publications SET published = published - 1",
            "UPDATE publications SET published = published + 1",
            &["publication_mismatch: 1: "],
        ),
        (
            "ALTER TABLE publications ADD COLUMN kept bigint; UPDATE publications SET kept = cursor, cursor = 0",
            "UPDATE publications SET cursor = kept; ALTER TABLE publications DROP COLUMN kept",
            &["publication_mismatch: 1: "],
        ),
        (
            "CREATE TABLE kept AS SELECT * FROM listing_valuations WHERE listing_id = 4;
             DELETE FROM listing_valuations WHERE listing_id = 4",
            "INSERT INTO listing_valuations SELECT * FROM kept; DROP TABLE kept",
            &["listing_not_updated: 1: 4"],
        ),
        (
            "UPDATE listing_valuations SET event_time = event_time - interval '1 s', run_id = 'older' WHERE listing_id < 3",
            "UPDATE listing_valuations SET event_time = event_time + interval '1 s', run_id = 'night-1'
             WHERE listing_id < 3",
            &["listing_not_updated: 2: 1, 2"],
        ),
        (
            "UPDATE listing_valuations SET valuation_cents = valuation_cents + 1 WHERE listing_id = 9",
            "UPDATE listing_valuations SET valuation_cents = valuation_cents - 1 WHERE listing_id = 9",
            &["listing_not_updated: 1: 9"],
        ),
        (
            "UPDATE valuations SET valuation_cents = valuation_cents + 100 WHERE listing_id = 9",
            "UPDATE valuations SET valuation_cents = valuation_cents - 100 WHERE listing_id = 9",
            &["listing_not_updated: 1: 9", "record_wrong: 1: 9 (", "record_missing: 1: 9"],
        ),
        (
            "UPDATE runs SET state = 'running', completed_at = NULL",
            "UPDATE runs SET state = 'complete', completed_at = (SELECT completed_at FROM kept_completion)",
            &[
                "outbox_without_completion: 1: ",
                "publication_without_completion: 1: ",
                "record_without_completion: 30: ",
            ],
        ),
    ] {
        if broken.contains("completed_at = NULL") {
            world.sql("CREATE TABLE kept_completion AS SELECT completed_at FROM runs").await?;
        }
        world.sql(broken).await?;
        let (code, document) = audit(&world, &[])?;
        let found = gaps(&document["runs"][0]);
        ensure!(code == Some(1) && document["verdict"] == "gaps", "{broken}: {code:?}");
        for gap in expected {
            ensure!(found.iter().any(|found| found.starts_with(gap)), "{broken}\nshould give {gap:?}, gave {found:#?}");
        }
        ensure!(found.len() == expected.len(), "{broken}\nshould give {expected:#?}, gave {found:#?}");
        world.sql(mended).await?;
        balanced(&world, &["--settled"]).with_context(|| format!("after {mended}"))?;
    }
    let text = world.done(&["audit", "--run", &id])?;
    ensure!(text.contains("balanced    night-1  complete: 30 selected, 30 valued, 0 failed, 30 on Kafka"), "{text}");
    Ok(())
}

#[tokio::test]
async fn what_belongs_to_no_run_is_named() -> Result<()> {
    let (world, _) = published_world(Behaviour::default()).await?;
    for (broken, mended, expected) in [
        (
            "INSERT INTO valuations SELECT 'gone', listing_id, zip_code, list_price_cents, valuation_cents, confidence
             FROM valuations;
             INSERT INTO run_listings VALUES ('a', 1), ('a', 2), ('z', 1);
             INSERT INTO quarantined_records (run_id, listing_id, event_id, code, reason) VALUES ('gone', 1, 'e', 'c', 'r')",
            "DELETE FROM valuations WHERE run_id = 'gone'; DELETE FROM run_listings; DELETE FROM quarantined_records",
            "rows_of_unknown_run: 4: quarantined_records of run gone, run_listings of run a, run_listings of run z, \
             valuations of run gone",
        ),
        (
            "UPDATE listing_valuations SET run_id = 'never', event_time = event_time + interval '1 s'
             WHERE listing_id IN (4, 7)",
            "UPDATE listing_valuations SET run_id = 'night-1', event_time = event_time - interval '1 s'
             WHERE listing_id IN (4, 7)",
            "current_value_of_unknown_run: 2: 4 (run never), 7 (run never)",
        ),
    ] {
        world.sql(broken).await?;
        let (code, document) = audit(&world, &[])?;
        ensure!(code == Some(1) && document["verdict"] == "gaps", "{document:#}");
        ensure!(gaps(&document["database"]) == [expected], "{document:#}");
        ensure!(gaps(&document["runs"][0]).is_empty(), "{document:#}");
        let told = text(&world.cli(&["audit"])?.stdout);
        ensure!(told.contains("GAPS        rows of no run\n") && told.contains("the books do not balance"), "{told}");
        balanced(&world, &["--run", "night-1"])?;
        world.sql(mended).await?;
        balanced(&world, &["--settled"])?;
    }
    // A run that retention has removed leaves its values where they are.
    world.sql("UPDATE listing_valuations SET run_id = 'old', event_time = now() - interval '30 days'").await?;
    let (_, document) = audit(&world, &[])?;
    ensure!(gaps(&document["database"]).is_empty(), "{document:#}");
    Ok(())
}

#[tokio::test]
async fn an_insert_that_was_under_way_at_the_opening_is_no_gap() -> Result<()> {
    let (world, _) = published_world(Behaviour::default()).await?;
    // As committed after the page was read: in the set by its time, and never seen.
    world.listings_between(0, 0).await?;
    world.sql("UPDATE listings SET created_at = opened_at - interval '2 s' FROM runs WHERE listing_id = 0").await?;
    let document = balanced(&world, &["--settled"])?;
    ensure!(
        document["runs"][0]["notes"].to_string().contains("no row for 1 listing inserted within 20 s"),
        "{document:#}"
    );
    // Nobody's insert takes an hour.
    world.sql("UPDATE listings SET created_at = opened_at - interval '1 hour' FROM runs WHERE listing_id = 0").await?;
    let (code, document) = audit(&world, &[])?;
    ensure!(code == Some(1) && gaps(&document["runs"][0]) == ["passed_without_row: 1: 0"], "{document:#}");
    world.sql("DELETE FROM listings WHERE listing_id = 0").await?;

    // As committed between the count and the page: seen, and not counted.
    world.sql("UPDATE runs SET selected = 29").await?;
    world.sql("UPDATE listings SET created_at = opened_at - interval '2 s' FROM runs WHERE listing_id = 5").await?;
    let document = balanced(&world, &["--settled"])?;
    ensure!(document["runs"][0]["notes"].to_string().contains("1 row more than the 29 counted"), "{document:#}");
    world.sql("UPDATE runs SET selected = 28").await?;
    let (code, document) = audit(&world, &[])?;
    ensure!(code == Some(1) && gaps(&document["runs"][0])[0].starts_with("excess: 2: "), "{document:#}");
    Ok(())
}

#[tokio::test]
async fn a_run_that_retention_begins_to_remove_meanwhile_is_no_gap() -> Result<()> {
    let (world, _) = published_world(Behaviour::default()).await?;
    // The audit has read the run, and waits for its listings while the rows go.
    let mut removal = world.database.begin().await?;
    sqlx::query("LOCK TABLE listings IN ACCESS EXCLUSIVE MODE").execute(&mut *removal).await?;
    let child =
        world.command().args(["audit", "--json", "--since", "2020-01-01T00:00:00Z"]).stdout(Stdio::piped()).spawn()?;
    until("an audit that waits", SOON, async || Ok((world.waiting_for_locks().await? == 1).then_some(()))).await?;
    sqlx::query("UPDATE runs SET pruned_since = now()").execute(&mut *removal).await?;
    sqlx::query("DELETE FROM valuations WHERE listing_id < 20").execute(&mut *removal).await?;
    removal.commit().await?;
    let output = child.wait_with_output()?;
    let document: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(output.status.success() && document["runs"] == serde_json::json!([]), "{}: {document:#}", output.status);
    Ok(())
}

/// Sends a record as somebody who is not the service would.
async fn produce(world: &World, topic: &str, key: &str, value: &[u8], ce_id: &str) -> Result<()> {
    let brokers = world.environment().variables().find(|(name, _)| *name == "WRITE_API_KAFKA_BROKERS");
    let producer: FutureProducer =
        ClientConfig::new().set("bootstrap.servers", brokers.context("brokers")?.1).create()?;
    let headers = OwnedHeaders::new().insert(Header { key: "ce_id", value: Some(ce_id) });
    let record = FutureRecord::to(topic).key(key).payload(value).headers(headers);
    producer.send(record, Duration::from_secs(10)).await.map_err(|(error, _)| error)?;
    Ok(())
}

#[tokio::test]
async fn each_break_on_the_topic_is_named() -> Result<()> {
    let (world, id) = published_world(Behaviour::default()).await?;
    let topic = world.environment().names().topic.clone();
    let value = |run: &str, listing: i64| {
        format!(
            r#"{{"run_id":"{run}","listing_id":{listing},"zip_code":98001,"list_price_cents":10000137,"valuation_cents":1,"delta_cents":0,"delta_ratio":0.0000,"assessment":"fair","confidence":0.5}}"#
        )
    };
    produce(&world, &topic, "1", value(&id, 1).as_bytes(), "wrong").await?;
    produce(&world, &topic, "999", value(&id, 999).as_bytes(), "of no valuation").await?;
    produce(&world, &topic, "1", value("never", 1).as_bytes(), "of no run").await?;
    produce(&world, &topic, "1", b"no json", "unreadable").await?;
    let (code, document) = audit(&world, &[])?;
    ensure!(code == Some(1), "{code:?}");
    let (run, foreign) = (gaps(&document["runs"][0]), gaps(&document["topic"]));
    println!("{}", text(&world.cli(&["audit"])?.stdout));
    ensure!(run.len() == 2 && foreign.len() == 2, "{document:#}");
    let wrong = run.iter().find(|gap| gap.starts_with("record_wrong: 1: 1 (")).context("record_wrong")?;
    for part in ["ce_id \"wrong\" instead of", "valuation_cents 1 instead of", "no header ce_time"] {
        ensure!(wrong.contains(part), "{wrong}");
    }
    ensure!(run.iter().any(|gap| gap.starts_with("record_without_valuation: 1: 999 (")), "{run:?}");
    ensure!(foreign.iter().any(|gap| gap.starts_with("record_of_unknown_run: 1: run \"never\"")), "{foreign:?}");
    ensure!(foreign.iter().any(|gap| gap.starts_with("record_unreadable: 1: partition")), "{foreign:?}");
    ensure!(document["runs"][0]["records"] == LISTINGS, "the right records are still counted: {document:#}");
    Ok(())
}

#[tokio::test]
async fn records_that_are_not_there_are_missing_and_those_that_retention_took_cannot_be_proven() -> Result<()> {
    let (mut world, id) = published_world(Behaviour::default()).await?;
    let kafka = local_stack::shared().await?.kafka();
    let (empty, short) = (
        format!("{}-empty", world.environment().names().topic),
        format!("{}-short", world.environment().names().topic),
    );
    kafka.create_topic(&empty, 3).await?;
    kafka.create_topic(&short, 1).await?;
    world.set("kafka.topic", &empty);
    let (code, document) = audit(&world, &[])?;
    let found = gaps(&document["runs"][0]);
    ensure!(code == Some(1) && found == ["record_missing: 30: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10"], "{found:?}");

    // A run on a topic that keeps 5 MiB, and then more than that by somebody else.
    world.set("kafka.topic", &short);
    let later = publish_a_run(&world, &["--id", "night-2"]).await?;
    balanced(&world, &["--run", &later, "--settled"])?;
    let filler = vec![b'x'; 200_000];
    for _ in 0..40 {
        produce(&world, &short, "1", &filler, "filler").await?;
    }
    let (code, document) = audit(&world, &["--run", &later, "--settled"])?;
    ensure!(code == Some(3) && document["verdict"] == "topic truncated", "{code:?}: {document:#}");
    ensure!(
        document["runs"][0]["truncated_records"] == LISTINGS && gaps(&document["runs"][0]).is_empty(),
        "{document:#}"
    );
    let output = world.cli(&["audit", "--run", &later])?;
    println!("{}", text(&output.stdout));
    ensure!(
        output.status.code() == Some(3) && text(&output.stdout).contains("topic truncated: 30 records"),
        "{output:?}"
    );
    // What the database proves is no less wrong for that.
    world.sql("UPDATE runs SET valued = valued + 1").await?;
    ensure!(audit(&world, &["--run", &later])?.0 == Some(1), "a gap beside a truncated topic");
    ensure!(audit(&world, &["--run", &id])?.0 == Some(1), "and of the other run");
    Ok(())
}

#[tokio::test]
async fn a_run_at_work_is_unfinished_and_no_gap_until_everything_should_be_settled() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 300, ..Behaviour::default() }).await?;
    world.set("partner.in_flight", 10).set("refresh.page_size", 10);
    world.listings(300).await?;
    world.sql("UPDATE listings SET created_at = created_at - interval '1 day'").await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued > 0).await?;
    for _ in 0..3 {
        let document = balanced(&world, &[])?;
        let unfinished = document["runs"][0]["unfinished"].as_str().context("unfinished")?;
        ensure!(
            unfinished.starts_with("worked on, ") && unfinished.contains(" of 300 done, no progress for "),
            "{unfinished}"
        );
    }
    let (code, document) = audit(&world, &["--settled"])?;
    ensure!(code == Some(1) && gaps(&document["runs"][0])[0].starts_with("unfinished: 1: "), "{document:#}");
    let told = text(&world.cli(&["audit", "--settled"])?.stdout);
    ensure!(told.matches("no progress for").count() == 1, "told once: {told}");
    ensure!(told.contains(": 1 run of which 1 unfinished, "), "{told}");
    // A cursor ahead of its results is wrong at any time.
    service.kill().await?;
    world.sql("UPDATE runs SET cursor = 300").await?;
    let (code, document) = audit(&world, &[])?;
    let found = gaps(&document["runs"][0]);
    ensure!(code == Some(1) && found.len() == 1 && found[0].starts_with("passed_without_row: "), "{found:?}");
    world.expect_work_left();
    Ok(())
}
