//! Calls and answers of SQS's JSON protocol.

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body_util::Full;
use serde_json::{Value, json};

const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/x-amz-json-1.0");
/// SQS gives at most so many messages to a receive, and one where the call does not say.
const MOST_MESSAGES: u64 = 10;

pub(super) type Answer = Response<Full<Bytes>>;

/// One call.
#[derive(Debug)]
pub(super) struct Call {
    /// `ReceiveMessage`, for example.
    pub(super) action: String,
    /// The name of the queue, empty for calls without one.
    pub(super) queue: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Value,
}

impl Call {
    pub(super) fn read(headers: HeaderMap, body: &[u8]) -> Result<Self> {
        let target = headers.get("x-amz-target").and_then(|target| target.to_str().ok());
        let action = target.and_then(|target| target.strip_prefix("AmazonSQS."));
        let action = action.context("a request without x-amz-target is none of SQS's JSON protocol")?.to_owned();
        let body: Value = serde_json::from_slice(body).with_context(|| format!("the body of {action} is no JSON"))?;
        let text = |name: &str| body[name].as_str().unwrap_or_default();
        let by_url = text("QueueUrl").rsplit('/').next().unwrap_or_default();
        let queue = if by_url.is_empty() { text("QueueName") } else { by_url }.to_owned();
        Ok(Self { action, queue, headers, body })
    }

    pub(super) fn is_receive(&self) -> bool {
        self.action == "ReceiveMessage"
    }

    pub(super) fn is_delete(&self) -> bool {
        matches!(self.action.as_str(), "DeleteMessage" | "DeleteMessageBatch")
    }

    pub(super) fn is_send(&self) -> bool {
        matches!(self.action.as_str(), "SendMessage" | "SendMessageBatch")
    }

    pub(super) fn is_change(&self) -> bool {
        matches!(self.action.as_str(), "ChangeMessageVisibility" | "ChangeMessageVisibilityBatch")
    }

    /// Whether it hides a message for longer. A change to 0 gives a message back.
    pub(super) fn is_extension(&self) -> bool {
        self.is_change() && (extends(&self.body) || self.entries().iter().any(extends))
    }

    /// The entries of a batch; none for other calls.
    pub(super) fn entries(&self) -> &[Value] {
        self.body["Entries"].as_array().map_or(&[], Vec::as_slice)
    }

    /// What a send, a delete or a change names: the entries of a batch, or the call itself.
    pub(super) fn messages(&self) -> impl Iterator<Item = &Value> {
        let single = self.body.get("Entries").is_none().then_some(&self.body);
        self.entries().iter().chain(single)
    }

    /// The most messages that a receive takes.
    pub(super) fn most_messages(&self) -> usize {
        let most = self.body["MaxNumberOfMessages"].as_u64().unwrap_or(1).min(MOST_MESSAGES);
        usize::try_from(most).unwrap_or(1)
    }

    /// Changes every receipt in it.
    pub(super) fn replace_receipts(&mut self, replace: impl Fn(&str) -> Option<String>) {
        let one = |holder: &mut Value| {
            if let Some(new) = holder["ReceiptHandle"].as_str().and_then(&replace) {
                holder["ReceiptHandle"] = new.into();
            }
        };
        if let Some(entries) = self.body.get_mut("Entries").and_then(Value::as_array_mut) {
            entries.iter_mut().for_each(one);
        } else if self.body.get("ReceiptHandle").is_some() {
            one(&mut self.body);
        }
    }
}

/// Whether an entry, or the body of a call for one message, hides the message for longer.
pub(super) fn extends(entry: &Value) -> bool {
    entry["VisibilityTimeout"].as_i64().is_some_and(|seconds| seconds > 0)
}

pub(super) fn success(body: &Value) -> Answer {
    answer(StatusCode::OK, body)
}

/// An error. `code` is the one that SDKs report, which SQS keeps from its older protocol in a header.
pub(super) fn error(status: StatusCode, code: &'static str, message: &str) -> Answer {
    let mut answer = answer(status, &json!({"__type": format!("com.amazonaws.sqs#{code}"), "message": message}));
    let fault = if status.is_server_error() { "Receiver" } else { "Sender" };
    if let Ok(value) = HeaderValue::from_str(&format!("{code};{fault}")) {
        answer.headers_mut().insert("x-amzn-query-error", value);
    }
    answer
}

/// An answer of the emulator, with another body.
pub(super) fn with_body(mut answer: Answer, body: &Value) -> Answer {
    *answer.body_mut() = Full::from(body.to_string());
    answer
}

/// Takes out what belongs to one connection or to a body of another length.
pub(super) fn end_to_end(headers: &mut HeaderMap) {
    for name in [header::CONNECTION, header::CONTENT_LENGTH, header::TRANSFER_ENCODING] {
        headers.remove(name);
    }
    headers.remove("keep-alive");
}

fn answer(status: StatusCode, body: &Value) -> Answer {
    let mut answer = Response::new(Full::from(body.to_string()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, CONTENT_TYPE);
    answer
}
