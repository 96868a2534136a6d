//! What can go wrong with a call of SQS.

use serde_json::Value;

use super::protocol::Call;
use crate::orders::Fault;

/// What can go wrong with a call of SQS, or with what it delivers. A call on which a fault can do nothing (a receive
/// that got no message, for one that repeats messages) does not use it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SqsFault {
    /// A receive is never answered. No message is taken from the queue.
    HungReceive,
    /// A receive that got messages is answered this many milliseconds late. They are hidden meanwhile.
    LateReceiveAnswer(u64),
    /// A received message is received once more, at once, by whoever polls the queue: by a parked poll first. The second
    /// receipt is another and as good as the first. Its receive count is one more.
    DuplicateDelivery,
    /// An extension is answered 500 and not carried out.
    ExtensionFails,
    /// An extension is carried out this many milliseconds late, and not if the client gives up before.
    ExtensionSlow(u64),
    /// Each message of an extension is refused: its receipt is stale.
    ExtensionRefused,
    /// Each message of an extension is refused: it would be hidden for more than 12 h from its receive.
    TwelveHourRefusal,
    /// A delete is carried out, and the connection is closed instead of an answer.
    DeleteAnswerLost,
    /// A delete is answered 500 and not carried out.
    DeleteFails,
    /// Receipts of a delete or a change of visibility are taken for those of an earlier receive. SQS's standard queues
    /// answer such a delete with success and do not delete; they refuse such a change.
    StaleReceipt,
    /// The first entry of a batch (send, delete, change of visibility) fails by SQS's own fault. The others are carried
    /// out.
    PartialBatchFailure,
    /// A call is throttled.
    Throttle,
    /// A call is refused because the credentials have expired.
    ExpiredCredentials,
    /// A send is carried out, and the connection is closed instead of an answer.
    SendAnswerLost,
    /// A message of more bytes, its attributes included, is refused. SQS counts of each attribute its name, its type and its
    /// value; the emulator counts the body alone.
    SizeLimit(usize),
    /// A call is never answered, and SQS gets nothing.
    Hang,
    /// A call is carried out and never answered.
    HangAnswer,
    /// A call's connection is closed; SQS gets nothing.
    Down,
}

impl SqsFault {
    /// Its name in [hits](super::SqsProxy::hits): `hung-receive`, for example.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::HungReceive => "hung-receive",
            Self::LateReceiveAnswer(_) => "late-receive-answer",
            Self::DuplicateDelivery => "duplicate-delivery",
            Self::ExtensionFails => "extension-fails",
            Self::ExtensionSlow(_) => "extension-slow",
            Self::ExtensionRefused => "extension-refused",
            Self::TwelveHourRefusal => "twelve-hour-refusal",
            Self::DeleteAnswerLost => "delete-answer-lost",
            Self::DeleteFails => "delete-fails",
            Self::StaleReceipt => "stale-receipt",
            Self::PartialBatchFailure => "partial-batch-failure",
            Self::Throttle => "throttle",
            Self::ExpiredCredentials => "expired-credentials",
            Self::SendAnswerLost => "send-answer-lost",
            Self::SizeLimit(_) => "size-limit",
            Self::Hang => "hang",
            Self::HangAnswer => "hang-answer",
            Self::Down => "down",
        }
    }

    /// Whether it happens to the messages of a receive: until they are there, nobody knows which of several parked polls
    /// gets them.
    pub(super) const fn needs_messages(self) -> bool {
        matches!(self, Self::LateReceiveAnswer(_) | Self::DuplicateDelivery)
    }

    /// Whether it can happen to the call.
    fn fits(self, call: &Call) -> bool {
        match self {
            Self::HungReceive | Self::LateReceiveAnswer(_) | Self::DuplicateDelivery => call.is_receive(),
            Self::ExtensionFails | Self::ExtensionSlow(_) | Self::ExtensionRefused | Self::TwelveHourRefusal => {
                call.is_extension()
            }
            Self::DeleteAnswerLost | Self::DeleteFails => call.is_delete(),
            Self::StaleReceipt => call.is_delete() || call.is_change(),
            Self::PartialBatchFailure => !call.entries().is_empty(),
            Self::SendAnswerLost => call.is_send(),
            Self::SizeLimit(limit) => call.is_send() && call.messages().any(|message| size(message) > limit),
            Self::Throttle | Self::ExpiredCredentials | Self::Down | Self::Hang | Self::HangAnswer => true,
        }
    }
}

/// Bytes of a message that is sent, as SQS counts them.
pub(super) fn size(message: &Value) -> usize {
    let text = |value: &Value| value.as_str().map_or(0, str::len);
    let attributes = message["MessageAttributes"].as_object().into_iter().flatten();
    let attributes = attributes.map(|(name, attribute)| {
        name.len() + text(&attribute["DataType"]) + text(&attribute["StringValue"]) + text(&attribute["BinaryValue"])
    });
    text(&message["MessageBody"]) + attributes.sum::<usize>()
}

/// Which calls an order is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// The action, `ReceiveMessage` for example; any if `None`.
    pub action: Option<String>,
    /// The queue's name; any if `None`.
    pub queue: Option<String>,
}

/// A fault as it was ordered.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scoped {
    pub(super) fault: SqsFault,
    pub(super) scope: Scope,
}

impl Scoped {
    pub(super) fn fits(&self, call: &Call) -> bool {
        let is = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|wanted| wanted == is);
        is(&self.scope.action, &call.action) && is(&self.scope.queue, &call.queue) && self.fault.fits(call)
    }
}

impl Fault for Scoped {
    fn name(&self) -> &'static str {
        self.fault.name()
    }
}

/// Why one entry of a batch, or a call of one message, is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Stale,
    TwelveHours,
    TooLarge(usize),
    Internal,
}

impl Refusal {
    /// Code, whether it is the sender's fault, and the message, as SQS words them for this entry (or call).
    pub(super) fn words(self, entry: &Value) -> (&'static str, bool, String) {
        let invalid = |parameter: &str, reason: &str| {
            let value = &entry[parameter];
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            (
                "InvalidParameterValue",
                true,
                format!("Value {value} for parameter {parameter} is invalid. Reason: {reason}"),
            )
        };
        match self {
            Self::Stale => {
                invalid("ReceiptHandle", "Message does not exist or is not available for visibility timeout change.")
            }
            Self::TwelveHours => invalid(
                "VisibilityTimeout",
                "Total VisibilityTimeout for the message is beyond the limit [43200 seconds]",
            ),
            Self::TooLarge(limit) => {
                let message =
                    format!("One or more parameters are invalid. Reason: Message must be shorter than {limit} bytes.");
                ("InvalidParameterValue", true, message)
            }
            Self::Internal => {
                ("InternalError", false, "We encountered an internal error. Please try again.".to_owned())
            }
        }
    }
}
