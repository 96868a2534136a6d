//! What an operator does with runs: looks at them, ends them, lets them go on. The cancel is exact: a run is complete or
//! cancelled, never both, and has post-processing only if it is complete.

use std::fs::File;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use local_stack::kafka::Order;
use local_stack::partner::RequiredHeader;
use local_stack::{Behaviour, Kafka};
use serde_json::Value;

use crate::harness::{LONG, Lane, SOON, Service, VISIBILITY, World, text, until};

const SECOND: Duration = Duration::from_secs(1);

/// Calls in flight and rows of a batch, where repeats are counted.
const IN_FLIGHT: u64 = 50;
const BATCH: u64 = 100;

/// A world whose runs last long enough to be met at work.
async fn slow_world(services: u32, latency_ms: u64) -> Result<World> {
    let mut world = World::for_services(services, Behaviour { latency_ms, ..Behaviour::default() }).await?;
    world.set("partner.in_flight", IN_FLIGHT).set("partner.rate_per_second", 0).set("refresh.page_size", BATCH);
    Ok(world)
}

/// Runs a verb that must end with code 1, and gives what it said.
fn refused(world: &World, arguments: &[&str]) -> Result<String> {
    let output = world.cli(arguments)?;
    ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{arguments:?}: {output:?}");
    Ok(text(&output.stderr))
}

/// The status of a run as a program reads it.
fn status(world: &World, id: &str) -> Result<Value> {
    serde_json::from_str(&world.done(&["status", id, "--json"])?).context("not JSON")
}

/// The status for people; every line fits.
fn shown(world: &World, arguments: &[&str]) -> Result<String> {
    let shown = world.done(arguments)?;
    let widest = shown.lines().map(|line| line.chars().count()).max().unwrap_or_default();
    ensure!(widest <= 80, "{widest} columns:\n{shown}");
    Ok(shown)
}

/// How many refresh events ended so.
async fn outcomes(service: &Service, outcome: &str) -> Result<f64> {
    service.metric(&format!(r#"write_api_events_total{{kind="valuations.refresh",outcome="{outcome}"}}"#)).await
}

/// Checks that a cancelled run is just that: nobody has it, its counts are its rows, nothing follows from it.
async fn check_cancelled(world: &World, id: &str) -> Result<()> {
    let run = world.run(id).await?.context("no run")?;
    ensure!(run.state == "cancelled" && !run.owned && !run.leased, "{run:?}");
    let rows = format!("SELECT count(*) FROM valuations WHERE run_id = '{id}'");
    ensure!(world.number(&rows).await? == run.valued + run.failed, "{run:?}");
    let announced = format!("SELECT count(*) FROM outbox WHERE lane = 'post_processing' AND body LIKE '%{id}%'");
    ensure!(world.number(&announced).await? == 0, "a cancelled run has post-processing");
    ensure!(world.passed_without_result(id).await? == 0, "the cursor is ahead of the results");
    Ok(())
}

#[tokio::test]
async fn a_cancel_reaches_the_work_and_keeps_the_answers_that_are_out() -> Result<()> {
    const LISTINGS: i64 = 2_000;
    let mut world = slow_world(1, 2_000).await?;
    // As in production: leases are renewed far too seldom to carry the news.
    world.set("queue.visibility_timeout", "60s");
    world.listings(LISTINGS).await?;
    let tap = world.environment().tap()?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued > 0).await?;

    let begin = Instant::now();
    let said = world.done(&["cancel", &id])?;
    let took = begin.elapsed();
    println!("cancelled after {took:?} with a partner that answers in 2 s");
    ensure!(took <= 6 * SECOND, "it took {took:?}");
    check_cancelled(&world, &id).await?;
    let stats = world.partner.stats();
    let run = world.run(&id).await?.context("no run")?;
    ensure!(run.valued as u64 == stats.requests && stats.abandoned == 0, "answers were lost: {run:?}, {stats:?}");
    ensure!(run.valued < LISTINGS && said.contains(&format!("{} of 2,000", run.valued)), "{run:?}: {said}");

    // The message is deleted, and the end is told once and rightly.
    world.quiet(SOON).await?;
    ensure!(outcomes(&service, "cancelled").await? == 1.0 && outcomes(&service, "lost").await? == 0.0);
    let log = service.log()?;
    let line = log.lines().find(|line| line.contains("event cancelled")).context("no line in the log")?;
    let line: Value = serde_json::from_str(line)?;
    ensure!(line["rows"] == run.valued && line["outcome"] == "cancelled" && line["level"] == "INFO", "{line}");

    // Once more is fine, and the same event again changes nothing.
    ensure!(world.done(&["cancel", &id])?.contains("is cancelled"));
    let again = world.refresh(&["--id", &id])?;
    ensure!(again == id);
    world.run_until(&id, SOON, |run| run.state == "cancelled").await?;
    until("the repeat to be acknowledged", SOON, async || Ok((outcomes(&service, "done").await? == 1.0).then_some(())))
        .await?;
    ensure!(service.log()?.contains("the run is cancelled and is left as it is"), "nobody is told");
    ensure!(world.partner.stats().requests == stats.requests, "a cancelled run made calls");

    world.partner.control(|behaviour| behaviour.latency_ms = 0)?;
    world.done(&["retry", &id])?;
    world.published(&id, LONG).await?;
    let homes = world.homes(LISTINGS).await?;
    world.check_run(&id, &homes).await?;
    world.check_records(&tap, &id, &homes).await?;
    let stats = world.partner.stats();
    ensure!(stats.requests == LISTINGS as u64 && stats.repeated_requests == 0, "{stats:?}");
    world.finish(service).await
}

#[tokio::test]
async fn a_partner_that_never_answers_cannot_hold_up_a_cancel() -> Result<()> {
    let mut world = slow_world(1, 0).await?;
    world.set("queue.visibility_timeout", "60s");
    world.set("partner.request_timeout", "2m").set("partner.total_timeout", "20m");
    world.listings(500).await?;
    let service = world.serve().await?;
    world.partner.control(|behaviour| behaviour.hang_ratio = 1.0)?;
    let id = world.refresh(&[])?;
    until("calls", SOON, async || Ok((world.partner.stats().requests >= IN_FLIGHT).then_some(()))).await?;
    let begin = Instant::now();
    world.done(&["cancel", &id])?;
    let took = begin.elapsed();
    println!("cancelled after {took:?} with a partner that never answers");
    ensure!(took <= 10 * SECOND, "it took {took:?}");
    check_cancelled(&world, &id).await?;
    until("no call out", SOON, async || Ok((world.partner.stats().in_flight == 0).then_some(()))).await?;
    ensure!(world.partner.stats().requests == IN_FLIGHT, "{:?}", world.partner.stats());
    world.quiet(SOON).await?;

    world.partner.control(|behaviour| behaviour.hang_ratio = 0.0)?;
    world.done(&["retry", &id])?;
    world.published(&id, LONG).await?;
    world.check_run(&id, &world.homes(500).await?).await?;
    ensure!(world.partner.stats().repeated_requests <= IN_FLIGHT, "{:?}", world.partner.stats());
    world.finish(service).await
}

#[tokio::test]
async fn an_open_breaker_cannot_hold_up_a_cancel() -> Result<()> {
    let mut world = slow_world(1, 10).await?;
    world.set("queue.visibility_timeout", "60s");
    world.listings(300).await?;
    let required = RequiredHeader { name: "x-api-key".to_owned(), value: "nobody has it".to_owned() };
    world.partner.control(|behaviour| behaviour.required_header = Some(required))?;
    let service = world.serve().await?;
    service.expect_errors();
    let id = world.refresh(&[])?;
    let open = async || service.metric("write_api_partner_breaker_open").await;
    until("an open breaker", SOON, async || Ok((open().await? == 1.0).then_some(()))).await?;
    let begin = Instant::now();
    world.done(&["cancel", &id])?;
    let took = begin.elapsed();
    println!("cancelled after {took:?} with an open breaker");
    // Nothing is out, so nothing is waited for.
    ensure!(took <= 4 * SECOND, "it took {took:?}");
    check_cancelled(&world, &id).await?;
    world.quiet(SOON).await?;
    world.finish(service).await
}

/// At a slow pace most listings that were begun wait for their turn. They are not sent, and not waited for.
#[tokio::test]
async fn a_cancelled_run_sends_nothing_that_waits_for_its_turn() -> Result<()> {
    const LISTINGS: i64 = 1_000;
    let mut world = slow_world(1, 10).await?;
    world.set("queue.visibility_timeout", "60s");
    world.set("partner.in_flight", 600).set("partner.rate_per_second", 60);
    // SQS hides what a parked poll of a stopped service would have brought: polls end soon here.
    world.set("queue.wait_time", "1s");
    world.listings(LISTINGS).await?;
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 60).await?;
    let begin = Instant::now();
    world.done(&["cancel", &id])?;
    let took = begin.elapsed();
    println!("cancelled after {took:?} with 500 listings that wait for their turn");
    ensure!(took <= 4 * SECOND, "it took {took:?}");
    check_cancelled(&world, &id).await?;
    let (run, stats) = (world.run(&id).await?.context("no run")?, world.partner.stats());
    ensure!(run.valued as u64 == stats.requests && stats.abandoned == 0, "{run:?}, {stats:?}");
    world.quiet(SOON).await?;
    world.set("partner.rate_per_second", 0);
    service.finish().await?;
    let service = world.serve().await?;
    world.done(&["retry", &id])?;
    world.published(&id, LONG).await?;
    world.check_run(&id, &world.homes(LISTINGS).await?).await?;
    ensure!(world.partner.stats().repeated_requests == 0, "{:?}", world.partner.stats());
    world.finish(service).await
}

/// The owner is dead and its lease is not over: the cancel waits for that, and nobody has to be there.
#[tokio::test]
async fn a_run_whose_owner_was_killed_is_cancelled_and_goes_on_when_retried() -> Result<()> {
    const LISTINGS: i64 = 2_000;
    let world = slow_world(1, 100).await?;
    world.listings(LISTINGS).await?;
    let tap = world.environment().tap()?;
    let first = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 300).await?;
    first.kill().await?;
    let begin = Instant::now();
    let said = world.cli(&["cancel", &id])?;
    let took = begin.elapsed();
    println!("cancelled after {took:?} with a killed owner, visibility timeout {VISIBILITY:?}");
    ensure!(said.status.success() && text(&said.stderr).contains("waiting for its worker"), "{said:?}");
    ensure!(took <= VISIBILITY + SECOND, "it took {took:?}");
    check_cancelled(&world, &id).await?;
    let calls = world.partner.stats().requests;

    // The message that the dead one had is acknowledged when it comes back.
    let second = world.serve().await?;
    world.quiet(SOON).await?;
    ensure!(outcomes(&second, "done").await? == 1.0 && world.partner.stats().requests == calls);
    check_cancelled(&world, &id).await?;

    world.done(&["retry", &id])?;
    world.published(&id, LONG).await?;
    let homes = world.homes(LISTINGS).await?;
    world.check_run(&id, &homes).await?;
    world.check_records(&tap, &id, &homes).await?;
    let stats = world.partner.stats();
    ensure!(stats.effects == LISTINGS as u64 && stats.distinct_keys == stats.effects, "{stats:?}");
    ensure!(stats.repeated_requests <= IN_FLIGHT + BATCH, "{stats:?}");
    world.finish(second).await
}

/// Neither the owner nor the one who asked lives on: the next delivery does what was asked.
#[tokio::test]
async fn a_cancel_survives_the_death_of_all_who_knew_of_it() -> Result<()> {
    let world = slow_world(1, 100).await?;
    world.listings(2_000).await?;
    let first = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 200).await?;
    first.kill().await?;
    let mut asking = world.command().args(["cancel", &id]).stderr(Stdio::piped()).spawn()?;
    until("the request", SOON, async || {
        let requested = "SELECT count(*) FROM runs WHERE cancel_requested_at IS NOT NULL AND state = 'running'";
        Ok((world.number(requested).await? == 1).then_some(()))
    })
    .await?;
    asking.kill()?;
    asking.wait()?;
    ensure!(status(&world, &id)?["phase"] == "cancelling");
    ensure!(refused(&world, &["retry", &id])?.contains("is being cancelled"));
    let calls = world.partner.stats().requests;

    let second = world.serve().await?;
    world.run_until(&id, LONG, |run| run.state == "cancelled").await?;
    world.quiet(SOON).await?;
    check_cancelled(&world, &id).await?;
    ensure!(world.partner.stats().requests == calls, "a cancelled run made calls");
    world.finish(second).await
}

#[tokio::test]
async fn a_run_that_waits_is_cancelled_at_once_and_what_failed_stays_so() -> Result<()> {
    const LISTINGS: i64 = 1_000;
    let world = slow_world(1, 100).await?;
    world.listings(LISTINGS).await?;
    world.partner.control(|behaviour| behaviour.forced = [(1, 404), (2, 422)].into())?;
    let unknown = "an-id-that-nobody-sent";
    for verb in ["cancel", "retry", "status"] {
        ensure!(refused(&world, &[verb, unknown])?.contains("there is no run"), "{verb}");
    }
    let first = world.serve().await?;
    let id = world.refresh(&["--id", "waits"])?;
    world.run_until(&id, SOON, |run| run.valued >= 100 && run.failed == 2).await?;
    ensure!(refused(&world, &["retry", &id])?.contains("send refresh"));
    first.finish().await?;
    ensure!(status(&world, &id)?["phase"] == "waiting");
    ensure!(world.depth(Lane::Valuations).await? == (1, 0));

    let begin = Instant::now();
    let cancelled = world.cli(&["cancel", &id])?;
    ensure!(cancelled.status.success() && cancelled.stderr.is_empty(), "{cancelled:?}");
    ensure!(begin.elapsed() <= 2 * SECOND, "it took {:?}", begin.elapsed());
    check_cancelled(&world, &id).await?;

    // A failed run is treated alike.
    world.sql("UPDATE runs SET state = 'failed', cancelled_at = NULL, cancel_requested_at = NULL").await?;
    ensure!(refused(&world, &["cancel", &id])?.contains("is failed already"));
    ensure!(shown(&world, &["status", &id])?.contains("failed: `write-api retry`"));

    // Retried before its old message came back: there are two then, for one run.
    world.partner.control(|behaviour| behaviour.forced.clear())?;
    world.done(&["retry", &id])?;
    ensure!(refused(&world, &["retry", &id])?.contains("goes on by itself"));
    let second = world.serve().await?;
    world.published(&id, LONG).await?;
    let run = world.run(&id).await?.context("no run")?;
    ensure!((run.selected, run.valued, run.failed) == (LISTINGS, LISTINGS - 2, 2), "{run:?}");
    let stats = world.partner.stats();
    ensure!(stats.requests == LISTINGS as u64 && stats.repeated_requests == 0, "{stats:?}");
    for verb in ["cancel", "retry"] {
        ensure!(refused(&world, &[verb, &id])?.contains("is complete"), "{verb}");
    }
    world.finish(second).await
}

/// Whichever has the row first wins, and the other hears of it.
#[tokio::test]
async fn a_cancel_and_a_completion_exclude_each_other() -> Result<()> {
    let world = slow_world(1, 5).await?;
    world.listings(40).await?;
    // The narrowest moment, made sure of: the request comes when the last batch is in and the run is not yet complete.
    world
        .sql(
            "CREATE FUNCTION cancel_now() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN UPDATE runs SET cancel_requested_at = clock_timestamp()
                        WHERE run_id = new.run_id AND valued = selected; RETURN NULL; END';
             CREATE CONSTRAINT TRIGGER cancel_now AFTER INSERT ON valuations DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW WHEN (new.run_id = 'too-late') EXECUTE FUNCTION cancel_now();",
        )
        .await?;
    let service = world.serve().await?;
    let id = world.refresh(&["--id", "too-late"])?;
    let run = world.run_until(&id, SOON, |run| run.state != "running").await?;
    ensure!(run.valued == 40, "{run:?}");
    check_cancelled(&world, &id).await?;
    world.sql("DROP TRIGGER cancel_now ON valuations").await?;
    world.done(&["retry", &id])?;
    world.published(&id, SOON).await?;
    ensure!(world.partner.stats().requests == 40, "{:?}", world.partner.stats());

    // And as it comes: cancels at all moments of short runs.
    let (mut cancelled, mut complete) = (0, 0);
    for number in 0..20 {
        let id = world.refresh(&["--id", &format!("race-{number}"), "--limit", "5"])?;
        world.partner.control(|behaviour| behaviour.latency_ms = number * 10)?;
        world.run_until(&id, SOON, |run| run.attempts == 1).await?;
        let cancel = world.cli(&["cancel", &id])?;
        let run = world.run(&id).await?.context("no run")?;
        match cancel.status.code() {
            Some(0) => {
                cancelled += 1;
                check_cancelled(&world, &id).await?;
            }
            Some(1) => {
                complete += 1;
                ensure!(run.state == "complete" && text(&cancel.stderr).contains("is complete"), "{run:?}: {cancel:?}");
            }
            _ => anyhow::bail!("{cancel:?}"),
        }
    }
    println!("{cancelled} cancelled, {complete} complete");
    world.quiet(LONG).await?;
    let runs = "SELECT count(*) FROM runs WHERE state = 'complete'";
    let announced = "SELECT count(*) FROM outbox WHERE lane = 'post_processing'";
    ensure!(world.number(runs).await? == world.number(announced).await?);
    ensure!(outcomes(&service, "lost").await? == 0.0);
    world.finish(service).await
}

/// The event sent again is the event that came, whatever wrapped it and however it was written.
#[tokio::test]
async fn a_retry_sends_the_very_event_that_opened_the_run() -> Result<()> {
    const DATA: &str = r#"{ "limit" : 30,"zip_codes": [98003, 98001,98003] }"#;
    let world = slow_world(1, 1_000).await?;
    world.listings(200).await?;
    let service = world.serve().await?;
    let event = format!(
        r#"{{"specversion":"1.0","id":"odd \"one\"","source":"/büro","type":"writeapi.valuations.refresh.v1","time":"2026-01-31T03:00:00+01:00","traceparent":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01","data":{DATA}}}"#
    );
    let notification = serde_json::json!({"Type": "Notification", "MessageId": "1", "Message": event});
    world.put(Lane::Events, &notification.to_string()).await?;
    let id = r#"odd "one""#;
    world.run_until(id, SOON, |run| run.owned).await?;
    world.done(&["cancel", id])?;
    world.partner.control(|behaviour| behaviour.latency_ms = 0)?;
    world.done(&["retry", id])?;
    world.published(id, LONG).await?;
    let body: String =
        sqlx::query_scalar("SELECT body FROM outbox WHERE lane = 'valuations'").fetch_one(&world.database).await?;
    ensure!(body.contains(&format!(r#""data":{DATA}"#)), "{body}");
    let (before, after): (Value, Value) = (serde_json::from_str(&event)?, serde_json::from_str(&body)?);
    for field in ["id", "source", "type", "traceparent", "data"] {
        ensure!(before[field] == after[field], "{field}: {body}");
    }
    ensure!(after["time"] == "2026-01-31T02:00:00Z", "{body}");
    ensure!(world.run(id).await?.is_some_and(|run| run.valued == 30 && run.attempts == 2));
    world.finish(service).await
}

#[tokio::test]
async fn the_status_is_right_at_each_state() -> Result<()> {
    const LISTINGS: i64 = 3_000;
    const ID: &str = "night-0193d0c8-5a1e-7c44-9b9e-3f1f2a9d7c55-of-a-producer-that-likes-long-ids-very-much-2026";
    let mut world = slow_world(1, 200).await?;
    // A partner that is silent for a while is no fault here.
    world.set("partner.request_timeout", "2m").set("partner.total_timeout", "20m");
    world.listings(LISTINGS).await?;
    ensure!(shown(&world, &["status"])? == "no run was opened yet" && world.done(&["status", "--json"])? == "[]");
    world.partner.control(|behaviour| behaviour.forced = [(3, 410)].into())?;

    let service = world.serve().await?;
    let id = world.refresh(&["--id", ID])?;
    // Running: figures agree with each other and with the table they are made from.
    let running = until("a rate", SOON, async || {
        let known = world.run(&id).await?.is_some();
        let status = if known { status(&world, &id)? } else { Value::Null };
        Ok(status["rate_rows_per_second"].as_f64().is_some_and(|rate| rate > 0.0).then_some(status))
    })
    .await?;
    let number = |name: &str| running[name].as_f64().with_context(|| format!("{name} in {running}"));
    ensure!(running["state"] == "running" && running["phase"] == "running" && running["attempts"] == 1, "{running}");
    ensure!(number("selected")? == 3_000.0 && number("done")? + number("left")? == 3_000.0, "{running}");
    ensure!(number("valued")? + number("failed")? == number("done")?, "{running}");
    let rate = number("rate_rows_per_second")?;
    let rows = rate * number("rate_window_seconds")?;
    ensure!((rows - number("done")?).abs() < 0.5, "one attempt, younger than 15 s: all its rows count: {running}");
    ensure!((number("eta_seconds")? - number("left")? / rate).abs() < 0.5, "{running}");
    let lease = number("lease_left_seconds")?;
    ensure!(lease > 0.0 && lease <= 4.0 && running["owner"].is_string(), "{running}");
    ensure!(running["publication"].is_null() && running["ended_at"].is_null(), "{running}");
    let page = shown(&world, &["status", &id])?;
    for entry in
        ["state        running", "3,000 selected", "rows/s over the last", "eta", "its lease ends in", "none before"]
    {
        ensure!(page.contains(entry), "{entry:?} is not in\n{page}");
    }

    // The stretch that the rate covers moves on: its next beginning becomes its beginning, with the rows of that moment.
    let aged = "UPDATE runs SET rate_since = rate_since - interval '1 hour',
                                next_rate_since = next_rate_since - interval '20 s'";
    for _ in 0..2 {
        let next_rows = world.number("SELECT next_rate_since_rows FROM runs").await? as f64;
        world.sql(aged).await?;
        let moved = until("a later beginning", SOON, async || {
            let now = status(&world, &id)?;
            Ok(now["rate_window_seconds"].as_f64().is_some_and(|seconds| seconds < 60.0).then_some(now))
        })
        .await?;
        let number = |name: &str| moved[name].as_f64().with_context(|| format!("{name} in {moved}"));
        let (window, rows) =
            (number("rate_window_seconds")?, number("rate_rows_per_second")? * number("rate_window_seconds")?);
        ensure!(window >= 20.0 && (number("done")? - rows - next_rows).abs() < 0.5, "from {next_rows}: {moved}");
    }

    // Watched from here on: the lines of a pipe, and the documents of a program.
    let (lines, documents) = (world.path("lines"), world.path("documents"));
    let watch = |arguments: &[&str], file| {
        world.command().args(["status", &id, "--watch"]).args(arguments).stdout(File::create(file)?).spawn()
    };
    let watchers = [watch(&[], &lines)?, watch(&["--json"], &documents)?];

    // Nothing comes any more: the rate falls, instead of staying what it was.
    world.partner.control(|behaviour| behaviour.hang_ratio = 1.0)?;
    let rate = || anyhow::Ok(status(&world, &id)?["rate_rows_per_second"].as_f64().unwrap_or_default());
    let before = rate()?;
    ensure!(before > 0.0, "no rate to fall");
    until("a falling rate", LONG, async || Ok((rate()? < before * 0.9).then_some(()))).await?;

    // Cancelling, cancelled: its watchers have seen the end.
    let mut cancel = world.command().args(["cancel", &id]).stderr(Stdio::null()).stdout(Stdio::null()).spawn()?;
    until("a cancel under way", SOON, async || Ok((status(&world, &id)?["phase"] == "cancelling").then_some(())))
        .await?;
    let page = shown(&world, &["status", &id])?;
    ensure!(page.contains("a cancel was requested"), "{page}");
    ensure!(status(&world, &id)?["eta_seconds"].is_null());
    until("the end of the cancel", SOON, async || Ok(cancel.try_wait()?)).await?;
    for mut watcher in watchers {
        let ended = until("the end of the watch", SOON, async || Ok(watcher.try_wait()?)).await?;
        ensure!(ended.success(), "{ended}");
    }
    let (lines, documents) = (std::fs::read_to_string(lines)?, std::fs::read_to_string(documents)?);
    ensure!(lines.lines().all(|line| line.chars().count() <= 80), "{lines}");
    ensure!(lines.lines().next().is_some_and(|line| line.contains(" running ")), "{lines}");
    ensure!(lines.lines().last().is_some_and(|line| line.contains(" cancelled ")), "{lines}");
    let documents: Vec<Value> = documents.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(documents.len() >= 2 && documents.last().is_some_and(|last| last["state"] == "cancelled"), "{documents:?}");
    let cancelled = status(&world, &id)?;
    ensure!(cancelled["phase"] == "cancelled" && cancelled["owner"].is_null(), "{cancelled}");
    ensure!(cancelled["ended_at"].is_string() && cancelled["rate_rows_per_second"].is_null(), "{cancelled}");
    ensure!(shown(&world, &["status", &id])?.contains("`write-api retry`"));

    // Waiting: reopened, and nobody there to work on it.
    service.finish().await?;
    world.partner.control(|behaviour| {
        behaviour.hang_ratio = 0.0;
        behaviour.latency_ms = 0;
    })?;
    world.done(&["retry", &id])?;
    let waiting = status(&world, &id)?;
    ensure!(
        waiting["state"] == "running" && waiting["phase"] == "waiting" && waiting["ended_at"].is_null(),
        "{waiting}"
    );
    ensure!(shown(&world, &["status", &id])?.contains("nobody works on it"));

    // Complete and published.
    let service = world.serve().await?;
    world.published(&id, LONG).await?;
    let complete = status(&world, &id)?;
    ensure!(complete["phase"] == "complete" && complete["failed"] == 1 && complete["left"] == 0, "{complete}");
    let publication = &complete["publication"];
    ensure!(publication["state"] == "complete" && publication["published"] == 2_999, "{complete}");
    ensure!(publication["cursor"] == LISTINGS && publication["count"] == 1, "{complete}");
    let page = shown(&world, &["status", &id])?;
    ensure!(page.contains("complete, 2,999 of 2,999 records, sent up to listing 3000"), "{page}");
    ensure!(world.done(&["status", &id, "--watch"])?.contains("complete 3,000 of 3,000 (1 failed)"));

    // The table: newest first, bounded, whole in its width with ids of any length.
    let small: Vec<String> =
        (0..3).map(|n| world.refresh(&["--id", &format!("small-{n}"), "--limit", "10"])).collect::<Result<_>>()?;
    for id in &small {
        world.published(id, LONG).await?;
    }
    let table = shown(&world, &["status"])?;
    // Below it is what all of them have used.
    let rows: Vec<&str> = table.lines().take_while(|line| !line.is_empty()).collect();
    ensure!(rows.len() == 5 && rows[0].starts_with("RUN") && rows[4].starts_with("night-0193"), "{table}");
    ensure!(rows[4].contains("…") && rows[4].contains(" complete ") && rows[4].contains(" 3,000 100%"), "{table}");
    let newest: Value = serde_json::from_str(&world.done(&["status", "--json", "--limit", "2"])?)?;
    let opened = |run: &Value| run["opened_at"].as_str().map(str::to_owned);
    ensure!(newest.as_array().is_some_and(|runs| runs.len() == 2), "{newest}");
    ensure!(opened(&newest[0]) >= opened(&newest[1]) && newest[1]["run_id"] != ID, "{newest}");
    world.finish(service).await
}

/// What a status says was used: bytes, and seconds waited for `reason`.
fn used(used: &Value, reason: &str) -> Result<(i64, f64)> {
    let allocated = used["allocated_bytes"].as_i64().with_context(|| used.to_string())?;
    let held = allocated - used["freed_bytes"].as_i64().unwrap_or(0);
    ensure!(used["held_bytes"] == held && used["busy_seconds"].as_f64() > Some(0.0), "{used}");
    Ok((allocated, used["waited_seconds"][reason].as_f64().unwrap_or(0.0)))
}

/// What the log line of the event that ended so says it allocated.
fn allocated(service: &Service, kind: &str, outcome: &str) -> Result<i64> {
    let log = service.log()?;
    let mut lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let line = lines.find(|line| line["kind"] == kind && line["outcome"] == outcome);
    line.and_then(|line| line["allocated_bytes"].as_i64()).with_context(|| format!("none ended {outcome} in\n{log}"))
}

/// The status for people, whichever lines it is broken into.
fn words(world: &World, arguments: &[&str]) -> Result<String> {
    Ok(shown(world, arguments)?.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// An attempt is killed, one is stopped and one ends: what the record says was used grows by what each of them tells in its log,
/// and what was waited for by no less than was certainly `waited`, in seconds. Gives the last service, and what was used in all.
async fn attempts_add_up(
    world: &World,
    killed: Service,
    kind: &str,
    id: &str,
    used: impl Fn() -> Result<(i64, f64)>,
    waited: impl AsyncFn() -> Result<f64>,
    far_enough: impl AsyncFn() -> Result<()>,
) -> Result<(Service, (i64, f64))> {
    killed.kill().await?;
    let (first, first_waited) = (used()?, waited().await?);
    ensure!(first.0 > 100_000 && first.1 >= first_waited, "{first_waited} {first:?}");

    let stopped = world.serve().await?;
    far_enough().await?;
    stopped.signal(libc::SIGTERM);
    ensure!(stopped.exit(LONG).await?.success());
    let (second, line) = (used()?, allocated(&stopped, kind, "released")?);
    // The line is written a moment later than the record.
    ensure!((line * 9 / 10..=line).contains(&(second.0 - first.0)), "{first:?}, {line} more, {second:?}");
    let second_waited = waited().await? - first_waited;
    ensure!(second.1 >= first.1 + second_waited, "{first:?}, {second_waited} more, {second:?}");
    stopped.check_log()?;

    let last = world.serve().await?;
    world.published(id, LONG).await?;
    let all = used()?;
    world.quiet(LONG).await?;
    let line = allocated(&last, kind, "done")?;
    ensure!((line * 9 / 10..=line).contains(&(all.0 - second.0)), "{second:?}, {line} more, {all:?}");
    ensure!(all.1 >= waited().await?, "{all:?}");
    Ok((last, all))
}

/// Killed, an attempt leaves what its last batch said; ended in order, all that it used. The next one adds its own.
#[tokio::test]
async fn the_status_sums_up_what_all_attempts_used() -> Result<()> {
    let world = slow_world(1, 100).await?;
    world.listings(4_000).await?;
    let killed = world.serve().await?;
    let id = world.refresh(&[])?;
    let of_run = || used(&status(&world, &id)?["used"], "partner");
    world.run_until(&id, SOON, |run| run.valued >= 300).await?;
    let page = || words(&world, &["status", &id]);
    ensure!(page()?.contains("not freed by itself, as of the last batch"), "{}", page()?);
    // Each call takes a tenth of a second.
    let called = async || anyhow::Ok(world.run(&id).await?.context("no run")?.valued as f64 / 10.0);
    let far_enough = async || world.run_until(&id, LONG, |run| run.valued >= 800).await.map(drop);
    let (last, _) = attempts_add_up(&world, killed, "valuations.refresh", &id, of_run, called, far_enough).await?;
    ensure!(page()?.contains("not freed by itself at the end") && page()?.contains("waited partner"), "{}", page()?);
    world.finish(last).await
}

/// The same of a publication, page by page; and of all that there are of a run, below the table.
#[tokio::test]
async fn the_status_sums_up_what_all_attempts_at_a_publication_used() -> Result<()> {
    const KIND: &str = "valuations.publish";
    const LISTINGS: i64 = 4_000;
    const PAGE: i64 = 50;
    let mut world = World::new(Behaviour::default()).await?;
    let kafka = Kafka::separate().await?;
    kafka.create_topic(&world.environment().names().topic, 12).await?;
    world.set("kafka.brokers", kafka.bootstrap()).set("kafka.page_size", PAGE).set("partner.rate_per_second", 0);
    world.listings(LISTINGS).await?;
    let killed = world.serve().await?;
    // A broker far away: a page takes a tenth of a second.
    kafka.order(&Order::Delay { milliseconds: 100 }).await?;
    let id = world.refresh(&[])?;
    let of_publication = || used(&status(&world, &id)?["publication"]["used"], "kafka");
    let published = async || world.number("SELECT coalesce(sum(published), 0)::bigint FROM publications").await;
    let until_published =
        async |records: i64| until("records", LONG, async || Ok((published().await? >= records).then_some(()))).await;
    let sent = async || anyhow::Ok((published().await? / PAGE) as f64 / 10.0);
    until_published(300).await?;
    let page = || words(&world, &["status", &id]);
    ensure!(
        page()?.contains("not freed by itself at the end")
            && page()?.contains("not freed by itself, as of the last page"),
        "{}",
        page()?
    );
    let far_enough = async || until_published(1_000).await;
    let (last, all) = attempts_add_up(&world, killed, KIND, &id, of_publication, sent, far_enough).await?;
    ensure!(page()?.contains("it used") && page()?.contains("it waited kafka"), "{}", page()?);
    ensure!(!page()?.contains("as of the last"), "{}", page()?);

    // The page has the newest publication; below the table is what all have used.
    let polls = || anyhow::Ok(status(&world, &id)?["publication"]["used"]["polls"].as_i64().unwrap_or(0));
    let before = polls()?;
    world.done(&["send", "publish", &id])?;
    world.publications(&id, 2, LONG).await?;
    ensure!(of_publication()? != all, "{all:?}");
    let table = words(&world, &["status"])?.replace(',', "");
    let of_both = format!("{} polls", before + polls()?);
    let below = table.split_once("used by valuations.refresh: ").and_then(|(_, below)| below.split_once("used by "));
    ensure!(below.is_some_and(|(_, below)| below.starts_with(KIND) && below.contains(&of_both)), "{of_both}: {table}");
    let all_used = &status(&world, &id)?["publication"]["all_used"];
    ensure!(all_used["polls"] == before + polls()?, "{of_both}: {all_used}");
    world.finish(last).await
}

/// It is a figure: whatever another release wrote there, the run goes on, and its work is no death.
#[tokio::test]
async fn a_run_whose_use_cannot_be_read_goes_on_and_counts_from_zero() -> Result<()> {
    let world = slow_world(1, 100).await?;
    world.listings(2_000).await?;
    let killed = world.serve().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued >= 300).await?;
    killed.kill().await?;
    world.sql(r#"UPDATE runs SET used = '{"allocated_bytes": 9007199254740993, "polls": -1}'"#).await?;
    ensure!(status(&world, &id)?["used"]["allocated_bytes"] == 0, "{}", status(&world, &id)?);

    let service = world.serve().await?;
    world.published(&id, LONG).await?;
    let complete = status(&world, &id)?;
    ensure!(complete["phase"] == "complete" && complete["attempts"] == 2, "{complete}");
    let (allocated, _) = used(&complete["used"], "partner")?;
    ensure!((100_000..1 << 40).contains(&allocated), "{complete}");
    let log = service.log()?;
    let mut told = log.lines().filter(|line| line.contains("what work on a run has used cannot be read"));
    ensure!(told.any(|line| line.contains(&id)), "no line names {id} in\n{log}");
    world.finish(service).await
}
