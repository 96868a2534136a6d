//! `serve --record`: each message that was consumed is a line, what happens to the file never harms the work, and what
//! was recorded can be replayed.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use local_stack::Behaviour;
use serde_json::{Value, json};

use crate::bad_input::{REFRESH, UPSERT, event, listing};
use crate::harness::{LONG, Lane, SOON, World, text, until};

const NIGHT: &str = "2026-01-31T02:00:00Z";

fn upsert(listing_id: i64) -> Value {
    event(&format!("u-{listing_id}"), UPSERT, NIGHT, listing(listing_id, 50_000_000 + listing_id))
}

#[tokio::test]
async fn what_was_recorded_can_be_replayed_and_a_redelivery_is_no_second_line() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let file = world.path("recording");
    let path = file.to_str().context("UTF-8")?;
    let service = world.serve_with(&["--record", path]).await?;
    // Each shape in which an event comes, and two that are refused.
    let pretty = serde_json::to_string_pretty(&upsert(1))?;
    let sns = json!({"Type": "Notification", "MessageId": "m", "Message": serde_json::to_string_pretty(&upsert(2))?});
    let night = json!({"version": "0", "id": "night", "detail-type": REFRESH, "source": "scheduler", "account": "1",
        "time": NIGHT, "region": "us-east-1", "resources": [], "detail": {"limit": 3}});
    world.put(Lane::Events, &pretty).await?;
    world.put(Lane::Events, &sns.to_string()).await?;
    world.put(Lane::Events, "not an event").await?;
    world.put(Lane::Events, &event("u-9", "writeapi.unknown.v1", NIGHT, json!({})).to_string()).await?;
    world.wait_for_dead_letters(Lane::Events, 2).await?;
    world.quiet(LONG).await?;

    // A first delivery that fails, and a second.
    service.expect_errors();
    world.sql("ALTER TABLE listings RENAME TO away").await?;
    world.put(Lane::Events, &upsert(3).to_string()).await?;
    let retried = r#"write_api_events_total{kind="listing.upsert",outcome="retried"}"#;
    until("a retried event", SOON, async || Ok((service.metric(retried).await? >= 1.0).then_some(()))).await?;
    world.sql("ALTER TABLE away RENAME TO listings").await?;
    world.quiet(LONG).await?;

    // The nightly event goes over three lanes and is one line.
    world.put(Lane::Events, &night.to_string()).await?;
    world.published("night", LONG).await?;
    world.quiet(LONG).await?;
    let written = r#"write_api_recorded_events_total{result="written"}"#;
    ensure!(service.metric(written).await? == 4.0);
    let state = "SELECT jsonb_agg(to_jsonb(l) - 'created_at' ORDER BY listing_id)::text FROM listings AS l";
    let before: String = sqlx::query_scalar(state).fetch_one(&world.database).await?;
    world.finish(service).await?;

    let lines: Vec<Value> = fs::read_to_string(&file)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let ids: Vec<&str> = lines.iter().filter_map(|line| line["id"].as_str()).collect();
    ensure!(ids.iter().copied().collect::<BTreeSet<_>>() == BTreeSet::from(["u-1", "u-2", "u-3", "night"]), "{ids:?}");
    ensure!(ids.len() == 4 && ids[3] == "night", "{ids:?}");
    ensure!(lines.iter().all(|line| line["specversion"] == "1.0"), "wrappers are off: {lines:?}");
    ensure!(lines.contains(&upsert(2)) && lines[3]["data"] == json!({"limit": 3}), "{lines:?}");

    // The same night in an empty world.
    world
        .sql("TRUNCATE listings, listing_events, listing_valuations, valuations, publications, runs, outbox CASCADE")
        .await?;
    let service = world.serve().await?;
    world.done(&["replay", path])?;
    until("the same listings", LONG, async || {
        let after: Option<String> = sqlx::query_scalar(state).fetch_one(&world.database).await?;
        Ok((after.as_deref() == Some(before.as_str())).then_some(()))
    })
    .await?;
    world.published("night", LONG).await?;
    world.finish(service).await
}

#[tokio::test]
async fn a_recording_outlives_a_kill_with_one_broken_line_at_most() -> Result<()> {
    const COUNT: i64 = 400;
    let world = World::new(Behaviour::default()).await?;
    let file = world.path("recording");
    let path = file.to_str().context("UTF-8")?;
    let service = world.serve_with(&["--record", path]).await?;
    let events: String = (1..=COUNT).map(|id| format!("{}\n", upsert(id))).collect();
    let source = world.path("events");
    fs::write(&source, events)?;
    world.done(&["replay", source.to_str().context("UTF-8")?])?;
    until("the middle", SOON, async || Ok((fs::read_to_string(&file)?.lines().count() >= 50).then_some(()))).await?;
    service.kill().await?;
    // As a kill in the middle of a write leaves it.
    let mut content = fs::read_to_string(&file)?;
    content.truncate(content.len() - 20);
    fs::write(&file, content)?;

    let service = world.serve_with(&["--record", path]).await?;
    world.quiet(LONG).await?;
    world.finish(service).await?;
    let output = world.cli(&["replay", "--dry-run", path])?;
    let said = text(&output.stdout);
    ensure!(output.status.code() == Some(1) && said.matches(": invalid_json: ").count() == 1, "{said}");
    world.done(&["replay", "--dry-run", "--skip-invalid", path])?;
    Ok(())
}

#[tokio::test]
async fn a_recording_that_is_full_or_impossible_harms_nothing() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let limited = world.path("limited");
    let limited_path = limited.to_str().context("UTF-8")?.to_owned();
    let nowhere = world.path("no/such/directory").display().to_string();
    let limit = (upsert(11).to_string().len() as u64 + 1) * 2;
    let with_limit = limit.to_string();
    let mut first = 1;
    for (options, result, written, level) in [
        (&["--record", "/dev/full"][..], "failed", 0.0, "ERROR"),
        (&["--record", nowhere.as_str()], "failed", 0.0, "ERROR"),
        (&["--record", limited_path.as_str(), "--record-limit", with_limit.as_str()], "over_limit", 2.0, "WARN"),
    ] {
        let service = world.serve_with(options).await?;
        service.expect_errors();
        for id in first..first + 5 {
            world.put(Lane::Events, &upsert(id).to_string()).await?;
        }
        first += 5;
        world.quiet(LONG).await?;
        let count = async |result: &str| {
            service.metric(&format!(r#"write_api_recorded_events_total{{result="{result}"}}"#)).await
        };
        until("all counted", SOON, async || {
            Ok(((count("written").await?, count(result).await?) == (written, 5.0 - written)).then_some(()))
        })
        .await?;
        let log = service.log()?;
        let told = log.lines().filter(|line| line.contains("the recording ") && line.contains(level)).count();
        ensure!(told == 1, "{told} lines at {level} in\n{log}");
        world.finish(service).await?;
    }
    ensure!(fs::metadata(&limited)?.len() <= limit);
    ensure!(world.number("SELECT count(*) FROM listings").await? == first - 1, "the work goes on");
    Ok(())
}
