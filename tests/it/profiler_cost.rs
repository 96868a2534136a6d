//! The profiler measures what it costs, and samples less where that is more than it may cost.

use anyhow::{Context, Result, ensure};
use local_stack::{Behaviour, http_client};
use write_api::profiling::pprof::Profile;

use crate::harness::{LONG, SOON, World, text, until};

#[tokio::test]
async fn a_profiler_above_its_budget_samples_less_and_the_work_goes_on() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 200, ..Behaviour::default() }).await?;
    // A tenth of a percent, which is 60 ms of a minute: some profiles take that.
    world.set("profiling.cpu_budget", "1ms");
    world.listings(2_000).await?;
    let service = world.serve().await?;
    service.ready().await?;
    let base = format!("{}/debug/pprof", service.profiling_url());
    ensure!(service.metric("write_api_profiler_rate_ratio").await? == 1.0, "it began slowed down");
    let id = world.refresh(&[])?;
    let ratio = until("lower rates", LONG, async || {
        // Never refused for the budget.
        let (status, body) = http_client::get(&format!("{base}/heap")).await?;
        ensure!(status.is_success(), "{status}: {}", text(&body));
        let ratio = service.metric("write_api_profiler_rate_ratio").await?;
        Ok((ratio < 1.0).then_some(ratio))
    })
    .await?;
    ensure!(ratio == 0.5 || ratio == 0.25, "{ratio}");
    let log = service.log()?;
    ensure!(log.contains("the profiler used more than profiling.cpu_budget and samples less"), "{log}");
    ensure!(log.contains("CPU profiles 100 Hz") && log.contains("CPU profiles 50 Hz"), "{log}");

    // A CPU profile is taken all the same, with fewer samples, each of which stands for more.
    let (status, body) = http_client::get(&format!("{base}/profile?seconds=1&hz=200")).await?;
    ensure!(status.is_success(), "{status}: {}", text(&body));
    let profile = Profile::decode(&body)?;
    let hz = 1_000_000_000 / profile.period;
    ensure!(hz < 200 && 200 % hz == 0, "a period of {}", profile.period);
    let note = profile.comments.iter().find(|comment| comment.contains("instead of 200")).context("no note")?;
    ensure!(note.starts_with(&format!("{hz} samples a second")), "{note}");

    world.published(&id, LONG).await?;
    for part in ["requests", "heap_samples", "bookkeeping"] {
        let spent = service.metric(&format!("write_api_profiler_cpu_seconds_total{{part=\"{part}\"}}")).await?;
        ensure!(spent > 0.0 && spent < 60.0, "{part}: {spent}");
    }
    for part in ["allocator", "tables", "tasks", "spans"] {
        let held = service.metric(&format!("write_api_profiler_memory_bytes{{part=\"{part}\"}}")).await?;
        ensure!(held > 1024.0 && held < 100e6, "{part}: {held}");
    }
    // Nothing is held for CPU profiles any more.
    until("its places to be given back", SOON, async || {
        let held = service.metric("write_api_profiler_memory_bytes{part=\"cpu_samples\"}").await?;
        Ok((held == 0.0).then_some(()))
    })
    .await?;
    world.finish(service).await
}
