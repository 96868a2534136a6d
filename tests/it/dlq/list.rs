//! What a list shows of dead letters, and that it leaves them as they are.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aws_sdk_sqs::types::QueueAttributeName;
use local_stack::{Behaviour, SqsFault};
use serde_json::{Value, json};

use super::{
    codes, dead_depth, listed, proxy, put_dead, put_many, reason, signal, take_all, upsert, url, wait_for_dead,
};
use crate::harness::{LANES, LONG, Lane, SOON, World, text, until};

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
