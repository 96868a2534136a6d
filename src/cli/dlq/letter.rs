//! A dead letter as operators see it: what the event is, why it is there, and what tells copies of it.

use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::filter::LaneName;
use crate::cli::text::{printable, span};
use crate::events::envelope::Event;
use crate::events::request;
use crate::queue::sqs::{DeadLetter, REDRIVES_UNREADABLE};

/// Code where SQS itself moved the message.
const RECEIVED_TOO_OFTEN: &str = "received_too_often";

/// Code where nothing says why the message is there: somebody put it there by hand.
const UNEXPLAINED: &str = "unexplained";

/// Kind of an event that cannot be read.
const UNKNOWN: &str = "unknown";

/// A dead letter.
pub(super) struct Letter {
    /// Where it is.
    pub(super) lane: LaneName,
    /// Id of the message in the dead-letter queue.
    pub(super) message_id: String,
    /// The event as it was sent.
    pub(super) body: String,
    /// Kind of event; its data may be wrong.
    pub(super) kind: &'static str,
    /// The event's id, where its envelope can be read.
    pub(super) event_id: Option<String>,
    /// SHA-256 over source, type and data, where they can be read.
    pub(super) digest: Option<[u8; 32]>,
    /// Equal in copies of one event.
    pub(super) identity: [u8; 32],
    /// A word for why it is there.
    pub(super) code: String,
    /// The sentence.
    reason: Option<String>,
    /// Id that the message had in its first queue; SQS keeps it when it moves a message.
    pub(super) origin_id: Option<String>,
    /// Receives in its first queue.
    receives: Option<u64>,
    /// How often it was sent again.
    pub(super) redrives: u32,
    /// When it was sent: to the dead-letter queue, or, where SQS moved it, by the producer.
    pub(super) sent_at: Option<OffsetDateTime>,
}

/// What the service writes into the attribute.
#[derive(Debug, Default, Deserialize)]
struct Reason {
    code: Option<String>,
    reason: Option<String>,
    message_id: Option<String>,
    receive_count: Option<u64>,
}

impl Letter {
    /// Finds out what a message of the lane's dead-letter queue is.
    pub(super) fn read(lane: LaneName, letter: DeadLetter) -> Self {
        let DeadLetter { message, reason, moved_from, sent_at_ms } = letter;
        let (kind, event_id, digest, identity) = match Event::decode(&message.body) {
            Ok(event) => {
                let digest = event.digest().ok();
                let kind = request::kind(&event).unwrap_or(UNKNOWN);
                let identity = digest.map(|digest| {
                    let mut hash = Sha256::new();
                    hash.update(event.time.unix_timestamp_nanos().to_be_bytes());
                    hash.update(digest);
                    hash.update(event.id.as_bytes());
                    hash.finalize().into()
                });
                (kind, Some(event.id.into_owned()), digest, identity)
            }
            Err(_) => (UNKNOWN, None, None, None),
        };
        let told: Option<Reason> = reason.as_deref().map(|text| {
            // Not ours: shown as it is.
            serde_json::from_str(text).unwrap_or_else(|_| Reason { reason: Some(text.to_owned()), ..Reason::default() })
        });
        let (code, reason, origin_id, receives) = match (told, moved_from) {
            (Some(told), _) => {
                (told.code.unwrap_or_else(|| UNEXPLAINED.to_owned()), told.reason, told.message_id, told.receive_count)
            }
            (None, Some(queue)) => {
                let why = format!("SQS took it from {queue}: it was received more often than the queue allows");
                (RECEIVED_TOO_OFTEN.to_owned(), Some(why), Some(message.id.clone()), None)
            }
            (None, None) => (UNEXPLAINED.to_owned(), None, None, None),
        };
        Letter {
            lane,
            kind,
            event_id,
            digest,
            identity: identity.unwrap_or_else(|| Sha256::digest(message.body.as_bytes()).into()),
            code,
            reason,
            origin_id,
            receives,
            redrives: message.redrives,
            sent_at: sent_at_ms
                .and_then(|ms| OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).ok()),
            message_id: message.id,
            body: message.body,
        }
    }

    /// Whether the event, the message or the message in its first queue has this id.
    pub(super) fn has_id(&self, id: &str) -> bool {
        [self.event_id.as_deref(), Some(&self.message_id), self.origin_id.as_deref()].contains(&Some(id))
    }

    /// By what an operator would name it: the event's id, or the message's.
    pub(super) fn name(&self) -> &str {
        self.event_id.as_deref().unwrap_or(&self.message_id)
    }

    fn redrives(&self) -> String {
        if self.redrives == REDRIVES_UNREADABLE { "?".to_owned() } else { self.redrives.to_string() }
    }

    /// One line of columns.
    pub(super) fn line(&self) -> String {
        let age =
            self.sent_at.map_or("?".to_owned(), |sent_at| span((OffsetDateTime::now_utc() - sent_at).as_seconds_f64()));
        format!(
            "{age:>7}  {:<15}  {:<18}  {:<20}  {:>2}  {}",
            self.lane.as_str(),
            self.kind,
            printable(&self.code),
            self.redrives(),
            printable(self.name())
        )
    }

    /// The heads of the columns of [`line`](Self::line).
    pub(super) fn heads() -> String {
        format!("{:>7}  {:<15}  {:<18}  {:<20}  {:>2}  {}", "AGE", "LANE", "KIND", "REASON", "RE", "EVENT OR MESSAGE")
    }

    /// All of it, for people.
    pub(super) fn page(&self) -> String {
        let or = |text: Option<&str>| text.unwrap_or("-").to_owned();
        let rows = [
            ("event", or(self.event_id.as_deref())),
            ("kind", self.kind.to_owned()),
            ("lane", self.lane.as_str().to_owned()),
            ("code", self.code.clone()),
            ("reason", or(self.reason.as_deref())),
            ("sent", or(self.sent_at().as_deref())),
            ("message", self.message_id.clone()),
            ("first message", or(self.origin_id.as_deref())),
            ("receives", self.receives.map_or("-".to_owned(), |receives| receives.to_string())),
            ("redrives", self.redrives()),
            ("bytes", self.body.len().to_string()),
        ];
        let mut page: String = rows.iter().map(|(name, value)| format!("{name:<13}  {}\n", printable(value))).collect();
        page.push('\n');
        for line in self.body.split('\n') {
            page.push_str(&printable(line));
            page.push('\n');
        }
        page
    }

    /// All of it, for programs; kept, it is enough to send the event once more.
    pub(super) fn document(&self) -> Value {
        json!({
            "lane": self.lane.as_str(),
            "message_id": self.message_id,
            "kind": self.kind,
            "event_id": self.event_id,
            "code": self.code,
            "reason": self.reason,
            "origin_message_id": self.origin_id,
            "receives": self.receives,
            "redrives": self.redrives,
            "sent_at": self.sent_at(),
            "body": self.body,
        })
    }

    fn sent_at(&self) -> Option<String> {
        self.sent_at.and_then(|sent_at| sent_at.format(&Rfc3339).ok())
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::queue::Message;

    fn letter(body: &str, reason: Option<&str>, moved_from: Option<&str>) -> Letter {
        let message = Message {
            id: "m-1".to_owned(),
            body: body.to_owned(),
            receipt: String::new(),
            receive_count: 1,
            redrives: 0,
            received_at: Instant::now(),
        };
        let own = |text: Option<&str>| text.map(str::to_owned);
        let letter = DeadLetter {
            message,
            reason: own(reason),
            moved_from: own(moved_from),
            sent_at_ms: Some(1_700_000_000_000),
        };
        Letter::read(LaneName::Events, letter)
    }

    fn event(id: &str, time: &str, data: &str) -> String {
        format!(
            r#"{{"specversion":"1.0","id":"{id}","source":"/t","type":"writeapi.valuations.refresh.v1","time":"{time}","data":{data}}}"#
        )
    }

    #[test]
    fn each_way_into_the_queue_is_told() {
        let time = "2026-01-31T02:00:00Z";
        let refused =
            letter("no", Some(r#"{"code":"invalid_json","reason":"r","message_id":"m-0","receive_count":2}"#), None);
        assert_eq!((refused.code.as_str(), refused.kind, refused.name()), ("invalid_json", UNKNOWN, "m-1"));
        assert!(refused.has_id("m-0") && refused.has_id("m-1") && !refused.has_id("m-2"));
        let moved = letter(&event("n-1", time, "{}"), None, Some("arn:q"));
        assert_eq!((moved.code.as_str(), moved.kind, moved.name()), (RECEIVED_TOO_OFTEN, "valuations.refresh", "n-1"));
        let by_hand = letter("{}", None, None);
        assert_eq!(by_hand.code, UNEXPLAINED);
        let foreign = letter("{}", Some("out of order"), None);
        assert_eq!((foreign.code.as_str(), foreign.reason.as_deref()), (UNEXPLAINED, Some("out of order")));
        // Data that the service refuses: the envelope still tells what the event is.
        let wrong = letter(&event("n-1", time, r#"{"limit":"x"}"#), Some(r#"{"code":"invalid_data"}"#), None);
        assert_eq!((wrong.code.as_str(), wrong.kind), ("invalid_data", "valuations.refresh"));
    }

    #[test]
    fn copies_have_the_same_identity_and_others_have_not() {
        let identity = |body: &str| letter(body, None, None).identity;
        let one = event("n-1", "2026-01-31T02:00:00Z", r#"{"limit":1}"#);
        assert_eq!(identity(&one), identity(&one.replace(':', " : ").replace("T02 : 00 : 00Z", "T02:00:00Z")));
        for other in [
            event("n-2", "2026-01-31T02:00:00Z", r#"{"limit":1}"#),
            event("n-1", "2026-01-31T02:00:01Z", r#"{"limit":1}"#),
            event("n-1", "2026-01-31T02:00:00Z", r#"{"limit":2}"#),
        ] {
            assert_ne!(identity(&one), identity(&other), "{other}");
        }
        assert_eq!(identity("no json"), identity("no json"));
        assert_ne!(identity("no json"), identity("no json "));
    }
}
