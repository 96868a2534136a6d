//! The broker at its worst.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use local_stack::kafka::{Order, ProduceError, Request};

use super::{Injection, Scene};
use crate::replica::LOOK;

/// Codes of Kafka's protocol that a produce request may be answered with and that say nothing against its records: some are
/// tried again by the client, some fail the page, some are the end of the producer.
const CODES: [i32; 21] = [3, 5, 6, 7, 8, 9, 13, 17, 19, 20, 21, 35, 43, 45, 47, 49, 56, 59, 74, 76, 90];
/// Until somebody publishes.
const BUSY_LIMIT: Duration = Duration::from_secs(60);

/// What the broker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Trouble {
    /// It refuses produce requests with errors that pass.
    Errors,
    /// It is away, sometimes for longer than a record may take.
    Down,
    /// It answers later than a record may take: the record is stored and its report is lost.
    Late,
}

pub(super) async fn inject(scene: &mut Scene<'_>, trouble: Trouble) -> Result<Injection> {
    publishing(scene).await?;
    match trouble {
        Trouble::Errors => errors(scene).await,
        Trouble::Down => {
            let time = Duration::from_millis(scene.rng.u64(1_000..8_000));
            broken_for(scene, time, Order::GoDown, Order::ComeUp).await
        }
        Trouble::Late => {
            let time = Duration::from_millis(scene.rng.u64(3_000..8_000));
            let (late, prompt) = (Order::Delay { milliseconds: 6_000 }, Order::Delay { milliseconds: 0 });
            broken_for(scene, time, late, prompt).await
        }
    }
}

async fn errors(scene: &mut Scene<'_>) -> Result<Injection> {
    let number = scene.rng.usize(1..5);
    let (order, proof) = if scene.rng.u8(..4) == 0 {
        (Order::FailProduce { errors: vec![ProduceError::Disconnect; number] }, format!("{number} times no answer"))
    } else {
        let codes: Vec<i32> = (0..number).filter_map(|_| scene.rng.choice(CODES)).collect();
        let proof = format!("the codes {codes:?}");
        (Order::Fail { request: Request::Produce, codes }, proof)
    };
    let (ordered, proof) = (number as u64, format!("{proof}, and a good report after them"));
    let published = "SELECT coalesce(sum(published), 0)::bigint FROM publications";
    let before = scene.world.number(published).await?;
    scene.stack.kafka().order(&order).await?;
    // The errors meet the next requests, one each; a record that gets through comes after them.
    let deadline = Instant::now() + BUSY_LIMIT;
    let mut hits = 0;
    while Instant::now() < deadline && hits == 0 {
        scene.world.check_alive()?;
        if scene.world.number(published).await? > before + 2 * scene.world.size.page as i64 {
            hits = ordered;
        }
        publishing_or_more(scene).await?;
        tokio::time::sleep(LOOK).await;
    }
    Ok(Injection { hits, hits_at_work: hits, proof, ..Injection::new("broker") })
}

/// Gives `broken`, and after `time` `mended`.
async fn broken_for(scene: &mut Scene<'_>, time: Duration, broken: Order, mended: Order) -> Result<Injection> {
    let published = "SELECT coalesce(sum(published), 0)::bigint FROM publications";
    scene.stack.kafka().order(&broken).await?;
    // What was on its way has arrived.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = scene.world.number(published).await?;
    let begun = Instant::now();
    let mut waiting = false;
    while begun.elapsed() < time {
        scene.world.check_alive()?;
        waiting |= scene.world.at_work().await?.publishers > 0;
        publishing_or_more(scene).await?;
        tokio::time::sleep(LOOK).await;
    }
    let after = scene.world.number(published).await?;
    if after > before {
        scene.violation("I4", format!("{} records count as published, and no broker reported them", after - before));
    }
    scene.stack.kafka().order(&mended).await?;
    let injection = Injection::new("broker");
    let proof =
        format!("{broken:?} for {time:?}: somebody published meanwhile and {} records were reported", after - before);
    Ok(if waiting && after == before { injection.hit(true, proof) } else { injection })
}

/// Waits until somebody publishes.
async fn publishing(scene: &mut Scene<'_>) -> Result<()> {
    let deadline = Instant::now() + BUSY_LIMIT;
    while scene.world.at_work().await?.publishers == 0 {
        scene.world.check_alive()?;
        publishing_or_more(scene).await?;
        ensure!(Instant::now() < deadline, "nobody publishes after {BUSY_LIMIT:?}");
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// Sends more to publish if there is nothing.
async fn publishing_or_more(scene: &mut Scene<'_>) -> Result<()> {
    if scene.world.at_work().await?.publishers > 0 {
        return Ok(());
    }
    let complete = scene.world.complete_runs().await?;
    let waiting = scene.world.depth(crate::workload::Lane::PostProcessing).await?;
    if waiting != (0, 0) {
        return Ok(());
    }
    match scene.rng.choice(&complete) {
        Some(run) => {
            let again = scene.world.workload.publish_now(run);
            scene.world.send(vec![again]).await
        }
        None if scene.world.idle().await? => scene.world.more(1).await,
        None => Ok(()),
    }
}
