//! Looking at the topic, and creating it.

use std::sync::Arc;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::{Client, ClientContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use super::client::{self, ClientLog};
use crate::config;
use crate::task;

/// What the brokers say of the topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopicInfo {
    /// Its partitions.
    pub partitions: usize,
    /// It did not exist before this call.
    pub created: bool,
}

/// The topic cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kafka topic {topic:?} on {brokers}: {problem}; {remedy}")]
pub struct TopicError {
    /// Value of `kafka.topic`.
    pub topic: String,
    /// Value of `kafka.brokers`.
    pub brokers: String,
    /// What is wrong.
    pub problem: String,
    /// What to do about it.
    pub remedy: &'static str,
}

const CHECK_BROKERS: &str = "see that the brokers run, that kafka.brokers (WRITE_API_KAFKA_BROKERS) names them and that the security settings \
     of [kafka] are theirs";
const CREATE: &str = "create it with `write-api setup`, or name another in kafka.topic";
const CHECK_PERMISSIONS: &str = "see the brokers' log and the permissions of this client";

impl TopicError {
    fn new(kafka: &config::Kafka, problem: impl Into<String>, remedy: &'static str) -> Self {
        TopicError { topic: kafka.topic.clone(), brokers: kafka.brokers.clone(), problem: problem.into(), remedy }
    }

    pub(super) fn interrupted(kafka: &config::Kafka) -> Self {
        Self::new(kafka, "the question was interrupted", "ask again")
    }

    fn is_missing(&self) -> bool {
        self.remedy == CREATE
    }
}

/// Asks for the topic's partitions. Blocks for up to `timeout`.
pub(super) fn look_at<C: ClientContext>(
    client: &Client<C>,
    log: &ClientLog,
    kafka: &config::Kafka,
    timeout: Duration,
) -> Result<TopicInfo, TopicError> {
    let metadata = client.fetch_metadata(Some(&kafka.topic), timeout).map_err(|error| {
        let cause = log.recent_cause().unwrap_or_else(|| describe(&error));
        TopicError::new(kafka, format!("no answer within {timeout:?} ({cause})"), CHECK_BROKERS)
    })?;
    let topic = metadata.topics().iter().find(|topic| topic.name() == kafka.topic);
    let Some(topic) = topic else {
        return Err(TopicError::new(kafka, "does not exist", CREATE));
    };
    match topic.error().map(RDKafkaErrorCode::from) {
        None if topic.partitions().is_empty() => Err(TopicError::new(kafka, "has no partitions", CREATE)),
        None => Ok(TopicInfo { partitions: topic.partitions().len(), created: false }),
        Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => {
            Err(TopicError::new(kafka, "does not exist", CREATE))
        }
        Some(code) => Err(TopicError::new(kafka, code.to_string(), CHECK_PERMISSIONS)),
    }
}

/// Asks for the topic on a connection of its own; an answer, or the reason for none, comes within `timeout`.
pub async fn inspect_topic(kafka: &config::Kafka, timeout: Duration) -> Result<TopicInfo, TopicError> {
    ask(&admin(kafka)?, kafka, timeout).await
}

type Admin = Arc<AdminClient<ClientLog>>;

fn admin(kafka: &config::Kafka) -> Result<Admin, TopicError> {
    let admin = client::common(kafka).create_with_context(ClientLog::default());
    admin.map(Arc::new).map_err(|error| TopicError::new(kafka, describe(&error), CHECK_BROKERS))
}

async fn ask(admin: &Admin, kafka: &config::Kafka, timeout: Duration) -> Result<TopicInfo, TopicError> {
    let (admin, settings) = (Arc::clone(admin), kafka.clone());
    let asked = task::spawn_blocking(move || look_at(admin.inner(), admin.inner().context(), &settings, timeout)).await;
    asked.unwrap_or_else(|_| Err(TopicError::interrupted(kafka)))
}

/// Creates the topic with the partitions and replicas of the settings if it does not exist. One that exists is left as
/// it is; compare [`TopicInfo::partitions`]. Each of the two questions gets `timeout`.
pub async fn ensure_topic(kafka: &config::Kafka, timeout: Duration) -> Result<TopicInfo, TopicError> {
    let admin = admin(kafka)?;
    match ask(&admin, kafka, timeout).await {
        Err(error) if error.is_missing() => {}
        known => return known,
    }

    let replication = TopicReplication::Fixed(kafka.replication_factor as i32);
    let topic = NewTopic::new(&kafka.topic, kafka.partitions as i32, replication);
    let options = AdminOptions::new().request_timeout(Some(timeout)).operation_timeout(Some(timeout));
    let answers = admin.create_topics([&topic], &options).await.map_err(|error| {
        let problem = format!("was not created: no answer within {timeout:?} ({})", describe(&error));
        TopicError::new(kafka, problem, "see that the brokers allow this client to create topics, or create it by hand")
    })?;
    match answers.into_iter().next() {
        // Someone else was faster; theirs will do.
        Some(Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => {
            Ok(TopicInfo { partitions: kafka.partitions as usize, created: true })
        }
        Some(Err((_, code))) => Err(TopicError::new(
            kafka,
            format!(
                "was not created with {} partitions of {} replicas: {code}",
                kafka.partitions, kafka.replication_factor
            ),
            "set kafka.partitions and kafka.replication_factor to what the brokers allow, or create it by hand",
        )),
        None => Err(TopicError::new(kafka, "was not created: an empty answer", CHECK_PERMISSIONS)),
    }
}

/// librdkafka's own words, without the wrapper's.
fn describe(error: &KafkaError) -> String {
    error.rdkafka_error_code().map_or_else(|| error.to_string(), |code| code.to_string())
}
