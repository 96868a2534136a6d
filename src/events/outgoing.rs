//! Events that this service makes, or sends once more: CloudEvents in structured mode that SQS takes.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::envelope::{VALUATIONS_PUBLISH, VALUATIONS_REFRESH};
use crate::queue::Refusal;

/// CloudEvents source of the events that this service makes.
pub const SOURCE: &str = "/writeapi";

/// The post-processing event of a run, the same whenever it is made.
pub fn publish_event(run_id: &str, time: OffsetDateTime, traceparent: Option<&str>) -> (Uuid, String) {
    let id = publish_event_id(run_id);
    let body =
        cloud_event(&id.to_string(), VALUATIONS_PUBLISH, time, traceparent, &serde_json::json!({"run_id": run_id}));
    (id, body)
}

/// The event of a run once more: a repeat of the one that opened it, by id and digest. It has nothing that the first had
/// not, so it is no longer than that was.
pub fn refresh_event(
    run_id: &str,
    source: &str,
    time: OffsetDateTime,
    traceparent: Option<&str>,
    data: &str,
) -> serde_json::Result<String> {
    #[derive(Serialize)]
    struct Again<'a> {
        specversion: &'static str,
        id: &'a str,
        source: &'a str,
        #[serde(rename = "type")]
        kind: &'static str,
        time: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        traceparent: Option<&'a str>,
        // Not a Value, which would order and space the data anew.
        data: &'a RawValue,
    }
    serde_json::to_string(&Again {
        specversion: "1.0",
        id: run_id,
        source,
        kind: VALUATIONS_REFRESH,
        time: time.format(&Rfc3339).expect("years have four digits"),
        traceparent,
        data: serde_json::from_str(data)?,
    })
}

/// UUIDv5 of `<run_id>:publish` in the namespace of URLs' sibling, OIDs.
fn publish_event_id(run_id: &str) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("{run_id}:publish").as_bytes())
}

/// A CloudEvent of this service in structured mode.
pub fn cloud_event(
    id: &str,
    kind: &str,
    time: OffsetDateTime,
    traceparent: Option<&str>,
    data: &serde_json::Value,
) -> String {
    structured(id, SOURCE, kind, time, traceparent, data)
}

/// The same from another source, its data as they are.
pub(super) fn structured(
    id: &str,
    source: &str,
    kind: &str,
    time: OffsetDateTime,
    traceparent: Option<&str>,
    data: &(impl Serialize + ?Sized),
) -> String {
    #[derive(Serialize)]
    struct CloudEvent<'a, D: ?Sized> {
        specversion: &'static str,
        id: &'a str,
        source: &'a str,
        #[serde(rename = "type")]
        kind: &'a str,
        time: String,
        datacontenttype: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        traceparent: Option<&'a str>,
        data: &'a D,
    }
    let (specversion, time, datacontenttype) = ("1.0", rfc3339(time), "application/json");
    let event = CloudEvent { specversion, id, source, kind, time, datacontenttype, traceparent, data };
    for_sqs(&serde_json::to_string(&event).expect("texts and JSON can be written as JSON"))
}

pub(super) fn rfc3339(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).expect("years have four digits")
}

/// A CloudEvent with another id and time, everything else as it was to the letter.
pub fn with_identity(document: &str, id: &str, time: OffsetDateTime) -> Result<String, Refusal> {
    let not_json = |error| Refusal { code: "invalid_json", reason: format!("not a JSON event: {error}") };
    let mut fields: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_str(document).map_err(not_json)?;
    let text = |text: &str| serde_json::value::to_raw_value(text).map_err(not_json);
    let (id, time) = (text(id)?, text(&rfc3339(time))?);
    fields.insert("id".into(), &id);
    fields.insert("time".into(), &time);
    serde_json::to_string(&fields).map_err(not_json)
}

/// Characters that XML 1.0 has not, and so no SQS message; JSON has them, as themselves and escaped. The control
/// characters, which are the others, JSON has only escaped.
pub(super) const NOT_XML: [char; 2] = ['\u{fffe}', '\u{ffff}'];

/// The same JSON without the characters that SQS refuses.
pub(super) fn for_sqs(json: &str) -> String {
    json.replace('\u{fffe}', "\\ufffe").replace('\u{ffff}', "\\uffff")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::envelope::{Event, document};
    use super::*;

    #[test]
    fn another_identity_changes_id_and_time_and_not_a_letter_more() {
        let text = r#"{"specversion":"1.0","id":"e-1","source":"/t","type":"x","time":"2026-01-31T02:00:00Z","data":{"n":1.50,"big":12345678901234567890123}}"#;
        let time = time::macros::datetime!(2026-02-01 03:00 UTC);
        let renewed = with_identity(text, "e \"2\"", time).expect("JSON");
        let event = Event::decode(&renewed).expect("good");
        assert_eq!((event.id.as_ref(), event.time), ("e \"2\"", time));
        assert!(renewed.contains(r#"{"n":1.50,"big":12345678901234567890123}"#), "{renewed}");
    }

    #[test]
    fn an_event_sent_again_is_the_same_event_with_the_same_bytes_of_data() {
        let data = r#"{ "zip_codes" : [98005, 98001,98001], "limit": 1.0e1 }"#;
        let first = format!(
            r#"{{"specversion":"1.0","id":"n \"1\"","source":"/té","type":"{VALUATIONS_REFRESH}","time":"2026-01-31T02:00:00Z","data":{data}}}"#
        );
        let event = Event::decode(&first).expect("good");
        let again = refresh_event(&event.id, &event.source, event.time, None, event.data_text()).expect("JSON");
        let repeat = Event::decode(&again).expect("good");
        assert_eq!((&repeat.id, &repeat.source, repeat.data_text()), (&event.id, &event.source, data));
        assert_eq!((repeat.time, repeat.digest()), (event.time, event.digest()));
        assert!(again.len() <= first.len(), "{again} may not pass where {first} did");
    }

    #[test]
    fn what_is_written_has_no_character_that_sqs_refuses() {
        let (_, body) = publish_event("run \u{ffff} \u{fffe}", time::macros::datetime!(2026-02-01 03:00 UTC), None);
        let upsert = json!({
            "specversion": "1.0", "id": "e-1", "source": "/test", "type": "x", "time": "2026-01-31T02:00:00Z",
            "data": {"description": "\u{ffff}ü\u{fffe}"}
        });
        // SNS gives the character as an escape; with the wrapper off it is a character.
        let sns = json!({"Type": "Notification", "Message": upsert.to_string()}).to_string();
        let sns = sns.replace('\u{ffff}', "\\uffff").replace('\u{fffe}', "\\ufffe");
        let document = document(&sns).expect("good");
        for text in [body.as_str(), &document] {
            assert!(!text.contains(['\u{fffe}', '\u{ffff}']), "{text}");
        }
        let value: serde_json::Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!(value["data"]["run_id"], "run \u{ffff} \u{fffe}");
        assert_eq!(Event::decode(&document).expect("good").digest(), Event::decode(&sns).expect("good").digest());
    }
}
