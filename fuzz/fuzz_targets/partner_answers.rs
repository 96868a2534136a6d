//! Answers of the partner: whatever they are, they end in a verdict or an error, within bounds, and however they arrive.

#![no_main]

use libfuzzer_sys::fuzz_target;
use write_api::partner::fuzzing::read_answer;

const MOST: usize = 16 * 1024;
const LISTING: i64 = 7;

fuzz_target!(|input: (u8, &[u8])| {
    let (piece, bytes) = input;
    let whole = read_answer(bytes, usize::MAX, MOST, LISTING);
    if let Ok(body) = &whole.body {
        assert!(body.len() <= MOST, "a body of {} bytes", body.len());
        assert!(whole.status.is_some_and(|status| status >= 200), "a body without a final status");
    }
    if let Some((cents, confidence)) = whole.valuation {
        assert!(cents >= 0 && (0.0..=1.0).contains(&confidence), "{cents} {confidence}");
    }
    // Where the pieces end is the network's affair and means nothing.
    assert_eq!(read_answer(bytes, usize::from(piece) + 1, MOST, LISTING), whole);
});
