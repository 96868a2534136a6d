//! The record of one valuation: its key, its value and its headers.
//!
//! Made from a finished run's valuations alone, in exact integer arithmetic, so that the same valuation gives the same
//! bytes on any machine at any time. The record's Kafka timestamp is the time of sending: were it the run's, sending an
//! old run again would hand the broker records that its retention deletes at once.

use std::sync::Arc;

use rdkafka::message::{Header, OwnedHeaders};
use sha1::{Digest, Sha1};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// `ce_type` of every record.
const EVENT_TYPE: &str = "writeapi.listing.valued.v1";

/// `ce_source` of every record.
const EVENT_SOURCE: &str = "/writeapi";

/// The namespace of `ce_id`, a UUIDv5 of `run_id:listing_id`. Part of the contract: consumers that saw an id before
/// know the record, so another namespace would make every record new to them.
const EVENT_ID_NAMESPACE: Uuid = Uuid::NAMESPACE_OID;

/// One listing's result in one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Valuation {
    /// The listing.
    pub listing_id: i64,
    /// Its zip code.
    pub zip_code: i32,
    /// Its list price in cents when it was valued; 0 if it had none.
    pub list_price_cents: i64,
    /// The partner's answer, in cents.
    pub valuation_cents: i64,
    /// The partner's confidence, from 0 to 1.
    pub confidence: f64,
}

/// A message ready to be sent.
#[derive(Debug, Clone)]
pub struct Record {
    /// The listing id as decimal text, so that the records of a listing stay in order in one partition.
    pub key: String,
    /// JSON.
    pub value: Vec<u8>,
    id: Uuid,
    common: Arc<Common>,
}

/// What the headers of all records of a run have in common.
#[derive(Debug)]
struct Common {
    time: String,
    traceparent: Option<String>,
}

impl Record {
    /// CloudEvents 1.0 in binary mode. Made anew each time, for librdkafka takes them with the record: it would be the most
    /// expensive part of a record to keep.
    pub fn headers(&self) -> OwnedHeaders {
        let Common { time, traceparent } = &*self.common;
        let mut buffer = Uuid::encode_buffer();
        // With room for all: a copy of those in common would have to grow by one.
        let mut headers = OwnedHeaders::new_with_capacity(7)
            .insert(header("ce_specversion", "1.0"))
            .insert(header("ce_type", EVENT_TYPE))
            .insert(header("ce_source", EVENT_SOURCE))
            .insert(header("ce_time", time))
            .insert(header("content-type", "application/json"));
        if let Some(traceparent) = traceparent {
            headers = headers.insert(header("traceparent", traceparent));
        }
        headers.insert(header("ce_id", self.id.hyphenated().encode_lower(&mut buffer)))
    }
}

/// Makes the records of one run. What they have in common is made once.
#[derive(Debug)]
pub struct Records {
    /// The value up to the listing's id, with the run's id as a JSON string.
    beginning: Vec<u8>,
    /// The hash of a `ce_id` up to the listing's id.
    id: Sha1,
    common: Arc<Common>,
}

impl Records {
    /// For the run `run_id`, complete since `completed_at`, begun by the event that carried `traceparent`.
    pub fn new(run_id: &str, completed_at: OffsetDateTime, traceparent: Option<&str>) -> Self {
        let time = completed_at.to_offset(time::UtcOffset::UTC).format(&Rfc3339).expect("the year has four digits");
        let beginning = format!(r#"{{"run_id":{},"listing_id":"#, serde_json::Value::from(run_id)).into_bytes();
        let id = Sha1::new().chain_update(EVENT_ID_NAMESPACE).chain_update(run_id).chain_update(":");
        Records { beginning, id, common: Arc::new(Common { time, traceparent: traceparent.map(str::to_owned) }) }
    }

    /// The record of one of the run's valuations.
    pub fn record(&self, valuation: &Valuation) -> Record {
        let &Valuation { listing_id, zip_code, list_price_cents, valuation_cents, confidence } = valuation;
        let delta = Delta::between(list_price_cents, valuation_cents);
        let mut digits = itoa::Buffer::new();
        let key = digits.format(listing_id).to_owned();
        // A UUIDv5. The hash is made here and not by `Uuid::new_v5`, whose SHA-1 does not use the processor's instructions for it: with it
        // and the formatting machinery below, publishing a record took a quarter more of the processors.
        let hash = self.id.clone().chain_update(&key).finalize();
        let id = uuid::Builder::from_sha1_bytes(*hash.first_chunk().expect("20 bytes")).into_uuid();

        // By hand, without the formatting machinery, and with more room than records need, so that it is allocated once.
        let mut value = Vec::with_capacity(self.beginning.len() + 256);
        value.extend_from_slice(&self.beginning);
        value.extend_from_slice(key.as_bytes());
        value.extend_from_slice(br#","zip_code":"#);
        value.extend_from_slice(digits.format(zip_code).as_bytes());
        value.extend_from_slice(br#","list_price_cents":"#);
        value.extend_from_slice(digits.format(list_price_cents).as_bytes());
        value.extend_from_slice(br#","valuation_cents":"#);
        value.extend_from_slice(digits.format(valuation_cents).as_bytes());
        value.extend_from_slice(br#","delta_cents":"#);
        value.extend_from_slice(digits.format(delta.cents).as_bytes());
        value.extend_from_slice(br#","delta_ratio":"#);
        delta.ratio.write(&mut value);
        value.extend_from_slice(br#","assessment":""#);
        value.extend_from_slice(delta.assessment.as_bytes());
        value.extend_from_slice(br#"","confidence":"#);
        serde_json::to_writer(&mut value, &confidence).expect("writing to memory cannot fail");
        value.push(b'}');
        Record { key, value, id, common: Arc::clone(&self.common) }
    }
}

fn header<'a>(key: &'a str, value: &'a str) -> Header<'a, &'a str> {
    Header { key, value: Some(value) }
}

/// How a valuation stands to the list price.
#[derive(Debug, PartialEq)]
struct Delta {
    cents: i128,
    ratio: Ratio,
    assessment: &'static str,
}

/// A ratio in ten-thousandths; `None` without a list price.
#[derive(Debug, PartialEq)]
struct Ratio(Option<i128>);

impl Delta {
    /// The assessment compares the exact amounts, not the rounded ratio: 4.996 % is shown as 0.0500 and still fair, and
    /// anyone can repeat the decision from the two amounts in the record. Without a list price nothing can be said
    /// either way, which is `fair`.
    fn between(list_price_cents: i64, valuation_cents: i64) -> Delta {
        let list = i128::from(list_price_cents);
        let cents = i128::from(valuation_cents) - list;
        let has_price = list > 0;
        Delta {
            cents,
            ratio: Ratio(has_price.then(|| divide_half_even(cents * 10_000, list))),
            // 5 % is one twentieth.
            assessment: match cents * 20 {
                twenty_deltas if has_price && twenty_deltas >= list => "undervalued",
                twenty_deltas if has_price && twenty_deltas <= -list => "overvalued",
                _ => "fair",
            },
        }
    }
}

/// `dividend / divisor` to the nearest whole number, a tie to the even one. The divisor is positive.
fn divide_half_even(dividend: i128, divisor: i128) -> i128 {
    let floor = dividend.div_euclid(divisor);
    let twice_the_rest = 2 * dividend.rem_euclid(divisor);
    let up = twice_the_rest > divisor || (twice_the_rest == divisor && floor % 2 != 0);
    floor + i128::from(up)
}

impl Ratio {
    /// As a JSON number with four decimals, or `null`.
    fn write(&self, json: &mut Vec<u8>) {
        let Some(ratio) = self.0 else { return json.extend_from_slice(b"null") };
        let size = ratio.unsigned_abs();
        if ratio < 0 {
            json.push(b'-');
        }
        json.extend_from_slice(itoa::Buffer::new().format(size / 10_000).as_bytes());
        let decimals = (size % 10_000) as u16;
        json.push(b'.');
        json.extend([1_000, 100, 10, 1].map(|place| b'0' + (decimals / place % 10) as u8));
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::message::Headers;
    use time::macros::datetime;

    use super::*;

    fn valuation(list_price_cents: i64, valuation_cents: i64) -> Valuation {
        Valuation { listing_id: 7_129_300_520, zip_code: 98_178, list_price_cents, valuation_cents, confidence: 0.87 }
    }

    fn headers(record: &Record) -> Vec<(String, String)> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        record.headers().iter().map(|header| (header.key.to_owned(), text(header.value.unwrap()))).collect()
    }

    /// The contract with the consumers, byte by byte. A change here is a new version of the event type.
    #[test]
    fn the_record_is_this_and_nothing_else() {
        let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let completed_at = datetime!(2026-03-01 04:00:17.25 +2);
        let records = Records::new("nightly \"2026-03-01\"", completed_at, Some(traceparent));
        let record = records.record(&valuation(22_190_000, 23_532_495));

        assert_eq!(record.key, "7129300520");
        assert_eq!(
            String::from_utf8(record.value.clone()).unwrap(),
            concat!(
                r#"{"run_id":"nightly \"2026-03-01\"","listing_id":7129300520,"zip_code":98178,"#,
                r#""list_price_cents":22190000,"valuation_cents":23532495,"delta_cents":1342495,"#,
                r#""delta_ratio":0.0605,"assessment":"undervalued","confidence":0.87}"#
            )
        );
        let expected = [
            ("ce_specversion", "1.0"),
            ("ce_type", "writeapi.listing.valued.v1"),
            ("ce_source", "/writeapi"),
            ("ce_time", "2026-03-01T02:00:17.25Z"),
            ("content-type", "application/json"),
            ("traceparent", traceparent),
            // From Python: uuid.uuid5(uuid.NAMESPACE_OID, 'nightly "2026-03-01":7129300520')
            ("ce_id", "f4036ba3-c76c-5daa-829c-28b795328be2"),
        ];
        assert_eq!(headers(&record), expected.map(|(key, value)| (key.to_owned(), value.to_owned())));

        let again = Records::new("nightly \"2026-03-01\"", completed_at, Some(traceparent));
        let again = again.record(&valuation(22_190_000, 23_532_495));
        assert_eq!((&again.key, &again.value), (&record.key, &record.value));
        assert_eq!(headers(&again), headers(&record));
    }

    #[test]
    fn a_value_is_json_and_traceparent_is_left_out_without_one() {
        let record = Records::new("r", OffsetDateTime::UNIX_EPOCH, None).record(&valuation(i64::MAX, 0));
        let value: serde_json::Value = serde_json::from_slice(&record.value).expect("JSON");
        assert_eq!(value["delta_cents"], -i64::MAX);
        assert_eq!(value["delta_ratio"], -1.0);
        assert!(headers(&record).iter().all(|(key, _)| key != "traceparent"));
        assert_eq!(headers(&record).len(), 6);
    }

    #[test]
    fn extreme_amounts_and_confidences_are_written_in_full() {
        let records = Records::new("r", OffsetDateTime::UNIX_EPOCH, None);
        let value = |listing_id, list_price_cents, valuation_cents, confidence| {
            let valuation = Valuation { listing_id, zip_code: -7, list_price_cents, valuation_cents, confidence };
            String::from_utf8(records.record(&valuation).value).unwrap()
        };
        for (confidence, text) in [(0.0, "0.0"), (1.0, "1.0"), (0.1 + 0.2, "0.30000000000000004"), (f64::NAN, "null")] {
            let value = value(1, 100, 100, confidence);
            assert!(value.ends_with(&format!(r#""assessment":"fair","confidence":{text}}}"#)), "{value}");
        }
        assert_eq!(
            value(i64::MIN + 1, i64::MAX, i64::MIN, 1e-7),
            concat!(
                r#"{"run_id":"r","listing_id":-9223372036854775807,"zip_code":-7,"list_price_cents":9223372036854775807,"#,
                r#""valuation_cents":-9223372036854775808,"delta_cents":-18446744073709551615,"delta_ratio":-2.0000,"#,
                r#""assessment":"overvalued","confidence":1e-7}"#
            )
        );
    }

    #[test]
    fn ratios_have_four_decimals_and_ties_go_to_the_even_one() {
        let ratio = |list, valuation| {
            let mut json = Vec::new();
            Delta::between(list, valuation).ratio.write(&mut json);
            String::from_utf8(json).unwrap()
        };
        for (list, valuation, expected) in [
            (100_000, 100_005, "0.0000"), // 0.00005, tie to 0
            (100_000, 100_015, "0.0002"), // 0.00015, tie to 2
            (100_000, 100_016, "0.0002"),
            (100_000, 100_025, "0.0002"), // 0.00025, tie to 2
            (100_000, 99_995, "0.0000"),  // no minus zero
            (100_000, 99_985, "-0.0002"),
            (100_000, 99_975, "-0.0002"),
            (3, 1, "-0.6667"),
            (3, 5, "0.6667"),
            (1, i64::MAX, "9223372036854775806.0000"),
            (100, 0, "-1.0000"),
            (0, 100, "null"),
        ] {
            assert_eq!(ratio(list, valuation), expected, "{valuation} for {list}");
        }
    }

    #[test]
    fn five_per_cent_is_exact() {
        let assessment = |list, valuation| Delta::between(list, valuation).assessment;
        assert_eq!(assessment(100_000, 105_000), "undervalued");
        assert_eq!(assessment(100_000, 104_999), "fair");
        assert_eq!(assessment(100_000, 95_000), "overvalued");
        assert_eq!(assessment(100_000, 95_001), "fair");
        assert_eq!(assessment(0, 50_000_000), "fair");
        assert_eq!(assessment(0, 0), "fair");
        assert_eq!(assessment(i64::MAX, 0), "overvalued");
    }
}
