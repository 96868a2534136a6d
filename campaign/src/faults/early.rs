//! A publish event before its run is complete. (One for a run that nobody knows is in every burst of work.)

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Injection, Scene};
use crate::replica::LOOK;

/// Until there is work to be met.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// Until the event was received and put off.
const PUT_OFF_WITHIN: Duration = Duration::from_secs(20);

/// Asks for the publication of a run at work. It must be put off, and done when the run is complete: the check wants its
/// records as those of every other.
pub(super) async fn publish(scene: &mut Scene<'_>) -> Result<Injection> {
    scene.world.busy(BUSY_LIMIT).await?;
    let running = "SELECT run_id FROM runs WHERE state = 'running' ORDER BY opened_at DESC LIMIT 1";
    let run: Option<String> = sqlx::query_scalar(running).fetch_optional(&scene.world.database).await?;
    let Some(run) = run else { return Ok(Injection::new("no run")) };
    let message = scene.world.workload.publish_now(&run);
    let event: Value = serde_json::from_str(&message.body)?;
    let id = event["id"].as_str().context("an event without id")?.to_owned();
    scene.world.send(vec![message]).await?;
    let begun = Instant::now();
    let injection = Injection::new(&run);
    while begun.elapsed() < PUT_OFF_WITHIN {
        scene.world.check_alive()?;
        if scene.world.replicas[0].has_logged(&[&id, "the run is not complete yet"])? {
            return Ok(injection.hit(true, format!("{id} was put off {:?} after it was sent", begun.elapsed())));
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(injection)
}
