//! An independent consumer, for checks.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tokio::sync::watch;

const METADATA_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the reader waits for a record before it looks whether it should end.
const POLL: Duration = Duration::from_millis(100);

/// One record as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapRecord {
    /// The partition it was in.
    pub partition: i32,
    /// Its place in the partition.
    pub offset: i64,
    /// The key, as text.
    pub key: String,
    /// The value.
    pub payload: Vec<u8>,
    /// The headers, as text.
    pub headers: BTreeMap<String, String>,
}

impl TapRecord {
    /// The CloudEvents id, empty when there is none.
    #[must_use]
    pub fn ce_id(&self) -> &str {
        self.headers.get("ce_id").map_or("", String::as_str)
    }

    /// The CloudEvents type, empty when there is none.
    #[must_use]
    pub fn ce_type(&self) -> &str {
        self.headers.get("ce_type").map_or("", String::as_str)
    }
}

/// Reads every partition of a topic from its beginning on, in a thread of its own, until dropped. It belongs to no
/// consumer group.
#[derive(Debug)]
pub struct KafkaTap {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    seen: Mutex<Seen>,
    /// Records read, for those who wait.
    count: watch::Sender<u64>,
    ended: AtomicBool,
}

#[derive(Debug, Default)]
struct Seen {
    records: Vec<TapRecord>,
    count: u64,
    ids: HashSet<String>,
    next_offset: BTreeMap<i32, i64>,
    missed: u64,
}

impl KafkaTap {
    /// Starts to read `topic`, which must exist, and keeps every record: about 1 KB each.
    pub fn start(bootstrap: &str, topic: &str) -> Result<Self> {
        Self::new(bootstrap, topic, true)
    }

    /// Starts to read `topic`, which must exist, and only counts: about 100 bytes for each distinct id.
    pub fn counting(bootstrap: &str, topic: &str) -> Result<Self> {
        Self::new(bootstrap, topic, false)
    }

    fn new(bootstrap: &str, topic: &str, keep_records: bool) -> Result<Self> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", bootstrap)
            .set("group.id", "local-stack-tap")
            .set("enable.auto.commit", "false")
            .set("allow.auto.create.topics", "false")
            .set("auto.offset.reset", "earliest")
            // The broker keeps 5 MiB a partition: be quick, and hold little here.
            .set("fetch.wait.max.ms", "50")
            .set("queued.max.messages.kbytes", "16384")
            .create()
            .context("cannot make a Kafka consumer")?;
        let metadata = consumer
            .fetch_metadata(Some(topic), METADATA_TIMEOUT)
            .with_context(|| format!("cannot ask the Kafka broker {bootstrap} for topic {topic}"))?;
        let partitions = metadata.topics().first().map_or(&[][..], |found| found.partitions());
        ensure!(!partitions.is_empty(), "the Kafka broker {bootstrap} has no topic {topic}: create it first");
        let mut assignment = TopicPartitionList::new();
        for partition in partitions {
            assignment.add_partition_offset(topic, partition.id(), Offset::Beginning)?;
        }
        consumer.assign(&assignment).with_context(|| format!("cannot read topic {topic}"))?;

        let shared = Arc::new(Shared::default());
        let reader = thread::Builder::new().name("kafka-tap".into()).spawn({
            let shared = shared.clone();
            move || read(&consumer, &shared, keep_records)
        })?;
        Ok(Self { shared, reader: Some(reader) })
    }

    /// Records read so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.seen().count
    }

    /// Distinct CloudEvents ids (`ce_id`) read so far.
    #[must_use]
    pub fn distinct_ids(&self) -> u64 {
        self.seen().ids.len() as u64
    }

    /// Records that the broker dropped before they were read, by the gaps between offsets. A count is good only if
    /// this is 0.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.seen().missed
    }

    /// The records read so far, in the order of reading; none for a tap that only counts.
    #[must_use]
    pub fn records(&self) -> Vec<TapRecord> {
        self.seen().records.clone()
    }

    /// Waits until `count` records were read, or `limit` has passed; gives the number read.
    pub async fn wait_for(&self, count: u64, limit: Duration) -> u64 {
        let mut read = self.shared.count.subscribe();
        let _ = tokio::time::timeout(limit, read.wait_for(|read| *read >= count)).await;
        self.count()
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for KafkaTap {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn read(consumer: &BaseConsumer, shared: &Shared, keep_records: bool) {
    while !shared.ended.load(Ordering::Relaxed) {
        match consumer.poll(POLL) {
            None => {}
            Some(Ok(message)) => {
                let mut seen = shared.seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.add(record(&message), keep_records);
                shared.count.send_replace(seen.count);
            }
            // A broker that is away comes back, or the check that waits for records says that they are missing.
            Some(Err(error)) => tracing::debug!(%error, "the Kafka tap got an error"),
        }
    }
}

fn record(message: &BorrowedMessage<'_>) -> TapRecord {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
    TapRecord {
        partition: message.partition(),
        offset: message.offset(),
        key: message.key().map(text).unwrap_or_default(),
        payload: message.payload().unwrap_or_default().to_vec(),
        headers: headers.map(|header| (header.key.to_owned(), header.value.map(text).unwrap_or_default())).collect(),
    }
}

impl Seen {
    fn add(&mut self, record: TapRecord, keep: bool) {
        self.count += 1;
        let expected = self.next_offset.insert(record.partition, record.offset + 1).unwrap_or(0);
        self.missed += u64::try_from(record.offset - expected).unwrap_or(0);
        if !self.ids.contains(record.ce_id()) {
            self.ids.insert(record.ce_id().to_owned());
        }
        if keep {
            self.records.push(record);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(partition: i32, offset: i64, id: &str) -> TapRecord {
        let headers = BTreeMap::from([("ce_id".to_owned(), id.to_owned())]);
        TapRecord { partition, offset, key: String::new(), payload: Vec::new(), headers }
    }

    #[test]
    fn repeats_and_gaps_are_counted() {
        let mut seen = Seen::default();
        for (partition, offset, id) in [(0, 0, "a"), (0, 1, "b"), (1, 3, "c"), (0, 2, "b"), (1, 6, "d")] {
            seen.add(record(partition, offset, id), false);
        }
        assert_eq!((seen.count, seen.ids.len(), seen.missed), (5, 4, 5));
        assert!(seen.records.is_empty());
    }
}
