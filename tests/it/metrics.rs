//! What an operator can graph and be woken by.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use local_stack::Behaviour;

use crate::harness::{LONG, Lane, World};

/// The samples of a page in the Prometheus text format, by name and labels.
fn samples(page: &str) -> Result<BTreeMap<&str, f64>> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (sample, value) = line.rsplit_once(' ').with_context(|| format!("no sample: {line}"))?;
            Ok((sample, value.parse().with_context(|| format!("no number: {line}"))?))
        })
        .collect()
}

#[tokio::test]
async fn the_metrics_tell_what_was_done_and_what_it_cost() -> Result<()> {
    const LISTINGS: i64 = 450;
    const REFUSED: i64 = 7;
    let behaviour = Behaviour { forced: (1..=REFUSED).map(|id| (id, 422)).collect(), ..Behaviour::default() };
    let mut world = World::new(behaviour).await?;
    world.set("refresh.page_size", 100);
    world.listings(LISTINGS).await?;
    let service = world.serve().await?;
    world.done(&["send", "upsert", "--sample", "3"])?;
    world.put(Lane::Events, "not an event").await?;
    world.wait_for_dead_letters(Lane::Events, 1).await?;
    // The three of the sample are listings as well by now.
    world.quiet(LONG).await?;
    let all = LISTINGS + 3;
    let id = world.refresh(&[])?;
    world.published(&id, LONG).await?;
    world.quiet(LONG).await?;

    let (status, page) = service.page("/metrics").await?;
    ensure!(status == 200);
    let samples = samples(&page)?;
    let value = |sample: &str| samples.get(sample).copied().with_context(|| format!("no {sample} in\n{page}"));

    let valued = (all - REFUSED) as f64;
    for (sample, expected) in [
        (r#"write_api_events_total{kind="listing.upsert",outcome="done"}"#, 3.0),
        (r#"write_api_events_total{kind="unknown",outcome="dead_lettered"}"#, 1.0),
        (r#"write_api_events_total{kind="valuations.refresh",outcome="forwarded"}"#, 1.0),
        (r#"write_api_events_total{kind="valuations.refresh",outcome="done"}"#, 1.0),
        (r#"write_api_events_total{kind="valuations.publish",outcome="done"}"#, 1.0),
        (r#"write_api_event_duration_seconds_count{kind="listing.upsert"}"#, 3.0),
        (r#"write_api_event_duration_seconds_count{kind="valuations.publish"}"#, 1.0),
        (r#"write_api_events_in_flight{lane="events"}"#, 0.0),
        (r#"write_api_events_in_flight{lane="valuations"}"#, 0.0),
        (r#"write_api_events_in_flight{lane="post_processing"}"#, 0.0),
        (r#"write_api_partner_requests_total{status="200"}"#, valued),
        (r#"write_api_partner_requests_total{status="422"}"#, REFUSED as f64),
        ("write_api_partner_request_duration_seconds_count", all as f64),
        (r#"write_api_partner_request_duration_seconds_bucket{le="+Inf"}"#, all as f64),
        ("write_api_partner_in_flight", 0.0),
        ("write_api_partner_breaker_open", 0.0),
        ("write_api_pages_read_total", 5.0),
        (r#"write_api_rows_committed_total{state="valued"}"#, valued),
        (r#"write_api_rows_committed_total{state="failed"}"#, REFUSED as f64),
        ("write_api_fenced_writes_total", 0.0),
        (r#"write_api_kafka_deliveries_total{result="ok"}"#, valued),
        ("write_api_outbox_sent_total", 1.0),
        ("write_api_outbox_pending", 0.0),
        ("write_api_outbox_lag_seconds", 0.0),
    ] {
        let found = value(sample)?;
        ensure!(found == expected, "{sample} is {found} and should be {expected}");
    }
    ensure!(value("write_api_batches_committed_total")? >= 5.0);
    ensure!(value(r#"write_api_sqs_requests_total{action="ReceiveMessage",result="ok"}"#)? >= 3.0);

    // allocated <= active <= resident, as jemalloc defines them; retained is no memory.
    let jemalloc = |name: &str| value(&format!("write_api_jemalloc_{name}_bytes"));
    let (allocated, active, resident) = (jemalloc("allocated")?, jemalloc("active")?, jemalloc("resident")?);
    ensure!(1e6 < allocated && allocated <= active && active <= resident, "{allocated} {active} {resident}");
    ensure!(jemalloc("retained")? >= 0.0);
    ensure!(value("process_resident_memory_bytes")? > 5e6);
    ensure!(value("process_cpu_seconds_total")? > 0.0);
    ensure!(value("process_open_fds")? > 3.0);

    let names = samples.keys().map(|sample| sample.split('{').next().unwrap_or(sample));
    for name in names {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        let described =
            |what: &str| page.contains(&format!("# {what} {family} ")) || page.contains(&format!("# {what} {name} "));
        ensure!(described("HELP") && described("TYPE"), "{name} has no description");
    }
    world.finish(service).await
}
