//! The outbox relay: from committed rows to SQS.
//!
//! Woken by each commit of this process, and by a timer for what others left behind. A row is claimed, sent, marked: a
//! relay that dies in between leaves a claim that ends, and the event may be sent twice, which its id absorbs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use uuid::Uuid;

use super::LaneQueues;
use crate::config;
use crate::db::Database;
use crate::db::outbox::OutboxRow;
use crate::fault;
use crate::health::Beat;
use crate::lifecycle::Stop;
use crate::metrics::Metrics;
use crate::queue::batch::{BATCH, batch_length};
use crate::queue::sqs::{Queue, Sent, Sqs};
use crate::task::park;

/// How long a row waits that SQS refuses. It will hardly ever be accepted, but it must not be forgotten either.
const REFUSED_WAIT: Duration = Duration::from_secs(3600);

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
                () = park(tokio::time::sleep(self.settings.poll_interval)) => {}
                () = self.stop.draining() => {}
            }
        }
    }

    async fn drain(&self, me: Uuid) -> anyhow::Result<()> {
        let relayed = self.relay(me).await;
        // After a failure above all: these are what it is noticed by.
        match self.database.outbox_backlog().await {
            Ok(backlog) => {
                self.metrics.outbox_pending.set(backlog.pending);
                self.metrics.outbox_lag.set(backlog.oldest_seconds as i64);
                relayed
            }
            Err(error) => relayed.and(Err(error.into())),
        }
    }

    async fn relay(&self, me: Uuid) -> anyhow::Result<()> {
        // A lane that failed is left alone until the next round: its rows, given back and claimed again, would stand in
        // the way of those of others.
        let mut failed: BTreeMap<String, anyhow::Error> = BTreeMap::new();
        loop {
            let without: Vec<String> = failed.keys().cloned().collect();
            let claim = self.settings.claim_timeout;
            let rows = self.database.claim_outbox(me, BATCH as i64, claim, &without).await?;
            fault_points("relay.claimed", &rows);
            let claimed = rows.len();
            let mut lanes: BTreeMap<&str, Vec<&OutboxRow>> = BTreeMap::new();
            for row in &rows {
                lanes.entry(&row.lane).or_default().push(row);
            }
            for (lane, rows) in lanes {
                if let Err(error) = self.send(me, lane, &rows).await {
                    failed.insert(lane.to_owned(), error);
                }
                self.beat.touch();
            }
            if claimed < BATCH {
                break;
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        let errors: Vec<String> = failed.iter().map(|(lane, error)| format!("lane {lane}: {error:#}")).collect();
        Err(anyhow::anyhow!(errors.join("; ")))
    }

    /// Sends the claimed rows of a lane, and ends the claim of each.
    async fn send(&self, me: Uuid, lane: &str, rows: &[&OutboxRow]) -> anyhow::Result<()> {
        let bodies: Vec<&str> = rows.iter().map(|row| row.body.as_str()).collect();
        fault_points("relay.before_send", rows.iter().copied());
        let results = match self.lanes.queue(lane).await {
            Ok(queue) => self.send_bodies(queue, &bodies).await,
            Err(error) => vec![Sent::Failed(error.to_string()); bodies.len()],
        };
        fault_points("relay.after_send", rows.iter().copied());
        let (mut sent, mut refused, mut left, mut failure) = (Vec::new(), Vec::new(), Vec::new(), None);
        for (row, result) in rows.iter().zip(results) {
            match result {
                Sent::Accepted => sent.push(row.event_id),
                Sent::Refused(reason) => {
                    let event_id = row.event_id;
                    tracing::error!(%event_id, lane, reason, "SQS refuses an event of the outbox; it is tried again in an hour");
                    refused.push(row.event_id);
                }
                Sent::Failed(error) => {
                    left.push(row.event_id);
                    failure = Some(error);
                }
            }
        }
        // One that fails does not keep the others from being tried.
        let marked = self.database.mark_sent(&sent).await;
        self.beat.touch();
        fault_points("relay.after_mark", rows.iter().copied());
        if marked.is_ok() {
            self.metrics.outbox_sent.inc_by(sent.len() as u64);
        }
        let put_off = self.database.return_outbox(me, &refused, REFUSED_WAIT).await;
        self.beat.touch();
        let returned = self.database.return_outbox(me, &left, Duration::ZERO).await;
        marked.and(put_off).and(returned)?;
        match failure {
            Some(error) => Err(anyhow::anyhow!("{} events were not sent: {error}", left.len())),
            None => Ok(()),
        }
    }

    /// Sends `bodies` in batches as large as SQS takes them. One result per body.
    async fn send_bodies(&self, queue: &Queue, bodies: &[&str]) -> Vec<Sent> {
        let mut results = Vec::with_capacity(bodies.len());
        while results.len() < bodies.len() {
            let rest = &bodies[results.len()..];
            let batch = &rest[..batch_length(rest)];
            match self.sqs.send_batch(queue, batch).await {
                Ok(sent) => results.extend(sent),
                // All of them for what is wrong with one: each by itself.
                Err(error) if error.is_about_the_message() => {
                    for body in batch {
                        results.push(match self.sqs.send(queue, body).await {
                            Ok(()) => Sent::Accepted,
                            Err(error) if error.is_about_the_message() => Sent::Refused(error.to_string()),
                            Err(error) => Sent::Failed(error.to_string()),
                        });
                        self.beat.touch();
                    }
                }
                Err(error) => results.extend(vec![Sent::Failed(error.to_string()); batch.len()]),
            }
            self.beat.touch();
        }
        results
    }
}

/// The point `name` for each row.
fn fault_points<'a>(name: &str, rows: impl IntoIterator<Item = &'a OutboxRow>) {
    if cfg!(feature = "fault-injection") {
        rows.into_iter().for_each(|row| fault::point(name, &row.event_id.to_string()));
    }
}

/// How long the relay may be silent: a poll interval between two looks at Postgres with all their tries, and a minute.
pub fn silence_limit(settings: &config::Outbox, database: &Database) -> Duration {
    settings.poll_interval + database.longest() * 2 + Duration::from_secs(60)
}
