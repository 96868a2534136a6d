//! Figures and times as people read and write them.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A number with commas between its thousands.
pub(super) fn thousands(number: i64) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut text = String::from(if number < 0 { "-" } else { "" });
    for (index, digit) in digits.char_indices() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A time span by its two largest units, in at most seven characters for whatever is shorter than three years.
pub(super) fn span(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
    if days > 0 {
        format!("{days}d{:02}h", hours % 24)
    } else if hours > 0 {
        format!("{hours}h{:02}m", minutes % 60)
    } else if minutes > 0 {
        format!("{minutes}m{:02}s", seconds % 60)
    } else {
        format!("{seconds}s")
    }
}

/// Reads a moment of the command line.
pub(super) fn moment(text: &str) -> Result<OffsetDateTime, String> {
    OffsetDateTime::parse(text, &Rfc3339)
        .map_err(|_| format!("{text:?} is no RFC 3339 time; give date, time and offset, such as 2026-01-31T02:00:00Z"))
}

/// A line that others wrote, without what would move a terminal's cursor, colour it or turn the direction of writing.
pub(super) fn printable(text: &str) -> String {
    let is_harmful = |c: char| {
        c.is_control()
            || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\t' => shown.push(c),
            c if is_harmful(c) => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_parted() {
        let texts = [0, 7, 999, 1_000, 17_000, -1_234_567, i64::MIN].map(thousands);
        assert_eq!(texts, ["0", "7", "999", "1,000", "17,000", "-1,234,567", "-9,223,372,036,854,775,808"]);
    }

    #[test]
    fn what_others_wrote_cannot_steer_a_terminal() {
        assert_eq!(printable("ü \t\"1\""), "ü \t\"1\"");
        assert_eq!(printable("\x1b[2Ja\rb\u{202e}"), "\\u{1b}[2Ja\\rb\\u{202e}");
    }

    #[test]
    fn a_span_has_two_units() {
        let texts = [-3.0, 0.4, 59.4, 59.6, 200.0, 7_500.0, 97_300.0].map(span);
        assert_eq!(texts, ["0s", "0s", "59s", "1m00s", "3m20s", "2h05m", "1d03h"]);
    }
}
