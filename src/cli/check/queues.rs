//! SQS: each queue with its dead-letter queue, as `setup` makes them.

use std::time::Duration;

use super::report::Finding;
use crate::queue::attributes::{Attributes, MAX_RECEIVE_COUNT, RETENTION, Redrive, dead_letter_queue};
use crate::queue::sqs::{Sqs, SqsError};

/// The queue `name`, which `key` is the setting of, and its dead-letter queue.
pub(super) async fn check(sqs: &Sqs, key: &str, name: &str, visibility: Duration) -> Vec<Finding> {
    let dead = dead_letter_queue(name);
    let (queue, dead_queue) = tokio::join!(look(sqs, name), look(sqs, &dead));
    let mut findings = match queue {
        Ok(attributes) => judge_queue(name, &attributes, visibility),
        Err(error) => vec![failure(key, name, &error)],
    };
    findings.extend(match dead_queue {
        Ok(attributes) => judge_dead_letter_queue(&dead, &attributes),
        Err(error) => vec![failure(key, &dead, &error)],
    });
    findings
}

async fn look(sqs: &Sqs, name: &str) -> Result<Attributes, SqsError> {
    let queue = sqs.queue(name).await?;
    sqs.attributes(&queue).await
}

fn failure(key: &str, name: &str, error: &SqsError) -> Finding {
    let title = title(name);
    if error.is_missing_queue() {
        let remedy = format!("create it with `write-api setup`, or name another in {key}");
        return Finding::fail(title, "does not exist", remedy);
    }
    let remedy = match &error.code {
        Some(code) if code.contains("AccessDenied") => "allow this client sqs:GetQueueUrl and sqs:GetQueueAttributes",
        Some(_) => "see the credentials and aws.region, and what SQS says",
        None => "see aws.endpoint_url, aws.region, the credentials and the network",
    };
    Finding::fail(title, error.to_string(), remedy)
}

fn judge_queue(name: &str, queue: &Attributes, visibility: Duration) -> Vec<Finding> {
    let mut findings = standard(name, queue);
    // Beside the queue itself: a dead-letter queue is in its queue's account and region.
    let prefix = queue.arn.rsplit_once(':').map_or("", |(prefix, _)| prefix);
    let wanted =
        Redrive { target_arn: format!("{prefix}:{}", dead_letter_queue(name)), max_receive_count: MAX_RECEIVE_COUNT };
    let remedy = format!("set its RedrivePolicy to {}", wanted.policy());
    match &queue.redrive {
        None => findings.push(Finding::fail(title(name), "has no dead-letter queue", remedy)),
        Some(redrive) if redrive.target_arn != wanted.target_arn => {
            let problem = format!("its dead-letter queue is {}", redrive.target_arn);
            findings.push(Finding::fail(title(name), problem, remedy));
        }
        Some(redrive) if redrive.max_receive_count != MAX_RECEIVE_COUNT => {
            // Receives count deploys and throttles: a small number sends work away that never failed.
            let problem = format!(
                "maxReceiveCount is {}, which deploys and throttles can reach, instead of {MAX_RECEIVE_COUNT}",
                redrive.max_receive_count
            );
            findings.push(Finding::fail(title(name), problem, remedy));
        }
        Some(_) => {}
    }
    if queue.visibility_timeout != visibility {
        let problem = format!(
            "VisibilityTimeout is {} s and queue.visibility_timeout {} s; the service asks for its own at each receive",
            queue.visibility_timeout.as_secs(),
            visibility.as_secs()
        );
        let remedy = format!("nothing needs to be done; to make them equal set it to {}", visibility.as_secs());
        findings.push(Finding::warn(title(name), problem, remedy));
    }
    if findings.is_empty() {
        let found = format!("standard, kept 14 days, to its dead-letter queue after {MAX_RECEIVE_COUNT} receives");
        findings.push(Finding::ok(title(name), found));
    }
    findings
}

fn judge_dead_letter_queue(name: &str, queue: &Attributes) -> Vec<Finding> {
    let mut findings = standard(name, queue);
    if findings.is_empty() {
        findings.push(Finding::ok(title(name), "standard, kept 14 days"));
    }
    findings
}

/// What holds for every queue.
fn standard(name: &str, queue: &Attributes) -> Vec<Finding> {
    let mut findings = Vec::new();
    if queue.fifo {
        let remedy = "use a standard queue: FIFO blocks a group behind one slow event";
        findings.push(Finding::fail(title(name), "is a FIFO queue", remedy));
    }
    let remedy = format!("set its MessageRetentionPeriod to {}", RETENTION.as_secs());
    match queue.retention {
        Some(RETENTION) => {}
        Some(retention) => {
            let problem = format!(
                "keeps messages for {} s instead of the 14 days after which an outage would cost events",
                retention.as_secs()
            );
            findings.push(Finding::fail(title(name), problem, remedy));
        }
        // No SQS, but something that stands in for it.
        None => findings.push(Finding::warn(title(name), "does not say how long it keeps messages", remedy)),
    }
    findings
}

fn title(name: &str) -> String {
    format!("queue {name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::report::{failures, lines};

    #[test]
    fn a_fifo_queue_is_refused_whatever_its_name() {
        let queue = Attributes {
            arn: "arn:aws:sqs:us-east-1:000000000000:q".to_owned(),
            fifo: true,
            retention: Some(RETENTION),
            visibility_timeout: Duration::from_secs(60),
            redrive: Some(Redrive {
                target_arn: "arn:aws:sqs:us-east-1:000000000000:q-dlq".to_owned(),
                max_receive_count: MAX_RECEIVE_COUNT,
            }),
        };
        let findings = judge_queue("q", &queue, Duration::from_secs(60));
        assert!(lines(&findings).contains("is a FIFO queue; use a standard queue"), "{}", lines(&findings));
        let standard = Attributes { fifo: false, ..queue };
        assert_eq!(failures(&judge_queue("q", &standard, Duration::from_secs(60))), 0);
        let silent = judge_queue("q", &Attributes { retention: None, ..standard }, Duration::from_secs(60));
        assert_eq!(failures(&silent), 0);
        assert!(lines(&silent).contains("warn"), "{}", lines(&silent));
    }
}
