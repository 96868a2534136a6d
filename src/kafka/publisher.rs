//! The producer: a page of records at a time, every delivery report awaited.
//!
//! While nothing is published the producer holds its connections, a thread for each broker and three more, all asleep, and
//! no records: librdkafka frees a record when its report was served, and the allocator gives the pages back.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::iter;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};

use super::client;
use super::delivery::{Deliveries, Page, PublishError, Published, Reports, Verdict};
use super::record::Record;
use super::topic::{self, TopicError, TopicInfo};
use crate::config;
use crate::fault;
use crate::metrics::Metrics;
use crate::task;

/// How long a page waits when librdkafka's queue is full. Reports make room within a round trip.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(2);

/// How long brokers may take to tell of the topic between two records of which one was refused for want of rights.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How long reports are served before looking whether anyone still needs the producer. The wrapper's own thread looks ten
/// times a second, and spins for the last millisecond of each time: 0.7 % of a core for a producer that does nothing.
const SERVE_FOR: Duration = Duration::from_secs(5);

type Producer = BaseProducer<Deliveries>;

/// Sends pages of records to the topic. Pages of different runs may be sent at the same time; clones share the producer.
#[derive(Clone)]
pub struct Publisher {
    shared: Arc<Shared>,
}

struct Shared {
    kafka: config::Kafka,
    client: ClientConfig,
    metrics: Arc<Metrics>,
    producer: Mutex<Arc<Producer>>,
}

impl Publisher {
    /// Starts the producer, which connects in the background: no broker has to be there yet.
    pub fn new(kafka: &config::Kafka, metrics: Arc<Metrics>) -> anyhow::Result<Self> {
        Self::with_client(kafka, client::producer(kafka), metrics)
    }

    /// As [`Publisher::new`], with other settings of librdkafka.
    pub(super) fn with_client(
        kafka: &config::Kafka,
        client: ClientConfig,
        metrics: Arc<Metrics>,
    ) -> anyhow::Result<Self> {
        let producer = start(&client, &metrics).with_context(|| {
            format!("kafka: no producer for kafka.brokers = {:?}; look at the [kafka] settings", kafka.brokers)
        })?;
        let producer = Mutex::new(producer);
        Ok(Publisher { shared: Arc::new(Shared { kafka: kafka.clone(), client, metrics, producer }) })
    }

    /// Sends the records of all items in parallel and returns when each was reported of: delivered to all in-sync replicas,
    /// refused, or given up after `kafka.delivery_timeout`. Waits for room where librdkafka's queue is full; drops nothing.
    ///
    /// `record` makes the record of an item, the same one each time. It is made when it is handed over, and freed then, since
    /// librdkafka has its own copy: made beforehand, those of a page would be held twice. Where some are refused they are made again.
    ///
    /// Brokers refuse a batch for one of its records, so those refused are sent again, each alone, and only those refused
    /// again count as refused. Want of rights is the topic's before it is a record's: such a record counts as refused only
    /// if the topic takes another of the page right afterwards; else the page is an error.
    ///
    /// Abandoning the future abandons the reports, not the records: those handed over may still be delivered.
    pub async fn publish_page<T: Sync>(
        &self,
        items: &[T],
        record: impl Fn(&T) -> Record + Sync,
    ) -> Result<Published, PublishError> {
        if fault::planted("no-kafka-flush") {
            let (page, producer) = (Page::new(), self.shared.producer());
            for item in items {
                self.hand_over(&producer, &record(item), &page).await;
            }
            return Ok(Published { records: items.len(), refused: Vec::new() });
        }
        let together = self.send(items.iter().map(&record)).await?;
        if together.failures.refused.is_empty() {
            return Ok(Published { records: together.delivered, refused: Vec::new() });
        }
        let suspects: HashSet<&str> = together.failures.refused.iter().map(|record| record.key.as_str()).collect();
        let mut published = Published { records: together.delivered, refused: Vec::new() };
        let mut rights_in_doubt = together.lack_rights();
        if rights_in_doubt && together.delivered == 0 {
            return Err(together.error(self.topic(), Verdict::NotAuthorized));
        }
        let mut topic_is_open = false;
        let is_suspect = |record: &Record| suspects.contains(record.key.as_str());
        for suspect in items.iter().map(&record).filter(is_suspect) {
            let alone = self.send_after(rights_in_doubt, &suspect).await?;
            rights_in_doubt = alone.lack_rights();
            if rights_in_doubt && !topic_is_open {
                // One that was taken with the others stands for the topic.
                let taken = items.iter().map(&record).find(|record| !is_suspect(record));
                topic_is_open = match taken {
                    Some(taken) => !self.send_after(true, &taken).await?.lack_rights(),
                    None => false,
                };
                if !topic_is_open {
                    return Err(alone.error(self.topic(), Verdict::NotAuthorized));
                }
                rights_in_doubt = false;
            }
            published.records += alone.delivered;
            published.refused.extend(alone.failures.refused);
        }
        Ok(published)
    }

    /// Sends records in parallel and awaits their reports. An error if any failed for a reason that passes, or if the
    /// producer came to its end.
    async fn send(&self, records: impl Iterator<Item: Borrow<Record>>) -> Result<Reports, PublishError> {
        let producer = self.shared.producer();
        let page = Page::new();
        for record in records {
            self.hand_over(&producer, record.borrow(), &page).await;
            // Making one and handing it over takes some microseconds; a page of them must not keep the thread from other tasks.
            tokio::task::consume_budget().await;
        }
        let reports = page.wait().await;
        if reports.failed() > 0
            && let Some((code, reason)) = producer.client().fatal_error()
        {
            tracing::error!(%code, reason, "the kafka producer has come to its end and is replaced");
            self.replace(producer).await;
            return Err(reports.error(self.topic(), Verdict::Restarted));
        }
        if reports.failures.passing > 0 {
            return Err(reports.error(self.topic(), Verdict::Retry));
        }
        Ok(reports)
    }

    /// Sends one record. With its rights in doubt, librdkafka is made to look at the topic first: once told that it may
    /// not write there, it refuses every record by itself until it has looked again.
    async fn send_after(&self, rights_in_doubt: bool, record: &Record) -> Result<Reports, PublishError> {
        if rights_in_doubt && let Err(error) = self.check(LOOK_AGAIN).await {
            // The record tells, which is sent all the same.
            tracing::debug!(%error, "the topic could not be looked at again");
        }
        self.send(iter::once(record)).await
    }

    fn topic(&self) -> &str {
        &self.shared.kafka.topic
    }

    async fn hand_over(&self, producer: &Producer, record: &Record, page: &Arc<Page>) {
        page.expect_one();
        let mut message = BaseRecord::with_opaque_to(&self.shared.kafka.topic, Arc::clone(page))
            .key(&record.key)
            .payload(&record.value)
            .headers(record.headers());
        loop {
            match producer.send(message) {
                Ok(()) => return,
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), rejected)) => {
                    message = rejected;
                    tokio::time::sleep(QUEUE_FULL_PAUSE).await;
                }
                Err((error, _)) => {
                    let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                    return page.report(Err((code, record.key.as_bytes())));
                }
            }
        }
    }

    /// Replaces `ended` by a fresh producer, unless another page did so already.
    async fn replace(&self, ended: Arc<Producer>) {
        let shared = Arc::clone(&self.shared);
        let replaced = task::spawn_blocking(move || {
            let mut producer = shared.producer.lock().unwrap_or_else(PoisonError::into_inner);
            if Arc::ptr_eq(&producer, &ended) {
                *producer = start(&shared.client, &shared.metrics)?;
            }
            anyhow::Ok(())
        });
        // The ended producer stays if that failed, and the next page comes here again.
        if let Ok(Err(error)) = replaced.await {
            tracing::error!(error = format!("{error:#}"), "no new kafka producer; the next page tries again");
        }
    }

    /// Waits until everything handed over was reported of, at most for `timeout`; says whether that is so. For pages
    /// whose future was abandoned: [`Publisher::publish_page`] waits for its own.
    pub async fn flush(&self, timeout: Duration) -> bool {
        let producer = self.shared.producer();
        let flushed = task::spawn_blocking(move || producer.flush(timeout).is_ok());
        flushed.await.unwrap_or(false)
    }

    /// Asks the brokers for the topic; an answer, or the reason for none, comes within `timeout`.
    pub async fn check(&self, timeout: Duration) -> Result<TopicInfo, TopicError> {
        let producer = self.shared.producer();
        let shared = Arc::clone(&self.shared);
        let asked = task::spawn_blocking(move || {
            let client = producer.client();
            topic::look_at(client, client.context().log(), &shared.kafka, timeout)
        });
        asked.await.unwrap_or_else(|_| Err(TopicError::interrupted(&self.shared.kafka)))
    }

    /// For tests: the native producer.
    #[cfg(test)]
    pub(super) fn native(&self) -> *mut rdkafka::bindings::rd_kafka_t {
        self.shared.producer().client().native_ptr()
    }
}

impl Shared {
    fn producer(&self) -> Arc<Producer> {
        Arc::clone(&self.producer.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Starts a producer and the thread that serves its reports. The thread ends, and the producer with it, within
/// [`SERVE_FOR`] of the last of the other owners.
fn start(client: &ClientConfig, metrics: &Metrics) -> anyhow::Result<Arc<Producer>> {
    let producer: Arc<Producer> = Arc::new(client.create_with_context(Deliveries::new(metrics))?);
    let served = Arc::downgrade(&producer);
    std::thread::Builder::new().name("kafka reports".to_owned()).spawn(move || {
        while let Some(producer) = served.upgrade() {
            producer.poll(SERVE_FOR);
        }
    })?;
    Ok(producer)
}
