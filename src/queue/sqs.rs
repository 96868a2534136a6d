//! SQS: the calls that the service makes, each with a bound, and nothing of the SDK's types outside this file.
//!
//! Retry follows meaning. A receive, a visibility change and a delete are not retried by the SDK: the poll loop comes
//! round again, the keeper asks again before the lease ends, and a message that was not deleted is delivered again and
//! recognised. A send is retried: losing it would cost a whole delivery.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use aws_config::retry::RetryConfig;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;
use aws_config::timeout::TimeoutConfig;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_sqs::types::{
    BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry,
    MessageAttributeValue, MessageSystemAttributeName, QueueAttributeName, SendMessageBatchRequestEntry,
};
use futures::FutureExt;
use tokio::time::Instant;

use super::attributes::{Attributes, MAX_RECEIVE_COUNT, RETENTION, Redrive, dead_letter_queue};
use super::batch::BATCH;
use super::reason::{REASON_ATTRIBUTE, shorter_reasons, with_what_goes};
use super::{Message, Refusal};
use crate::config;
use crate::fault;
use crate::metrics::Metrics;
use crate::task::{For, wait};

/// The longest that SQS holds a message back when it is sent.
pub const MOST_DELAY: Duration = Duration::from_secs(900);

/// Name of the message attribute that counts how often an operator sent a message again from its dead-letter queue. It
/// travels with the event, so that one that is refused each time can be told.
pub const REDRIVES_ATTRIBUTE: &str = "redrives";

/// A count of redrives that is there and cannot be read: whoever must not go in circles goes no further.
pub const REDRIVES_UNREADABLE: u32 = u32::MAX;

/// Why a call to SQS failed.
#[derive(Debug, thiserror::Error)]
#[error("SQS {action} on {queue} failed: {message}")]
pub struct SqsError {
    pub(super) action: &'static str,
    pub(super) queue: String,
    pub(super) message: String,
    /// SQS's error code, such as `AWS.SimpleQueueService.NonExistentQueue`, if it answered.
    pub code: Option<String>,
    pub(super) timeout: bool,
}

impl SqsError {
    fn new<E>(action: &'static str, queue: &str, error: SdkError<E>) -> Self
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let code = error.code().map(str::to_owned);
        let timeout = matches!(error, SdkError::TimeoutError(_));
        // The causes in one line each; the SDK's own way to show them adds pages of its inner state.
        let message = format!("{:#}", anyhow::Error::new(error));
        SqsError { action, queue: queue.to_owned(), message, code, timeout }
    }

    fn no_answer(action: &'static str, queue: &str, bound: Duration) -> Self {
        let message = format!("no answer within {bound:?}");
        SqsError { action, queue: queue.to_owned(), message, code: None, timeout: true }
    }

    /// Whether SQS says that something about the message is wrong: its size, its characters. Sending the same again is
    /// in vain.
    pub fn is_about_the_message(&self) -> bool {
        const CODES: [&str; 4] =
            ["InvalidParameterValue", "InvalidMessageContents", "InvalidAttributeValue", "BatchRequestTooLong"];
        self.code.as_deref().is_some_and(|code| CODES.iter().any(|known| code.contains(known)))
    }

    /// Whether SQS says that there is no such queue.
    pub fn is_missing_queue(&self) -> bool {
        self.code.as_deref().is_some_and(|code| code.contains("NonExistentQueue") || code.contains("QueueDoesNotExist"))
    }
}

/// A queue that was looked up.
#[derive(Debug, Clone)]
pub struct Queue {
    /// Its name.
    pub name: Arc<str>,
    /// Its address, which tells queues of the same name apart.
    pub url: Arc<str>,
}

/// What became of one entry of a visibility change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extension {
    /// It is hidden for the time asked.
    Extended,
    /// SQS will not: the receipt is stale, the message is gone, or 12 h are over. The message may be with another.
    Refused(String),
    /// SQS did not do it now; asking again may help.
    Failed(String),
}

/// What became of one entry of a batch that was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sent {
    /// SQS has it.
    Accepted,
    /// SQS will never take it: the message itself is wrong.
    Refused(String),
    /// SQS did not take it now; sending it again may help.
    Failed(String),
}

/// A client of SQS; cloning shares its connections.
#[derive(Clone)]
pub struct Sqs {
    client: Client,
    metrics: Arc<Metrics>,
    request_timeout: Duration,
}

impl Sqs {
    /// A client with connections of its own. Nothing is called yet.
    pub async fn new(aws: &config::Aws, queue: &config::Queue, metrics: Arc<Metrics>) -> Self {
        let mut loader = crate::aws::loader(&aws.region)
            .retry_config(RetryConfig::disabled())
            // Meant for streamed bodies; a long poll is silent by design.
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(queue.request_timeout)
                    .operation_attempt_timeout(queue.request_timeout)
                    .build(),
            );
        if let Some(url) = &aws.endpoint_url {
            loader = loader.endpoint_url(url);
        }
        Sqs { client: Client::new(&loader.load().await), metrics, request_timeout: queue.request_timeout }
    }

    fn count<T>(&self, action: &'static str, result: &Result<T, SqsError>) {
        let result = match result {
            Ok(_) => "ok",
            Err(error) if error.timeout => "timeout",
            Err(_) => "error",
        };
        self.metrics.sqs_calls.with_label_values(&[action, result]).inc();
    }

    /// Bounds a whole call, retries and credentials included: a second line behind the SDK's own attempt timeout.
    // Not async: the wait belongs to the place of the call.
    #[track_caller]
    fn bounded<T>(
        &self,
        action: &'static str,
        queue: &str,
        bound: Duration,
        call: impl Future<Output = Result<T, SqsError>>,
    ) -> impl Future<Output = Result<T, SqsError>> {
        wait(For::Queue, tokio::time::timeout(bound, call)).map(move |answered| {
            let result = answered.unwrap_or_else(|_| Err(SqsError::no_answer(action, queue, bound)));
            self.count(action, &result);
            result
        })
    }

    /// Looks a queue up by name.
    pub async fn queue(&self, name: &str) -> Result<Queue, SqsError> {
        let action = "GetQueueUrl";
        let call = async {
            let output = self.client.get_queue_url().queue_name(name).send().await;
            let output = output.map_err(|error| SqsError::new(action, name, error))?;
            Ok(Queue { name: name.into(), url: output.queue_url.unwrap_or_default().into() })
        };
        self.bounded(action, name, self.request_timeout * 2, call).await
    }

    /// Waits up to `wait` for up to `max` messages, which stay hidden from others for `visibility`.
    pub async fn receive(
        &self,
        queue: &Queue,
        max: usize,
        wait: Duration,
        visibility: Duration,
    ) -> Result<Vec<Message>, SqsError> {
        let (messages, received_at) = self.receive_with(queue, max, wait, visibility, &SERVICE_READS).await?;
        Ok(messages.into_iter().filter_map(|message| received(message, received_at)).collect())
    }

    /// As [`receive`](Self::receive), of a dead-letter queue: with what tells where each message comes from.
    pub async fn receive_dead_letters(
        &self,
        dead: &Queue,
        wait: Duration,
        visibility: Duration,
    ) -> Result<Vec<DeadLetter>, SqsError> {
        let (messages, received_at) = self.receive_with(dead, BATCH, wait, visibility, &REPAIR_READS).await?;
        Ok(messages.into_iter().filter_map(|message| dead_letter(message, received_at)).collect())
    }

    async fn receive_with(
        &self,
        queue: &Queue,
        max: usize,
        wait: Duration,
        visibility: Duration,
        reads: &Reads,
    ) -> Result<(Vec<aws_sdk_sqs::types::Message>, Instant), SqsError> {
        let action = "ReceiveMessage";
        let none = Duration::from_secs(24 * 3600);
        let bound = if fault::planted("no-receive-timeout") { none } else { wait + self.request_timeout };
        let call = async {
            let request = self
                .client
                .receive_message()
                .queue_url(&*queue.url)
                .max_number_of_messages(max.min(BATCH) as i32)
                .wait_time_seconds(whole_seconds(wait))
                .visibility_timeout(whole_seconds(visibility))
                .set_message_attribute_names(Some(reads.attributes.iter().map(|&name| name.to_owned()).collect()))
                .set_message_system_attribute_names(Some(reads.system.to_vec()))
                .customize()
                .config_override(
                    aws_sdk_sqs::config::Builder::new()
                        .timeout_config(TimeoutConfig::builder().operation_attempt_timeout(bound).build()),
                );
            request.send().await.map_err(|error| SqsError::new(action, &queue.name, error))
        };
        let output = self.bounded(action, &queue.name, bound + self.request_timeout, call).await?;
        Ok((output.messages.unwrap_or_default(), Instant::now()))
    }

    /// Deletes up to ten messages. Returns how many SQS did not delete.
    pub async fn delete(&self, queue: &Queue, receipts: &[String]) -> Result<usize, SqsError> {
        let action = "DeleteMessageBatch";
        let call = async {
            let entries = receipts.iter().enumerate().map(|(index, receipt)| {
                DeleteMessageBatchRequestEntry::builder()
                    .id(index.to_string())
                    .receipt_handle(receipt)
                    .build()
                    .expect("id and receipt are set")
            });
            let request =
                self.client.delete_message_batch().queue_url(&*queue.url).set_entries(Some(entries.collect()));
            request.send().await.map_err(|error| SqsError::new(action, &queue.name, error))
        };
        Ok(self.bounded(action, &queue.name, self.request_timeout * 2, call).await?.failed.len())
    }

    /// Sets how long up to ten messages stay hidden from now on, each by its own time. One result per entry.
    pub async fn change_visibility(
        &self,
        queue: &Queue,
        entries: &[(String, Duration)],
    ) -> Result<Vec<Extension>, SqsError> {
        let action = "ChangeMessageVisibilityBatch";
        let call = async {
            let entries = entries.iter().enumerate().map(|(index, (receipt, visibility))| {
                ChangeMessageVisibilityBatchRequestEntry::builder()
                    .id(index.to_string())
                    .receipt_handle(receipt)
                    .visibility_timeout(whole_seconds(*visibility))
                    .build()
                    .expect("id and receipt are set")
            });
            let request = self
                .client
                .change_message_visibility_batch()
                .queue_url(&*queue.url)
                .set_entries(Some(entries.collect()));
            request.send().await.map_err(|error| SqsError::new(action, &queue.name, error))
        };
        let output = self.bounded(action, &queue.name, self.request_timeout * 2, call).await?;
        let done = output.successful.into_iter().map(|success| success.id);
        // A refusal is about this receipt: it is stale, gone, or past its 12 h.
        Ok(by_entry(entries.len(), done, output.failed, Extension::Extended, Extension::Refused, Extension::Failed))
    }

    /// Sends one message, retrying what passes.
    pub async fn send(&self, queue: &Queue, body: &str) -> Result<(), SqsError> {
        self.send_with(queue, body, None, 0, Duration::ZERO).await
    }

    /// Sends a message that has been `redrives` times through a dead-letter queue, with that count.
    pub async fn send_redriven(&self, queue: &Queue, body: &str, redrives: u32) -> Result<(), SqsError> {
        self.send_with(queue, body, None, redrives, Duration::ZERO).await
    }

    /// As [`send_redriven`](Self::send_redriven); nobody receives the message before `delay` is over, at most
    /// [`MOST_DELAY`].
    pub async fn send_delayed(
        &self,
        queue: &Queue,
        body: &str,
        redrives: u32,
        delay: Duration,
    ) -> Result<(), SqsError> {
        self.send_with(queue, body, None, redrives, delay).await
    }

    async fn send_with(
        &self,
        queue: &Queue,
        body: &str,
        refusal: Option<&str>,
        redrives: u32,
        delay: Duration,
    ) -> Result<(), SqsError> {
        let action = "SendMessage";
        let call = async {
            let mut request = self.client.send_message().queue_url(&*queue.url).message_body(body);
            if !delay.is_zero() {
                request = request.delay_seconds(whole_seconds(delay.min(MOST_DELAY)));
            }
            let attribute = |kind: &str, value: &str| {
                let attribute = MessageAttributeValue::builder().data_type(kind).string_value(value).build();
                attribute.expect("the data type is set")
            };
            if let Some(reason) = refusal {
                request = request.message_attributes(REASON_ATTRIBUTE, attribute("String", reason));
            }
            if redrives > 0 {
                request = request.message_attributes(REDRIVES_ATTRIBUTE, attribute("Number", &redrives.to_string()));
            }
            let request = request
                .customize()
                .config_override(aws_sdk_sqs::config::Builder::new().retry_config(RetryConfig::standard()));
            request.send().await.map_err(|error| SqsError::new(action, &queue.name, error))?;
            Ok(())
        };
        self.bounded(action, &queue.name, self.request_timeout * 4, call).await
    }

    /// Sends a refused message on to its dead-letter queue, with as much of the reason as goes. The count of redrives goes
    /// in any case: the message came with it, so there is room for it.
    pub async fn send_refused(
        &self,
        dead: &Queue,
        refusal: &Refusal,
        message: &Message,
        source: &Queue,
    ) -> Result<(), SqsError> {
        let reasons = shorter_reasons(refusal, message, &source.name);
        let whole = reasons[0].clone();
        let send = |reason: Option<String>| async move {
            self.send_with(dead, &message.body, reason.as_deref(), message.redrives, Duration::ZERO).await
        };
        let went = with_what_goes(reasons, send).await?;
        if went != whole {
            let (message_id, with) = (message.id.as_str(), went.unwrap_or_default());
            tracing::warn!(message_id, with, "a refused event had no room for its reason in the dead-letter queue");
        }
        Ok(())
    }

    /// Sends up to ten messages, at most [`BATCH_BYTES`](super::batch::BATCH_BYTES) together. One result per message.
    pub async fn send_batch(&self, queue: &Queue, bodies: &[&str]) -> Result<Vec<Sent>, SqsError> {
        let action = "SendMessageBatch";
        let call = async {
            let entries = bodies.iter().enumerate().map(|(index, body)| {
                SendMessageBatchRequestEntry::builder()
                    .id(index.to_string())
                    .message_body(*body)
                    .build()
                    .expect("id and body are set")
            });
            let request = self
                .client
                .send_message_batch()
                .queue_url(&*queue.url)
                .set_entries(Some(entries.collect()))
                .customize()
                .config_override(aws_sdk_sqs::config::Builder::new().retry_config(RetryConfig::standard()));
            request.send().await.map_err(|error| SqsError::new(action, &queue.name, error))
        };
        let output = self.bounded(action, &queue.name, self.request_timeout * 4, call).await?;
        let done = output.successful.into_iter().map(|success| success.id);
        Ok(by_entry(bodies.len(), done, output.failed, Sent::Accepted, Sent::Refused, Sent::Failed))
    }

    /// Creates a queue with its dead-letter queue where they are missing, and leaves alone what is there. Returns the
    /// names of those that it created.
    pub async fn ensure_queue(&self, name: &str, visibility: Duration) -> Result<Vec<String>, SqsError> {
        let dead = dead_letter_queue(name);
        let mut created = Vec::new();
        let dead_queue = match self.queue(&dead).await {
            Ok(queue) => queue,
            Err(error) if error.is_missing_queue() => {
                created.push(dead.clone());
                self.create(&dead, HashMap::new()).await?
            }
            Err(error) => return Err(error),
        };
        match self.queue(name).await {
            Ok(_) => {}
            Err(error) if error.is_missing_queue() => {
                let redrive = Redrive {
                    target_arn: self.attributes(&dead_queue).await?.arn,
                    max_receive_count: MAX_RECEIVE_COUNT,
                };
                let attributes = HashMap::from([
                    (QueueAttributeName::RedrivePolicy, redrive.policy()),
                    (QueueAttributeName::VisibilityTimeout, whole_seconds(visibility).to_string()),
                ]);
                self.create(name, attributes).await?;
                created.push(name.to_owned());
            }
            Err(error) => return Err(error),
        }
        Ok(created)
    }

    async fn create(&self, name: &str, mut attributes: HashMap<QueueAttributeName, String>) -> Result<Queue, SqsError> {
        let action = "CreateQueue";
        attributes.insert(QueueAttributeName::MessageRetentionPeriod, RETENTION.as_secs().to_string());
        let call = async {
            let request = self.client.create_queue().queue_name(name).set_attributes(Some(attributes));
            let output = request.send().await.map_err(|error| SqsError::new(action, name, error))?;
            Ok(Queue { name: name.into(), url: output.queue_url.unwrap_or_default().into() })
        };
        self.bounded(action, name, self.request_timeout * 2, call).await
    }

    /// About how many messages a queue has, those included that are hidden because somebody has received them.
    pub async fn depth(&self, queue: &Queue) -> Result<u64, SqsError> {
        let action = "GetQueueAttributes";
        let names = [
            QueueAttributeName::ApproximateNumberOfMessages,
            QueueAttributeName::ApproximateNumberOfMessagesNotVisible,
        ];
        let call = async {
            let request =
                self.client.get_queue_attributes().queue_url(&*queue.url).set_attribute_names(Some(names.to_vec()));
            let output = request.send().await.map_err(|error| SqsError::new(action, &queue.name, error))?;
            let given = output.attributes.unwrap_or_default();
            let number = |name| given.get(name).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
            Ok(names.iter().map(number).sum())
        };
        self.bounded(action, &queue.name, self.request_timeout * 2, call).await
    }

    /// How a queue is set up.
    pub async fn attributes(&self, queue: &Queue) -> Result<Attributes, SqsError> {
        let action = "GetQueueAttributes";
        let call = async {
            // All of them: to ask a standard queue whether it is FIFO is an error.
            let request =
                self.client.get_queue_attributes().queue_url(&*queue.url).attribute_names(QueueAttributeName::All);
            let output = request.send().await.map_err(|error| SqsError::new(action, &queue.name, error))?;
            let given = output.attributes.unwrap_or_default();
            let given = given.into_iter().map(|(name, value)| (name.as_str().to_owned(), value)).collect();
            Attributes::read(&given).map_err(|message| SqsError {
                action,
                queue: queue.name.to_string(),
                message,
                code: None,
                timeout: false,
            })
        };
        self.bounded(action, &queue.name, self.request_timeout * 2, call).await
    }
}

/// A message of a dead-letter queue.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// The message; its body is the event as it was sent.
    pub message: Message,
    /// The attribute `reason`; `None` where the service did not refuse it.
    pub reason: Option<String>,
    /// The queue that SQS itself took it from because it was received too often; `None` where SQS did not.
    pub moved_from: Option<String>,
    /// When it was sent, in milliseconds since 1970 by SQS's clock: to the dead-letter queue by the service, or, where SQS
    /// moved it, to its first queue by the producer. `None` where SQS does not tell.
    pub sent_at_ms: Option<i64>,
}

/// What a receive asks for beside bodies.
struct Reads {
    attributes: &'static [&'static str],
    system: &'static [MessageSystemAttributeName],
}

/// The service's own loops.
const SERVICE_READS: Reads =
    Reads { attributes: &[REDRIVES_ATTRIBUTE], system: &[MessageSystemAttributeName::ApproximateReceiveCount] };

const REPAIR_READS: Reads = Reads {
    attributes: &[REASON_ATTRIBUTE, REDRIVES_ATTRIBUTE],
    system: &[
        MessageSystemAttributeName::ApproximateReceiveCount,
        MessageSystemAttributeName::SentTimestamp,
        MessageSystemAttributeName::DeadLetterQueueSourceArn,
    ],
};

/// What became of the entries of a batch in their order, which their ids tell. A fault of the sender is final, but for a
/// throttle, which SQS counts as one.
fn by_entry<T: Clone>(
    length: usize,
    done: impl Iterator<Item = String>,
    failed: Vec<BatchResultErrorEntry>,
    success: T,
    refusal: impl Fn(String) -> T,
    failure: impl Fn(String) -> T,
) -> Vec<T> {
    let mut results = vec![failure("SQS did not mention the entry".to_owned()); length];
    let index = |id: &str| id.parse::<usize>().ok().filter(|index| *index < length);
    for index in done.filter_map(|id| index(&id)) {
        results[index] = success.clone();
    }
    for entry in failed {
        if let Some(index) = index(&entry.id) {
            let message = format!("{}: {}", entry.code, entry.message.unwrap_or_default());
            let is_final = entry.sender_fault && !entry.code.contains("Throttl");
            results[index] = if is_final { refusal(message) } else { failure(message) };
        }
    }
    results
}

/// SQS counts in whole seconds. What is cut off is not promised to anyone; less than a second becomes zero only where
/// zero was asked.
fn whole_seconds(duration: Duration) -> i32 {
    let seconds = duration.as_secs() + u64::from(duration.as_secs() == 0 && !duration.is_zero());
    i32::try_from(seconds.min(43_200)).expect("12 h in seconds fit")
}

/// The parts that the service needs. A message without them cannot be handled or deleted; SQS never sends one.
fn received(message: aws_sdk_sqs::types::Message, received_at: Instant) -> Option<Message> {
    let (Some(id), Some(receipt)) = (message.message_id, message.receipt_handle) else {
        tracing::error!(attributes = ?message.attributes, "SQS delivered a message without id or receipt handle; it cannot be handled");
        return None;
    };
    let receive_count = message
        .attributes
        .as_ref()
        .and_then(|all| all.get(&MessageSystemAttributeName::ApproximateReceiveCount))
        .and_then(|count| count.parse().ok())
        .unwrap_or(1);
    let redrives =
        message.message_attributes.as_ref().and_then(|all| all.get(REDRIVES_ATTRIBUTE)).map_or(0, |count| {
            count.string_value().and_then(|count| count.parse().ok()).unwrap_or(REDRIVES_UNREADABLE)
        });
    Some(Message { id, body: message.body.unwrap_or_default(), receipt, receive_count, redrives, received_at })
}

fn dead_letter(message: aws_sdk_sqs::types::Message, received_at: Instant) -> Option<DeadLetter> {
    let system = |name| message.attributes.as_ref().and_then(|all| all.get(&name)).cloned();
    let moved_from = system(MessageSystemAttributeName::DeadLetterQueueSourceArn);
    let sent_at_ms = system(MessageSystemAttributeName::SentTimestamp).and_then(|text| text.parse().ok());
    let reason = message.message_attributes.as_ref().and_then(|all| all.get(REASON_ATTRIBUTE)?.string_value.clone());
    Some(DeadLetter { message: received(message, received_at)?, reason, moved_from, sent_at_ms })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_entry_of_a_batch_has_its_result() {
        let failed = |id: &str, code: &str, sender_fault: bool| {
            let entry = BatchResultErrorEntry::builder().id(id).code(code).sender_fault(sender_fault);
            entry.message("why").build().expect("id, code and fault are set")
        };
        let entries = vec![
            failed("3", "InternalError", false),
            failed("1", "RequestThrottled", true),
            failed("2", "ReceiptHandleIsInvalid", true),
            failed("9", "InternalError", false),
        ];
        let done = ["4", "nonsense"].into_iter().map(str::to_owned);
        let failure = |reason: &str| Sent::Failed(reason.to_owned());
        assert_eq!(
            by_entry(5, done, entries, Sent::Accepted, Sent::Refused, Sent::Failed),
            [
                failure("SQS did not mention the entry"),
                failure("RequestThrottled: why"),
                Sent::Refused("ReceiptHandleIsInvalid: why".to_owned()),
                failure("InternalError: why"),
                Sent::Accepted,
            ]
        );
    }

    #[test]
    fn seconds_are_whole_and_zero_only_if_asked() {
        assert_eq!(whole_seconds(Duration::ZERO), 0);
        assert_eq!(whole_seconds(Duration::from_millis(300)), 1);
        assert_eq!(whole_seconds(Duration::from_millis(4900)), 4);
        assert_eq!(whole_seconds(Duration::from_secs(90_000)), 43_200);
    }
}
