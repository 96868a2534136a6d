//! Heap profiles kept on disk by the running service: when they are taken, that they are whole, and that a directory that
//! takes none harms no work.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use local_stack::Behaviour;
use write_api::profiling::pprof::Profile;
use write_api::profiling::snapshots::Record;

use crate::harness::{LONG, SOON, World, until};

/// The records in `directory`, in the order in which they were taken; each has a profile that can be read.
pub fn records(directory: &Path) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("{}", directory.display()))? {
        let path = entry?.path();
        let name = path.to_string_lossy().into_owned();
        let Some(stem) = name.strip_suffix(".pb.gz") else { continue };
        let profile = Profile::decode(&fs::read(&path)?).with_context(|| name.clone())?;
        ensure!(!profile.samples.is_empty(), "{name} is empty");
        records.push(serde_json::from_slice::<Record>(&fs::read(format!("{stem}.json"))?)?);
    }
    records.sort_by_key(|record| (record.start_ms, record.sequence));
    Ok(records)
}

/// Waits for one with `reason` that `wanted` likes.
pub async fn taken(directory: &Path, reason: &str, wanted: impl Fn(&Record) -> bool) -> Result<Record> {
    until(&format!("a snapshot for {reason}"), LONG, async || {
        if !directory.exists() {
            return Ok(None);
        }
        Ok(records(directory)?.into_iter().find(|record| record.reason == reason && wanted(record)))
    })
    .await
}

#[tokio::test]
async fn a_service_that_is_killed_leaves_what_it_had_and_the_next_one_ends_with_a_last() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let directory = world.path("snapshots");
    world.set("profiling.snapshots.directory", directory.display()).set("profiling.snapshots.interval", "5s");
    let service = world.serve().await?;
    let first = taken(&directory, "start", |_| true).await?;
    ensure!(first.rss_bytes > 1 << 20 && first.jemalloc.allocated > 0 && first.sequence == 1, "{first:?}");
    let second = taken(&directory, "interval", |_| true).await?;
    let apart = second.time_ms - first.time_ms;
    // By the clock of the wall, and the interval is kept by one that nobody sets.
    ensure!(apart + 50 >= 5_000, "{apart} ms apart");
    service.kill().await?;
    ensure!(records(&directory)?.len() >= 2, "the kill took snapshots with it");

    let service = world.serve().await?;
    taken(&directory, "start", |record| record.start_ms > first.start_ms).await?;
    world.finish(service).await?;
    let last = records(&directory)?.pop().context("no snapshot")?;
    ensure!(last.reason == "stop" && last.start_ms > first.start_ms, "{last:?}");
    Ok(())
}

#[tokio::test]
async fn a_slow_event_is_framed_and_a_crossed_share_is_told() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 4_000, ..Behaviour::default() }).await?;
    let directory = world.path("snapshots");
    world
        .set("profiling.snapshots.directory", directory.display())
        .set("profiling.snapshots.interval", "1h")
        .set("profiling.snapshots.memory_limit_mib", 16)
        .set("partner.in_flight", 10)
        .set("partner.rate_per_second", 0);
    world.listings(40).await?;
    let service = world.serve().await?;
    // A service takes more than 16 MiB, so that all three stages are crossed at once, which is one reason.
    taken(&directory, "memory", |_| true).await?;
    world.refresh(&[])?;
    let start = taken(&directory, "event-start", |_| true).await?;
    ensure!(start.events_in_flight.get("valuations.refresh").is_some_and(|count| *count >= 1), "{start:?}");
    let end = taken(&directory, "event-end", |_| true).await?;
    ensure!(end.time_ms > start.time_ms, "{start:?} {end:?}");
    world.quiet(LONG).await?;
    world.finish(service).await?;
    let told = records(&directory)?.iter().filter(|record| record.reason == "memory").count();
    ensure!(told == 1, "{told} snapshots for memory");
    Ok(())
}

#[tokio::test]
async fn an_event_of_milliseconds_is_named_with_its_beginning_and_its_end() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let directory = world.path("snapshots");
    world.set("profiling.snapshots.directory", directory.display()).set("profiling.snapshots.interval", "1h");
    world.listings(5).await?;
    let service = world.serve().await?;
    taken(&directory, "start", |_| true).await?;
    let ids = [world.refresh(&[])?, world.refresh(&[])?];
    for id in &ids {
        world.published(id, LONG).await?;
    }
    world.finish(service).await?;
    let records = records(&directory)?;
    for kind in ["valuations.refresh", "valuations.publish"] {
        let told = |names: fn(&Record) -> &Vec<String>| {
            records.iter().flat_map(names).filter(|name| name.starts_with(kind)).count()
        };
        let (began, ended) = (told(|record| &record.began), told(|record| &record.ended));
        ensure!(began >= 2 && began == ended, "{kind}: {began} began and {ended} ended in {records:#?}");
    }
    for id in &ids {
        let refresh = format!("valuations.refresh {id}");
        ensure!(records.iter().any(|record| record.began.contains(&refresh)), "{refresh} is not in {records:#?}");
    }
    Ok(())
}

#[tokio::test]
async fn growth_since_a_slow_event_began_is_told() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 15_000, ..Behaviour::default() }).await?;
    let directory = world.path("snapshots");
    world
        .set("profiling.snapshots.directory", directory.display())
        .set("profiling.snapshots.interval", "1h")
        .set("profiling.snapshots.growth_mib", 1)
        .set("partner.rate_per_second", 0)
        .set("partner.request_timeout", "30s");
    world.listings(1_000).await?;
    let service = world.serve().await?;
    taken(&directory, "start", |_| true).await?;
    let id = world.refresh(&[])?;
    let refresh = format!("valuations.refresh {id}");
    // A thousand calls in flight take more than that.
    let grown = taken(&directory, "growth", |record| record.slow_events.contains_key(&refresh)).await?;
    ensure!(grown.rss_bytes >= grown.slow_events[&refresh] + (1 << 20), "{grown:?}");
    world.published(&id, LONG).await?;
    world.finish(service).await
}

#[tokio::test]
async fn no_more_are_kept_than_may_be_and_first_last_and_peak_stay() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let directory = world.path("snapshots");
    world
        .set("profiling.snapshots.directory", directory.display())
        .set("profiling.snapshots.interval", "5s")
        .set("profiling.snapshots.max_count", 4);
    let service = world.serve().await?;
    taken(&directory, "interval", |record| record.sequence >= 5).await?;
    world.finish(service).await?;
    let records = records(&directory)?;
    let (first, last) = (records.first().context("none")?, records.last().context("none")?);
    ensure!(records.len() == 4 && first.sequence == 1 && last.reason == "stop", "{records:#?}");
    Ok(())
}

#[tokio::test]
async fn a_directory_that_takes_nothing_harms_no_work() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    // Below a file, where nobody can make a directory, not even root.
    let file = world.path("file");
    fs::write(&file, "")?;
    world.set("profiling.snapshots.directory", file.join("snapshots").display());
    world.listings(10).await?;
    let check = world.cli(&["check"])?;
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    ensure!(!check.status.success() && said.contains("profiling.snapshots.directory"), "{said}");
    let service = world.serve().await?;
    until("a failure that is counted", SOON, async || {
        let failed = service.metric("write_api_snapshots_total{result=\"failed\"}").await.unwrap_or(0.0);
        Ok((failed >= 1.0).then_some(()))
    })
    .await?;
    let id = world.refresh(&[])?;
    world.published(&id, LONG).await?;
    let log = service.log()?;
    ensure!(log.contains("no snapshot of the heap") && log.contains("cannot make"), "{log}");
    tokio::time::timeout(Duration::from_secs(60), world.finish(service)).await?
}
