//! How SQS is called: as seldom as the messages allow.

use anyhow::{Result, ensure};
use local_stack::{Behaviour, SqsProxy};

use crate::harness::{LONG, World};

/// A lane whose limit is reached has single permits free all the time, and a receive for each of them would cost SQS and us ten
/// times as much.
#[tokio::test]
async fn a_full_lane_is_polled_for_ten_messages_at_a_time() -> Result<()> {
    const EVENTS: u64 = 600;
    let mut world = World::new(Behaviour::default()).await?;
    let proxy = SqsProxy::start(local_stack::shared().await?.sqs().endpoint())?;
    world.done(&["seed", "--count", "500"])?;
    world.done(&["send", "upsert", "--sample", &EVENTS.to_string()])?;
    world.set("aws.endpoint_url", proxy.endpoint()).set("lanes.events.in_flight", 12);
    let service = world.serve().await?;
    world.quiet(LONG).await?;
    let calls = proxy.calls_by_action();
    let of = |action: &str| calls.get(action).copied().unwrap_or(0);
    let fewest = EVENTS / 10;
    // Beside the full ones: the first of each lane, and those that come back empty at the end.
    ensure!(of("ReceiveMessage") <= fewest * 3 / 2 + 20, "{EVENTS} events: {calls:?}");
    ensure!(of("DeleteMessageBatch") <= fewest * 2, "{EVENTS} events: {calls:?}");
    world.finish(service).await
}
