//! What travels: the body of a call, the body of an answer, the idempotency key.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// One listing, as the partner wants to see it. Its JSON is the body of the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Request {
    /// The listing to be valued.
    pub listing_id: i64,
    /// Where it is.
    pub zip_code: i32,
    /// What is asked for it, in US cents.
    pub list_price_cents: i64,
    /// Bedrooms, if known; `null` otherwise.
    pub bedrooms: Option<i16>,
    /// Living area in square feet, if known; `null` otherwise.
    pub living_square_feet: Option<i32>,
}

/// A run to the partner: its part of the idempotency keys, and whether its calls may still be sent. Clones are one run.
///
/// The key of one listing is `<run_id>:<listing_id>`. Event ids are arbitrary text and header values are not: every
/// byte outside printable ASCII, the space and the percent sign are percent-encoded, all else stays as it is. The percent
/// sign is among them so that two runs never share a key.
#[derive(Debug, Clone)]
pub struct RunKey(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    key: String,
    closed: AtomicBool,
    closing: Notify,
}

impl RunKey {
    /// The run with this id.
    pub fn new(run_id: &str) -> Self {
        let mut key = String::with_capacity(run_id.len());
        for byte in run_id.bytes() {
            match byte {
                b'!'..=b'~' if byte != b'%' => key.push(char::from(byte)),
                _ => write!(key, "%{byte:02X}").expect("writing to a string cannot fail"),
            }
        }
        RunKey(Arc::new(Inner { key, closed: AtomicBool::new(false), closing: Notify::new() }))
    }

    /// Nothing of the run is sent from now on. What is out goes on; what waits for its first or its next try ends.
    pub fn close(&self) {
        self.0.closed.store(true, Ordering::Release);
        self.0.closing.notify_waiters();
    }

    /// The run's part alone, without colon and listing id.
    pub(super) fn as_str(&self) -> &str {
        &self.0.key
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Acquire)
    }

    /// Waits for `work`; `None` if the run is closed first.
    pub(super) async fn while_open<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        // Before the flag is read: what is closed in between is heard.
        let closing = self.0.closing.notified();
        if self.is_closed() {
            return None;
        }
        tokio::select! {
            biased;
            done = work => Some(done),
            () = closing => None,
        }
    }
}

/// What the partner says a listing is worth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Valuation {
    /// In US cents, never negative.
    pub valuation_cents: i64,
    /// From 0 to 1.
    pub confidence: f64,
}

impl Valuation {
    /// Reads the body of a 200. An answer that makes no sense is an error that says what is wrong with it: it is not a
    /// verdict on the listing, and the partner is asked again.
    pub(super) fn read(body: &[u8], listing_id: i64) -> Result<Valuation, &'static str> {
        #[derive(Deserialize)]
        struct Answer {
            listing_id: i64,
            valuation_cents: i64,
            confidence: f64,
        }
        let answer: Answer = serde_json::from_slice(body).map_err(|error| match error.classify() {
            serde_json::error::Category::Data => "JSON without the fields of a valuation",
            _ => "a body that is not JSON",
        })?;
        if answer.listing_id != listing_id {
            return Err("a valuation of another listing");
        }
        if answer.valuation_cents < 0 {
            return Err("a negative valuation");
        }
        if !(0.0..=1.0).contains(&answer.confidence) {
            return Err("a confidence outside 0 to 1");
        }
        Ok(Valuation { valuation_cents: answer.valuation_cents, confidence: answer.confidence })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_the_json_of_the_contract() {
        let mut request = Request {
            listing_id: 7,
            zip_code: 98002,
            list_price_cents: 22_190_000,
            bedrooms: Some(3),
            living_square_feet: Some(1180),
        };
        assert_eq!(
            serde_json::to_string(&request).expect("plain data"),
            r#"{"listing_id":7,"zip_code":98002,"list_price_cents":22190000,"bedrooms":3,"living_square_feet":1180}"#
        );
        request.bedrooms = None;
        assert!(serde_json::to_string(&request).expect("plain data").contains(r#""bedrooms":null"#));
    }

    #[test]
    fn only_an_answer_that_makes_sense_is_a_valuation() {
        let good = br#"{"listing_id":7,"valuation_cents":100,"confidence":0.5,"model":"new fields are welcome"}"#;
        assert_eq!(Valuation::read(good, 7), Ok(Valuation { valuation_cents: 100, confidence: 0.5 }));
        for nonsense in [
            &b""[..],
            b"<html>",
            b"{}",
            b"[7,100,0.5]x",
            br#"{"listing_id":8,"valuation_cents":100,"confidence":0.5}"#,
            br#"{"listing_id":7,"valuation_cents":-1,"confidence":0.5}"#,
            br#"{"listing_id":7,"valuation_cents":1.5,"confidence":0.5}"#,
            br#"{"listing_id":7,"valuation_cents":100,"confidence":1.01}"#,
            br#"{"listing_id":7,"valuation_cents":100,"confidence":-0.01}"#,
            br#"{"listing_id":7,"valuation_cents":100,"confidence":NaN}"#,
            br#"{"listing_id":7,"valuation_cents":100,"confidence":null}"#,
            br#"{"listing_id":7,"valuation_cents":100}"#,
            br#"{"listing_id":7,"valuation_cents":100,"confidence":1e999}"#,
        ] {
            assert!(Valuation::read(nonsense, 7).is_err(), "{}", String::from_utf8_lossy(nonsense));
        }
    }

    #[test]
    fn a_run_key_is_a_header_value_and_no_two_runs_share_one() {
        assert_eq!(RunKey::new("nightly/2024-05-01:a_b~").as_str(), "nightly/2024-05-01:a_b~");
        assert_eq!(RunKey::new("a b\r\nx: ü").as_str(), "a%20b%0D%0Ax:%20%C3%BC");
        assert_ne!(RunKey::new("a b").as_str(), RunKey::new("a%20b").as_str());
    }
}
