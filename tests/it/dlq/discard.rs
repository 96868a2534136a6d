//! What is deleted for good.

use anyhow::{Result, ensure};
use local_stack::Behaviour;

use super::{dead_depth, put_dead, reason, take_all, upsert};
use crate::harness::{LANES, Lane, World};

#[tokio::test]
async fn a_discard_wants_a_yes_and_deletes_what_is_meant() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.expect_dead_letters();
    put_dead(&world, Lane::Events, "no json", &[("reason", &reason("invalid_json", "m-1"))]).await?;
    put_dead(&world, Lane::Valuations, "no json either", &[("reason", &reason("invalid_json", "m-2"))]).await?;
    put_dead(&world, Lane::Events, &upsert(1), &[("reason", &reason("invalid_data", "m-3"))]).await?;
    for arguments in [
        &["dlq", "discard", "--reason", "invalid_json"][..],
        &["dlq", "discard", "--yes"],
        &["dlq", "discard", "--lane", "events", "--yes"],
        &["dlq", "discard", "--reason", "invalid_json", "--yes", "--dry-run"],
    ] {
        let output = world.cli(arguments)?;
        ensure!(output.status.code() == Some(64), "{arguments:?}: {output:?}");
    }
    let would = world.done(&["dlq", "discard", "--reason", "invalid_json", "--dry-run"])?;
    ensure!(would.contains("2 letters would be discarded"), "{would}");
    ensure!(dead_depth(&world, Lane::Events).await? == (2, 0) && dead_depth(&world, Lane::Valuations).await? == (1, 0));
    let done = world.done(&["dlq", "discard", "--reason", "invalid_json", "--yes"])?;
    println!("{done}");
    ensure!(done.contains("2 letters discarded"), "{done}");
    let left = take_all(&world, Lane::Events, "-dlq").await?;
    ensure!(left.len() == 1 && left[0].0 == upsert(1), "{left:?}");
    for lane in LANES {
        ensure!(dead_depth(&world, lane).await? == (0, 0) && world.depth(lane).await? == (0, 0), "{lane:?}");
    }
    Ok(())
}
