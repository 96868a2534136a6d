//! The figures in words.

use std::fmt::Write;

use super::report::Report;
use local_stack::{Bound, Memory, thousands};

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

/// The whole summary, in lines of 80 columns where figures are of the usual size.
pub(super) fn text(report: &Report) -> String {
    let Report { settings, rows, partner, valuations, kafka, fast_events, memory, cpu, queues, .. } = report;
    let mut lines = Lines("\n".to_owned());
    let [selected, valued, failed] = [rows.selected, rows.valued, rows.failed].map(thousands);
    let published = thousands(rows.published);
    lines.add("rows", &format!("{selected} selected, {valued} valued, {failed} failed, {published} published"));

    let [calls, repeats] = [partner.requests, partner.repeated_requests].map(thousands);
    let statuses: Vec<_> =
        partner.by_status.iter().map(|(status, count)| format!("{} x {status}", thousands(*count))).collect();
    lines.add("partner calls", &format!("{calls}, of them {repeats} repeats; by status: {}", statuses.join(", ")));
    let [in_flight, most_in_flight] = [partner.max_in_flight, settings.in_flight.into()].map(thousands);
    lines.add("", &format!("at most {in_flight} in flight (allowed: {most_in_flight})"));
    let [a_second, cap] = [partner.max_in_one_second, settings.partner_rate_cap.into()].map(thousands);
    let cap = if settings.partner_rate_cap == 0 { "any" } else { &cap };
    lines.add("", &format!("at most {a_second} in any one second (allowed: {cap})"));

    let [rows, right] = [valuations.rows, valuations.right].map(thousands);
    lines.add("valuations", &format!("{rows} in the database, {right} equal to the partner's function"));
    let [records, ids, missed] = [kafka.records, kafka.distinct_ids, kafka.missed].map(thousands);
    lines.add("Kafka", &format!("{records} records read by an independent consumer:"));
    lines.add("", &format!("{ids} distinct ce_id, {missed} missed"));

    let [sent, done, written] = [fast_events.sent, fast_events.done, fast_events.listings_written].map(thousands);
    let fate = if fast_events.sent == 0 {
        "none was sent".to_owned()
    } else {
        format!("{done} of {sent} done, {written} listings written")
    };
    lines.add("fast events", &fate);
    if let (Some(p50), Some(p99)) = (fast_events.p50_seconds, fast_events.p99_seconds) {
        let [p50, p99] = [p50, p99].map(|seconds| format!("{:.1} ms", seconds * 1e3));
        let beside = thousands(fast_events.beside_the_slow_one);
        lines.add("", &format!("{beside} while the slow one ran, task start to outcome:"));
        lines.add("", &format!("p50 {p50}, p99 {p99} (from the histogram in /metrics,"));
        lines.add("", "interpolated linearly within its bucket)");
    }
    stages(&mut lines, report);

    let of_memory = |part: fn(&Memory) -> f64| {
        let [before, peak, after] = [&memory.before, &memory.peak, &memory.after].map(part);
        format!("{before:5.1} before, {peak:5.1} peak, {after:5.1} 10 s after")
    };
    lines.add("memory (MiB)", &format!("RSS      {}", of_memory(|memory| memory.rss_mib)));
    let anonymous = of_memory(|memory| memory.anonymous_mib);
    lines.add("", &format!("RssAnon  {anonymous}"));
    let each = cpu.microseconds_per_listing.map(|each| format!(", {each:.0} µs a listing")).unwrap_or_default();
    lines.add("CPU", &format!("{:.2} s of the service{each}, fast events included", cpu.seconds));
    let [left, dead] = [queues.left, queues.dead_letters].map(thousands);
    lines.add("queues", &format!("{left} messages left, {dead} in the dead-letter queues"));
    lines.add("log", &format!("{} warnings and errors", thousands(report.log_warnings)));
    if report.machine.development_build {
        lines.add("note", "a development build of write-api: CPU and memory are not a release's");
    }

    let (wrong, counts) = (report.wrong().len(), report.checks.len());
    let _ = match wrong {
        0 => writeln!(lines.0, "\nAll {counts} counts are right."),
        _ => writeln!(lines.0, "\n{wrong} of {counts} counts are WRONG."),
    };
    lines.0
}

fn stages(lines: &mut Lines, report: &Report) {
    let (settings, stages) = (&report.settings, &report.stages);
    let mut stage = |name: &str, what: &str, seconds: Option<f64>| {
        let seconds = seconds.map_or_else(|| "    never".to_owned(), |seconds| format!("{seconds:7.2} s"));
        lines.add(name, &format!("{seconds}  {what}"));
    };
    stage("time", "event sent to first call", stages.sent_to_first_call);
    stage("", "first call to run complete", stages.first_call_to_run_complete);
    stage("", "run complete to all published", stages.run_complete_to_published);
    stage("", "event sent to all published", stages.sent_to_published);
    if let (Some(ideal), Some(ratio)) = (stages.ideal, stages.ratio_to_ideal) {
        let bound = match ideal.bound {
            Bound::Rate => format!("{} a second", thousands(settings.partner_rate_cap.into())),
            Bound::Latency => format!("{} in flight", thousands(settings.in_flight.into())),
        };
        let (seconds, latency) = (ideal.seconds, settings.partner_latency_ms);
        lines.add("", &format!("first call to run complete: {ratio:.3} x the ideal of {seconds:.2} s,"));
        lines.add("", &format!("which is {bound}, {latency} ms each"));
    }
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
    lines.add("another event", &format!(". {variables}"));
    lines.add("", &format!("{service} send refresh --limit 1000"));
    lines.0.push_str("\nCtrl-C stops all of it.\n");
    lines.0
}

/// Lines of a name and a text.
struct Lines(String);

impl Lines {
    fn add(&mut self, name: &str, text: &str) {
        let _ = writeln!(self.0, "{name:<NAMES$} {text}");
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Stages;
    use super::super::report::tests::good;
    use super::*;

    #[test]
    fn the_summary_says_what_happened_and_that_it_is_right() {
        let text = text(&good());
        for part in [
            "10 selected, 10 valued, 0 failed, 10 published",
            "10, of them 0 repeats; by status: 10 x 200",
            "1.050 x the ideal of 2.00 s,\n",
            "5 a second, 250 ms each\n",
            " 20.0 before,  40.0 peak,  21.0 10 s after\n",
            "All 19 counts are right.",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
        let wide: Vec<_> = text.lines().filter(|line| line.chars().count() > 80).collect();
        assert!(wide.is_empty(), "{wide:#?}");
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
