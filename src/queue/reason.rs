//! Why a message was refused, as it goes with the message to its dead-letter queue.

use super::sqs::SqsError;
use super::{Message, Refusal};

/// Name of the message attribute that carries the reason of a refused message, a JSON object of at most 1 KiB.
pub const REASON_ATTRIBUTE: &str = "reason";

/// The reason of a refused message as its attribute: JSON, at most 1 KiB however long the sentence.
pub fn reason_json(refusal: &Refusal, message: &Message, queue: &str) -> String {
    const MOST: usize = 1024;
    let whole = |reason: &str| {
        serde_json::json!({
            "code": refusal.code,
            "reason": reason,
            "message_id": message.id,
            "queue": queue,
            "receive_count": message.receive_count,
        })
        .to_string()
    };
    // What SQS does not accept in an attribute are control characters, which JSON escapes, and these two, which it does
    // not; an error of the JSON reader can quote them.
    let shown = refusal.reason.replace(['\u{fffe}', '\u{ffff}'], "\u{fffd}");
    let mut reason = shown.as_str();
    let mut json = whole(reason);
    while json.len() > MOST && !reason.is_empty() {
        // Escapes make a character up to six bytes long: cut by what is too much, then look again.
        let mut end = reason.len().saturating_sub((json.len() - MOST).div_ceil(6).max(1));
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        reason = &reason[..end];
        json = whole(&format!("{reason}…"));
    }
    json
}

/// What a refused message is sent with: the whole reason, then the code alone, then nothing. SQS counts attributes
/// towards the largest size of a message, so one that is nearly that large has no room for a sentence; in the dead-letter
/// queue without its reason it is better off than going round a thousand times.
pub(super) fn shorter_reasons(refusal: &Refusal, message: &Message, queue: &str) -> [Option<String>; 3] {
    let code = serde_json::json!({"code": refusal.code}).to_string();
    [Some(reason_json(refusal, message, queue)), Some(code), None]
}

/// Sends with the first of `reasons` that SQS takes, and returns it.
pub(super) async fn with_what_goes<F: Future<Output = Result<(), SqsError>>>(
    reasons: [Option<String>; 3],
    send: impl Fn(Option<String>) -> F,
) -> Result<Option<String>, SqsError> {
    let mut left = reasons.into_iter().peekable();
    loop {
        let reason = left.next().flatten();
        match send(reason.clone()).await {
            Ok(()) => return Ok(reason),
            Err(error) if error.is_about_the_message() && left.peek().is_some() => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[test]
    fn a_reason_fits_its_attribute_whatever_it_quotes() {
        let message = Message { receive_count: 3, ..message(String::new()) };
        for reason in ["short".to_owned(), "\u{1}".repeat(5000), "ü".repeat(5000), "\"".repeat(2000)] {
            let refusal = Refusal { code: "invalid_json", reason };
            let json = reason_json(&refusal, &message, "writeapi-events");
            assert!(json.len() <= 1024, "{} bytes", json.len());
            let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
            assert_eq!(value["code"], "invalid_json");
        }
    }

    fn message(body: String) -> Message {
        Message {
            id: "m-1".to_owned(),
            body,
            receipt: String::new(),
            receive_count: 1,
            redrives: 0,
            received_at: Instant::now(),
        }
    }

    fn refused_for(code: &str) -> SqsError {
        SqsError {
            action: "SendMessage",
            queue: "q-dlq".to_owned(),
            message: "no".to_owned(),
            code: Some(code.to_owned()),
            timeout: false,
        }
    }

    #[tokio::test]
    async fn a_reason_is_shortened_until_the_message_is_not_too_large() {
        const LARGEST: usize = 256 * 1024;
        let refusal = Refusal { code: "too_large", reason: "r".repeat(2000) };
        for (room, expected) in [(2000, 1024), (1000, 20), (10, 0)] {
            let message = message("b".repeat(LARGEST - room));
            // SQS counts the name, the type and the value of an attribute.
            let sqs = |reason: Option<String>| {
                let attribute = reason.map_or(0, |reason| REASON_ATTRIBUTE.len() + "String".len() + reason.len());
                let fits = message.body.len() + attribute <= LARGEST;
                std::future::ready(if fits { Ok(()) } else { Err(refused_for("InvalidParameterValue")) })
            };
            let went = with_what_goes(shorter_reasons(&refusal, &message, "q"), sqs).await.expect("it went");
            assert_eq!(went.as_ref().map_or(0, String::len), expected, "{went:?}");
            assert!(went.is_none_or(|went| went.contains(r#""code":"too_large""#)));
        }
        let message = message(String::new());
        for (code, tries) in [("InvalidMessageContents", 3), ("RequestThrottled", 1)] {
            let tried = std::cell::Cell::new(0);
            let sqs = |_: Option<String>| {
                tried.set(tried.get() + 1);
                std::future::ready(Err(refused_for(code)))
            };
            let error = with_what_goes(shorter_reasons(&refusal, &message, "q"), sqs).await.expect_err(code);
            assert_eq!((error.code.as_deref(), tried.get()), (Some(code), tries));
        }
    }

    #[test]
    fn a_reason_has_no_character_that_sqs_refuses() {
        let message = message(String::new());
        let refusal = Refusal { code: "invalid_data", reason: "unknown field `\u{ffff}\u{fffe}`".to_owned() };
        let json = reason_json(&refusal, &message, "q");
        assert!(!json.contains(['\u{fffe}', '\u{ffff}']), "{json}");
    }
}
