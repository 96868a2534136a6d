//! What follows from a run's record. Nothing is guessed: where the record cannot tell, there is no figure.

use std::ops::Add;

use crate::db::ledger::WorkLedger;
use crate::db::operations::RunStatus;
use crate::task::Kind;

/// A rate over less than this would say more about the size of a batch than about the run.
const SHORTEST_RATE_SECONDS: f64 = 2.0;

/// Whether the run is in a state that it does not leave by itself.
pub(super) fn is_over(run: &RunStatus) -> bool {
    run.state != "running"
}

/// Whether somebody works on the run: the lease of its owner holds.
pub(super) fn is_at_work(run: &RunStatus) -> bool {
    !is_over(run) && run.lease_left_seconds.is_some_and(|left| left > 0.0)
}

/// The run's state in one word that tells what happens to it now. It is the record's word but for these: `waiting`,
/// nobody works on the run, its event has to be delivered again; `cancelling`, its end was asked for; `publishing`, it is
/// complete and its records are not all on Kafka; `unpublished`, the same, and its publication is quarantined.
pub(super) fn phase(run: &RunStatus) -> &str {
    match run.state.as_str() {
        "running" if run.cancel_requested => "cancelling",
        "running" if !is_at_work(run) => "waiting",
        "complete" if run.publication_state.as_deref() == Some("failed") => "unpublished",
        "complete" if run.publication_state.as_deref() != Some("complete") => "publishing",
        state => state,
    }
}

/// Listings that are terminal.
pub(super) fn done(run: &RunStatus) -> i64 {
    run.valued + run.failed
}

/// Listings that are not.
pub(super) fn left(run: &RunStatus) -> i64 {
    (run.selected - done(run)).max(0)
}

/// How much of the run is done, in whole percent; 100 only when it is all.
pub(super) fn percent(run: &RunStatus) -> i64 {
    if run.selected == 0 { 100 } else { done(run) * 100 / run.selected }
}

/// Rows a second of late, by the counts and the clock of the database. It falls while nothing is committed. `None` while
/// nobody works on the run, and in the first moments of an attempt.
pub(super) fn rate(run: &RunStatus) -> Option<f64> {
    let seconds = run.rate_seconds.filter(|seconds| *seconds >= SHORTEST_RATE_SECONDS && is_at_work(run))?;
    Some(run.rate_rows? as f64 / seconds)
}

/// How long what is left takes if the rate stays as it is, post-processing not included. `None` if it would never end.
pub(super) fn eta_seconds(run: &RunStatus) -> Option<f64> {
    let rate = rate(run).filter(|rate| *rate > 0.0 && !run.cancel_requested)?;
    Some(left(run) as f64 / rate)
}

/// What the work on runs, and on all their publications, has used together; without a kind of which no record has any.
pub(super) fn used_by_kind(runs: &[RunStatus]) -> Vec<(Kind, WorkLedger)> {
    let refreshes = runs.iter().filter_map(RunStatus::ledger).reduce(Add::add);
    let publications = runs.iter().flat_map(RunStatus::publication_ledgers).reduce(Add::add);
    let kinds = [(Kind::ValuationsRefresh, refreshes), (Kind::ValuationsPublish, publications)];
    kinds.into_iter().filter_map(|(kind, used)| Some((kind, used?))).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::value::RawValue;
    use sqlx::types::Json;
    use time::macros::datetime;
    use uuid::Uuid;

    use super::*;

    /// A run in the middle of its work.
    pub(in crate::cli::status) fn at_work() -> RunStatus {
        RunStatus {
            run_id: "0193d0c8-5a1e-7c44-9b9e-3f1f2a9d7c55".to_owned(),
            state: "running".to_owned(),
            cancel_requested: false,
            selected: 17_000,
            valued: 9_108,
            failed: 12,
            cursor: 2_193_000_010,
            attempts: 2,
            owner: Some(Uuid::nil()),
            lease_left_seconds: Some(41.2),
            rate_rows: Some(24_048),
            rate_seconds: Some(24.0),
            progress_seconds: Some(0.2),
            last_error: None,
            opened_at: datetime!(2026-11-24 02:00:00 UTC),
            ended_at: None,
            age_seconds: 31.0,
            used: None,
            is_pruned: false,
            publications: 0,
            publication_state: None,
            published: None,
            quarantined: None,
            publication_cursor: None,
            publication_error: None,
            publication_failed_at: None,
            publication_failed_seconds: None,
            publication_used: None,
            publications_used: None,
        }
    }

    /// The same, over and published.
    pub(in crate::cli::status) fn complete() -> RunStatus {
        RunStatus {
            state: "complete".to_owned(),
            valued: 16_988,
            owner: None,
            lease_left_seconds: None,
            ended_at: Some(datetime!(2026-11-24 02:00:19 UTC)),
            publications: 1,
            publication_state: Some("complete".to_owned()),
            published: Some(16_988),
            quarantined: Some(0),
            publication_cursor: Some(9_900_000_190),
            ..at_work()
        }
    }

    #[test]
    fn a_phase_tells_what_happens_to_the_run_now() {
        let with = |change: fn(&mut RunStatus), from: RunStatus| {
            let mut run = from;
            change(&mut run);
            phase(&run).to_owned()
        };
        assert_eq!(with(|_| (), at_work()), "running");
        assert_eq!(with(|run| run.lease_left_seconds = Some(-1.0), at_work()), "waiting");
        assert_eq!(with(|run| run.lease_left_seconds = None, at_work()), "waiting");
        assert_eq!(with(|run| run.cancel_requested = true, at_work()), "cancelling");
        assert_eq!(with(|run| run.state = "cancelled".to_owned(), at_work()), "cancelled");
        assert_eq!(with(|_| (), complete()), "complete");
        assert_eq!(with(|run| run.publication_state = None, complete()), "publishing");
        assert_eq!(with(|run| run.publication_state = Some("running".to_owned()), complete()), "publishing");
        assert_eq!(with(|run| run.publication_state = Some("failed".to_owned()), complete()), "unpublished");
    }

    #[test]
    fn rate_and_eta_are_told_only_where_the_record_can_tell_them() {
        assert_eq!((rate(&at_work()), eta_seconds(&at_work())), (Some(1_002.0), Some(7_880.0 / 1_002.0)));
        let none = |change: fn(&mut RunStatus)| {
            let mut run = at_work();
            change(&mut run);
            (rate(&run), eta_seconds(&run))
        };
        assert_eq!(none(|run| run.lease_left_seconds = Some(-1.0)), (None, None), "nobody works on it");
        assert_eq!(none(|run| run.rate_seconds = Some(0.3)), (None, None), "too early");
        assert_eq!(none(|run| run.rate_rows = Some(0)), (Some(0.0), None), "at this rate it never ends");
        assert_eq!(none(|run| run.cancel_requested = true).1, None, "it will not get there");
        assert_eq!(rate(&complete()), None);
    }

    /// As a row keeps it.
    pub(in crate::cli::status) fn kept(used: &WorkLedger) -> Json<Box<RawValue>> {
        Json(serde_json::value::to_raw_value(used).unwrap())
    }

    #[test]
    fn what_was_used_is_told_by_kind_with_every_publication() {
        let polls = |polls| WorkLedger { polls, ..WorkLedger::default() };
        assert_eq!(used_by_kind(&[at_work(), complete()]), []);
        let run = RunStatus { used: Some(kept(&polls(1))), ..at_work() };
        assert_eq!(used_by_kind(&[run.clone(), complete()]), [(Kind::ValuationsRefresh, polls(1))]);
        let published = RunStatus {
            used: Some(kept(&polls(10))),
            publication_used: Some(kept(&polls(300))),
            publications_used: Some(vec![kept(&polls(100)), kept(&polls(300))]),
            ..complete()
        };
        let all = used_by_kind(&[run, published, complete()]);
        assert_eq!(all, [(Kind::ValuationsRefresh, polls(11)), (Kind::ValuationsPublish, polls(400))]);
    }

    #[test]
    fn all_of_nothing_is_done_and_almost_all_is_not_all() {
        let run = RunStatus { selected: 0, valued: 0, failed: 0, ..at_work() };
        assert_eq!((percent(&run), left(&run)), (100, 0));
        let run = RunStatus { selected: 17_000, valued: 16_999, failed: 0, ..at_work() };
        assert_eq!((percent(&run), left(&run)), (99, 1));
    }
}
