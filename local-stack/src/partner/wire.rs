//! What the partner is asked and what it answers.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde::Deserialize;

/// The longest `Idempotency-Key` that is accepted, in bytes.
const KEY_BYTES: usize = 256;

/// The body of `POST /v1/valuations`. A field too many or too few is an error: the contract has exactly these.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ValuationRequest {
    pub(super) listing_id: i64,
    #[serde(rename = "zip_code")]
    _zip_code: i64,
    pub(super) list_price_cents: i64,
    #[serde(rename = "bedrooms")]
    _bedrooms: i64,
    #[serde(rename = "living_square_feet")]
    _living_square_feet: i64,
}

/// The partner's answer for one listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Valuation {
    /// The listing.
    pub listing_id: i64,
    /// What it is worth, in cents.
    pub valuation_cents: i64,
    /// How sure that is, in hundredths: 0 to 100.
    pub confidence_percent: u8,
}

impl Valuation {
    /// How sure the valuation is: 0 to 1, two decimals.
    #[must_use]
    pub fn confidence(&self) -> f64 {
        f64::from(self.confidence_percent) / 100.0
    }

    pub(super) fn json(&self) -> String {
        let Self { listing_id, valuation_cents, .. } = self;
        let confidence = self.confidence();
        format!(r#"{{"listing_id":{listing_id},"valuation_cents":{valuation_cents},"confidence":{confidence}}}"#)
    }
}

/// What the partner answers for a listing at this price: 0.8000 to 1.2000 times the price, by the listing's id, rounded
/// down to a cent. Tests compute the expected world with it.
#[must_use]
pub fn valuation(listing_id: i64, list_price_cents: i64) -> Valuation {
    let hash = mix(listing_id.cast_unsigned());
    let ten_thousandths = 8_000 + i128::from(hash % 4_001);
    let cents = i128::from(list_price_cents) * ten_thousandths / 10_000;
    Valuation {
        listing_id,
        valuation_cents: i64::try_from(cents).unwrap_or(i64::MAX),
        confidence_percent: u8::try_from((hash >> 32) % 101).unwrap_or(0),
    }
}

/// The finalizer of SplitMix64: every bit of the input changes about half of the output's.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// The stub's memory of one `Idempotency-Key`: a hash, so that it costs the same whatever the key's length. With
/// 1,700,000 keys the odds that any two share one are below 1 in 10,000,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct KeyHash(u64);

impl KeyHash {
    /// Takes `<run_id>:<listing_id>`, or says what is wrong with it.
    pub(super) fn of(key: &[u8], listing_id: i64) -> Result<Self, String> {
        let text = str::from_utf8(key).map_err(|_| "Idempotency-Key is not text".to_owned())?;
        if text.len() > KEY_BYTES {
            return Err(format!("Idempotency-Key has {} bytes, more than {KEY_BYTES}", text.len()));
        }
        match text.rsplit_once(':') {
            Some((run, listing)) if !run.is_empty() && listing.parse() == Ok(listing_id) => {
                let mut hasher = DefaultHasher::new();
                text.hash(&mut hasher);
                Ok(Self(hasher.finish()))
            }
            _ => Err(format!("Idempotency-Key is {text:?}, not <run_id>:{listing_id}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valuations_are_spread_over_their_whole_range() {
        let price = 1_000_000;
        let all: Vec<_> = (1..=20_000).map(|id| valuation(id, price)).collect();
        let least = all.iter().map(|answer| answer.valuation_cents).min();
        let most = all.iter().map(|answer| answer.valuation_cents).max();
        assert!(least >= Some(800_000) && least < Some(801_000), "{least:?}");
        assert!(most <= Some(1_200_000) && most > Some(1_199_000), "{most:?}");
        assert!((0..=100).all(|percent| all.iter().any(|answer| answer.confidence_percent == percent)));
    }

    #[test]
    fn an_answer_is_the_same_for_ever() {
        // Pinned: the expected worlds of tests and the records of earlier runs depend on it.
        let answer = valuation(7_129_300_520, 22_190_000);
        assert_eq!(answer.json(), r#"{"listing_id":7129300520,"valuation_cents":25551785,"confidence":0.77}"#);
    }

    #[test]
    fn the_largest_price_does_not_overflow() {
        assert!((1..100).any(|id| valuation(id, i64::MAX).valuation_cents == i64::MAX));
    }

    #[test]
    fn keys_name_the_run_and_the_listing_of_the_body() {
        assert!(KeyHash::of(b"run-1:17", 17).is_ok());
        assert!(KeyHash::of(b"urn:a:b:17", 17).is_ok());
        assert_ne!(KeyHash::of(b"run-1:17", 17), KeyHash::of(b"run-2:17", 17));
        for (key, listing) in [(&b"run-1:18"[..], 17), (b":17", 17), (b"17", 17), (b"", 17), (b"\xff:17", 17)] {
            assert!(KeyHash::of(key, listing).is_err(), "{key:?}");
        }
        assert!(KeyHash::of(format!("{}:17", "x".repeat(KEY_BYTES)).as_bytes(), 17).is_err());
    }
}
