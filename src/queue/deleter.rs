//! Deleting finished messages ten at a time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::lease::Lease;
use super::sqs::{BATCH, Queue, Sqs};

/// Delete calls in flight a lane.
const CALLS: usize = 4;

/// A finished message; its lease lasts until SQS has been told, so that it is not delivered again meanwhile.
type Finished = (String, Lease);

/// Takes finished messages and deletes them in batches.
pub struct Deleter {
    sender: mpsc::Sender<Finished>,
    task: JoinHandle<()>,
}

impl Deleter {
    /// Starts deleting from `queue`. A message waits at most `linger` for others to share its call.
    pub fn start(sqs: Sqs, queue: Queue, linger: Duration) -> Self {
        // Bounded: if deletes do not get through, finishing slows down, and with it receiving.
        let (sender, receiver) = mpsc::channel(CALLS * BATCH);
        Deleter { sender, task: tokio::spawn(collect(sqs, queue, linger, receiver)) }
    }

    /// Hands over a finished message.
    pub async fn delete(&self, receipt: String, lease: Lease) {
        if self.sender.send((receipt, lease)).await.is_err() {
            tracing::error!("the deleter has ended early; the message will be delivered again and recognised");
        }
    }

    /// Deletes what was handed over, then ends.
    pub async fn flush(self) {
        drop(self.sender);
        let _ = self.task.await;
    }
}

async fn collect(sqs: Sqs, queue: Queue, linger: Duration, mut receiver: mpsc::Receiver<Finished>) {
    let calls = Arc::new(Semaphore::new(CALLS));
    while let Some(first) = receiver.recv().await {
        let deadline = Instant::now() + linger;
        let mut batch = vec![first];
        while batch.len() < BATCH {
            match timeout_at(deadline, receiver.recv()).await {
                Ok(Some(next)) => batch.push(next),
                Ok(None) | Err(_) => break,
            }
        }
        let permit = calls.clone().acquire_owned().await.expect("the semaphore is never closed");
        let (sqs, queue) = (sqs.clone(), queue.clone());
        tokio::spawn(async move {
            delete(&sqs, &queue, batch).await;
            drop(permit);
        });
    }
    let _ = calls.acquire_many(CALLS as u32).await;
}

/// Not retried: a message that stays is delivered again after its visibility timeout and found to be done.
async fn delete(sqs: &Sqs, queue: &Queue, batch: Vec<Finished>) {
    let (receipts, leases): (Vec<String>, Vec<Lease>) = batch.into_iter().unzip();
    match sqs.delete(queue, &receipts).await {
        Ok(0) => {}
        Ok(left) => tracing::warn!(queue = %queue.name, left, "SQS did not delete some messages; they will come again"),
        Err(error) => tracing::warn!(%error, messages = receipts.len(), "delete failed; the messages will come again"),
    }
    drop(leases);
}
