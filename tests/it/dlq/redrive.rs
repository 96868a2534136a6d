//! What is sent again, and what is told of what is not.

use anyhow::{Context, Result, ensure};
use local_stack::{Behaviour, Scope, SqsFault};

use super::{
    dead_depth, listed, proxy, put_dead, put_many, reason, take_all, take_when_visible, upsert, wait_for_dead,
};
use crate::harness::{LONG, Lane, SOON, World, text};

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
