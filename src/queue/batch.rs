//! How much goes in one call of SQS.

/// The most entries of one batch call, and messages of one receive.
pub const BATCH: usize = 10;

/// The most bytes of the bodies of one batch together.
pub const BATCH_BYTES: usize = 256 * 1024;

/// Whether a batch of so many messages and bytes may have one more message, of `next` bytes.
pub fn has_room(messages: usize, bytes: usize, next: usize) -> bool {
    messages < BATCH && bytes + next <= BATCH_BYTES
}

/// How many of `bodies`, from the first on, go in one batch: at least one, whatever its size.
pub fn batch_length(bodies: &[&str]) -> usize {
    let mut bytes = 0;
    let fits = bodies.iter().enumerate().take_while(|(messages, body)| {
        let fits = *messages == 0 || has_room(*messages, bytes, body.len());
        bytes += body.len();
        fits
    });
    fits.count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_cut_by_number_and_by_bytes() {
        let large = "b".repeat(BATCH_BYTES / 3);
        let huge = "b".repeat(BATCH_BYTES + 1);
        assert_eq!(batch_length(&[]), 0);
        assert_eq!(batch_length(&["b"; 12]), BATCH);
        assert_eq!(batch_length(&[large.as_str(); 5]), 3);
        assert_eq!(batch_length(&[&large, &huge, "b"]), 1);
        assert_eq!(batch_length(&[&huge, "b"]), 1);
    }
}
