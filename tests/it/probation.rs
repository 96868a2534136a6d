//! Work that died before and now waits without progress: after a while it is no suspect any more.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use local_stack::Behaviour;

use crate::harness::{LONG, Lane, SOON, World};

/// Longer than the 20 s of probation and what a suspect that could not be alone is put off for meanwhile.
const PROBATION: Duration = Duration::from_secs(120);

#[tokio::test]
async fn a_suspect_that_waits_for_its_partner_lets_others_be_alone_and_is_not_charged_for_them() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 600_000, ..Behaviour::default() }).await?;
    world.set("partner.request_timeout", "7m").set("partner.total_timeout", "1h").set("shutdown.grace", "4s");
    world.set("queue.wait_time", "1s").set("queue.visibility_timeout", "3s");
    world.listings(10).await?;
    let ids = ["one", "other"];
    let before = world.serve().await?;
    for id in ids {
        world.refresh(&["--id", id])?;
        world.run_until(id, SOON, |run| run.owned).await?;
    }
    before.finish().await?;
    // As two deaths would have left them.
    world.sql("UPDATE runs SET deaths = 2, deaths_since = clock_timestamp()").await?;
    let deaths = async |id: &str| world.number(&format!("SELECT deaths::bigint FROM runs WHERE run_id = '{id}'")).await;

    let service = world.serve().await?;
    // Whichever comes first is alone, and the other one waits for as long as it counts as a suspect.
    let first = crate::harness::until("a suspect at work", LONG, async || {
        for id in ids {
            if world.run(id).await?.context("it was there")?.owned {
                return Ok(Some(id));
            }
        }
        Ok(None)
    })
    .await?;
    let second = ids.into_iter().find(|id| *id != first).context("there are two")?;
    ensure!((deaths(first).await?, deaths(second).await?) == (2, 2));
    world.run_until(second, PROBATION, |run| run.owned).await?;
    ensure!(deaths(first).await? == 0, "it gave its pass back and is still suspected");
    ensure!(deaths(second).await? == 2, "it has only just begun");
    let begun = world.run(first).await?.context("it was there")?.attempts;
    service.kill().await?;

    let service = world.serve().await?;
    let letters = world.wait_for_dead_letters_within(Lane::Valuations, 1, LONG).await?;
    ensure!(letters[0].code() == "quarantined" && letters[0].body.contains(second), "{letters:?}");
    // Until it is claimed anew, the row still names the killed process as its owner.
    let run = world.run_until(first, LONG, |run| run.owned && run.attempts > begun).await?;
    ensure!(run.state == "running" && deaths(first).await? == 1, "charged for the other: {run:?}");
    world.partner.control(|behaviour| behaviour.latency_ms = 0)?;
    // What is out is asked again by whoever comes next.
    service.finish().await?;
    let service = world.serve().await?;
    world.published(first, LONG).await?;
    world.check_run(first, &world.homes(10).await?).await?;
    world.done(&["retry", second])?;
    world.published(second, LONG).await?;
    world.finish(service).await
}
