//! Processes that are killed or interrupted, and neighbours that are away: no letter is lost.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use local_stack::{Behaviour, Scope, SqsFault};

use super::{complaint, dead_depth, ended, hits, proxy, put_dead, reason, signal, start_redrive, take_all, upsert};
use crate::harness::{Lane, SOON, World, text, until};

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
