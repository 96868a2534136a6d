//! Runs for people: a table, a page for one run, a line for each change. All fit 80 columns.

use std::fmt::Write;

use time::OffsetDateTime;
use time::macros::format_description;

use super::figures::{done, eta_seconds, is_at_work, is_over, left, percent, phase, rate, used_by_kind};
use crate::cli::text::{printable, span, thousands};
use crate::db::ledger::WorkLedger;
use crate::db::operations::RunStatus;

const WIDTH: usize = 80;

/// Columns of the names on a run's page.
const LABEL: usize = 13;

/// Where there is no figure.
const NONE: &str = "-";

/// The runs, one a line, and what the work on all of them has used.
pub(super) fn table(runs: &[RunStatus]) -> String {
    if runs.is_empty() {
        return "no run was opened yet\n".to_owned();
    }
    let mut rows = vec![["RUN", "STATE", "ROWS", "DONE", "FAILED", "ROWS/S", "ETA"].map(str::to_owned)];
    rows.extend(runs.iter().map(|run| {
        [
            printable(&run.run_id),
            phase(run).to_owned(),
            thousands(run.selected),
            format!("{}%", percent(run)),
            thousands(run.failed),
            rate(run).map_or(NONE.to_owned(), rate_text),
            eta_seconds(run).map_or(NONE.to_owned(), span),
        ]
    }));
    let mut widths = [0; 7];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    // The ids get what the others leave.
    let others: usize = widths[1..].iter().map(|width| width + 1).sum();
    widths[0] = widths[0].min(WIDTH.saturating_sub(others));
    let mut text = String::new();
    for [run, state, figures @ ..] in &rows {
        let _ = write!(text, "{:<1$} {state:<2$}", shortened(run, widths[0]), widths[0], widths[1]);
        for (figure, width) in figures.iter().zip(&widths[2..]) {
            let _ = write!(text, " {figure:>width$}");
        }
        text.push('\n');
    }
    for (kind, used) in used_by_kind(runs) {
        text.push('\n');
        text += &wrapped("used", &format!("by {}: {}", kind.name(), used_text(&used)));
        text += &wrapped("waited", &waited_text(&used));
    }
    text
}

/// Everything about one run.
pub(super) fn page(run: &RunStatus) -> String {
    let mut page = String::new();
    let mut entry = |name: &str, value: String| page += &wrapped(name, &value);
    entry("run", run.run_id.clone());
    entry("state", state(run));
    entry(
        "rows",
        format!(
            "{} selected, {} done ({} failed), {} left",
            thousands(run.selected),
            thousands(done(run)),
            thousands(run.failed),
            thousands(left(run))
        ),
    );
    if is_at_work(run) {
        entry("rate", rate_with_window(run));
        entry("eta", eta_seconds(run).map_or(NONE.to_owned(), span));
    }
    if let Some(seconds) = run.progress_seconds {
        let cursor = match run.cursor {
            i64::MIN => "the first page is not done yet".to_owned(),
            cursor => format!("done up to listing {cursor}"),
        };
        entry("progress", format!("last batch {} ago, {cursor}", span(seconds)));
    }
    entry("attempts", run.attempts.to_string());
    if let (Some(owner), Some(lease)) = (run.owner, run.lease_left_seconds) {
        let lease = if lease > 0.0 {
            format!("its lease ends in {} unless renewed", span(lease))
        } else {
            format!("its lease ended {} ago", span(-lease))
        };
        entry("owner", format!("{owner}, {lease}"));
    }
    match run.ended_at {
        None => entry("opened", format!("{}, {} ago", moment(run.opened_at), span(run.age_seconds))),
        Some(ended) => {
            entry("opened", moment(run.opened_at));
            entry("ended", format!("{}, after {}", moment(ended), span(run.age_seconds)));
        }
    }
    if let Some(error) = &run.last_error {
        entry("last error", error.clone());
    }
    // What attempts used that died is known as of the last that they wrote, also where there were too many of them.
    if let Some(used) = run.ledger() {
        let is_whole = is_over(run) && run.state != "failed";
        entry("used", used_text(&used) + if is_whole { " at the end" } else { ", as of the last batch" });
        entry("waited", waited_text(&used));
    }
    entry("publication", publication(run));
    if let Some(error) = &run.publication_error {
        entry("its error", error.clone());
    }
    if let Some(used) = run.publication_ledger() {
        let is_whole = run.publication_state.as_deref() == Some("complete");
        entry("it used", used_text(&used) + if is_whole { " at the end" } else { ", as of the last page" });
        entry("it waited", waited_text(&used));
    }
    page
}

/// The run in a line, for where lines are collected.
pub(super) fn line(run: &RunStatus) -> String {
    let mut figures = format!("{} {} of {}", phase(run), thousands(done(run)), thousands(run.selected));
    if run.failed > 0 {
        let _ = write!(figures, " ({} failed)", thousands(run.failed));
    }
    if let Some(rate) = rate(run) {
        let _ = write!(figures, ", {} rows/s", rate_text(rate));
    }
    if let Some(eta) = eta_seconds(run) {
        let _ = write!(figures, ", eta {}", span(eta));
    }
    let room = WIDTH.saturating_sub(figures.chars().count() + 1);
    format!("{} {figures}", shortened(&printable(&run.run_id), room))
}

fn state(run: &RunStatus) -> String {
    match phase(run) {
        state if run.is_pruned => return format!("{state}; older than retention.age, it is being removed"),
        "waiting" if run.owner.is_some() => {
            "running, but its worker is gone: it goes on when its event is delivered again"
        }
        "waiting" => "running, but nobody works on it: it goes on when its event is delivered",
        "cancelling" if is_at_work(run) => "running, a cancel was requested: its worker ends it within seconds",
        "cancelling" => "running, a cancel was requested and its worker is gone: `write-api cancel` closes it",
        "publishing" | "unpublished" => "complete",
        "cancelled" => "cancelled: `write-api retry` lets it go on",
        "failed" => "failed: `write-api retry` lets it go on",
        state => state,
    }
    .to_owned()
}

/// What work has used; where it is one run's or publication's, the moment that it is of follows.
fn used_text(used: &WorkLedger) -> String {
    let mib = |bytes: f64| format!("{:.1} MiB", bytes / 1_048_576.0);
    format!(
        "{} busy in {} polls, {} allocated, {} of it not freed by itself",
        short(used.busy_us),
        thousands(used.polls as i64),
        mib(used.allocated_bytes as f64),
        mib(used.held_bytes() as f64),
    )
}

/// What it waited for, the longest first. A thousand calls at once wait a thousand seconds in one.
fn waited_text(used: &WorkLedger) -> String {
    let mut waits: Vec<_> = used.waited_us.iter().collect();
    waits.sort_by_key(|(_, us)| std::cmp::Reverse(**us));
    let waits = waits.iter().map(|(reason, us)| format!("{reason} {}", short(**us)));
    let waits = waits.collect::<Vec<_>>().join(", ");
    if waits.is_empty() { "for nothing".to_owned() } else { format!("{waits}, all that wait at once added up") }
}

/// A time with a decimal where that says something.
fn short(us: u64) -> String {
    let seconds = us as f64 / 1e6;
    if seconds < 60.0 { format!("{seconds:.1}s") } else { span(seconds) }
}

fn publication(run: &RunStatus) -> String {
    let Some(state) = &run.publication_state else {
        return match run.state.as_str() {
            "complete" => "not begun: its event is on its way",
            _ if is_over(run) => "none",
            _ => "none before the run is complete",
        }
        .to_owned();
    };
    let records = thousands(run.published.unwrap_or_default());
    let mut text = format!("{state}, {records} of {} records", thousands(run.valued));
    if let Some(quarantined) = run.quarantined.filter(|quarantined| *quarantined > 0) {
        let _ = write!(text, ", {} quarantined: Kafka refuses them", thousands(quarantined));
    }
    if let Some(cursor) = run.publication_cursor.filter(|cursor| *cursor != i64::MIN) {
        let _ = write!(text, ", sent up to listing {cursor}");
    }
    if let (Some(at), Some(seconds)) = (run.publication_failed_at, run.publication_failed_seconds) {
        let _ = write!(
            text,
            "; quarantined at {}, {} ago: `write-api dlq redrive --reason quarantined` lets it go on",
            moment(at),
            span(seconds)
        );
    }
    if run.publications > 1 {
        let _ = write!(text, "; the newest of {}", run.publications);
    }
    text
}

fn rate_with_window(run: &RunStatus) -> String {
    match (rate(run), run.rate_seconds) {
        (Some(rate), Some(seconds)) => format!("{} rows/s over the last {}", rate_text(rate), span(seconds)),
        _ => format!("{NONE} (this attempt has just begun)"),
    }
}

/// Slow rates have a decimal: 0 would look like a halt.
fn rate_text(rate: f64) -> String {
    if rate < 10.0 { format!("{rate:.1}") } else { thousands(rate.round() as i64) }
}

fn moment(time: OffsetDateTime) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second] UTC");
    time.to_offset(time::UtcOffset::UTC).format(format).unwrap_or_default()
}

/// An id in at most `width` columns: both ends, because ids of one kind differ at either.
fn shortened(id: &str, width: usize) -> String {
    let length = id.chars().count();
    if length <= width {
        return id.to_owned();
    }
    let tail = width.saturating_sub(1) / 3;
    let head = width.saturating_sub(1 + tail);
    let start: String = id.chars().take(head).collect();
    let end: String = id.chars().skip(length - tail).collect();
    format!("{start}…{end}")
}

/// A name and its value, broken between words where it is longer than a line, and within a word that is.
fn wrapped(name: &str, value: &str) -> String {
    let room = WIDTH - LABEL;
    let mut lines = vec![String::new()];
    for word in value.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()) {
        let mut word: Vec<char> = printable(word).chars().collect();
        loop {
            let line = lines.last_mut().expect("there is always one");
            let used = line.chars().count();
            let gap = usize::from(used > 0);
            if used + gap + word.len() <= room {
                line.extend((gap > 0).then_some(' '));
                line.extend(&word);
                break;
            }
            if used == 0 {
                line.extend(word.drain(..room));
            }
            lines.push(String::new());
        }
    }
    let mut text = String::new();
    for (index, line) in lines.iter().enumerate() {
        let _ = writeln!(text, "{:<LABEL$}{line}", if index == 0 { name } else { "" });
    }
    text
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::super::figures::tests::{at_work, complete, kept};
    use super::*;

    fn widest(text: &str) -> usize {
        text.lines().map(|line| line.chars().count()).max().unwrap_or_default()
    }

    #[test]
    fn the_table_fits_with_ids_and_figures_of_any_length() {
        let long = RunStatus {
            run_id: format!("nightly/{}/1", "ü".repeat(240)),
            selected: 21_436_000,
            valued: 20_000_000,
            rate_rows: Some(3),
            ..at_work()
        };
        let table = table(&[at_work(), complete(), long]);
        assert_eq!(widest(&table), 80, "{table}");
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[1].ends_with("…1f2a9d7c55 running      17,000  53%     12  1,002      8s"), "{table}");
        assert!(lines[2].ends_with("…1f2a9d7c55 complete     17,000 100%     12      -       -"), "{table}");
        assert!(lines[3].starts_with("nightly/üüü") && lines[3].contains("…") && lines[3].contains("üü/1 "), "{table}");
    }

    #[test]
    fn a_short_table_shows_ids_whole() {
        let small = RunStatus { selected: 500, valued: 200, failed: 0, ..at_work() };
        let table = table(&[small]);
        assert!(widest(&table) <= 80 && table.contains("\n0193d0c8-5a1e-7c44-9b9e-3f1f2a9d7c55 running "), "{table}");
    }

    #[test]
    fn a_page_tells_everything_in_80_columns() {
        let error = format!("no\nanswer from {} at all", "x".repeat(150));
        let run = RunStatus { last_error: Some(error), run_id: "i".repeat(256), ..at_work() };
        let page = page(&run);
        assert_eq!(widest(&page), 80, "{page}");
        for entry in [
            "state        running\n",
            "rows         17,000 selected, 9,120 done (12 failed), 7,880 left\n",
            "rate         1,002 rows/s over the last 24s\n",
            "eta          8s\n",
            "progress     last batch 0s ago, done up to listing 2193000010\n",
            "attempts     2\n",
            "owner        00000000-0000-0000-0000-000000000000, its lease ends in 41s unless\n             renewed\n",
            "opened       2026-11-24 02:00:00 UTC, 31s ago\n",
            "last error   no answer from\n             xxxx",
            "publication  none before the run is complete\n",
        ] {
            assert!(page.contains(entry), "{entry:?} is not in\n{page}");
        }
    }

    #[test]
    fn an_id_does_not_turn_the_direction_of_writing() {
        let run = RunStatus { run_id: "a\u{202e}b".to_owned(), ..at_work() };
        for shown in [page(&run), table(std::slice::from_ref(&run)), line(&run)] {
            assert!(shown.contains("a\\u{202e}b"), "{shown}");
        }
    }

    #[test]
    fn a_page_tells_what_was_used_and_waited_for() {
        let waited_us = [("database", 2_500_000), ("partner", 8_500_000_000)].map(|(name, us)| (name.to_owned(), us));
        let used = WorkLedger {
            allocated_bytes: 512 << 20,
            freed_bytes: 510 << 20,
            busy_us: 3_140_000,
            polls: 17_345,
            waited_us: waited_us.into(),
        };
        let words = |text: String| {
            assert!(widest(&text) <= 80, "{text}");
            text.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        let page_of = |run: RunStatus| words(page(&RunStatus { used: Some(kept(&used)), ..run }));
        for entry in [
            "used 3.1s busy in 17,345 polls, 512.0 MiB allocated, 2.0 MiB of it not freed by itself at the end",
            "waited partner 2h21m, database 2.5s, all that wait at once added up",
        ] {
            let page = page_of(complete());
            assert!(page.contains(entry), "{entry:?} is not in\n{page}");
        }
        for died in [at_work(), RunStatus { state: "failed".to_owned(), ..complete() }] {
            assert!(page_of(died).contains("not freed by itself, as of the last batch"));
        }
        for (state, until) in
            [("complete", " at the end"), ("running", ", as of the last page"), ("failed", ", as of the last page")]
        {
            let published = RunStatus {
                publication_state: Some(state.to_owned()),
                publication_used: Some(kept(&used)),
                ..complete()
            };
            let page = words(page(&published));
            assert!(page.contains(&format!("not freed by itself{until} it waited")), "{page}");
        }
        assert!(!page(&complete()).contains("used"));

        let published = RunStatus {
            publication_used: Some(kept(&used)),
            publications_used: Some(vec![kept(&used), kept(&used)]),
            ..complete()
        };
        for entry in [
            "it used 3.1s busy in 17,345 polls, 512.0 MiB allocated, 2.0 MiB of it not freed by itself at the end",
            "it waited partner 2h21m, database 2.5s, all that wait at once added up",
        ] {
            let page = words(page(&published));
            assert!(page.contains(entry), "{entry:?} is not in\n{page}");
        }
        let publishing = RunStatus { publication_state: Some("running".to_owned()), ..published.clone() };
        assert!(words(page(&publishing)).contains("not freed by itself, as of the last page"));

        // Below the table: of all runs, and of all their publications.
        let all = words(table(&[RunStatus { used: Some(kept(&used)), ..at_work() }, published, complete()]));
        for entry in [
            "used by valuations.refresh: 3.1s busy in 17,345 polls, 512.0 MiB allocated, 2.0 MiB of it not freed by itself waited",
            "used by valuations.publish: 6.3s busy in 34,690 polls, 1024.0 MiB allocated, 4.0 MiB of it not freed by itself waited \
             partner 4h43m, database 5.0s, all that wait at once added up",
        ] {
            assert!(all.contains(entry), "{entry:?} is not in\n{all}");
        }
        assert!(!table(&[complete()]).contains("used"));
    }

    #[test]
    fn a_page_tells_what_was_quarantined_and_what_is_being_removed() {
        let run = RunStatus { published: Some(16_980), quarantined: Some(8), is_pruned: true, ..complete() };
        let page = page(&run);
        for entry in [
            "state        complete; older than retention.age, it is being removed\n",
            "publication  complete, 16,980 of 16,988 records, 8 quarantined: Kafka refuses",
        ] {
            assert!(page.contains(entry), "{entry:?} is not in\n{page}");
        }
        assert!(!super::page(&complete()).contains("quarantined"));
    }

    #[test]
    fn a_page_tells_since_when_and_why_a_publication_is_quarantined() {
        let run = RunStatus {
            publication_state: Some("failed".to_owned()),
            publication_failed_at: Some(datetime!(2026-11-24 03:00:00 UTC)),
            publication_failed_seconds: Some(7_500.0),
            publication_error: Some("quarantined: 3 attempts in a row died without progress".to_owned()),
            ..complete()
        };
        let page = page(&run).split_whitespace().collect::<Vec<_>>().join(" ");
        for entry in [
            "publication failed, 16,988 of 16,988 records",
            "quarantined at 2026-11-24 03:00:00 UTC, 2h05m ago: `write-api dlq redrive --reason quarantined` lets it go on",
            "its error quarantined: 3 attempts in a row died without progress",
        ] {
            assert!(page.contains(entry), "{entry:?} is not in\n{page}");
        }
    }

    #[test]
    fn a_line_fits_and_has_the_id_at_its_start() {
        assert_eq!(
            line(&at_work()),
            "0193d0c8-5a1e-…a9d7c55 running 9,120 of 17,000 (12 failed), 1,002 rows/s, eta 8s"
        );
        assert_eq!(line(&at_work()).chars().count(), 80);
        assert_eq!(line(&complete()), "0193d0c8-5a1e-7c44-9b9e-3f1f2a9d7c55 complete 17,000 of 17,000 (12 failed)");
    }
}
