//! Figures as people read them.

/// Seconds in the unit that suits them.
#[must_use]
pub fn duration(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 120.0 => format!("{seconds:.1} s"),
        seconds if seconds < 7_200.0 => format!("{:.1} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3_600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_readable() {
        assert_eq!([1.84, 119.0, 359.0, 8_640.0].map(duration), ["1.8 s", "119.0 s", "6.0 min", "2.4 h"]);
    }
}
