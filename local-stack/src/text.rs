//! Figures as people read them.

/// A count with a comma before every three digits.
#[must_use]
pub fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_readable() {
        let texts = [0, 999, 1_000, 17_000, 1_700_000].map(thousands);
        assert_eq!(texts, ["0", "999", "1,000", "17,000", "1,700,000"]);
    }
}
