//! Deleting finished messages ten at a time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::batch::BATCH;
use super::lease::Lease;
use super::sqs::{Queue, Sqs};
use crate::fault;
use crate::task::{self, For, wait};

/// Delete calls in flight a lane.
const CALLS: usize = 4;

/// A finished message.
struct Finished {
    message_id: String,
    receipt: String,
    /// Lasts until SQS has been told, so that the message is not delivered again meanwhile.
    lease: Lease,
}

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
        Deleter { sender, task: task::spawn("deleter", collect(sqs, queue, linger, receiver)) }
    }

    /// Hands over a finished message.
    pub async fn delete(&self, message_id: String, receipt: String, lease: Lease) {
        if self.sender.send(Finished { message_id, receipt, lease }).await.is_err() {
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
    loop {
        let mut batch = Vec::with_capacity(BATCH);
        if task::park(receiver.recv_many(&mut batch, BATCH)).await == 0 {
            break;
        }
        let deadline = Instant::now() + linger;
        if batch.len() < BATCH {
            // Those that were received together end one after another, and need not wake this task each.
            task::after_those_ready().await;
        }
        while batch.len() < BATCH {
            let room = BATCH - batch.len();
            match task::park(timeout_at(deadline, receiver.recv_many(&mut batch, room))).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        let permit = wait(For::Permit, calls.clone().acquire_owned()).await.expect("the semaphore is never closed");
        let (sqs, queue) = (sqs.clone(), queue.clone());
        task::spawn("delete", async move {
            delete(&sqs, &queue, batch).await;
            drop(permit);
        });
    }
    let _ = calls.acquire_many(CALLS as u32).await;
}

/// Not retried: a message that stays is delivered again after its visibility timeout and found to be done.
async fn delete(sqs: &Sqs, queue: &Queue, batch: Vec<Finished>) {
    let mut receipts = Vec::with_capacity(batch.len());
    let mut leases = Vec::with_capacity(batch.len());
    let mut message_ids = Vec::with_capacity(batch.len());
    for Finished { message_id, receipt, lease } in batch {
        receipts.push(receipt);
        leases.push(lease);
        message_ids.push(message_id);
    }
    message_ids.iter().for_each(|message_id| fault::point("queue.before_delete", message_id));
    match sqs.delete(queue, &receipts).await {
        Ok(0) => {}
        Ok(left) => tracing::warn!(queue = %queue.name, left, "SQS did not delete some messages; they will come again"),
        Err(error) => tracing::warn!(%error, messages = receipts.len(), "delete failed; the messages will come again"),
    }
    message_ids.iter().for_each(|message_id| fault::point("queue.after_delete", message_id));
    drop(leases);
}
