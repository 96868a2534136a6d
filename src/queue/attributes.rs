//! How queues are set up: what `setup` gives them, and what `check` reads of them.

use std::collections::HashMap;
use std::time::Duration;

/// How a queue is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// Its name for all of AWS, which ends in its own name.
    pub arn: String,
    /// Whether it is FIFO.
    pub fifo: bool,
    /// How long it keeps a message; `None` where that is not told, as ElasticMQ does not.
    pub retention: Option<Duration>,
    /// How long a received message stays hidden where the receiver does not say.
    pub visibility_timeout: Duration,
    /// Where messages go that were received too often.
    pub redrive: Option<Redrive>,
}

/// Where messages go that were received too often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redrive {
    /// The dead-letter queue.
    pub target_arn: String,
    /// After so many receives.
    pub max_receive_count: u32,
}

impl Attributes {
    /// Reads them by the names that SQS gives them.
    pub(super) fn read(given: &HashMap<String, String>) -> Result<Self, String> {
        let text = |name: &str| given.get(name).ok_or_else(|| format!("the answer has no {name}"));
        let seconds = |name: &str| {
            let text = text(name)?;
            text.parse().map(Duration::from_secs).map_err(|_| format!("{name} is {text:?}, not a number of seconds"))
        };
        let redrive = match given.get("RedrivePolicy") {
            Some(policy) => Some(Redrive::read(policy).ok_or_else(|| format!("RedrivePolicy is {policy:?}"))?),
            None => None,
        };
        Ok(Attributes {
            arn: text("QueueArn")?.clone(),
            fifo: given.get("FifoQueue").is_some_and(|fifo| fifo == "true"),
            retention: match given.contains_key("MessageRetentionPeriod") {
                true => Some(seconds("MessageRetentionPeriod")?),
                false => None,
            },
            visibility_timeout: seconds("VisibilityTimeout")?,
            redrive,
        })
    }
}

impl Redrive {
    /// SQS accepts the count as a number and as text, and gives it back as it was given.
    fn read(policy: &str) -> Option<Self> {
        let policy: serde_json::Value = serde_json::from_str(policy).ok()?;
        let count = &policy["maxReceiveCount"];
        let count = count.as_u64().or_else(|| count.as_str()?.parse().ok())?;
        Some(Redrive {
            target_arn: policy["deadLetterTargetArn"].as_str()?.to_owned(),
            max_receive_count: u32::try_from(count).ok()?,
        })
    }

    /// The attribute `RedrivePolicy`.
    pub fn policy(&self) -> String {
        format!(r#"{{"deadLetterTargetArn":"{}","maxReceiveCount":"{}"}}"#, self.target_arn, self.max_receive_count)
    }
}

/// After so many receives SQS itself moves a message to the dead-letter queue: a last resort, since receives count
/// deploys and throttles as well.
pub const MAX_RECEIVE_COUNT: u32 = 1_000;

/// The longest that SQS keeps a message, on the queue and on its dead-letter queue.
pub const RETENTION: Duration = Duration::from_secs(14 * 24 * 3600);

/// The dead-letter queue of a queue.
pub fn dead_letter_queue(name: &str) -> String {
    format!("{name}-dlq")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_sqs_writes_them() {
        let mut given = HashMap::from(
            [
                ("QueueArn", "arn:aws:sqs:us-east-1:000000000000:q".to_owned()),
                ("MessageRetentionPeriod", "1209600".to_owned()),
                ("VisibilityTimeout", "60".to_owned()),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        );
        let plain = Attributes::read(&given).expect("a standard queue");
        assert_eq!((plain.fifo, plain.retention, &plain.redrive), (false, Some(RETENTION), &None));
        for count in ["1000", "\"1000\""] {
            let policy = format!(r#"{{"deadLetterTargetArn":"arn:q-dlq","maxReceiveCount":{count}}}"#);
            given.insert("RedrivePolicy".to_owned(), policy);
            let redrive = Attributes::read(&given).expect("good").redrive.expect("set");
            assert_eq!(redrive, Redrive { target_arn: "arn:q-dlq".to_owned(), max_receive_count: MAX_RECEIVE_COUNT });
            assert_eq!(Redrive::read(&redrive.policy()), Some(redrive));
        }
        given.insert("RedrivePolicy".to_owned(), "nonsense".to_owned());
        assert!(Attributes::read(&given).is_err());
        given.remove("QueueArn");
        given.remove("RedrivePolicy");
        assert_eq!(Attributes::read(&given), Err("the answer has no QueueArn".to_owned()));
    }
}
