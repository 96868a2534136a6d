//! Reading the topic back, for checks: every partition from its oldest record to where it ended when the reading began.
//!
//! The reader belongs to no consumer group and commits nothing. It always begins with the oldest record: a start by time
//! would have to trust the clocks of those who sent, and a record that it passed over would look lost.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::mpsc;

use super::client::{self, ClientLog};
use super::topic::look_at;
use crate::config;
use crate::task;

/// Records handed over together, at most.
const BATCH: usize = 1_000;

/// Batches read ahead. With [`BATCH`] records of under 1 KB, a few MB.
const AHEAD: usize = 2;

/// A look at the offsets of one partition.
const OFFSETS_TIMEOUT: Duration = Duration::from_secs(15);

/// Between two looks whether anyone still listens.
const POLL: Duration = Duration::from_millis(100);

/// A record as Kafka has it.
#[derive(Debug, Clone)]
pub struct StoredRecord {
    /// Its partition.
    pub partition: i32,
    /// Its place there.
    pub offset: i64,
    /// When it was sent, in milliseconds since 1970; `None` where Kafka does not tell.
    pub timestamp_ms: Option<i64>,
    /// The key.
    pub key: Option<Vec<u8>>,
    /// The value.
    pub value: Option<Vec<u8>>,
    /// The headers, in their order.
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

/// What there is to read of one partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset of the oldest record that is kept; above 0 where older ones were removed.
    pub low: i64,
    /// The offset after the newest record, when the reading began.
    pub high: i64,
}

/// Why the topic could not be read.
#[derive(Debug, thiserror::Error)]
#[error("kafka topic {topic:?} cannot be read: {problem}")]
pub struct ReadError {
    /// Value of `kafka.topic`.
    topic: String,
    /// What happened, and what to do.
    problem: String,
}

impl ConsumerContext for ClientLog {}

/// A reading that has begun: its ends are fixed.
pub struct TopicReader {
    consumer: BaseConsumer<ClientLog>,
    topic: String,
    extents: BTreeMap<i32, Extent>,
}

impl TopicReader {
    /// Finds the partitions and where each ends now. Each question may take 15 s.
    pub async fn open(kafka: &config::Kafka) -> Result<Self, ReadError> {
        let kafka = kafka.clone();
        blocking(kafka.topic.clone(), move || Self::open_blocking(&kafka)).await
    }

    fn open_blocking(kafka: &config::Kafka) -> Result<Self, ReadError> {
        let failed = |problem: String| ReadError { topic: kafka.topic.clone(), problem };
        let mut settings = client::common(kafka);
        settings
            // librdkafka assigns nothing without a name of a group; none is joined, and nothing is kept under it.
            .set("group.id", "write-api-audit")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("enable.partition.eof", "true")
            // A record that is gone when it is asked for is an error, not a reason to begin elsewhere.
            .set("auto.offset.reset", "error")
            // Committed records only is the default. The producer uses no transactions, so that leaves out none of its own.
            .set("queued.max.messages.kbytes", "16384");
        let consumer: BaseConsumer<ClientLog> =
            settings.create_with_context(ClientLog::default()).map_err(|error| failed(error.to_string()))?;
        let topic = look_at(consumer.client(), consumer.context(), kafka, OFFSETS_TIMEOUT);
        let partitions = topic.map_err(|error| failed(error.to_string()))?.partitions;
        let mut extents = BTreeMap::new();
        for partition in 0..partitions as i32 {
            let (low, high) = consumer
                .fetch_watermarks(&kafka.topic, partition, OFFSETS_TIMEOUT)
                .map_err(|error| failed(format!("the offsets of partition {partition}: {error}; try again")))?;
            extents.insert(partition, Extent { low, high });
        }
        Ok(TopicReader { consumer, topic: kafka.topic.clone(), extents })
    }

    /// Where each partition begins and ends.
    pub fn extents(&self) -> &BTreeMap<i32, Extent> {
        &self.extents
    }

    /// Reads everything up to the ends, in batches of up to 1,000 records of any partition. An error ends it; so does
    /// silence for `patience`. The reading stops when the receiver is dropped.
    pub fn read(self, patience: Duration) -> mpsc::Receiver<Result<Vec<StoredRecord>, ReadError>> {
        let (sender, receiver) = mpsc::channel(AHEAD);
        task::spawn_blocking(move || {
            if let Err(error) = self.read_blocking(patience, &sender) {
                // Nobody listens any more where this fails.
                let _ = sender.blocking_send(Err(error));
            }
        });
        receiver
    }

    fn read_blocking(
        self,
        patience: Duration,
        sender: &mpsc::Sender<Result<Vec<StoredRecord>, ReadError>>,
    ) -> Result<(), ReadError> {
        let failed = |problem: String| ReadError { topic: self.topic.clone(), problem };
        let mut open: BTreeMap<i32, i64> = self.extents.iter().map(|(id, extent)| (*id, extent.high)).collect();
        open.retain(|id, high| self.extents[id].low < *high);
        let mut assignment = TopicPartitionList::new();
        for partition in open.keys() {
            let from = Offset::Offset(self.extents[partition].low);
            let added = assignment.add_partition_offset(&self.topic, *partition, from);
            added.map_err(|error| failed(error.to_string()))?;
        }
        self.consumer.assign(&assignment).map_err(|error| failed(error.to_string()))?;
        let mut batch = Vec::with_capacity(BATCH);
        let mut heard = Instant::now();
        while !open.is_empty() {
            match self.consumer.poll(POLL) {
                Some(Ok(message)) => {
                    heard = Instant::now();
                    let (partition, next) = (message.partition(), message.offset() + 1);
                    match open.get(&partition) {
                        // Sent after the reading began.
                        None => continue,
                        Some(high) if next > *high => {
                            open.remove(&partition);
                            continue;
                        }
                        Some(high) if next == *high => {
                            open.remove(&partition);
                        }
                        Some(_) => {}
                    }
                    batch.push(stored(&message));
                }
                // The last offsets before the end may hold no records.
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    heard = Instant::now();
                    open.remove(&partition);
                }
                Some(Err(error @ KafkaError::MessageConsumption(_))) if heard.elapsed() < patience => {
                    // Brokers that are away come back; one that refuses us goes on to do so until the patience is over.
                    tracing::debug!(%error, "the topic could not be read for a moment");
                    std::thread::sleep(POLL);
                }
                Some(Err(error)) => {
                    let cause = self.consumer.context().recent_cause().unwrap_or_default();
                    return Err(failed(format!(
                        "{error} {cause}; see that the client may read the topic, then try again"
                    )));
                }
                None if heard.elapsed() >= patience => {
                    let cause =
                        self.consumer.context().recent_cause().unwrap_or_else(|| "no cause is known".to_owned());
                    let left = open.len();
                    return Err(failed(format!(
                        "no record for {patience:?} with {left} partitions not at their end ({cause}); try again"
                    )));
                }
                None => {}
            }
            let due = batch.len() >= BATCH || heard.elapsed() >= POLL && !batch.is_empty();
            if (due && sender.blocking_send(Ok(std::mem::take(&mut batch))).is_err()) || sender.is_closed() {
                return Ok(());
            }
        }
        if !batch.is_empty() {
            let _ = sender.blocking_send(Ok(batch));
        }
        Ok(())
    }
}

fn stored(message: &BorrowedMessage<'_>) -> StoredRecord {
    let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
    StoredRecord {
        partition: message.partition(),
        offset: message.offset(),
        timestamp_ms: message.timestamp().to_millis(),
        key: message.key().map(<[u8]>::to_vec),
        value: message.payload().map(<[u8]>::to_vec),
        headers: headers.map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec))).collect(),
    }
}

/// Runs what blocks on a thread for that.
async fn blocking<T: Send + 'static>(
    topic: String,
    work: impl FnOnce() -> Result<T, ReadError> + Send + 'static,
) -> Result<T, ReadError> {
    let done = task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(ReadError { topic, problem: "the reading was interrupted; try again".to_owned() }))
}
