//! The figures.

use std::fmt::Write as _;

use bench::machine::Machine;
use bench::text::duration;
use local_stack::thousands;
use serde::Serialize;

use crate::heap::Growth;
use crate::timeline::Point;
use crate::way::Way;

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) settings: Settings,
    pub(crate) machine: Machine,
    pub(crate) ways: Vec<WayReport>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Settings {
    /// Listings of each event in turn.
    pub(crate) rows: Vec<u32>,
    pub(crate) partner_latency_ms: u32,
    /// `None`: all of them.
    pub(crate) calls_of_the_old_way: Option<u32>,
}

impl Settings {
    /// The most calls that the old way makes for an event whose memory is looked into, which all calls hold alike; `None`: all.
    pub(crate) fn calls_of_the_old_ways_profiles(&self) -> Option<u32> {
        const MOST: u32 = 200;
        self.calls_of_the_old_way.map(|calls| calls.min(MOST))
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct WayReport {
    pub(crate) way: Way,
    /// In the order of the settings' rows.
    pub(crate) events: Vec<Figures>,
    /// In the same order.
    pub(crate) heaps: Vec<Heap>,
    pub(crate) points: Vec<Point>,
}

/// What holds memory in the middle of an event.
#[derive(Debug, Serialize)]
pub(crate) struct Heap {
    /// Listings of the event.
    pub(crate) rows: u32,
    pub(crate) growth: Growth,
}

/// One event. Times are in seconds, memory in MiB.
#[derive(Debug, Serialize)]
pub(crate) struct Figures {
    pub(crate) rows: u32,
    /// Calls that were made. If these are fewer than the rows, `wall_seconds` and `cpu_seconds` are what all of them would
    /// have taken at the rate of those that were made.
    pub(crate) calls: u32,
    /// By the clock of the points.
    pub(crate) began: f64,
    pub(crate) ended: f64,
    /// From the event being sent to its last record being read.
    pub(crate) wall_seconds: f64,
    pub(crate) calls_a_second: f64,
    pub(crate) most_in_flight: u64,
    pub(crate) cpu_seconds: f64,
    pub(crate) rss_before_mib: f64,
    pub(crate) rss_peak_mib: f64,
    /// 10 s after the end.
    pub(crate) rss_after_mib: f64,
    pub(crate) live_before_mib: f64,
    pub(crate) live_peak_mib: f64,
    pub(crate) live_after_mib: f64,
    /// From the sending to the end, polls included.
    pub(crate) sqs_calls: u64,
}

/// A row of the table: what it shows, and its text for one event.
type Row = (&'static str, fn(&Figures) -> String);

/// The rows of the table.
pub(crate) const ROWS: [Row; 11] = [
    ("wall time", |f| format!("{}{}", about(f), duration(f.wall_seconds))),
    ("peak RSS, MiB", |f| format!("{:.1}", f.rss_peak_mib)),
    ("peak RSS above before, MiB", |f| format!("{:.1}", f.rss_peak_mib - f.rss_before_mib)),
    ("RSS 10 s after, MiB", |f| format!("{:.1}", f.rss_after_mib)),
    ("RSS 10 s after, above before, MiB", |f| format!("{:+.1}", f.rss_after_mib - f.rss_before_mib)),
    ("live heap at its peak, MiB", |f| format!("{:.1}", f.live_peak_mib)),
    ("live heap kept 10 s after, MiB", |f| format!("{:+.1}", f.live_after_mib - f.live_before_mib)),
    ("CPU, s", |f| format!("{}{:.2}", about(f), f.cpu_seconds)),
    ("calls a second", |f| thousands(f.calls_a_second as u64)),
    ("most calls in flight", |f| thousands(f.most_in_flight)),
    ("SQS calls", sqs_calls),
];

/// Most are polls, so that those of a part of an event say nothing of the whole.
fn sqs_calls(figures: &Figures) -> String {
    match figures.is_of_a_part() {
        true => format!("{} in {}", figures.sqs_calls, duration(figures.ended - figures.began)),
        false => figures.sqs_calls.to_string(),
    }
}

/// Marks what was worked out from a part of the calls.
fn about(figures: &Figures) -> &'static str {
    if figures.is_of_a_part() { "≈ " } else { "" }
}

impl Figures {
    /// Whether not all calls of the event were made.
    pub(crate) fn is_of_a_part(&self) -> bool {
        self.calls < self.rows
    }
}

impl Report {
    /// The table and what holds memory, for a terminal.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for (index, rows) in self.settings.rows.iter().enumerate() {
            let _ = write!(text, "{:<37}", format!("{} listings", thousands((*rows).into())));
            for way in &self.ways {
                let _ = write!(text, "{:>18}", way.way.name());
            }
            text.push('\n');
            for (name, cell) in ROWS {
                let _ = write!(text, "  {name:<35}");
                for way in &self.ways {
                    let _ = write!(text, "{:>18}", cell(&way.events[index]));
                }
                text.push('\n');
            }
            text.push('\n');
        }
        for way in &self.ways {
            for heap in &way.heaps {
                let _ = writeln!(text, "{}", heap.sentence(way.way));
            }
        }
        if let Some(scaled) = self.scaled() {
            let _ = writeln!(text, "\n{scaled}");
        }
        text
    }

    /// What was scaled, if anything was.
    pub(crate) fn scaled(&self) -> Option<String> {
        let (calls, profiled) = (self.settings.calls_of_the_old_way?, self.settings.calls_of_the_old_ways_profiles()?);
        Some(format!(
            "≈: the old way read and held all rows but made only {} of its calls, one after another ({} in the events of its \
             heap profiles); wall time and CPU are what all of them would take at that rate. Its curves and SQS calls are those \
             of the part that ran. --full makes them all.",
            thousands(calls.into()),
            thousands(profiled.into())
        ))
    }
}

impl Heap {
    /// What holds the memory of `way`, in words.
    pub(crate) fn sentence(&self, way: Way) -> String {
        let rows = thousands(self.rows.into());
        let mut text = format!(
            "{} holds {:.1} MiB more in the middle of {rows} listings than before",
            way.name(),
            self.growth.mib
        );
        for (index, holder) in self.growth.holders.iter().enumerate() {
            let joint = if index == 0 { ": " } else { "; " };
            let _ = write!(text, "{joint}{:.1} MiB in {}", holder.mib, holder.function);
        }
        text + "."
    }
}
