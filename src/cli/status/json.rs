//! A run's status for programs: every figure of the record, with its unit in its name.

use std::ops::Add;

use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::figures::{done, eta_seconds, left, phase, rate};
use crate::db::ledger::WorkLedger;
use crate::db::operations::RunStatus;

pub(super) fn documents(runs: &[RunStatus]) -> Value {
    runs.iter().map(document).collect()
}

pub(super) fn document(run: &RunStatus) -> Value {
    let time = |time: OffsetDateTime| time.format(&Rfc3339).ok();
    let used = |used: WorkLedger| {
        let seconds = |us: u64| us as f64 / 1e6;
        let waited: Map<String, Value> =
            used.waited_us.iter().map(|(reason, us)| (reason.clone(), seconds(*us).into())).collect();
        json!({
            "allocated_bytes": used.allocated_bytes,
            "freed_bytes": used.freed_bytes,
            "held_bytes": used.held_bytes(),
            "busy_seconds": seconds(used.busy_us),
            "polls": used.polls,
            "waited_seconds": waited,
        })
    };
    let publication = run.publication_state.as_ref().map(|state| {
        json!({
            "state": state,
            "published": run.published,
            "quarantined": run.quarantined,
            "cursor": run.publication_cursor.filter(|cursor| *cursor != i64::MIN),
            "last_error": run.publication_error,
            "failed_at": run.publication_failed_at.and_then(time),
            "used": run.publication_ledger().map(used),
            "count": run.publications,
            "all_used": run.publication_ledgers().reduce(Add::add).map(used),
        })
    });
    json!({
        "run_id": run.run_id,
        "state": run.state,
        "phase": phase(run),
        "cancel_requested": run.cancel_requested,
        "selected": run.selected,
        "done": done(run),
        "valued": run.valued,
        "failed": run.failed,
        "left": left(run),
        "cursor": Some(run.cursor).filter(|cursor| *cursor != i64::MIN),
        "attempts": run.attempts,
        "owner": run.owner,
        "lease_left_seconds": run.lease_left_seconds,
        "rate_rows_per_second": rate(run),
        "rate_window_seconds": rate(run).and(run.rate_seconds),
        "eta_seconds": eta_seconds(run),
        "since_progress_seconds": run.progress_seconds,
        "last_error": run.last_error,
        "is_pruned": run.is_pruned,
        "opened_at": time(run.opened_at),
        "ended_at": run.ended_at.and_then(time),
        "age_seconds": run.age_seconds,
        "used": run.ledger().map(used),
        "publication": publication,
    })
}
