//! Heap snapshots in S3: what is on disk gets there, through an outage and a kill.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use local_stack::wire::{Flow, Wire};
use local_stack::{Behaviour, S3};
use serde_json::Value;

use crate::harness::{LONG, SOON, Service, World, text, until};
use crate::snapshots::{records, taken};

const URL: &str = "s3://profiles/write-api";

/// A world whose service sends its snapshots through a wire.
async fn world() -> Result<(World, S3, Wire)> {
    let s3 = S3::with_bucket("profiles").await?;
    let wire = Wire::to(s3.endpoint())?;
    let mut world = World::new(Behaviour::default()).await?;
    let directory = world.path("snapshots");
    world
        .set("profiling.snapshots.directory", directory.display())
        .set("profiling.snapshots.interval", "5s")
        .set("profiling.snapshots.s3_url", URL)
        .set("profiling.snapshots.s3_endpoint_url", wire.url());
    Ok((world, s3, wire))
}

/// Start and sequence of all snapshots in a directory.
fn on_disk(directory: &Path) -> Result<BTreeSet<(u64, u64)>> {
    Ok(records(directory)?.iter().map(|record| (record.start_ms, record.sequence)).collect())
}

/// The same of S3, by the program's own verb; empty if there are none.
fn in_s3(world: &World) -> Result<BTreeSet<(u64, u64)>> {
    let output = world.cli(&["profile", "list", URL, "--json", "--limit", "1000"])?;
    if !output.status.success() {
        let said = text(&output.stderr);
        ensure!(said.contains("there are no snapshots"), "{said}");
        return Ok(BTreeSet::new());
    }
    let list: Value = serde_json::from_slice(&output.stdout)?;
    let number = |one: &Value, name: &str| one[name].as_u64().with_context(|| format!("no {name} in {one}"));
    let all = list.as_array().context("no list")?;
    all.iter().map(|one| Ok((number(one, "start_ms")?, number(one, "sequence")?))).collect()
}

async fn outage_is_told(service: &Service) -> Result<()> {
    until("a snapshot that is not sent", LONG, async || {
        let failed = service.metric("write_api_snapshots_total{result=\"not_sent\"}").await.unwrap_or(0.0);
        Ok((failed >= 1.0).then_some(()))
    })
    .await
}

#[tokio::test]
async fn an_outage_and_a_kill_in_it_keep_nothing_from_s3_in_the_end() -> Result<()> {
    outage_with_a_kill(Duration::ZERO).await
}

/// The same for as long as S3 may well be away.
#[tokio::test]
#[ignore = "takes more than two minutes"]
async fn an_outage_of_two_minutes_and_a_kill_in_it_keep_nothing_from_s3_in_the_end() -> Result<()> {
    outage_with_a_kill(Duration::from_secs(120)).await
}

/// S3 is away for so long at least, and a process is killed meanwhile.
async fn outage_with_a_kill(outage: Duration) -> Result<()> {
    let (world, _s3, wire) = world().await?;
    let directory = world.path("snapshots");
    let service = world.serve().await?;
    until("the first in S3", SOON, async || Ok((!in_s3(&world)?.is_empty()).then_some(()))).await?;

    wire.set(Flow::Cut);
    let cut = Instant::now();
    taken(&directory, "interval", |record| record.sequence >= 3).await?;
    outage_is_told(&service).await?;
    let log = service.log()?;
    ensure!(log.contains("was not sent to S3") && log.contains(URL), "{log}");
    service.kill().await?;
    let left = on_disk(&directory)?;
    ensure!(left.len() >= 3, "{left:?}");

    // The outage lasts beyond the kill, and the next process writes more.
    let service = world.serve().await?;
    let first = left.iter().next().context("none")?.0;
    taken(&directory, "start", |record| record.start_ms > first).await?;
    outage_is_told(&service).await?;
    tokio::time::sleep(outage.saturating_sub(cut.elapsed())).await;
    wire.set(Flow::Open);
    until("everything in S3", LONG, async || Ok(on_disk(&directory)?.is_subset(&in_s3(&world)?).then_some(()))).await?;
    ensure!(left.is_subset(&in_s3(&world)?), "what the killed process left is not there");

    // The last one is sent before the process ends, and what is there can be read as on disk.
    world.finish(service).await?;
    ensure!(on_disk(&directory)? == in_s3(&world)?, "the last one was not sent");
    let (here, there) = (format!("{}#last", directory.display()), format!("{URL}#last"));
    let top = |place: &str| -> Result<Value> {
        let top: Value = serde_json::from_str(&world.done(&["profile", "top", "--json", place])?)?;
        ensure!(top["source"].as_str().is_some_and(|source| source.ends_with("_stop.pb.gz")), "{top}");
        Ok(top["total"].clone())
    };
    ensure!(top(&here)? == top(&there)?, "not the same");
    world.done(&["profile", "grew", URL])?;
    let file = world.path("fetched.pb.gz").display().to_string();
    world.done(&["profile", "fetch", &there, "--output", &file])?;
    Ok(())
}

#[tokio::test]
async fn s3_that_hangs_delays_neither_the_work_nor_the_end() -> Result<()> {
    let (world, _s3, wire) = world().await?;
    world.listings(10).await?;
    wire.set(Flow::Stalled);
    let service = world.serve().await?;
    let id = world.refresh(&[])?;
    world.published(&id, LONG).await?;
    // Within the grace period, which `finish` demands.
    tokio::time::timeout(Duration::from_secs(25), world.finish(service)).await??;
    let last = records(&world.path("snapshots"))?.pop().context("no snapshot")?;
    ensure!(last.reason == "stop", "{last:?}");
    Ok(())
}

#[tokio::test]
async fn check_tells_whether_s3_takes_a_file() -> Result<()> {
    let (mut world, _s3, _wire) = world().await?;
    let said = text(&world.cli(&["check"])?.stdout);
    ensure!(said.contains(&format!("a file was written to {URL}")), "{said}");
    world.set("profiling.snapshots.s3_url", "s3://no-such-bucket/write-api");
    let output = world.cli(&["check"])?;
    let said = text(&output.stdout);
    ensure!(!output.status.success() && said.contains("s3://no-such-bucket"), "{said}");
    Ok(())
}
