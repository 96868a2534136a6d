//! Messages that the next receive gets from the proxy instead of the queue.

use std::collections::{HashMap, VecDeque};

use serde_json::Value;

/// A message that waits for a receive.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) message: Value,
    /// Whether it was received before. Otherwise its first receiver had been answered already.
    pub(super) is_repeat: bool,
}

/// Messages that wait for a receive, and the receipts that the proxy made.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    waiting: HashMap<String, VecDeque<Waiting>>,
    /// The queue's own receipt for each that the proxy made.
    receipts: HashMap<String, String>,
}

impl Repeats {
    /// Another delivery of `message`, with a receipt of its own and one receive more.
    pub(super) fn add(&mut self, queue: &str, message: &Value) {
        let mut message = message.clone();
        let own = message["ReceiptHandle"].as_str().unwrap_or_default().to_owned();
        let own = self.receipt(&own).unwrap_or(own);
        let made = format!("{own}-again-{}", self.receipts.len());
        message["ReceiptHandle"] = made.as_str().into();
        self.receipts.insert(made, own);
        if let Some(count) = message.pointer_mut("/Attributes/ApproximateReceiveCount")
            && let Some(received) = count.as_str().and_then(|count| count.parse::<u64>().ok())
        {
            *count = (received + 1).to_string().into();
        }
        self.push(queue, message, true);
    }

    /// Messages whose receive was answered with others meanwhile.
    pub(super) fn keep(&mut self, queue: &str, messages: &[Value]) {
        for message in messages {
            self.push(queue, message.clone(), false);
        }
    }

    /// Up to `most` messages that wait.
    pub(super) fn take(&mut self, queue: &str, most: usize) -> Vec<Waiting> {
        let waiting = self.waiting.entry(queue.to_owned()).or_default();
        waiting.drain(..most.min(waiting.len())).collect()
    }

    /// The queue's own receipt for one that the proxy made.
    pub(super) fn receipt(&self, made: &str) -> Option<String> {
        self.receipts.get(made).cloned()
    }

    fn push(&mut self, queue: &str, message: Value, is_repeat: bool) {
        self.waiting.entry(queue.to_owned()).or_default().push_back(Waiting { message, is_repeat });
    }
}
