//! Dead letters: seen without being taken, sent again without being lost, deleted only by saying so.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aws_sdk_sqs::types::{MessageAttributeValue, QueueAttributeName, SendMessageBatchRequestEntry};
use local_stack::{Behaviour, Scope, SqsFault, SqsProxy};
use serde_json::{Value, json};

use crate::harness::{LANES, LONG, Lane, SOON, World, text, until};

/// A good upsert of listing `id`, by event `upsert-<id>`.
fn upsert(id: i64) -> String {
    json!({
        "specversion": "1.0", "id": format!("upsert-{id}"), "source": "/test", "type": "writeapi.listing.upsert.v1",
        "time": "2026-01-31T02:00:00Z",
        "data": {"listing_id": id, "zip_code": 98001, "list_price_cents": 1, "bedrooms": 1, "living_square_feet": 1},
    })
    .to_string()
}

fn reason(code: &str, message_id: &str) -> String {
    json!({"code": code, "reason": "because", "message_id": message_id, "queue": "q", "receive_count": 1}).to_string()
}

async fn url(world: &World, lane: Lane, suffix: &str) -> Result<String> {
    let name = format!("{}{suffix}", world.queue_name(lane));
    let found = world.sqs.get_queue_url().queue_name(name).send().await?;
    found.queue_url.context("a URL")
}

/// Puts a message into a lane's dead-letter queue.
async fn put_dead(world: &World, lane: Lane, body: &str, attributes: &[(&str, &str)]) -> Result<()> {
    let mut request = world.sqs.send_message().queue_url(url(world, lane, "-dlq").await?).message_body(body);
    for (name, value) in attributes {
        let kind = if *name == "redrives" { "Number" } else { "String" };
        let value = MessageAttributeValue::builder().data_type(kind).string_value(*value).build()?;
        request = request.message_attributes(*name, value);
    }
    request.send().await?;
    Ok(())
}

/// Takes everything that can be received of a queue: bodies with their count of redrives.
async fn take_all(world: &World, lane: Lane, suffix: &str) -> Result<Vec<(String, String)>> {
    let url = url(world, lane, suffix).await?;
    let mut taken = Vec::new();
    loop {
        let request = world.sqs.receive_message().queue_url(&url).max_number_of_messages(10);
        let messages = request.message_attribute_names("All").send().await?.messages.unwrap_or_default();
        if messages.is_empty() {
            return Ok(taken);
        }
        for message in messages {
            let receipt = message.receipt_handle.unwrap_or_default();
            world.sqs.delete_message().queue_url(&url).receipt_handle(receipt).send().await?;
            let attributes = message.message_attributes.unwrap_or_default();
            let redrives = attributes.get("redrives").and_then(|value| value.string_value.clone());
            taken.push((message.body.unwrap_or_default(), redrives.unwrap_or_default()));
        }
    }
}

/// Messages of a lane's dead-letter queue that can be received, and those that are hidden.
async fn dead_depth(world: &World, lane: Lane) -> Result<(u64, u64)> {
    let names =
        [QueueAttributeName::ApproximateNumberOfMessages, QueueAttributeName::ApproximateNumberOfMessagesNotVisible];
    let url = url(world, lane, "-dlq").await?;
    let request = world.sqs.get_queue_attributes().queue_url(url).set_attribute_names(Some(names.to_vec()));
    let attributes = request.send().await?.attributes.unwrap_or_default();
    let number = |name| attributes.get(name).and_then(|text| text.parse().ok()).unwrap_or(0);
    Ok((number(&names[0]), number(&names[1])))
}

async fn wait_for_dead(world: &World, lane: Lane, count: u64) -> Result<()> {
    until("dead letters", SOON, async || Ok((dead_depth(world, lane).await? == (count, 0)).then_some(()))).await
}

/// The letters of a list as a program reads them.
fn listed(world: &World, filters: &[&str]) -> Result<Vec<Value>> {
    let shown = world.done(&[&["dlq", "list", "--json"], filters].concat())?;
    shown.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

/// What of a list tells letters apart here.
fn codes(letters: &[Value]) -> BTreeMap<String, usize> {
    let mut codes = BTreeMap::new();
    for letter in letters {
        *codes.entry(letter["code"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
    }
    codes
}

#[tokio::test]
async fn letters_of_every_origin_are_listed_once_and_left_as_they_are() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    ensure!(world.done(&["dlq", "list"])? == "0 dead letters", "an empty list");
    let service = world.serve().await?;
    world.put(Lane::Events, "no json").await?;
    world.put(Lane::Events, &upsert(1).replace("98001", "\"98001\"")).await?;
    let publish = world.done(&["send", "publish", "no-such-run"])?;
    wait_for_dead(&world, Lane::Events, 2).await?;
    wait_for_dead(&world, Lane::PostProcessing, 1).await?;
    service.finish().await?;
    put_dead(&world, Lane::Events, &upsert(3), &[]).await?;

    // SQS itself moves what was received too often.
    let (source, dead) = (url(&world, Lane::Valuations, "").await?, url(&world, Lane::Valuations, "-dlq").await?);
    let arn =
        world.sqs.get_queue_attributes().queue_url(&dead).attribute_names(QueueAttributeName::QueueArn).send().await?;
    let arn = arn.attributes.and_then(|mut all| all.remove(&QueueAttributeName::QueueArn)).context("an ARN")?;
    let policy = json!({"deadLetterTargetArn": arn, "maxReceiveCount": "1"}).to_string();
    world
        .sqs
        .set_queue_attributes()
        .queue_url(&source)
        .attributes(QueueAttributeName::RedrivePolicy, policy)
        .send()
        .await?;
    world.put(Lane::Valuations, "received in vain").await?;
    until("the move by SQS", SOON, async || {
        world.sqs.receive_message().queue_url(&source).visibility_timeout(0).send().await?;
        Ok((dead_depth(&world, Lane::Valuations).await?.0 == 1).then_some(()))
    })
    .await?;

    let expected: BTreeMap<String, usize> =
        ["invalid_json", "invalid_data", "unknown_run", "unexplained", "received_too_often"]
            .map(|code| (code.to_owned(), 1))
            .into();
    for _ in 0..2 {
        let letters = listed(&world, &[])?;
        ensure!(codes(&letters) == expected, "{letters:#?}");
        ensure!(dead_depth(&world, Lane::Events).await? == (3, 0), "a list takes nothing and gives back at once");
    }
    let table = world.done(&["dlq", "list"])?;
    println!("{table}");
    ensure!(table.contains("5 dead letters") && table.contains("upsert-3") && table.contains(&publish), "{table}");

    for (filters, codes_of) in [
        (&["--kind", "listing.upsert"][..], &["invalid_data", "unexplained"][..]),
        (&["--kind", "unknown"], &["invalid_json", "received_too_often"]),
        (&["--kind", "listing.upsert", "--kind", "unknown", "--reason", "invalid_json"], &["invalid_json"]),
        (&["--lane", "post_processing"], &["unknown_run"]),
        (&["--lane", "post_processing", "--lane", "valuations"], &["unknown_run", "received_too_often"]),
        (&["--id", "upsert-3", "--id", &publish], &["unexplained", "unknown_run"]),
        (&["--newer-than", "1h", "--reason", "invalid_json"], &["invalid_json"]),
        (&["--older-than", "1h"], &[]),
        (&["--until", "2020-01-01T00:00:00Z"], &[]),
        (&["--since", "2020-01-01T00:00:00Z", "--lane", "post_processing"], &["unknown_run"]),
    ] {
        let letters = listed(&world, filters)?;
        let wanted: BTreeMap<String, usize> = codes_of.iter().map(|code| ((*code).to_owned(), 1)).collect();
        ensure!(codes(&letters) == wanted, "{filters:?} gave {letters:#?}");
    }

    let page = world.done(&["dlq", "show", "upsert-1"])?;
    ensure!(page.contains("invalid_data") && page.contains("zip_code") && page.contains("listing.upsert"), "{page}");
    let unknown = world.cli(&["dlq", "show", "nobody"])?;
    ensure!(unknown.status.code() == Some(1), "{unknown:?}");
    Ok(())
}

#[tokio::test]
async fn a_redrive_sends_what_is_meant_once_and_says_what_it_would_do() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    for id in 1..=3 {
        put_dead(&world, Lane::Events, &upsert(id), &[("reason", &reason("invalid_data", &format!("m-{id}")))]).await?;
    }
    // What a refusal whose delete was lost leaves behind, and a bad one that is not meant.
    put_dead(&world, Lane::Events, &upsert(2), &[("reason", &reason("invalid_data", "m-2"))]).await?;
    put_dead(&world, Lane::Events, "no json", &[("reason", &reason("invalid_json", "m-9"))]).await?;

    for arguments in
        [&["dlq", "redrive"][..], &["dlq", "redrive", "--lane", "events"], &["dlq", "redrive", "--all", "--id", "x"]]
    {
        let output = world.cli(arguments)?;
        ensure!(output.status.code() == Some(64), "{arguments:?}: {output:?}");
    }
    let would = world.done(&["dlq", "redrive", "--reason", "invalid_data", "--dry-run"])?;
    println!("{would}");
    ensure!(would.contains("3 letters would be redriven, 1 duplicate would be deleted, 0 would be left"), "{would}");
    ensure!(dead_depth(&world, Lane::Events).await? == (5, 0) && world.depth(Lane::Events).await? == (0, 0));

    let done = world.done(&["dlq", "redrive", "--reason", "invalid_data", "--rate", "100"])?;
    println!("{done}");
    ensure!(done.contains("3 letters redriven, 1 duplicate deleted, 0 left"), "{done}");
    ensure!(done.matches("a copy of message").count() == 1, "{done}");
    let mut sent = take_all(&world, Lane::Events, "").await?;
    sent.sort();
    let expected: Vec<_> = (1..=3).map(|id| (upsert(id), "1".to_owned())).collect();
    ensure!(sent == expected, "{sent:?}");
    let left = take_all(&world, Lane::Events, "-dlq").await?;
    ensure!(left == [("no json".to_owned(), String::new())], "{left:?}");
    world.check_dead_letters().await
}

#[tokio::test]
async fn what_is_refused_each_time_comes_back_with_its_count_until_the_guard_holds_it() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    let service = world.serve().await?;
    // A slow kind on the common lane, so that the count has to survive the way to its own lane.
    let body = r#"{"specversion":"1.0","id":"bad-1","source":"/t","type":"writeapi.valuations.publish.v1","time":"2026-01-31T02:00:00Z","data":{"run_id":"no-such-run"}}"#;
    world.put(Lane::Events, body).await?;
    wait_for_dead(&world, Lane::PostProcessing, 1).await?;
    let redrives = |world: &World| Ok::<_, anyhow::Error>(listed(world, &[])?[0]["redrives"].as_u64());
    for times in 1..=3 {
        world.done(&["dlq", "redrive", "--id", "bad-1"])?;
        wait_for_dead(&world, Lane::PostProcessing, 1).await?;
        ensure!(redrives(&world)? == Some(times), "after {times} redrives");
        let letter = &listed(&world, &[])?[0];
        ensure!(letter["code"] == "unknown_run" && letter["body"] == body, "{letter}");
    }
    let output = world.cli(&["dlq", "redrive", "--id", "bad-1"])?;
    ensure!(output.status.code() == Some(1) && text(&output.stdout).contains("redriven 3 times"), "{output:?}");
    ensure!(redrives(&world)? == Some(3) && dead_depth(&world, Lane::PostProcessing).await? == (1, 0));
    world.done(&["dlq", "redrive", "--id", "bad-1", "--force"])?;
    wait_for_dead(&world, Lane::PostProcessing, 1).await?;
    ensure!(redrives(&world)? == Some(4), "forced");

    // Forwarded from the common lane, it keeps its count.
    ensure!(take_all(&world, Lane::PostProcessing, "-dlq").await?.len() == 1);
    put_dead(&world, Lane::Events, body, &[("redrives", "1")]).await?;
    world.done(&["dlq", "redrive", "--lane", "events", "--all"])?;
    wait_for_dead(&world, Lane::PostProcessing, 1).await?;
    ensure!(redrives(&world)? == Some(2), "the forward lost the count");
    world.finish(service).await
}

/// A redrive that tells each letter on a pipe.
fn start_redrive(world: &World, options: &[&str]) -> Result<(Child, impl Iterator<Item = std::io::Result<String>>)> {
    let mut child = world.command().args(["dlq", "redrive"]).args(options).stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(child.stdout.take().context("a pipe")?).lines();
    Ok((child, lines))
}

#[tokio::test]
async fn a_redrive_killed_at_any_moment_loses_no_letter() -> Result<()> {
    const LETTERS: i64 = 300;
    const KILLS: [usize; 4] = [1, 60, 40, 90];
    let world = World::new(Behaviour::default()).await?;
    for id in 1..=LETTERS {
        put_dead(&world, Lane::Events, &upsert(id), &[("reason", &reason("invalid_data", &format!("m-{id}")))]).await?;
    }
    for lines_before in KILLS {
        let (mut child, mut lines) = start_redrive(&world, &["--all", "--rate", "1000"])?;
        let told: Vec<String> = lines.by_ref().take(lines_before).collect::<Result<_, _>>()?;
        ensure!(told.len() == lines_before && told.iter().all(|line| line.starts_with("redriven")), "{told:?}");
        child.kill()?;
        child.wait()?;
        let (visible, hidden) = dead_depth(&world, Lane::Events).await?;
        ensure!(visible + hidden > 0, "killed too late to prove anything");
        until("the letters that the killed redrive held", SOON, async || {
            Ok((dead_depth(&world, Lane::Events).await?.1 == 0).then_some(()))
        })
        .await?;
    }
    let done = world.done(&["dlq", "redrive", "--all", "--rate", "1000"])?;
    ensure!(done.contains(" 0 left"), "{done}");
    ensure!(take_all(&world, Lane::Events, "-dlq").await?.is_empty());
    let sent = take_all(&world, Lane::Events, "").await?;
    let distinct: BTreeSet<&str> = sent.iter().map(|(body, _)| body.as_str()).collect();
    let expected: BTreeSet<String> = (1..=LETTERS).map(upsert).collect();
    ensure!(distinct == expected.iter().map(String::as_str).collect(), "{} of {LETTERS} arrived", distinct.len());
    let repeats = sent.len() - distinct.len();
    println!("{} kills, {LETTERS} letters, {repeats} sent twice", KILLS.len());
    ensure!(repeats <= KILLS.len(), "{repeats} sent twice by {} kills", KILLS.len());
    world.check_dead_letters().await
}

#[tokio::test]
async fn an_interrupted_redrive_gives_back_what_it_has_not_sent() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    world.set("queue.visibility_timeout", "60s");
    for id in 1..=20 {
        put_dead(&world, Lane::Events, &upsert(id), &[]).await?;
    }
    let (mut child, mut lines) = start_redrive(&world, &["--all", "--rate", "2"])?;
    lines.next().context("a first letter")??;
    signal(&child, libc::SIGINT);
    let status = child.wait()?;
    ensure!(status.code() == Some(1), "{status}");
    let (visible, hidden) = dead_depth(&world, Lane::Events).await?;
    let (sent, _) = world.depth(Lane::Events).await?;
    ensure!(
        hidden == 0 && visible + sent == 20 && (1..20).contains(&sent),
        "{visible} visible, {hidden} hidden, {sent} sent"
    );
    take_all(&world, Lane::Events, "").await?;
    Ok(())
}

#[tokio::test]
async fn a_discard_wants_a_yes_and_deletes_what_is_meant() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    put_dead(&world, Lane::Events, "no json", &[("reason", &reason("invalid_json", "m-1"))]).await?;
    put_dead(&world, Lane::Valuations, "no json either", &[("reason", &reason("invalid_json", "m-2"))]).await?;
    put_dead(&world, Lane::Events, &upsert(1), &[("reason", &reason("invalid_data", "m-3"))]).await?;
    for arguments in [
        &["dlq", "discard", "--reason", "invalid_json"][..],
        &["dlq", "discard", "--yes"],
        &["dlq", "discard", "--lane", "events", "--yes"],
        &["dlq", "discard", "--reason", "invalid_json", "--yes", "--dry-run"],
    ] {
        let output = world.cli(arguments)?;
        ensure!(output.status.code() == Some(64), "{arguments:?}: {output:?}");
    }
    let would = world.done(&["dlq", "discard", "--reason", "invalid_json", "--dry-run"])?;
    ensure!(would.contains("2 letters would be discarded"), "{would}");
    ensure!(dead_depth(&world, Lane::Events).await? == (2, 0) && dead_depth(&world, Lane::Valuations).await? == (1, 0));
    let done = world.done(&["dlq", "discard", "--reason", "invalid_json", "--yes"])?;
    println!("{done}");
    ensure!(done.contains("2 letters discarded"), "{done}");
    let left = take_all(&world, Lane::Events, "-dlq").await?;
    ensure!(left.len() == 1 && left[0].0 == upsert(1), "{left:?}");
    for lane in LANES {
        ensure!(dead_depth(&world, lane).await? == (0, 0) && world.depth(lane).await? == (0, 0), "{lane:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_redriven_quarantined_run_goes_on_where_it_was() -> Result<()> {
    const LISTINGS: i64 = 300;
    let mut world = World::new(Behaviour { latency_ms: 300, ..Behaviour::default() }).await?;
    world.expect_dead_letters();
    world.set("partner.in_flight", 20).set("refresh.page_size", 20);
    world.listings(LISTINGS).await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued > 0).await?;
    service.kill().await?;
    // As the quarantine leaves it: the run closed, its message in the dead-letter queue.
    take_when_visible(&world, Lane::Valuations).await?;
    world.sql("UPDATE runs SET state = 'failed', owner = NULL, lease_until = NULL").await?;
    let (source, data): (String, String) =
        sqlx::query_as("SELECT event_source, event_data FROM runs").fetch_one(&world.database).await?;
    let event = |data: &str| {
        format!(
            r#"{{"specversion":"1.0","id":"{id}","source":"{source}","type":"writeapi.valuations.refresh.v1","time":"2026-01-31T02:00:00Z","data":{data}}}"#
        )
    };
    // Another event with the run's id is none of the run's.
    put_dead(&world, Lane::Valuations, &event(r#"{"limit":1}"#), &[("reason", &reason("id_reused", "m-0"))]).await?;
    put_dead(&world, Lane::Valuations, &event(&data), &[("reason", &reason("quarantined", "m-1"))]).await?;
    world.partner.control(|behaviour| behaviour.latency_ms = 0)?;

    let would = world.done(&["dlq", "redrive", "--reason", "quarantined", "--dry-run"])?;
    ensure!(would.contains("its quarantined run would go on"), "{would}");
    ensure!(world.run(&id).await?.context("a run")?.state == "failed", "a dry run changed the run");
    let other = world.done(&["dlq", "redrive", "--reason", "id_reused"])?;
    ensure!(!other.contains("goes on") && world.run(&id).await?.context("a run")?.state == "failed", "{other}");
    take_when_visible(&world, Lane::Valuations).await?;
    let done = world.done(&["dlq", "redrive", "--reason", "quarantined"])?;
    println!("{done}");
    ensure!(done.contains("its quarantined run goes on"), "{done}");

    let service = world.serve().await?;
    world.published(&id, LONG).await?;
    world.check_run(&id, &world.homes(LISTINGS).await?).await?;
    world.finish(service).await
}

/// Takes the one message of a lane, as soon as it is visible.
async fn take_when_visible(world: &World, lane: Lane) -> Result<()> {
    until("a message", SOON, async || Ok((!take_all(world, lane, "").await?.is_empty()).then_some(()))).await
}

/// A proxy before SQS, which the program uses from now on. The world's own client goes past it.
async fn proxy(world: &mut World) -> Result<SqsProxy> {
    let proxy = SqsProxy::start(local_stack::shared().await?.sqs().endpoint())?;
    world.set("aws.endpoint_url", proxy.endpoint());
    Ok(proxy)
}

/// Puts many letters into a lane's dead-letter queue, in batches.
async fn put_many(world: &World, lane: Lane, letters: i64) -> Result<()> {
    let url = url(world, lane, "-dlq").await?;
    for first in (1..=letters).step_by(10) {
        let mut request = world.sqs.send_message_batch().queue_url(&url);
        for id in first..(first + 10).min(letters + 1) {
            let entry = SendMessageBatchRequestEntry::builder().id(id.to_string()).message_body(upsert(id)).build()?;
            request = request.entries(entry);
        }
        let output = request.send().await?;
        ensure!(output.failed.is_empty(), "{:?}", output.failed);
    }
    Ok(())
}

#[tokio::test]
async fn a_list_of_thousands_ends_though_calls_are_slow_and_at_once_when_interrupted() -> Result<()> {
    const LETTERS: i64 = 5_000;
    let mut world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    world.set("queue.visibility_timeout", "60s");
    put_many(&world, Lane::Events, LETTERS).await?;
    let proxy = proxy(&mut world).await?;
    proxy.order(SqsFault::LateReceiveAnswer(100), u64::MAX);
    proxy.order(SqsFault::ExtensionSlow(100), u64::MAX);
    let list = || world.command().args(["dlq", "list", "--lane", "events", "--json"]).stdout(Stdio::piped()).spawn();

    let child = list()?;
    until("letters on their way", LONG, async || Ok((dead_depth(&world, Lane::Events).await?.1 > 2_500).then_some(())))
        .await?;
    let begun = Instant::now();
    signal(&child, libc::SIGINT);
    let output = child.wait_with_output()?;
    let took = begun.elapsed();
    ensure!(output.status.code() == Some(1), "{:?}: {}", output.status, text(&output.stderr));
    ensure!(took < Duration::from_secs(4), "{took:?} from the signal to the end");
    let told = text(&output.stdout);
    let last: Value = serde_json::from_str(told.lines().last().unwrap_or_default())?;
    ensure!(last["partial"].to_string().contains("interrupted"), "{last}");
    ensure!(told.lines().count() > 2_000, "what was read is told: {} lines", told.lines().count());
    ensure!(dead_depth(&world, Lane::Events).await? == (LETTERS as u64, 0), "not all was given back");

    let begun = Instant::now();
    let output = list()?.wait_with_output()?;
    println!("{LETTERS} letters: interrupted within {took:?}, listed in {:?}", begun.elapsed());
    ensure!(output.status.success(), "{:?}", output.status);
    ensure!(text(&output.stdout).lines().count() == LETTERS as usize);
    ensure!(dead_depth(&world, Lane::Events).await? == (LETTERS as u64, 0), "not all was given back");
    Ok(())
}

#[tokio::test]
async fn what_somebody_else_has_received_is_told_and_is_no_success() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    for id in 1..=3 {
        put_dead(&world, Lane::Events, &upsert(id), &[]).await?;
    }
    let url = url(&world, Lane::Events, "-dlq").await?;
    let received = world.sqs.receive_message().queue_url(&url).max_number_of_messages(2).visibility_timeout(600);
    let hidden = received.send().await?.messages.unwrap_or_default().len();
    ensure!(hidden == 2, "{hidden}");
    for verb in [&["list"][..], &["list", "--json"], &["discard", "--id", "x", "--yes"], &["redrive", "--id", "x"]] {
        let output = world.cli(&[&["dlq"], verb].concat())?;
        let told = text(&output.stderr);
        ensure!(output.status.code() == Some(1) && told.contains("about 2 more letters"), "{verb:?}: {output:?}");
        ensure!(!verb.contains(&"--json") || text(&output.stdout).contains("\"partial\""), "{output:?}");
    }
    let seen = text(&world.cli(&["dlq", "list", "--json"])?.stdout);
    let seen: Value = serde_json::from_str(seen.lines().next().unwrap_or_default())?;
    let id = seen["event_id"].as_str().context("an id")?;
    let output = world.cli(&["dlq", "show", id])?;
    ensure!(output.status.code() == Some(1) && text(&output.stdout).contains(id), "a copy may be hidden: {output:?}");
    Ok(())
}

#[tokio::test]
async fn copies_in_two_lanes_are_sent_once() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    for lane in [Lane::Events, Lane::Valuations] {
        put_dead(&world, lane, &upsert(1), &[("reason", &reason("invalid_data", "m-1"))]).await?;
    }
    put_dead(&world, Lane::PostProcessing, &upsert(1), &[("reason", &reason("invalid_data", "m-2"))]).await?;
    let output = world.cli(&["dlq", "redrive", "--all"])?;
    let told = text(&output.stdout);
    ensure!(told.contains("1 letter redriven, 1 duplicate deleted, 1 left"), "{told}");
    ensure!(output.status.code() == Some(1), "what may have been refused again is left");
    ensure!(take_all(&world, Lane::Events, "").await?.len() == 1 && world.depth(Lane::Valuations).await? == (0, 0));
    Ok(())
}

#[tokio::test]
async fn a_letter_without_room_for_its_count_is_left_unless_forced() -> Result<()> {
    const LARGEST: usize = 256 * 1024;
    let mut world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    let large = "b".repeat(LARGEST);
    put_dead(&world, Lane::Events, &large, &[]).await?;
    put_dead(&world, Lane::Events, &upsert(1), &[]).await?;
    let proxy = proxy(&mut world).await?;
    proxy.order(SqsFault::SizeLimit(LARGEST), u64::MAX);
    // Nothing would count how often it goes round.
    let output = world.cli(&["dlq", "redrive", "--all"])?;
    let told = text(&output.stdout);
    ensure!(told.contains("--force sends it without its count of redrives"), "{told}");
    ensure!(
        output.status.code() == Some(1) && told.contains("1 letter redriven, 0 duplicates deleted, 1 left"),
        "{told}"
    );
    ensure!(dead_depth(&world, Lane::Events).await? == (1, 0));
    let told = world.done(&["dlq", "redrive", "--all", "--force"])?;
    ensure!(told.contains("without its count of redrives"), "{told}");
    let mut sent = take_all(&world, Lane::Events, "").await?;
    sent.sort();
    ensure!(sent == [(large, String::new()), (upsert(1), "1".to_owned())], "{} came", sent.len());
    ensure!(proxy.hits().get("size-limit") == Some(&2), "{:?}", proxy.hits());
    Ok(())
}

/// Every place between two calls of a redrive: the letter is in one queue, or in both.
#[tokio::test]
async fn a_redrive_killed_between_any_two_calls_loses_nothing() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    world.set("queue.visibility_timeout", "8s");
    let proxy = proxy(&mut world).await?;
    for (place, action, fault, sent, dead) in [
        ("before the send", "SendMessage", SqsFault::Hang, 0, 1),
        ("after the send, its answer lost", "SendMessage", SqsFault::HangAnswer, 1, 1),
        ("after the send", "ChangeMessageVisibilityBatch", SqsFault::Hang, 1, 1),
        ("before the delete", "DeleteMessageBatch", SqsFault::Hang, 1, 1),
        ("after the delete", "DeleteMessageBatch", SqsFault::HangAnswer, 1, 0),
    ] {
        put_dead(&world, Lane::Events, &upsert(1), &[]).await?;
        let before = hits(&proxy, fault);
        proxy.order_in(Scope { action: Some(action.to_owned()), queue: None }, fault, u64::MAX);
        let (mut child, _lines) = start_redrive(&world, &["--lane", "events", "--all"])?;
        until(place, SOON, async || Ok((hits(&proxy, fault) > before).then_some(()))).await?;
        child.kill()?;
        child.wait()?;
        proxy.clear();
        until("the letter that the killed redrive held", SOON, async || {
            Ok((dead_depth(&world, Lane::Events).await?.1 == 0).then_some(()))
        })
        .await?;
        let (there, left) = (world.depth(Lane::Events).await?, dead_depth(&world, Lane::Events).await?);
        ensure!((there, left) == ((sent, 0), (dead, 0)), "killed {place}: {there:?} sent, {left:?} left");
        // The next one ends the work; what is sent twice is absorbed by the event's id.
        world.done(&["dlq", "redrive", "--lane", "events", "--all"])?;
        let came = take_all(&world, Lane::Events, "").await?;
        ensure!(
            came.len() as u64 == sent + dead && came.iter().all(|(body, _)| *body == upsert(1)),
            "{place}: {came:?}"
        );
        ensure!(take_all(&world, Lane::Events, "-dlq").await?.is_empty(), "{place}");
    }
    world.check_dead_letters().await
}

/// Sends a signal to a child that was not waited for.
fn signal(child: &Child, signal: libc::c_int) {
    // SAFETY: the child is ours and was not waited for.
    unsafe { libc::kill(child.id() as libc::pid_t, signal) };
}

/// Waits for a child, and gives how long that took.
fn ended(child: Child) -> Result<(std::process::Output, Duration)> {
    let begun = Instant::now();
    let output = child.wait_with_output()?;
    Ok((output, begun.elapsed()))
}

fn hits(proxy: &SqsProxy, fault: SqsFault) -> u64 {
    proxy.hits().get(fault.name()).copied().unwrap_or(0)
}

#[tokio::test]
async fn an_interrupt_waits_for_no_answer_that_does_not_come_and_a_second_for_none() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    world.set("queue.visibility_timeout", "60s");
    let proxy = proxy(&mut world).await?;
    put_dead(&world, Lane::Events, &upsert(1), &[]).await?;
    let start =
        |arguments: &[&str]| world.command().args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let redrive = ["dlq", "redrive", "--lane", "events", "--all"];

    // A send that hangs.
    proxy.order_in(Scope { action: Some("SendMessage".to_owned()), queue: None }, SqsFault::Hang, u64::MAX);
    let child = start(&redrive)?;
    until("the send", SOON, async || Ok((hits(&proxy, SqsFault::Hang) == 1).then_some(()))).await?;
    signal(&child, libc::SIGINT);
    let (output, took) = ended(child)?;
    println!("a hanging send: {took:?}");
    let told = text(&output.stderr);
    ensure!(output.status.code() == Some(1) && took < Duration::from_secs(3), "{took:?}: {output:?}");
    ensure!(told.contains("interrupted") && told.contains("still here, and may have been sent"), "{told}");
    ensure!(dead_depth(&world, Lane::Events).await? == (1, 0), "not given back");
    proxy.clear();

    // A receive that hangs.
    proxy.order(SqsFault::HungReceive, u64::MAX);
    let child = start(&["dlq", "list", "--lane", "events"])?;
    until("the receive", SOON, async || Ok((hits(&proxy, SqsFault::HungReceive) == 1).then_some(()))).await?;
    signal(&child, libc::SIGTERM);
    let (output, took) = ended(child)?;
    println!("a hanging receive: {took:?}");
    ensure!(output.status.code() == Some(1) && took < Duration::from_secs(3), "{took:?}: {output:?}");
    proxy.clear();

    // The rate: one was sent, and the next is a second away.
    put_dead(&world, Lane::Events, &upsert(2), &[]).await?;
    put_dead(&world, Lane::Events, &upsert(3), &[]).await?;
    let (child, mut lines) = start_redrive(&world, &["--lane", "events", "--all", "--rate", "1"])?;
    lines.next().context("a first letter")??;
    signal(&child, libc::SIGINT);
    let (output, took) = ended(child)?;
    println!("between two sends: {took:?}");
    ensure!(output.status.code() == Some(1) && took < Duration::from_millis(900), "{took:?}: {output:?}");
    ensure!(dead_depth(&world, Lane::Events).await? == (2, 0), "not given back");

    // Giving back hangs as well: whoever asks twice does not wait for it.
    proxy.order_in(Scope { action: Some("SendMessage".to_owned()), queue: None }, SqsFault::Hang, u64::MAX);
    let change = Scope { action: Some("ChangeMessageVisibilityBatch".to_owned()), queue: None };
    let before = hits(&proxy, SqsFault::Hang);
    let child = start(&redrive)?;
    until("the send", SOON, async || Ok((hits(&proxy, SqsFault::Hang) > before).then_some(()))).await?;
    proxy.order_in(change, SqsFault::Hang, u64::MAX);
    signal(&child, libc::SIGINT);
    until("the giving back", SOON, async || Ok((hits(&proxy, SqsFault::Hang) > before + 1).then_some(()))).await?;
    signal(&child, libc::SIGINT);
    let (output, took) = ended(child)?;
    println!("a second interrupt: {took:?}");
    let told = text(&output.stderr);
    ensure!(output.status.code() == Some(1) && told.contains("ended at once"), "{took:?}: {output:?}");
    ensure!(took < Duration::from_millis(900), "{took:?}");
    take_all(&world, Lane::Events, "").await?;
    Ok(())
}

/// What a verb says at its end that cannot do its work: one line.
fn complaint(world: &World, arguments: &[&str]) -> Result<String> {
    let output = world.cli(arguments)?;
    let told = text(&output.stderr);
    let lines: Vec<&str> = told.lines().filter(|line| !line.starts_with('{')).collect();
    ensure!(output.status.code() == Some(1) && lines.len() == 1, "{arguments:?}: {output:?}");
    ensure!(lines[0].starts_with("write-api: "), "{told}");
    Ok(lines[0].to_owned())
}

#[tokio::test]
async fn a_neighbour_that_is_away_is_named_in_one_line_with_what_to_do() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    put_dead(&world, Lane::Events, &upsert(1), &[]).await?;
    let verbs = [&["list"][..], &["show", "x"], &["redrive", "--all"], &["discard", "--all", "--yes"]];
    let proxy = proxy(&mut world).await?;
    for action in ["GetQueueUrl", "ReceiveMessage"] {
        proxy.order_in(Scope { action: Some(action.to_owned()), queue: None }, SqsFault::Down, u64::MAX);
        for verb in verbs {
            let told = complaint(&world, &[&["dlq"], verb].concat())?;
            println!("{told}");
            for part in
                [&format!("SQS {action} on "), "-dlq failed", &proxy.endpoint(), "aws.region", "`write-api check`"]
            {
                ensure!(told.contains(part), "no {part:?}: {told}");
            }
        }
        proxy.clear();
    }
    // In the middle of the work: what was sent is told.
    proxy.order_in(
        Scope { action: Some("SendMessage".to_owned()), queue: None },
        SqsFault::ExpiredCredentials,
        u64::MAX,
    );
    let told = complaint(&world, &["dlq", "redrive", "--all"])?;
    println!("{told}");
    ensure!(told.contains("stopped after 0 letters") && told.contains("was not sent and is still here"), "{told}");
    ensure!(told.contains("expired") && told.contains("the credentials"), "{told}");
    proxy.clear();

    let database = world.environment().database_url().to_owned();
    let nobody = format!("127.0.0.1:{}", local_stack::free_port()?);
    world.set("database.url", format!("postgres://app@{nobody}/app"));
    for verb in [&["dlq", "redrive", "--all"][..], &["dlq", "redrive", "--all", "--dry-run"], &["audit"]] {
        let told = complaint(&world, verb)?;
        println!("{told}");
        for part in ["Postgres", &nobody, "refused", "database.url", "`write-api check`"] {
            ensure!(told.contains(part), "no {part:?}: {told}");
        }
    }
    ensure!(dead_depth(&world, Lane::Events).await? == (1, 0), "a letter is gone or hidden");
    world.set("database.url", database);

    world.set("lanes.events.queue", "no-such-queue");
    let told = complaint(&world, &["dlq", "list"])?;
    println!("{told}");
    ensure!(told.contains("no-such-queue-dlq") && told.contains("`write-api setup`"), "{told}");
    Ok(())
}

#[tokio::test]
async fn what_others_wrote_is_shown_and_does_not_steer_the_terminal() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    // SQS takes all of these in bodies and attributes.
    let hostile = "\u{9b}31mred\u{202e}\u{61c}\u{2028}\u{7f}\rover";
    put_dead(&world, Lane::Events, &format!("no json {hostile}\tend\nline"), &[("reason", &reason(hostile, hostile))])
        .await?;
    put_dead(&world, Lane::Events, &upsert(1).replace("upsert-1", hostile), &[("reason", hostile)]).await?;
    let id = listed(&world, &["--kind", "unknown"])?[0]["message_id"].as_str().context("an id")?.to_owned();
    for arguments in [&["list"][..], &["show", &id], &["show", hostile], &["redrive", "--all", "--dry-run"]] {
        let told = world.done(&[&["dlq"], arguments].concat())?;
        let harmful: Vec<char> = told
            .chars()
            .filter(|c| c.is_control() && !"\n\t".contains(*c) || "\u{202e}\u{61c}\u{2028}".contains(*c))
            .collect();
        ensure!(harmful.is_empty(), "{arguments:?} printed {harmful:?}:\n{told}");
        ensure!(told.contains("\\u{9b}31mred\\u{202e}\\u{61c}\\u{2028}\\u{7f}\\rover"), "{told}");
    }
    Ok(())
}

#[tokio::test]
async fn a_limit_is_one_for_all_lanes() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    for (id, lane) in (1..).zip([Lane::Events, Lane::Events, Lane::Valuations, Lane::Valuations, Lane::PostProcessing])
    {
        put_dead(&world, lane, &upsert(id), &[]).await?;
    }
    ensure!(listed(&world, &["--limit", "3"])?.len() == 3);
    let told = world.done(&["dlq", "discard", "--all", "--dry-run", "--limit", "3"])?;
    ensure!(told.contains("3 letters would be discarded"), "{told}");
    let told = world.done(&["dlq", "redrive", "--all", "--limit", "3"])?;
    ensure!(told.contains("3 letters redriven, 0 duplicates deleted, 0 left"), "{told}");
    ensure!(listed(&world, &[])?.len() == 2, "more were taken");
    for lane in LANES {
        take_all(&world, lane, "").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_letter_that_was_sent_and_not_deleted_is_told_as_that() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    for id in 1..=2 {
        put_dead(&world, Lane::Events, &upsert(id), &[]).await?;
    }
    let proxy = proxy(&mut world).await?;
    let scope = Scope { action: Some("DeleteMessageBatch".to_owned()), queue: None };
    proxy.order_in(scope, SqsFault::PartialBatchFailure, 1);
    let output = world.cli(&["dlq", "redrive", "--all"])?;
    let told = text(&output.stdout);
    ensure!(told.matches("redriven, not deleted").count() == 1 && told.contains("2 letters redriven"), "{told}");
    ensure!(output.status.code() == Some(1), "{output:?}");
    Ok(())
}

#[tokio::test]
async fn a_letter_that_another_received_while_it_was_sent_is_told_as_that() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    put_dead(&world, Lane::Events, &upsert(1), &[]).await?;
    let proxy = proxy(&mut world).await?;
    // SQS says that a delete by an old receipt was done, and does nothing.
    proxy.order(SqsFault::StaleReceipt, u64::MAX);
    let output = world.cli(&["dlq", "redrive", "--all"])?;
    let told = text(&output.stdout);
    ensure!(told.contains("redriven, not deleted") && told.contains("somebody else has it"), "{told}");
    ensure!(output.status.code() == Some(1), "{output:?}");
    ensure!(take_all(&world, Lane::Events, "").await?.len() == 1, "it was sent");
    Ok(())
}

#[tokio::test]
async fn a_letter_of_which_sqs_does_not_say_whose_it_is_is_left() -> Result<()> {
    const LETTERS: i64 = 6;
    let mut world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    world.set("queue.visibility_timeout", "2s");
    put_many(&world, Lane::Events, LETTERS).await?;
    let proxy = proxy(&mut world).await?;
    proxy.order(SqsFault::ExtensionFails, u64::MAX);
    // The rate outlasts the time for which letters are hidden, and no extension is carried out.
    let output = world.cli(&["dlq", "redrive", "--all", "--rate", "1"])?;
    let told = text(&output.stdout);
    let (sent, left) = (told.matches("redriven  events").count(), told.matches("left  events").count());
    ensure!(sent > 0 && left > 0 && sent + left == LETTERS as usize, "{told}");
    ensure!(told.matches("SQS did not say whether somebody else has it").count() == left, "{told}");
    ensure!(output.status.code() == Some(1), "{output:?}");
    ensure!(take_all(&world, Lane::Events, "").await?.len() == sent, "{told}");
    Ok(())
}
