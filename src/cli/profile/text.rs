//! Figures of profiles as people read them.

use time::OffsetDateTime;
use time::macros::format_description;

use super::source::Found;
use crate::cli::text::thousands;

/// A value in its unit: bytes in the largest unit that leaves a digit before the point.
pub(super) fn amount(value: i64, unit: &str) -> String {
    match unit {
        "bytes" => bytes(value),
        "nanoseconds" => format!("{:.2}s", value as f64 / 1e9),
        _ => thousands(value),
    }
}

/// The same with a sign, for what changed.
pub(super) fn change(value: i64, unit: &str) -> String {
    format!("{}{}", if value > 0 { "+" } else { "" }, amount(value, unit))
}

fn bytes(value: i64) -> String {
    let size = value.unsigned_abs();
    let (divisor, unit) = match size {
        0..1_024 => return format!("{value}B"),
        1_024..1_048_576 => (1_024.0, "KiB"),
        1_048_576..1_073_741_824 => (1_048_576.0, "MiB"),
        _ => (1_073_741_824.0, "GiB"),
    };
    format!("{:.1}{unit}", value as f64 / divisor)
}

/// A moment in UTC, to the second.
pub(super) fn moment(ms: u64) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
    let moment = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).ok();
    moment.and_then(|moment| moment.format(&format).ok()).unwrap_or_else(|| "-".to_owned())
}

/// When a profile was taken, in milliseconds since 1970.
pub(super) fn taken_ms(found: &Found) -> u64 {
    match &found.record {
        Some(record) => record.time_ms,
        None => u64::try_from(found.profile.time_nanos / 1_000_000).unwrap_or(0),
    }
}

/// A share in whole percent.
pub(super) fn share(part: i64, whole: i64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.0}%", part as f64 * 100.0 / whole as f64) }
}

/// Rows under their heads, columns two spaces apart; those in `right` end at one edge. The last column is never padded.
pub(super) fn table(heads: &[&str], right: &[usize], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([heads[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let mut line = String::new();
        for (column, cell) in cells.iter().enumerate() {
            let gap = if column > 0 { "  " } else { "" };
            let padding = " ".repeat(widths[column] - cell.chars().count());
            match right.contains(&column) {
                true => line.extend([gap, &padding, cell]),
                false => line.extend([gap, cell, &padding]),
            }
        }
        line.truncate(line.trim_end().len());
        line + "\n"
    };
    let rows = rows.iter().map(|row| line(row.iter().map(String::as_str).collect()));
    std::iter::once(line(heads.to_vec())).chain(rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_short() {
        let texts = [0, 1_023, 1_024, -1_572_864, 5_368_709_120].map(|value| amount(value, "bytes"));
        assert_eq!(texts, ["0B", "1023B", "1.0KiB", "-1.5MiB", "5.0GiB"]);
        assert_eq!([change(12_345, "count"), change(-7, "count"), change(0, "count")], ["+12,345", "-7", "0"]);
        assert_eq!([share(1, 3), share(0, 0)], ["33%", "-"]);
        assert_eq!(moment(1_764_295_201_500), "2025-11-28 02:00:01");
    }

    #[test]
    fn a_table_has_straight_columns() {
        let rows = [vec!["1".to_owned(), "b".to_owned()], vec!["1,000".to_owned(), "ü c".to_owned()]];
        assert_eq!(table(&["HELD", "KIND"], &[0], &rows), " HELD  KIND\n    1  b\n1,000  ü c\n");
    }
}
