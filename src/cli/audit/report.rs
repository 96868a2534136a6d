//! What the audit found, for people and for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use super::account::{Account, Gap, listed};
use super::{Found, Verdict, expected};
use crate::cli::count;
use crate::cli::text::{printable, thousands};

/// A line for each run, its gaps below it, and a last line for all.
pub(super) fn text(found: &Found, verdict: Verdict) -> String {
    let Found { accounts, of_no_run, topic } = found;
    let mut text = String::new();
    for account in accounts {
        let word = match account {
            Account { gaps, .. } if !gaps.is_empty() => "GAPS",
            Account { truncated: 1.., .. } => "truncated",
            Account { unfinished, .. } if !unfinished.is_empty() => "unfinished",
            _ => "balanced",
        };
        let Account { run_id, state, .. } = account;
        let _ = writeln!(
            text,
            "{word:<10}  {run_id}  {state}: {} selected, {} valued, {} failed, {} on Kafka{}",
            thousands(account.selected),
            thousands(account.valued),
            thousands(account.failed),
            count_of(account.records),
            if account.repeats > 0 { format!(" ({} sent again)", count_of(account.repeats)) } else { String::new() },
        );
        gaps(&mut text, &account.gaps);
        if account.truncated > 0 {
            let _ = writeln!(
                text,
                "            topic truncated: {} cannot be proven, the topic does not keep all of their time",
                count(account.truncated, "record")
            );
        }
        // Where nothing should be under way, it is among the gaps.
        let unfinished = account.unfinished.iter().filter(|_| !account.gaps.iter().any(|gap| gap.kind == "unfinished"));
        for note in unfinished.chain(&account.notes) {
            let _ = writeln!(text, "            {note}");
        }
    }
    if !of_no_run.is_empty() {
        text.push_str("GAPS        rows of no run\n");
        gaps(&mut text, of_no_run);
    }
    if !topic.gaps.is_empty() {
        text.push_str("GAPS        records of no run\n");
        gaps(&mut text, &topic.gaps);
    }
    let all = match verdict {
        Verdict::Balanced => "the books balance",
        Verdict::Gaps => "the books do not balance",
        Verdict::Truncated => "the books balance as far as the truncated topic tells",
    };
    let unfinished = accounts.iter().filter(|account| !account.unfinished.is_empty()).count();
    let _ = write!(
        text,
        "{all}: {}{}, {} read from {}",
        count(accounts.len() as u64, "run"),
        if unfinished > 0 { format!(" of which {unfinished} unfinished") } else { String::new() },
        count(topic.records, "record"),
        count(topic.extents.len() as u64, "partition"),
    );
    if topic.cut_partitions() > 0 {
        let _ = write!(text, ", {} of which records were removed", topic.cut_partitions());
    }
    if topic.of_pruned_runs > 0 {
        let _ = write!(text, ", {} of runs that were pruned", topic.of_pruned_runs);
    }
    text.push('\n');
    // Ids and what rows hold came from outside.
    text.lines().flat_map(|line| [printable(line), "\n".to_owned()]).collect()
}

fn gaps(text: &mut String, gaps: &[Gap]) {
    for Gap { kind, count, first } in gaps {
        let more = count - first.len() as u64;
        let _ = write!(text, "            {kind}: {}: {}", count_of(*count), first.join(", "));
        text.push_str(&if more > 0 { format!(", and {} more\n", count_of(more)) } else { "\n".to_owned() });
    }
}

fn count_of(number: u64) -> String {
    thousands(i64::try_from(number).unwrap_or(i64::MAX))
}

/// One line of JSON.
pub(super) fn document(found: &Found, verdict: Verdict) -> String {
    let Found { accounts, of_no_run, topic } = found;
    let gaps = |gaps: &[Gap]| -> Value {
        gaps.iter().map(|Gap { kind, count, first }| json!({"kind": kind, "count": count, "first": first})).collect()
    };
    let runs: Value = accounts
        .iter()
        .map(|account| {
            json!({
                "run_id": account.run_id,
                "state": account.state,
                "selected": account.selected,
                "valued": account.valued,
                "failed": account.failed,
                "records": account.records,
                "repeated_records": account.repeats,
                "truncated_records": account.truncated,
                "publish_event_id": expected::publish_event_id(&account.run_id),
                "unfinished": listed(&account.unfinished),
                "notes": account.notes,
                "gaps": gaps(&account.gaps),
            })
        })
        .collect();
    let verdict = match verdict {
        Verdict::Balanced => "balanced",
        Verdict::Gaps => "gaps",
        Verdict::Truncated => "topic truncated",
    };
    let topic = json!({
        "records": topic.records,
        "partitions": topic.extents.len(),
        "truncated_partitions": topic.cut_partitions(),
        "records_of_pruned_runs": topic.of_pruned_runs,
        "gaps": gaps(&topic.gaps),
    });
    format!("{}\n", json!({"verdict": verdict, "runs": runs, "database": {"gaps": gaps(of_no_run)}, "topic": topic}))
}
