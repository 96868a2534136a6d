//! What follows from a run, worked out anew from the contract: ids, keys, values, headers. Nothing here is shared with the
//! code that makes them.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::db::audit::{RunHead, ValuationBooks};
use crate::kafka::StoredRecord;

/// The namespace of derived ids: that of object identifiers, RFC 9562, section 6.6.
const NAMESPACE: Uuid = Uuid::from_u128(0x6ba7_b812_9dad_11d1_80b4_00c0_4fd4_30c8);

/// Id of the event that publishes a run.
pub(super) fn publish_event_id(run_id: &str) -> Uuid {
    Uuid::new_v5(&NAMESPACE, [run_id.as_bytes(), b":publish"].concat().as_slice())
}

/// What a record says that it is about.
pub(super) struct About {
    pub(super) run_id: String,
    pub(super) listing_id: i64,
}

/// Reads what a record is about from its value.
pub(super) fn about(record: &StoredRecord) -> Option<About> {
    #[derive(Deserialize)]
    struct Value {
        run_id: String,
        listing_id: i64,
    }
    let value: Value = serde_json::from_slice(record.value.as_deref()?).ok()?;
    Some(About { run_id: value.run_id, listing_id: value.listing_id })
}

/// What is wrong with a record of a valuation, by field, as `found instead of expected`; empty if nothing is.
pub(super) fn differences(record: &StoredRecord, run_id: &str, head: &RunHead, row: &ValuationBooks) -> Vec<String> {
    let mut wrong = Vec::new();
    let key = row.listing_id.to_string();
    differ(&mut wrong, "key", record.key.as_deref(), key.as_bytes());
    for (name, expected) in headers(run_id, head, row.listing_id) {
        let mut found = record.headers.iter().filter(|(header, _)| header == name);
        match (found.next(), found.next()) {
            (Some((_, value)), None) => differ(&mut wrong, name, value.as_deref(), expected.as_bytes()),
            (None, _) => wrong.push(format!("no header {name}")),
            (Some(_), Some(_)) => wrong.push(format!("header {name} more than once")),
        }
    }
    let known = 6 + usize::from(head.traceparent.is_some());
    if record.headers.len() != known && wrong.is_empty() {
        wrong.push(format!("{} headers instead of {known}", record.headers.len()));
    }
    value_differences(&mut wrong, record.value.as_deref().unwrap_or_default(), run_id, row);
    wrong
}

fn differ(wrong: &mut Vec<String>, what: &str, found: Option<&[u8]>, expected: &[u8]) {
    if found != Some(expected) {
        let found = String::from_utf8_lossy(found.unwrap_or_default());
        wrong.push(format!("{what} {found:?} instead of {:?}", String::from_utf8_lossy(expected)));
    }
}

fn headers(run_id: &str, head: &RunHead, listing_id: i64) -> Vec<(&'static str, String)> {
    let ce_id = Uuid::new_v5(&NAMESPACE, format!("{run_id}:{listing_id}").as_bytes()).to_string();
    // Postgres writes all six digits, RFC 3339 as it is sent only those that are needed.
    let time = head.completed_at.as_deref().unwrap_or_default().trim_end_matches('0').trim_end_matches('.');
    let mut headers = vec![
        ("ce_id", ce_id),
        ("ce_type", "writeapi.listing.valued.v1".to_owned()),
        ("ce_specversion", "1.0".to_owned()),
        ("ce_source", "/writeapi".to_owned()),
        ("ce_time", format!("{time}Z")),
        ("content-type", "application/json".to_owned()),
    ];
    headers.extend(head.traceparent.clone().map(|traceparent| ("traceparent", traceparent)));
    headers
}

fn value_differences(wrong: &mut Vec<String>, value: &[u8], run_id: &str, row: &ValuationBooks) {
    // Each field as it is written.
    let Ok(written) = serde_json::from_slice::<BTreeMap<String, &RawValue>>(value) else {
        return wrong.push("the value is no JSON object".to_owned());
    };
    let found = |name: &str| written.get(name).map(|value| value.get());
    let (Some(valuation), Some(confidence)) = (row.valuation_cents, row.confidence) else { return };
    let (list, delta) = (i128::from(row.list_price_cents), i128::from(valuation) - i128::from(row.list_price_cents));
    // A number can be spelt in several ways; of this one the contract fixes the value only.
    let spelling = found("confidence").filter(|spelling| spelling.parse() == Ok(confidence));
    // In the order of the contract.
    let expected = [
        ("run_id", serde_json::Value::from(run_id).to_string()),
        ("listing_id", row.listing_id.to_string()),
        ("zip_code", row.zip_code.to_string()),
        ("list_price_cents", list.to_string()),
        ("valuation_cents", valuation.to_string()),
        ("delta_cents", delta.to_string()),
        ("delta_ratio", ratio(delta, list)),
        ("assessment", format!("{:?}", assessment(delta, list))),
        ("confidence", spelling.map_or_else(|| confidence.to_string(), str::to_owned)),
    ];
    for (name, expected) in &expected {
        match found(name) {
            None => wrong.push(format!("no field {name}")),
            Some(found) if found != expected => wrong.push(format!("{name} {found} instead of {expected}")),
            Some(_) => {}
        }
    }
    let is_known = |name: &str| expected.iter().any(|(known, _)| *known == name);
    wrong.extend(written.keys().filter(|name| !is_known(name)).map(|name| format!("unknown field {name:?}")));
    // The same fields in another order, twice, or with white space, are other bytes.
    let fields = expected.map(|(name, expected)| format!("\"{name}\":{expected}"));
    if wrong.is_empty() && value != format!("{{{}}}", fields.join(",")).as_bytes() {
        wrong.push("the fields of the value are right, its bytes are not".to_owned());
    }
}

/// `delta / list` with four decimals, ties to the even one; `null` without a list price.
fn ratio(delta: i128, list: i128) -> String {
    if list == 0 {
        return "null".to_owned();
    }
    let (size, list) = (delta.unsigned_abs() * 10_000, list.unsigned_abs());
    let (down, rest) = (size / list, size % list);
    let ten_thousandths = match (rest * 2).cmp(&list) {
        std::cmp::Ordering::Less => down,
        std::cmp::Ordering::Greater => down + 1,
        std::cmp::Ordering::Equal => down + down % 2,
    };
    let sign = if delta < 0 && ten_thousandths > 0 { "-" } else { "" };
    format!("{sign}{}.{:04}", ten_thousandths / 10_000, ten_thousandths % 10_000)
}

/// From five hundredths of the list price.
fn assessment(delta: i128, list: i128) -> &'static str {
    if list > 0 && delta * 100 >= list * 5 {
        "undervalued"
    } else if list > 0 && -delta * 100 >= list * 5 {
        "overvalued"
    } else {
        "fair"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = "nightly \"1\"";

    fn row() -> ValuationBooks {
        ValuationBooks {
            listing_id: 7,
            zip_code: 98_178,
            list_price_cents: 22_190_000,
            valuation_cents: Some(23_532_495),
            confidence: Some(0.87),
        }
    }

    fn head() -> RunHead {
        RunHead { completed_at: Some("2026-03-01T02:00:17.250000".to_owned()), traceparent: None }
    }

    /// Written by hand from the contract.
    fn record() -> StoredRecord {
        let value = concat!(
            r#"{"run_id":"nightly \"1\"","listing_id":7,"zip_code":98178,"list_price_cents":22190000,"#,
            r#""valuation_cents":23532495,"delta_cents":1342495,"delta_ratio":0.0605,"assessment":"undervalued","#,
            r#""confidence":0.87}"#
        );
        let headers = [
            ("ce_specversion", "1.0"),
            ("ce_type", "writeapi.listing.valued.v1"),
            ("ce_source", "/writeapi"),
            ("ce_time", "2026-03-01T02:00:17.25Z"),
            ("content-type", "application/json"),
            // From Python: uuid.uuid5(uuid.NAMESPACE_OID, 'nightly "1":7')
            ("ce_id", "343e6683-34dc-5765-9554-213913357f69"),
        ];
        StoredRecord {
            partition: 0,
            offset: 0,
            timestamp_ms: None,
            key: Some(b"7".to_vec()),
            value: Some(value.as_bytes().to_vec()),
            headers: headers.map(|(name, value)| (name.to_owned(), Some(value.as_bytes().to_vec()))).into(),
        }
    }

    fn wrong(change: impl FnOnce(&mut StoredRecord)) -> String {
        let mut record = record();
        change(&mut record);
        differences(&record, RUN, &head(), &row()).join("; ")
    }

    #[test]
    fn a_record_is_right_or_told_what_is_wrong() {
        assert_eq!(wrong(|_| {}), "");
        let value = |from: &'static str, to: &'static str| {
            move |record: &mut StoredRecord| {
                let text = String::from_utf8(record.value.take().expect("a value")).expect("UTF-8");
                assert!(text.contains(from));
                record.value = Some(text.replace(from, to).into_bytes());
            }
        };
        assert_eq!(wrong(value("23532495", "23532496")), "valuation_cents 23532496 instead of 23532495");
        assert_eq!(wrong(value("0.0605", "0.060")), "delta_ratio 0.060 instead of 0.0605");
        assert_eq!(wrong(value("undervalued", "fair")), "assessment \"fair\" instead of \"undervalued\"");
        assert_eq!(wrong(value("0.87", "8.7e-1")), "");
        assert_eq!(wrong(value("0.87", "0.88")), "confidence 0.88 instead of 0.87");
        assert_eq!(wrong(value("\"zip_code\":98178,", "")), "no field zip_code");
        assert_eq!(wrong(value("\"zip_code\"", "\"zip\"")), "no field zip_code; unknown field \"zip\"");
        assert_eq!(
            wrong(value("98178,", "98178,\"zip_code\":98178,")),
            "the fields of the value are right, its bytes are not"
        );
        assert_eq!(wrong(|record| record.value = Some(b"[]".to_vec())), "the value is no JSON object");
        assert_eq!(wrong(value(",\"zip", ", \"zip")), "the fields of the value are right, its bytes are not");
        assert_eq!(wrong(|record| record.key = Some(b"8".to_vec())), "key \"8\" instead of \"7\"");
        assert_eq!(wrong(|record| drop(record.headers.remove(2))), "no header ce_source");
        assert_eq!(wrong(|record| record.headers.push(("x".to_owned(), None))), "7 headers instead of 6");
        let again = wrong(|record| record.headers[5].1 = Some(b"other".to_vec()));
        assert!(again.starts_with("ce_id \"other\" instead of"), "{again}");
    }

    #[test]
    fn ratios_and_assessments_follow_the_contract() {
        for (list, valuation, ratio_, assessment_) in [
            (100_000, 100_005, "0.0000", "fair"),
            (100_000, 100_015, "0.0002", "fair"),
            (100_000, 99_995, "0.0000", "fair"),
            (100_000, 99_985, "-0.0002", "fair"),
            (100_000, 105_000, "0.0500", "undervalued"),
            (100_000, 95_000, "-0.0500", "overvalued"),
            (100_000, 104_999, "0.0500", "fair"),
            (0, 100, "null", "fair"),
        ] {
            let delta = valuation - list;
            assert_eq!(
                (ratio(delta, list).as_str(), assessment(delta, list)),
                (ratio_, assessment_),
                "{valuation} for {list}"
            );
        }
    }

    #[test]
    fn the_id_of_post_processing_follows_from_the_run() {
        // From Python: uuid.uuid5(uuid.NAMESPACE_OID, 'nightly-1:publish')
        assert_eq!(publish_event_id("nightly-1").to_string(), "d05145fc-c6af-51e8-9901-d9ce3025b14c");
    }
}
