//! What the demo says while it runs: a bar on a terminal, a line every two seconds elsewhere.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use local_stack::thousands;

/// Between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(2);
/// Columns of the bar itself.
const BAR: usize = 24;
/// Columns of a terminal that does not tell its width.
const USUAL_WIDTH: usize = 80;

/// How far everything is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    pub(super) valued: u64,
    pub(super) selected: u64,
    pub(super) published: u64,
    pub(super) upserts_done: u64,
    pub(super) upserts: u64,
    pub(super) in_flight: u64,
    pub(super) rss_mib: f64,
}

/// Prints the steps of the demo with the time since its start.
#[derive(Debug)]
pub(super) struct Progress {
    started: Instant,
    is_terminal: bool,
    last_line: Instant,
    bar_is_drawn: bool,
}

impl Progress {
    pub(super) fn start() -> Self {
        let now = Instant::now();
        Self { started: now, is_terminal: io::stdout().is_terminal(), last_line: now, bar_is_drawn: false }
    }

    /// A new step begins.
    pub(super) fn step(&mut self, text: &str) {
        self.clear();
        println!("{} {text}", self.clock());
        self.last_line = Instant::now();
    }

    /// Shows how far everything is, as often as the output wants it.
    pub(super) fn show(&mut self, moment: &Moment) {
        if self.is_terminal {
            let line = moment.bar(width());
            print!("\r\x1b[2K{line}");
            let _ = io::stdout().flush();
            self.bar_is_drawn = true;
        } else if self.last_line.elapsed() >= LINE_INTERVAL {
            self.step(&moment.sentence());
        }
    }

    /// Takes the bar away.
    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.bar_is_drawn) {
            print!("\r\x1b[2K");
            let _ = io::stdout().flush();
        }
    }

    fn clock(&self) -> String {
        format!("[{:5.1} s]", self.started.elapsed().as_secs_f64())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Moment {
    /// One line of at most `width` columns, its least important parts left out where they do not fit.
    fn bar(&self, width: usize) -> String {
        let ratio = if self.selected == 0 { 0.0 } else { self.valued as f64 / self.selected as f64 };
        let full = ((ratio * BAR as f64) as usize).min(BAR);
        let mut line = format!("{}{} {:3.0} %", "█".repeat(full), "░".repeat(BAR - full), (ratio * 100.0).floor());
        let mut columns = BAR + 6;
        let parts = [
            format!("  {} of {} valued", thousands(self.valued), thousands(self.selected)),
            format!("  RSS {:.0} MiB", self.rss_mib),
            format!("  {} in flight", thousands(self.in_flight)),
            format!("  {} published", thousands(self.published)),
            format!("  {} upserts", thousands(self.upserts_done)),
        ];
        for part in parts {
            columns += part.len();
            if columns >= width {
                break;
            }
            let _ = write!(line, "{part}");
        }
        line
    }

    fn sentence(&self) -> String {
        format!(
            "{} of {} listings valued, {} published, {} calls in flight, {} of {} upserts done, RSS {:.1} MiB",
            thousands(self.valued),
            thousands(self.selected),
            thousands(self.published),
            thousands(self.in_flight),
            thousands(self.upserts_done),
            thousands(self.upserts),
            self.rss_mib,
        )
    }
}

/// Columns of the terminal at standard output.
fn width() -> usize {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the call is given a valid structure, which it fills or leaves alone.
    let told = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &mut size) } == 0;
    if told && size.ws_col > 0 { size.ws_col.into() } else { USUAL_WIDTH }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOMENT: Moment = Moment {
        valued: 8_500,
        selected: 17_000,
        published: 0,
        upserts_done: 1_950,
        upserts: 4_000,
        in_flight: 250,
        rss_mib: 38.4,
    };

    #[test]
    fn the_bar_shows_the_ratio_and_fits_the_terminal() {
        let wide = MOMENT.bar(200);
        assert!(wide.starts_with("████████████░░░░░░░░░░░░  50 %  8,500 of 17,000 valued  RSS 38 MiB"), "{wide}");
        assert!(wide.ends_with("1,950 upserts"), "{wide}");
        for width in [40, 60, 80, 100] {
            let line = MOMENT.bar(width);
            assert!(line.chars().count() < width, "{width}: {line}");
        }
    }

    #[test]
    fn nothing_selected_yet_is_no_progress() {
        let line = Moment { valued: 0, selected: 0, ..MOMENT }.bar(80);
        assert!(line.starts_with("░░░░░░░░░░░░░░░░░░░░░░░░   0 %"), "{line}");
    }
}
