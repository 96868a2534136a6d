//! How far a replay is, on stderr: a bar on a terminal, now and then a line elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How often the bar is drawn.
const BAR_INTERVAL: Duration = Duration::from_millis(100);

/// How often a line is written where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Characters of the bar.
const BAR_WIDTH: usize = 24;

/// Counts events for whoever waits.
pub(super) struct Meter {
    /// What is done to them: "sent".
    verb: &'static str,
    total: Option<u64>,
    /// How long everything takes by its pace, if there is one.
    planned: Option<Duration>,
    began: Instant,
    shown: Instant,
    drawn: bool,
    terminal: bool,
}

impl Meter {
    pub(super) fn new(verb: &'static str, total: Option<u64>, planned: Option<Duration>) -> Self {
        let now = Instant::now();
        let terminal = std::io::stderr().is_terminal();
        Meter { verb, total, planned, began: now, shown: now, drawn: false, terminal }
    }

    /// Shows `done` if it is time to.
    pub(super) fn show(&mut self, done: u64) {
        let interval = if self.terminal { BAR_INTERVAL } else { LINE_INTERVAL };
        if self.shown.elapsed() < interval {
            return;
        }
        self.shown = Instant::now();
        let text = self.text(done, self.began.elapsed());
        let mut stderr = std::io::stderr().lock();
        // Whether anybody reads it does not matter to the replay.
        let _ = if self.terminal {
            write!(stderr, "\r{}{text}\x1b[K", bar(done, self.total)).and_then(|()| stderr.flush())
        } else {
            writeln!(stderr, "{text}")
        };
        self.drawn = self.terminal;
    }

    fn text(&self, done: u64, elapsed: Duration) -> String {
        let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
        let Some(total) = self.total else { return format!("{done} events {}, {rate:.0} a second", self.verb) };
        // Once the pace is over and events are left, SQS was slower, and what it takes a second counts.
        let left = self
            .planned
            .and_then(|planned| planned.checked_sub(elapsed))
            .or_else(|| Duration::try_from_secs_f64(total.saturating_sub(done) as f64 / rate).ok());
        let percent = (done * 100).checked_div(total).unwrap_or(100);
        let left = left.map_or("?".to_owned(), span);
        format!("{done} of {total} events {} ({percent} %), {rate:.0} a second, {left} left", self.verb)
    }
}

impl Drop for Meter {
    /// Takes the bar away, so that what is written next has the line for itself.
    fn drop(&mut self) {
        if self.drawn {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

fn bar(done: u64, total: Option<u64>) -> String {
    let Some(total) = total.filter(|total| *total > 0) else { return String::new() };
    let full = (done.min(total) as usize * BAR_WIDTH) / total as usize;
    format!("[{}{}] ", "#".repeat(full), ".".repeat(BAR_WIDTH - full))
}

/// A time for people: two units at most.
pub(super) fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_how_fast_and_how_long_still() {
        let meter = |total, planned| Meter::new("sent", total, planned);
        let at = Duration::from_secs(10);
        assert_eq!(meter(Some(400), None).text(100, at), "100 of 400 events sent (25 %), 10 a second, 30 s left");
        let planned = Some(Duration::from_secs(3_690));
        assert_eq!(meter(Some(400), planned).text(1, at), "1 of 400 events sent (0 %), 0 a second, 1 h 1 min left");
        let over = Some(Duration::from_secs(9));
        assert_eq!(meter(Some(400), over).text(100, at), "100 of 400 events sent (25 %), 10 a second, 30 s left");
        assert_eq!(meter(Some(400), None).text(0, at), "0 of 400 events sent (0 %), 0 a second, ? left");
        assert_eq!(meter(None, None).text(100, at), "100 events sent, 10 a second");
    }

    #[test]
    fn the_bar_is_as_long_as_ever() {
        for done in [0, 1, 50, 99, 100, 101] {
            assert_eq!(bar(done, Some(100)).len(), BAR_WIDTH + 3, "{done}");
        }
        assert_eq!(bar(5, Some(0)), "");
    }
}
