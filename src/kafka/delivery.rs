//! Waiting for the delivery reports of a page.
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

/// A page was delivered whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// Records that all in-sync replicas have.
    pub records: usize,
}

/// A page was not delivered whole. Those of its records that were are harmless when sent again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct PublishError {
    /// Topic of the page.
    pub topic: String,
    /// Records that were delivered.
    pub delivered: usize,
    /// Records that were not, or of which that is not known.
    pub failed: usize,
    /// Key of the record that failed first; a refused one goes before others, because it will be refused again.
    pub key: String,
    /// Why it failed.
    pub code: RDKafkaErrorCode,
    /// What to do.
    pub verdict: Verdict,
}

/// What to do about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Send the page again later.
    Retry,
    /// The producer had come to its end and was replaced. Send the page again.
    Restarted,
    /// Sending it again is of no use: the record is too large or not valid, or writing it is not permitted.
    Refused,
}

impl Verdict {
    fn of(code: RDKafkaErrorCode) -> Verdict {
        use RDKafkaErrorCode::*;
        match code {
            MessageSizeTooLarge
            | InvalidMessage
            | InvalidMessageSize
            | InvalidRecord
            | InvalidTimestamp
            | PolicyViolation
            | TopicAuthorizationFailed
            | ClusterAuthorizationFailed => Verdict::Refused,
            // A topic that is missing is among these: `setup` or the operator creates it, and the page goes out.
            _ => Verdict::Retry,
        }
    }
}

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PublishError { topic, delivered, failed, key, code, verdict } = self;
        write!(f, "kafka topic {topic:?}: {failed} of {} records not delivered; ", delivered + failed)?;
        write!(f, "key {key}: {code}; ")?;
        f.write_str(match verdict {
            Verdict::Retry => "send the page again later",
            Verdict::Restarted => "the producer was restarted, send the page again",
            Verdict::Refused => "do not send it again before the record, the topic's limits or the permissions change",
        })
    }
}

/// Counts the reports of one page.
pub(super) struct Page {
    /// Reports to come, and one for the sender until it has sent all.
    outstanding: AtomicUsize,
    delivered: AtomicUsize,
    failures: Mutex<Failures>,
    done: Notify,
}

#[derive(Default)]
struct Failures {
    count: usize,
    first: Option<(String, RDKafkaErrorCode)>,
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
                failures.count += 1;
                let refused = |code| Verdict::of(code) == Verdict::Refused;
                if failures.first.as_ref().is_none_or(|(_, first)| refused(code) && !refused(*first)) {
                    failures.first = Some((String::from_utf8_lossy(key).into_owned(), code));
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
    pub async fn wait(&self, topic: &str) -> Result<Published, PublishError> {
        self.count_down();
        self.done.notified().await;
        let delivered = self.delivered.load(Ordering::Relaxed);
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        match &failures.first {
            None => Ok(Published { records: delivered }),
            Some((key, code)) => Err(PublishError {
                topic: topic.to_owned(),
                delivered,
                failed: failures.count,
                key: key.clone(),
                code: *code,
                verdict: Verdict::of(*code),
            }),
        }
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
