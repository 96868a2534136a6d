//! The figures in words.

use std::fmt::Write;

use super::arithmetic::Bound;
use super::report::{Report, Stages};
use super::sampling::Memory;

/// Columns before the figures.
const NAMES: usize = 15;

/// Where to look while the demo stays up.
#[derive(Debug)]
pub(super) struct Addresses {
    pub(super) admin: String,
    pub(super) profiling: String,
    pub(super) partner: String,
    pub(super) database: String,
    pub(super) log: String,
    pub(super) service: String,
    pub(super) variables: String,
}

/// The whole summary.
pub(super) fn text(report: &Report) -> String {
    let Report { rows, partner, valuations, kafka, fast_events, cpu, queues, .. } = report;
    let settings = &report.settings;
    let mut lines = Lines::default();
    lines.0.push('\n');
    lines.add(
        "rows",
        &format!(
            "{} selected, {} valued, {} failed, {} published",
            thousands(rows.selected),
            thousands(rows.valued),
            thousands(rows.failed),
            thousands(rows.published),
        ),
    );
    let statuses: Vec<_> =
        partner.by_status.iter().map(|(status, count)| format!("{}x {status}", thousands(*count))).collect();
    lines.add(
        "partner calls",
        &format!(
            "{}, {} of them repeats; answers: {}",
            thousands(partner.requests),
            thousands(partner.repeated_requests),
            if statuses.is_empty() { "none".to_owned() } else { statuses.join(", ") },
        ),
    );
    lines.add(
        "",
        &format!(
            "at most {} in flight (allowed: {}), at most {} in any one second (allowed: {})",
            thousands(partner.max_in_flight),
            thousands(settings.in_flight.into()),
            thousands(partner.max_in_one_second),
            if settings.partner_rate_cap == 0 { "any".to_owned() } else { thousands(settings.partner_rate_cap.into()) },
        ),
    );
    lines.add(
        "valuations",
        &format!(
            "{} in the database, {} equal to what the partner's own function gives",
            thousands(valuations.rows),
            thousands(valuations.right),
        ),
    );
    lines.add(
        "Kafka",
        &format!(
            "{} records read by an independent consumer: {} distinct ce_id, {} missed",
            thousands(kafka.records),
            thousands(kafka.distinct_ids),
            thousands(kafka.missed),
        ),
    );
    lines.add(
        "fast events",
        &format!(
            "{} of {} done; {} listings written",
            thousands(fast_events.done),
            thousands(fast_events.sent),
            thousands(fast_events.listings_written),
        ),
    );
    if let (Some(p50), Some(p99)) = (fast_events.p50_seconds, fast_events.p99_seconds) {
        lines.add(
            "",
            &format!(
                "{} while the slow one ran: p50 {}, p99 {} from task start to outcome",
                thousands(fast_events.beside_the_slow_one),
                milliseconds(p50),
                milliseconds(p99),
            ),
        );
        lines.add("", "(from the histogram at /metrics, interpolated linearly within its bucket)");
    }
    stages(&mut lines, report);
    lines.add(
        "memory (RSS)",
        &format!(
            "{:.1} MiB before, {:.1} MiB peak, {:.1} MiB 10 s after",
            report.memory.before.rss_mib, report.memory.peak.rss_mib, report.memory.after.rss_mib,
        ),
    );
    let anonymous = |memory: Memory| memory.anonymous_mib;
    lines.add(
        "",
        &format!(
            "of it heap and stacks (RssAnon): {:.1}, {:.1}, {:.1} MiB; sampled every 100 ms",
            anonymous(report.memory.before),
            anonymous(report.memory.peak),
            anonymous(report.memory.after),
        ),
    );
    lines.add(
        "CPU",
        &match cpu.microseconds_per_listing {
            Some(each) => {
                format!("{:.2} s of the service, {each:.0} µs a listing, the fast events included", cpu.seconds)
            }
            None => format!("{:.2} s of the service, the fast events included", cpu.seconds),
        },
    );
    lines.add(
        "queues",
        &format!(
            "{} messages left, {} in the dead-letter queues",
            thousands(queues.left),
            thousands(queues.dead_letters),
        ),
    );
    lines.add("log", &format!("{} warnings and errors", thousands(report.log_warnings)));
    if report.machine.development_build {
        lines.add("note", "write-api is a development build: its CPU and memory are not those of a release");
    }
    let wrong = report.wrong().len();
    let counts = report.checks.len();
    let _ = match wrong {
        0 => writeln!(lines.0, "\nAll {counts} counts are right."),
        _ => writeln!(lines.0, "\n{wrong} of {counts} counts are WRONG."),
    };
    lines.0
}

fn stages(lines: &mut Lines, report: &Report) {
    let settings = &report.settings;
    let Stages { sent_to_first_call, first_call_to_run_complete, run_complete_to_published, sent_to_published, .. } =
        report.stages;
    let ideal = report.stages.ideal.zip(report.stages.ratio_to_ideal).map(|(ideal, ratio)| {
        let limit = match ideal.bound {
            Bound::Rate => format!("{} a second", thousands(settings.partner_rate_cap.into())),
            Bound::Latency => format!("{} in flight", thousands(settings.in_flight.into())),
        };
        format!(
            "   {ratio:.3} x the ideal of {:.2} s ({limit}, {} ms each)",
            ideal.seconds, settings.partner_latency_ms
        )
    });
    let mut stage = |name: &str, what: &str, seconds: Option<f64>, note: &str| {
        let seconds = seconds.map_or_else(|| "    never".to_owned(), |seconds| format!("{seconds:7.2} s"));
        lines.add(name, &format!("{what:<34}{seconds}{note}"));
    };
    stage("time", "event sent to first call", sent_to_first_call, "");
    stage("", "first call to run complete", first_call_to_run_complete, ideal.as_deref().unwrap_or_default());
    stage("", "run complete to all published", run_complete_to_published, "");
    stage("", "event sent to all published", sent_to_published, "");
}

/// Where to look, with the commands.
pub(super) fn addresses(addresses: &Addresses) -> String {
    let Addresses { admin, profiling, partner, database, log, service, variables } = addresses;
    let mut lines = Lines("\nStill running. Look at\n".to_owned());
    lines.add("metrics", &format!("{admin}/metrics   (/livez, /readyz)"));
    lines.add("heap", &format!("go tool pprof -top -cum {profiling}/debug/pprof/heap"));
    lines.add("partner", &format!("{partner}/stats"));
    lines.add("database", database);
    lines.add("log", log);
    lines.add("another event", &format!(". {variables} && {service} send refresh --limit 1000"));
    lines.0.push_str("\nCtrl-C stops all of it.\n");
    lines.0
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, name: &str, text: &str) {
        let _ = writeln!(self.0, "{name:<NAMES$} {text}");
    }
}

/// A count with a comma before every three digits.
pub(super) fn thousands(count: u64) -> String {
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

fn milliseconds(seconds: f64) -> String {
    format!("{:.1} ms", seconds * 1e3)
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::good;
    use super::*;

    #[test]
    fn counts_are_readable() {
        let texts = [0, 999, 1_000, 17_000, 1_700_000].map(thousands);
        assert_eq!(texts, ["0", "999", "1,000", "17,000", "1,700,000"]);
    }

    #[test]
    fn the_summary_says_what_happened_and_that_it_is_right() {
        let text = text(&good());
        for part in [
            "10 selected, 10 valued, 0 failed, 10 published",
            "10, 0 of them repeats; answers: 10x 200",
            "1.050 x the ideal of 2.00 s (5 a second, 250 ms each)",
            "20.0 MiB before, 40.0 MiB peak, 21.0 MiB 10 s after",
            "All 19 counts are right.",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
    }

    #[test]
    fn the_summary_says_what_is_wrong() {
        let mut report = good();
        report.queues.dead_letters = 1;
        report.stages = Stages::new(100.0, Some(100.5), None, None, None);
        report.check(10, 5);
        let text = text(&report);
        assert!(text.contains("1 of 19 counts are WRONG.") && text.contains("never"), "{text}");
    }
}
