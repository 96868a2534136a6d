//! Calls of SQS: one for one message costs as much as one for ten.

use anyhow::{Result, ensure};
use local_stack::Behaviour;

use crate::harness::{LONG, World};

/// A lane at its limit gets its permits back one by one, and each would be a receive of its own.
#[tokio::test]
async fn messages_of_a_full_queue_come_and_go_ten_at_a_time() -> Result<()> {
    const EVENTS: u32 = 600;
    let mut world = World::new(Behaviour::default()).await?;
    world.set("lanes.events.in_flight", 30).set("database.max_connections", 2);
    world.done(&["send", "upsert", "--sample", &EVENTS.to_string()])?;
    let service = world.serve().await?;
    world.quiet(LONG).await?;
    let done = service.metric(r#"write_api_events_total{kind="listing.upsert",outcome="done"}"#).await?;
    ensure!(done == f64::from(EVENTS), "{done} of {EVENTS} events are done");
    for action in ["ReceiveMessage", "DeleteMessageBatch"] {
        let calls =
            service.metric(&format!("write_api_sqs_requests_total{{action=\"{action}\",result=\"ok\"}}")).await?;
        println!("{calls} calls of {action} for {EVENTS} messages");
        let ideal = f64::from(EVENTS) / 10.0;
        // Not all are full: those that look for what was there last, and the polls of the other lanes.
        ensure!(calls >= ideal && calls <= 1.5 * ideal, "{calls} calls of {action} for {EVENTS} messages");
    }
    world.finish(service).await
}
