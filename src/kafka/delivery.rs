//! Waiting for the delivery reports of records that were sent together.
//!
//! Every record of a page carries a pointer to the same counter; its report counts it down, and the last one wakes the
//! one task that waits. A channel and a task for each record would do the same with a thousand times the allocations.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::IntCounter;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Message};
use rdkafka::producer::ProducerContext;
use tokio::sync::Notify;

use super::client::ClientLog;
use crate::metrics::Metrics;
use crate::task::{For, wait};

/// Every record of a page has met its end: it was delivered, or it is refused for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Records that all in-sync replicas have.
    pub records: usize,
    /// Those that Kafka takes neither with others nor alone.
    pub refused: Vec<RefusedRecord>,
}

/// A record that sending again is of no use for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedRecord {
    /// Its key.
    pub key: String,
    /// Why it is refused.
    pub code: RDKafkaErrorCode,
}

/// A page has to be sent again. Those of its records that were delivered are harmless when sent again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct PublishError {
    /// Topic of the page.
    pub topic: String,
    /// Records that were delivered.
    pub delivered: usize,
    /// Records that were not, or of which that is not known.
    pub failed: usize,
    /// Key of the record that failed first.
    pub key: String,
    /// Why it failed.
    pub code: RDKafkaErrorCode,
    /// What to do.
    pub verdict: Verdict,
}

/// What to do about a page that was not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Send the page again later.
    Retry,
    /// The producer had come to its end and was replaced. Send the page again.
    Restarted,
    /// Send the page again later: the topic takes no record of ours until somebody gives us the right to write to it.
    NotAuthorized,
}

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PublishError { topic, delivered, failed, key, code, verdict } = self;
        write!(f, "kafka topic {topic:?}: {failed} of {} records not delivered; ", delivered + failed)?;
        write!(f, "key {key}: {code}; ")?;
        f.write_str(match verdict {
            Verdict::Retry => "send the page again later",
            Verdict::Restarted => "the producer was restarted, send the page again",
            Verdict::NotAuthorized => "give this client the right to write to the topic, the page is sent again later",
        })
    }
}

/// What a failed delivery says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// Nothing of the record: brokers, the network, the topic or the producer are at fault.
    Passing,
    /// The record, or one that shared its batch, will never be taken.
    Record,
    /// We may not write here. That may be about the record where something before the brokers judges records.
    Rights,
}

impl Failure {
    /// Sorts a code of a delivery report. Whether the producer has come to its end is no matter of codes: librdkafka is
    /// asked.
    pub fn of(code: RDKafkaErrorCode) -> Failure {
        use RDKafkaErrorCode::*;
        match code {
            // A batch that is too large may be of records that are not.
            MessageSizeTooLarge | MessageBatchTooLarge | InvalidMessage | InvalidMessageSize | InvalidRecord
            | PolicyViolation => Failure::Record,
            TopicAuthorizationFailed | ClusterAuthorizationFailed => Failure::Rights,
            // A topic that is missing is among these: `setup` or the operator creates it, and the page goes out. So is a
            // timestamp, which is that of the sending: a clock that is wrong now is right later.
            _ => Failure::Passing,
        }
    }
}

/// Counts the reports of records that were sent together.
pub(super) struct Page {
    /// Reports to come, and one for the sender until it has sent all.
    outstanding: AtomicUsize,
    delivered: AtomicUsize,
    failures: Mutex<Failures>,
    done: Notify,
}

/// What the reports of records that were sent together add up to.
#[derive(Debug, Default)]
pub(super) struct Reports {
    /// Records that all in-sync replicas have.
    pub delivered: usize,
    /// What failed.
    pub failures: Failures,
}

/// Failed records.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// How many failed for a reason that passes.
    pub passing: usize,
    /// The first of those.
    pub first_passing: Option<RefusedRecord>,
    /// Those that were refused.
    pub refused: Vec<RefusedRecord>,
}

impl Reports {
    /// Whether any was refused for want of rights.
    pub fn lack_rights(&self) -> bool {
        self.failures.refused.iter().any(|record| Failure::of(record.code) == Failure::Rights)
    }

    /// How many were not delivered, or not known to be.
    pub fn failed(&self) -> usize {
        self.failures.passing + self.failures.refused.len()
    }

    /// The error that gives `verdict` and names the first record that it is about.
    pub fn error(&self, topic: &str, verdict: Verdict) -> PublishError {
        let first = self.failures.first_passing.as_ref().or(self.failures.refused.first());
        PublishError {
            topic: topic.to_owned(),
            delivered: self.delivered,
            failed: self.failed(),
            key: first.map(|record| record.key.clone()).unwrap_or_default(),
            code: first.map_or(RDKafkaErrorCode::NoError, |record| record.code),
            verdict,
        }
    }
}

impl Page {
    pub fn new() -> Arc<Page> {
        Arc::new(Page {
            outstanding: AtomicUsize::new(1),
            delivered: AtomicUsize::new(0),
            failures: Mutex::default(),
            done: Notify::new(),
        })
    }

    /// One more report to wait for. To be called before the record is handed over, because its report can be faster.
    pub fn expect_one(&self) {
        self.outstanding.fetch_add(1, Ordering::Relaxed);
    }

    /// One report has come.
    pub fn report(&self, result: Result<(), (RDKafkaErrorCode, &[u8])>) {
        match result {
            Ok(()) => {
                self.delivered.fetch_add(1, Ordering::Relaxed);
            }
            Err((code, key)) => {
                let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
                let record = || RefusedRecord { key: String::from_utf8_lossy(key).into_owned(), code };
                match Failure::of(code) {
                    Failure::Passing => {
                        failures.passing += 1;
                        failures.first_passing.get_or_insert_with(record);
                    }
                    Failure::Record | Failure::Rights => failures.refused.push(record()),
                }
            }
        }
        self.count_down();
    }

    fn count_down(&self) {
        // Release: the counts above are written before; acquire: the last one sees those of all others.
        if self.outstanding.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.done.notify_one();
        }
    }

    /// Waits until every record sent was reported of. To be called once, when all were handed over.
    pub async fn wait(&self) -> Reports {
        self.count_down();
        wait(For::Kafka, self.done.notified()).await;
        let delivered = self.delivered.load(Ordering::Relaxed);
        let failures = std::mem::take(&mut *self.failures.lock().unwrap_or_else(PoisonError::into_inner));
        Reports { delivered, failures }
    }
}

/// What the producer calls back.
pub(super) struct Deliveries {
    log: ClientLog,
    ok: IntCounter,
    error: IntCounter,
}

impl Deliveries {
    pub fn new(metrics: &Metrics) -> Self {
        Deliveries {
            log: ClientLog::default(),
            ok: metrics.kafka_deliveries.with_label_values(&["ok"]),
            error: metrics.kafka_deliveries.with_label_values(&["error"]),
        }
    }

    pub fn log(&self) -> &ClientLog {
        &self.log
    }
}

impl ClientContext for Deliveries {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.log.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.log.error(error, reason);
    }
}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = Arc<Page>;

    fn delivery(&self, result: &DeliveryResult<'_>, page: Arc<Page>) {
        match result {
            Ok(_) => {
                self.ok.inc();
                page.report(Ok(()));
            }
            Err((error, message)) => {
                self.error.inc();
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                page.report(Err((code, message.key().unwrap_or_default())));
            }
        }
    }
}
