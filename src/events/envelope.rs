//! From the body of a message to an event: wrappers off, CloudEvents 1.0 read, everything checked.
//!
//! Accepted are a CloudEvent in structured mode, an SNS notification with one of these inside, and an EventBridge event,
//! whose own id, time and detail-type count unless its detail is a CloudEvent. Whatever else arrives is refused with a
//! word to filter by and a sentence that names the thing and the value.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::ops::Deref;
use time::format_description::well_known::Rfc3339;
use time::{OffsetDateTime, UtcOffset};

use super::outgoing::{NOT_XML, for_sqs, structured};
use crate::queue::Refusal;

/// Kind of [`LISTING_UPSERT`] in logs and metrics.
pub const KIND_UPSERT: &str = "listing.upsert";
/// Kind of [`VALUATIONS_REFRESH`] in logs and metrics.
pub const KIND_REFRESH: &str = "valuations.refresh";
/// Kind of [`VALUATIONS_PUBLISH`] in logs and metrics.
pub const KIND_PUBLISH: &str = "valuations.publish";

/// CloudEvents type: one listing to write.
pub const LISTING_UPSERT: &str = "writeapi.listing.upsert.v1";
/// CloudEvents type: ask the partner for valuations.
pub const VALUATIONS_REFRESH: &str = "writeapi.valuations.refresh.v1";
/// CloudEvents type: publish the valuations of a run.
pub const VALUATIONS_PUBLISH: &str = "writeapi.valuations.publish.v1";

/// The largest body, in bytes: what SNS and older SQS queues carry.
pub const MAX_BODY_BYTES: usize = 256 * 1024;

/// The deepest nesting of objects and arrays.
pub const MAX_DEPTH: usize = 32;

/// The longest id and source, in bytes: they become keys and headers.
const MAX_NAME_BYTES: usize = 256;

/// Wrappers around wrappers: EventBridge to SNS to SQS is two.
const MAX_WRAPPERS: usize = 3;

/// An event whose envelope is good. Its data are still JSON text.
#[derive(Debug, Clone)]
pub struct Event<'a> {
    /// Stable id, given by the producer.
    pub id: Cow<'a, str>,
    /// Where it comes from.
    pub source: Cow<'a, str>,
    /// CloudEvents type.
    pub kind: Cow<'a, str>,
    /// When it happened.
    pub time: OffsetDateTime,
    /// W3C trace context.
    pub traceparent: Option<Cow<'a, str>>,
    data: Cow<'a, str>,
}

/// Every field that one of the accepted shapes has at its top level. Read once, without copying.
#[derive(Deserialize)]
struct Shapes<'a> {
    #[serde(borrow)]
    specversion: Option<Text<'a>>,
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(borrow)]
    source: Option<Text<'a>>,
    #[serde(borrow, rename = "type")]
    kind: Option<Text<'a>>,
    #[serde(borrow)]
    time: Option<Text<'a>>,
    #[serde(borrow)]
    datacontenttype: Option<Text<'a>>,
    #[serde(borrow)]
    traceparent: Option<Text<'a>>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    data_base64: Option<serde::de::IgnoredAny>,
    #[serde(borrow, rename = "Type")]
    sns_type: Option<Text<'a>>,
    #[serde(borrow, rename = "Message")]
    sns_message: Option<Text<'a>>,
    #[serde(borrow, rename = "detail-type")]
    detail_type: Option<Text<'a>>,
    #[serde(borrow)]
    detail: Option<&'a RawValue>,
}

/// Text that borrows from the body unless it has escapes. An `Option<Cow<str>>` by itself is always copied: serde borrows
/// only for a field that is a `Cow` (serde.rs, "Borrowing data in a derived impl").
#[derive(Deserialize, Clone)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

fn refuse(code: &'static str, reason: impl Into<String>) -> Refusal {
    Refusal { code, reason: reason.into() }
}

/// The refusal of a body that nobody need read, known by its size.
pub fn too_large(bytes: u64) -> Refusal {
    refuse("too_large", format!("the body has {bytes} bytes, at most {MAX_BODY_BYTES} are accepted"))
}

impl<'a> Event<'a> {
    /// Reads the body of a message.
    pub fn decode(body: &'a str) -> Result<Event<'a>, Refusal> {
        if body.len() > MAX_BODY_BYTES {
            return Err(too_large(body.len() as u64));
        }
        Self::unwrap(body, MAX_WRAPPERS)
    }

    fn unwrap(text: &'a str, wrappers_left: usize) -> Result<Event<'a>, Refusal> {
        match peel(text, wrappers_left)? {
            Peeled::CloudEvent(shapes) | Peeled::EventBridge(shapes) => Self::cloud_event(shapes),
            Peeled::Wrapper(Cow::Borrowed(inner)) => Self::unwrap(inner, wrappers_left - 1),
            // The inner document is text inside text, so what was read of it can only be owned.
            Peeled::Wrapper(Cow::Owned(inner)) => Ok(Event::unwrap(&inner, wrappers_left - 1)?.into_owned()),
        }
    }

    fn cloud_event(shapes: Shapes<'a>) -> Result<Event<'a>, Refusal> {
        let version = shapes.specversion.as_deref().unwrap_or_default();
        if version != "1.0" {
            let reason = format!("specversion {version:?} is not supported, only \"1.0\" is");
            return Err(refuse("unknown_version", reason));
        }
        let id = name("id", shapes.id)?;
        let source = name("source", shapes.source)?;
        let kind = name("type", shapes.kind)?;
        let time = shapes.time.ok_or_else(|| refuse("invalid_envelope", "time is missing"))?;
        let parsed = OffsetDateTime::parse(&time, &Rfc3339).map_err(|error| {
            refuse(
                "invalid_envelope",
                format!("time {:?} is not RFC 3339, such as 2026-01-31T02:00:00Z: {error}", &*time),
            )
        })?;
        // An offset can lead out of the years that Postgres and RFC 3339 can write.
        let in_utc = parsed.checked_to_offset(UtcOffset::UTC).filter(|time| (1..=9999).contains(&time.year()));
        let time = in_utc.ok_or_else(|| {
            refuse("invalid_envelope", format!("time {:?} is not within the years 1 to 9999 in UTC", &*time))
        })?;
        if shapes.data_base64.is_some() {
            return Err(refuse("invalid_envelope", "data_base64 is not supported, send JSON in data"));
        }
        if let Some(content_type) = shapes.datacontenttype {
            let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
            if essence != "application/json" && !essence.ends_with("+json") {
                let reason = format!("datacontenttype {:?} is not supported, only JSON is", &*content_type);
                return Err(refuse("invalid_envelope", reason));
            }
        }
        let data = shapes.data.ok_or_else(|| refuse("invalid_data", "data is missing"))?;
        // A trace context is a courtesy: a broken one is dropped, not the event.
        let traceparent = shapes.traceparent.map(|text| text.0).filter(|text| text.len() == 55 && text.is_ascii());
        Ok(Event { id, source, kind, time, traceparent, data: Cow::Borrowed(data.get()) })
    }

    fn into_owned(self) -> Event<'static> {
        fn own(text: Cow<'_, str>) -> Cow<'static, str> {
            Cow::Owned(text.into_owned())
        }
        Event {
            id: own(self.id),
            source: own(self.source),
            kind: own(self.kind),
            time: self.time,
            traceparent: self.traceparent.map(own),
            data: own(self.data),
        }
    }

    /// The data, an object, as `T`.
    pub fn data<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        // A derived reader takes an array as well, its values by position.
        if !is_object(&self.data) {
            return Err(refuse("invalid_data", format!("data of {} must be a JSON object", self.kind)));
        }
        serde_json::from_str(&self.data)
            .map_err(|error| refuse("invalid_data", format!("data of {} cannot be read: {error}", self.kind)))
    }

    /// The data as they came.
    pub fn data_text(&self) -> &str {
        &self.data
    }

    /// SHA-256 over source, type and data: two events with the same id are the same event if this is equal. The data
    /// are compared as JSON values, so white space and the order of keys do not count.
    pub fn digest(&self) -> Result<[u8; 32], Refusal> {
        let value: serde_json::Value = self.data()?;
        // Serialising a Value writes its keys in order.
        let mut data = Vec::with_capacity(self.data.len());
        serde_json::to_writer(&mut data, &value).expect("writing to memory cannot fail");
        let mut hash = Sha256::new();
        // A length before each part keeps the parts apart.
        for part in [self.source.as_bytes(), self.kind.as_bytes(), &data] {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        Ok(hash.finalize().into())
    }
}

/// What is left of a body when its outermost wrapper is off.
enum Peeled<'a> {
    /// No wrapper: the text itself is the event.
    CloudEvent(Shapes<'a>),
    /// An EventBridge event without a CloudEvent inside, its names moved to where a CloudEvent has them.
    EventBridge(Shapes<'a>),
    /// The document inside.
    Wrapper(Cow<'a, str>),
}

fn peel(text: &str, wrappers_left: usize) -> Result<Peeled<'_>, Refusal> {
    check_text(text)?;
    let shapes: Shapes<'_> =
        serde_json::from_str(text).map_err(|error| refuse("invalid_json", format!("not a JSON event: {error}")))?;
    if !is_object(text) {
        return Err(refuse("invalid_json", "not a JSON event: an event is an object"));
    }
    if shapes.specversion.is_some() {
        return Ok(Peeled::CloudEvent(shapes));
    }
    if wrappers_left == 0 {
        return Err(refuse("invalid_envelope", format!("more than {MAX_WRAPPERS} wrappers around the event")));
    }
    if shapes.sns_type.as_deref() == Some("Notification") {
        let message =
            shapes.sns_message.ok_or_else(|| refuse("invalid_envelope", "the SNS notification has no Message"))?;
        return Ok(Peeled::Wrapper(message.0));
    }
    if let (Some(_), Some(detail)) = (&shapes.detail_type, shapes.detail) {
        return Ok(event_bridge(shapes, detail));
    }
    Err(refuse(
        "invalid_envelope",
        "neither a CloudEvent (no specversion), nor an SNS notification, nor an EventBridge event",
    ))
}

fn event_bridge<'a>(shapes: Shapes<'a>, detail: &'a RawValue) -> Peeled<'a> {
    #[derive(Deserialize)]
    struct Probe {
        specversion: Option<serde::de::IgnoredAny>,
    }
    let inner: Result<Probe, _> = serde_json::from_str(detail.get());
    if matches!(inner, Ok(Probe { specversion: Some(_) })) {
        return Peeled::Wrapper(Cow::Borrowed(detail.get()));
    }
    Peeled::EventBridge(Shapes {
        specversion: Some(Text("1.0".into())),
        kind: shapes.detail_type.clone(),
        data: Some(detail),
        datacontenttype: None,
        data_base64: None,
        ..shapes
    })
}

/// The CloudEvent of a body as it arrived, wrappers off, on one line. An EventBridge event without a CloudEvent inside
/// becomes the CloudEvent that it stands for. The body must be one that [`Event::decode`] accepts.
pub fn document(body: &str) -> Result<Cow<'_, str>, Refusal> {
    fn unwrap(text: &str, wrappers_left: usize) -> Result<Cow<'_, str>, Refusal> {
        match peel(text, wrappers_left)? {
            Peeled::CloudEvent(_) => Ok(Cow::Borrowed(text)),
            Peeled::EventBridge(shapes) => {
                let event = Event::cloud_event(shapes)?;
                let data: &RawValue = serde_json::from_str(&event.data)
                    .map_err(|error| refuse("invalid_data", format!("data is not JSON: {error}")))?;
                Ok(Cow::Owned(structured(
                    &event.id,
                    &event.source,
                    &event.kind,
                    event.time,
                    event.traceparent.as_deref(),
                    data,
                )))
            }
            Peeled::Wrapper(Cow::Borrowed(inner)) => unwrap(inner, wrappers_left - 1),
            Peeled::Wrapper(Cow::Owned(inner)) => Ok(Cow::Owned(unwrap(&inner, wrappers_left - 1)?.into_owned())),
        }
    }
    let document = unwrap(body, MAX_WRAPPERS)?;
    // JSON has line breaks only between its tokens; inside a text they are escaped.
    let document =
        if document.contains(['\n', '\r']) { Cow::Owned(document.replace(['\n', '\r'], " ")) } else { document };
    Ok(if document.contains(NOT_XML) { Cow::Owned(for_sqs(&document)) } else { document })
}

fn is_object(json: &str) -> bool {
    json.trim_start().starts_with('{')
}

/// A field that must be there, not empty, and fit to be a key.
fn name<'a>(field: &str, value: Option<Text<'a>>) -> Result<Cow<'a, str>, Refusal> {
    let Text(value) = value.ok_or_else(|| refuse("invalid_envelope", format!("{field} is missing")))?;
    let unfit = |character: char| character.is_control() || NOT_XML.contains(&character);
    if value.is_empty() || value.len() > MAX_NAME_BYTES || value.chars().any(unfit) {
        let shown: String = value.chars().take(64).collect();
        let reason = format!(
            "{field} {shown:?} must have 1 to {MAX_NAME_BYTES} bytes, no control characters, and neither U+FFFE nor U+FFFF"
        );
        return Err(refuse("invalid_envelope", reason));
    }
    Ok(value)
}

/// One look at the bytes before any parser: the depth of nesting, and NUL characters, which JSON can write and Postgres
/// cannot store.
fn check_text(text: &str) -> Result<(), Refusal> {
    let bytes = text.as_bytes();
    let (mut depth, mut in_string, mut index) = (0usize, false, 0);
    while index < bytes.len() {
        match bytes[index] {
            b'\\' if in_string => {
                // Within a string inside a string the backslash is doubled, and the inner document is checked by itself.
                if bytes[index + 1..].starts_with(b"u0000") {
                    return Err(refuse("invalid_data", "a text contains the character U+0000, which cannot be stored"));
                }
                index += 1;
            }
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Err(refuse("too_deep", format!("nested more than {MAX_DEPTH} levels deep")));
                }
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        index += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::outgoing::rfc3339;
    use super::*;
    use serde_json::json;

    fn good() -> serde_json::Value {
        json!({
            "specversion": "1.0", "id": "e-1", "source": "/test", "type": VALUATIONS_REFRESH,
            "time": "2026-01-31T02:00:00Z", "data": {"zip_codes": null, "limit": 10}
        })
    }

    fn code(body: &str) -> &'static str {
        Event::decode(body).map(|event| event.id.into_owned()).expect_err(body).code
    }

    #[test]
    fn a_cloud_event_is_read_without_copies() {
        let body = good().to_string();
        let event = Event::decode(&body).expect("good");
        assert_eq!((event.id.as_ref(), event.kind.as_ref()), ("e-1", VALUATIONS_REFRESH));
        assert!(matches!(event.id, Cow::Borrowed(_)));
    }

    #[test]
    fn wrappers_come_off() {
        let plain = good().to_string();
        let sns = json!({"Type": "Notification", "MessageId": "x", "Message": plain}).to_string();
        let bridge = json!({"version": "0", "id": "b-1", "detail-type": "x", "source": "s", "time": "2026-01-31T02:00:00Z",
            "detail": good()});
        let bridge_in_sns = json!({"Type": "Notification", "Message": bridge.to_string()}).to_string();
        for body in [sns, bridge.to_string(), bridge_in_sns] {
            let event = Event::decode(&body).expect(&body);
            assert_eq!(event.id, "e-1");
            assert_eq!(event.digest(), Event::decode(&plain).expect("good").digest());
        }
    }

    #[test]
    fn an_event_bridge_event_without_a_cloud_event_gives_its_own_names() {
        let body = json!({"version": "0", "id": "night-1", "detail-type": VALUATIONS_REFRESH, "source": "scheduler",
            "time": "2026-01-31T02:00:00Z", "detail": {"limit": 17000}})
        .to_string();
        let event = Event::decode(&body).expect("good");
        assert_eq!((event.id.as_ref(), event.kind.as_ref()), ("night-1", VALUATIONS_REFRESH));
        assert_eq!(event.data::<serde_json::Value>().expect("JSON"), json!({"limit": 17000}));
    }

    #[test]
    fn the_document_of_a_body_is_the_cloud_event_as_it_was_on_one_line() {
        let mut event = good();
        event["tracestate"] = json!("a=b");
        event["data"] = json!({"price": 1.50, "text": "line\nbreak"});
        let pretty = serde_json::to_string_pretty(&event).expect("JSON").replace("1.5", "1.50");
        let sns = json!({"Type": "Notification", "Message": pretty}).to_string();
        for body in [pretty.clone(), sns] {
            let document = document(&body).expect("good");
            assert_eq!(document, pretty.replace('\n', " "));
            assert_eq!(Event::decode(&document).expect("good").digest(), Event::decode(&body).expect("good").digest());
        }
        let plain = good().to_string();
        assert!(matches!(document(&plain), Ok(Cow::Borrowed(text)) if text == plain));
    }

    /// Digests are stored. Made in another way, they would turn an event that is delivered again into another event with its id.
    #[test]
    fn the_digest_is_this_and_stays_so() {
        let mut event = good();
        event["source"] = json!("/crm");
        event["type"] = json!(LISTING_UPSERT);
        event["data"] = json!({"b": 1.5, "a": "é\n", "n": [true, null, -3]});
        let body = event.to_string();
        let digest = Event::decode(&body).expect("good").digest().expect("an object");
        // From Python: for each part, its length as 8 bytes and then it, of source, type and
        // json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False), through hashlib.sha256.
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "b893375b7e9a26b80830e16512d536fbe8e1c0f39ebd91ae5736fe86e5e1ab3e");
    }

    #[test]
    fn an_event_bridge_event_becomes_the_cloud_event_that_it_stands_for() {
        let bridge = json!({"version": "0", "id": "night-1", "detail-type": VALUATIONS_REFRESH, "source": "scheduler",
            "time": "2026-01-31T02:00:00Z", "detail": {"limit": 17000}})
        .to_string();
        let sns = json!({"Type": "Notification", "Message": bridge}).to_string();
        for body in [bridge, sns] {
            let document = document(&body).expect("good");
            assert!(document.contains("specversion"), "{document}");
            let (one, two) = (Event::decode(&body).expect("good"), Event::decode(&document).expect("good"));
            assert_eq!((&one.id, one.time), (&two.id, two.time));
            assert_eq!(one.digest(), two.digest());
        }
    }

    #[test]
    fn each_unreadable_body_has_its_code() {
        let with = |field: &str, value: serde_json::Value| {
            let mut event = good();
            event[field] = value;
            event.to_string()
        };
        let without = |field: &str| {
            let mut event = good();
            event.as_object_mut().expect("object").remove(field);
            event.to_string()
        };
        assert_eq!(code("not json"), "invalid_json");
        assert_eq!(code(""), "invalid_json");
        assert_eq!(code("[1]"), "invalid_json");
        // Read by position, these would be the first fields of an event.
        let by_position = r#"["1.0","e-1","/test","x","2026-01-31T02:00:00Z",null,null,{},null,null,null,null,null]"#;
        assert_eq!(code(by_position), "invalid_json");
        assert_eq!(code("{}"), "invalid_envelope");
        assert_eq!(code(&with("specversion", json!("0.3"))), "unknown_version");
        assert_eq!(code(&with("time", json!("yesterday"))), "invalid_envelope");
        assert_eq!(code(&with("id", json!(""))), "invalid_envelope");
        assert_eq!(code(&with("id", json!("a\nb"))), "invalid_envelope");
        assert_eq!(code(&with("id", json!("x".repeat(257)))), "invalid_envelope");
        assert_eq!(code(&with("id", json!("a\u{ffff}"))), "invalid_envelope");
        assert_eq!(code(&with("source", json!("\u{fffe}"))), "invalid_envelope");
        assert_eq!(code(&with("datacontenttype", json!("text/xml"))), "invalid_envelope");
        assert_eq!(code(&without("data")), "invalid_data");
        assert_eq!(code(&without("time")), "invalid_envelope");
        assert_eq!(code(&with("data", json!({"description": "a\u{0}b"}))), "invalid_data");
        assert_eq!(code(&with("data", json!("x".repeat(MAX_BODY_BYTES)))), "too_large");
        let deep = format!(r#"{{"specversion":"1.0","x":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(code(&deep), "too_deep");
        let four =
            (0..4).fold(good().to_string(), |inner, _| json!({"Type": "Notification", "Message": inner}).to_string());
        assert_eq!(code(&four), "invalid_envelope");
    }

    #[test]
    fn the_same_event_has_the_same_digest_and_another_has_another() {
        let one = good().to_string();
        let spaced = serde_json::to_string_pretty(&good()).expect("JSON");
        let reordered = one.replace(r#""limit":10,"zip_codes":null"#, r#""zip_codes":null,"limit":10"#);
        assert_ne!(one, reordered);
        let mut other = good();
        other["data"]["limit"] = json!(11);
        let digest = |body: &str| Event::decode(body).expect("good").digest().expect("JSON");
        assert_eq!(digest(&one), digest(&spaced));
        assert_eq!(digest(&one), digest(&reordered));
        assert_ne!(digest(&one), digest(&other.to_string()));
    }

    #[test]
    fn a_text_that_mentions_u0000_is_no_nul() {
        let mut event = good();
        event["data"] = json!({"description": "a backslash: \\u0000"});
        assert!(Event::decode(&event.to_string()).is_ok());
    }

    #[test]
    fn a_time_that_is_outside_of_the_calendar_in_utc_is_refused() {
        let at = |time: &str| {
            let mut event = good();
            event["time"] = json!(time);
            event.to_string()
        };
        for time in ["9999-12-31T23:59:59-01:00", "0000-01-01T00:00:00+01:00", "0001-01-01T00:59:59+01:00"] {
            let body = at(time);
            let refusal = Event::decode(&body).expect_err(time);
            assert_eq!(refusal.code, "invalid_envelope");
            assert!(refusal.reason.contains(time), "{}", refusal.reason);
        }
        for (time, utc) in [
            ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59Z"),
            ("0001-01-01T01:00:00+01:00", "0001-01-01T00:00:00Z"),
            ("2026-01-31T02:00:00+05:30", "2026-01-30T20:30:00Z"),
        ] {
            let body = at(time);
            assert_eq!(rfc3339(Event::decode(&body).expect(time).time), utc);
        }
    }
}
