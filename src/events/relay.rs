//! The outbox relay: from committed rows to SQS.
//!
//! Woken by each commit of this process, and by a timer for what others left behind. A row is claimed, sent, marked: a
//! relay that dies in between leaves a claim that ends, and the event may be sent twice, which its id absorbs.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use uuid::Uuid;

use super::LaneQueues;
use crate::config;
use crate::db::Database;
use crate::db::outbox::OutboxRow;
use crate::health::Beat;
use crate::lifecycle::Stop;
use crate::metrics::Metrics;
use crate::queue::sqs::{BATCH, Sent, Sqs};

/// What a relay is made of.
pub struct Relay {
    /// Where the rows are.
    pub database: Database,
    /// Where they go.
    pub sqs: Sqs,
    /// By which queue.
    pub lanes: Arc<LaneQueues>,
    /// Rings after each commit.
    pub wake: Arc<Notify>,
    /// Intervals.
    pub settings: config::Outbox,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Touched each round.
    pub beat: Beat,
    /// Ends the relay.
    pub stop: Stop,
}

impl Relay {
    /// Relays until stopped, and a last time then: what was committed while draining should not wait for another process.
    pub async fn run(self) {
        let me = Uuid::new_v4();
        loop {
            let stopping = self.stop.is_draining();
            if let Err(error) = self.drain(me).await {
                tracing::warn!(error = format!("{error:#}"), "the outbox could not be relayed; trying again");
            }
            self.beat.touch();
            if stopping {
                self.beat.retire();
                return;
            }
            tokio::select! {
                () = self.wake.notified() => {}
                () = tokio::time::sleep(self.settings.poll_interval) => {}
                () = self.stop.draining() => {}
            }
        }
    }

    async fn drain(&self, me: Uuid) -> anyhow::Result<()> {
        loop {
            let rows = self.database.claim_outbox(me, BATCH as i64, self.settings.claim_timeout).await?;
            let claimed = rows.len();
            if claimed > 0 {
                self.send(me, rows).await?;
            }
            if claimed < BATCH {
                break;
            }
        }
        let backlog = self.database.outbox_backlog().await?;
        self.metrics.outbox_pending.set(backlog.pending);
        self.metrics.outbox_lag.set(backlog.oldest_seconds as i64);
        Ok(())
    }

    async fn send(&self, me: Uuid, rows: Vec<OutboxRow>) -> anyhow::Result<()> {
        let mut lanes: Vec<&str> = rows.iter().map(|row| row.lane.as_str()).collect();
        lanes.sort_unstable();
        lanes.dedup();
        for lane in lanes {
            let of_lane: Vec<&OutboxRow> = rows.iter().filter(|row| row.lane == lane).collect();
            let bodies: Vec<&str> = of_lane.iter().map(|row| row.body.as_str()).collect();
            let accepted = match self.lanes.queue(lane).await {
                Ok(queue) => self.sqs.send_batch(queue, &bodies).await,
                Err(error) => Err(error),
            };
            let accepted =
                accepted.map(|results| results.iter().map(|sent| *sent == Sent::Accepted).collect::<Vec<_>>());
            let (sent, left): (Vec<_>, Vec<_>) = match &accepted {
                Ok(accepted) => of_lane.iter().zip(accepted).partition(|(_, accepted)| **accepted),
                Err(_) => (Vec::new(), of_lane.iter().zip(&[false; BATCH]).collect()),
            };
            let ids = |rows: Vec<(&&OutboxRow, &bool)>| rows.iter().map(|(row, _)| row.event_id).collect::<Vec<_>>();
            let (sent, left) = (ids(sent), ids(left));
            if !sent.is_empty() {
                self.database.mark_sent(&sent).await?;
                self.metrics.outbox_sent.inc_by(sent.len() as u64);
            }
            if !left.is_empty() {
                self.database.unclaim_outbox(me, &left).await?;
                let error = accepted.err().map_or_else(|| "SQS did not accept them".to_owned(), |e| e.to_string());
                anyhow::bail!("{} events for lane {lane} were not sent: {error}", left.len());
            }
        }
        Ok(())
    }
}

/// How long the relay may be silent: a poll interval and a round of everything it does at its bounds.
pub fn silence_limit(settings: &config::Outbox) -> Duration {
    settings.poll_interval + Duration::from_secs(120)
}
