//! What operators ask of runs: how they are, a cancel, a retry.
//!
//! A cancel is a request in the run's row. Whoever works on the run sees it, stops and closes it; a run that nobody works
//! on is closed by the request itself. All times that are compared or subtracted are those of the database's clock.

use std::time::Duration;

use serde_json::value::RawValue;
use sqlx::postgres::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::ledger::WorkLedger;
use super::{Database, DbError, run};
use crate::task::Kind;

/// How a run is.
#[derive(Debug, Clone)]
pub struct RunStatus {
    /// Id of the event.
    pub run_id: String,
    /// As the record has it: running, complete, cancelled, failed.
    pub state: String,
    /// Whether an operator asked for its end.
    pub cancel_requested: bool,
    /// How many listings matched at the opening.
    pub selected: i64,
    /// Listings with a valuation.
    pub valued: i64,
    /// Listings that failed for good.
    pub failed: i64,
    /// Every listing up to here is terminal.
    pub cursor: i64,
    /// How often work was begun.
    pub attempts: i32,
    /// Token of the attempt that has the run.
    pub owner: Option<Uuid>,
    /// What is left of that attempt's lease; negative where it is over.
    pub lease_left_seconds: Option<f64>,
    /// Listings that became terminal in the last `rate_seconds`.
    pub rate_rows: Option<i64>,
    /// 15 to 30 s, or the age of an attempt that is younger.
    pub rate_seconds: Option<f64>,
    /// Since the last committed batch.
    pub progress_seconds: Option<f64>,
    /// Why the last attempt ended early.
    pub last_error: Option<String>,
    /// When the set was fixed.
    pub opened_at: OffsetDateTime,
    /// When it became complete or cancelled.
    pub ended_at: Option<OffsetDateTime>,
    /// From the opening to the end, or to now.
    pub age_seconds: f64,
    /// What its attempts have used until the last batch or end, as it is kept; `None` for none yet, and for runs from before this
    /// was kept.
    pub used: Option<Json<Box<RawValue>>>,
    /// Retention has begun to remove it.
    pub is_pruned: bool,
    /// How many publish events of the run were begun.
    pub publications: i64,
    /// State of the newest of them.
    pub publication_state: Option<String>,
    /// Its records with a delivery report.
    pub published: Option<i64>,
    /// Its records that Kafka refused for good.
    pub quarantined: Option<i64>,
    /// Every valuation up to this listing id has its delivery report or is quarantined.
    pub publication_cursor: Option<i64>,
    /// Why its last attempt ended early, or why it is quarantined.
    pub publication_error: Option<String>,
    /// When it was quarantined; `None` unless it is.
    pub publication_failed_at: Option<OffsetDateTime>,
    /// Since then.
    pub publication_failed_seconds: Option<f64>,
    /// What its attempts have used until the last page or end, as `used` has it of the run.
    pub publication_used: Option<Json<Box<RawValue>>>,
    /// The same of each publication of the run that has any, the newest included.
    pub publications_used: Option<Vec<Json<Box<RawValue>>>>,
}

impl RunStatus {
    /// What its attempts have used, as far as this release can read it.
    pub fn ledger(&self) -> Option<WorkLedger> {
        self.used.as_ref().map(|used| WorkLedger::read(Kind::ValuationsRefresh, &self.run_id, used))
    }

    /// The same of the newest publication.
    pub fn publication_ledger(&self) -> Option<WorkLedger> {
        self.publication_used.as_ref().map(|used| self.publish_ledger(used))
    }

    /// The same of each publication.
    pub fn publication_ledgers(&self) -> impl Iterator<Item = WorkLedger> {
        self.publications_used.iter().flatten().map(|used| self.publish_ledger(used))
    }

    fn publish_ledger(&self, used: &RawValue) -> WorkLedger {
        WorkLedger::read(Kind::ValuationsPublish, &self.run_id, used)
    }
}

/// What came of asking for a run's end.
#[derive(Debug, Clone, PartialEq)]
pub enum CancelClaim {
    /// It is cancelled, and nobody works on it.
    Cancelled,
    /// An attempt has it, which will see the request; the attempt's lease ends after this time unless it is renewed.
    Requested(Duration),
    /// It was over already, in this state.
    Ended(String),
    /// There is no such run.
    Unknown,
}

/// The event of a run, as far as it is needed to send it again.
#[derive(Debug, Clone)]
pub struct KeptEvent {
    /// CloudEvents source.
    pub source: String,
    /// CloudEvents time.
    pub time: OffsetDateTime,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// The data, byte by byte; `None` in runs from before they were kept.
    pub data: Option<String>,
}

impl Database {
    /// One run, or the newest ones, at most `limit`.
    pub async fn run_statuses(&self, run_id: Option<&str>, limit: i64) -> Result<Vec<RunStatus>, DbError> {
        run!(self, "the status of runs", connection => {
            sqlx::query_as!(
                RunStatus,
                r#"
                SELECT r.run_id, r.state, r.cancel_requested_at IS NOT NULL AS "cancel_requested!",
                       r.selected, r.valued, r.failed, r.cursor, r.attempts, r.owner, r.last_error, r.opened_at,
                       extract(epoch FROM r.lease_until - clock_timestamp())::float8 AS lease_left_seconds,
                       r.valued + r.failed - r.rate_since_rows AS rate_rows,
                       extract(epoch FROM clock_timestamp() - r.rate_since)::float8 AS rate_seconds,
                       extract(epoch FROM clock_timestamp() - r.progressed_at)::float8 AS progress_seconds,
                       coalesce(r.completed_at, r.cancelled_at) AS ended_at,
                       extract(epoch FROM coalesce(r.completed_at, r.cancelled_at, clock_timestamp()) - r.opened_at)::float8
                           AS "age_seconds!",
                       r.pruned_since IS NOT NULL AS "is_pruned!", r.used AS "used: Json<Box<RawValue>>",
                       every.count AS "publications!", every.used AS "publications_used: Vec<Json<Box<RawValue>>>",
                       p.state AS "publication_state?", p.published AS "published?", p.quarantined AS "quarantined?",
                       p.cursor AS "publication_cursor?", p.last_error AS publication_error,
                       p.used AS "publication_used: Json<Box<RawValue>>",
                       p.failed_at AS "publication_failed_at?",
                       extract(epoch FROM clock_timestamp() - p.failed_at)::float8 AS publication_failed_seconds
                FROM runs AS r
                CROSS JOIN LATERAL (
                    SELECT count(*) AS count, array_agg(used) FILTER (WHERE used IS NOT NULL) AS used
                    FROM publications
                    WHERE run_id = r.run_id
                ) AS every
                LEFT JOIN LATERAL (
                    SELECT state, published, quarantined, cursor, last_error, used,
                           CASE WHEN state = 'failed' THEN coalesce(failed_at, begun_at, opened_at) END AS failed_at
                    FROM publications
                    WHERE run_id = r.run_id
                    ORDER BY opened_at DESC
                    LIMIT 1
                ) AS p ON true
                WHERE $1::text IS NULL OR r.run_id = $1
                ORDER BY r.opened_at DESC, r.run_id
                LIMIT $2
                "#,
                run_id,
                limit,
            )
            .fetch_all(connection)
            .await
        })
    }

    /// Asks for the end of a run. May be repeated: until the run is over, each time closes it if nobody has it any more.
    pub async fn cancel_run(&self, run_id: &str) -> Result<CancelClaim, DbError> {
        run!(self, "the cancel of a run", connection => {
            if let Some(claim) = request_cancel(connection, run_id).await? {
                return Ok(claim);
            }
            let state = sqlx::query_scalar!("SELECT state FROM runs WHERE run_id = $1", run_id)
                .fetch_optional(connection)
                .await?;
            Ok(match state {
                None => CancelClaim::Unknown,
                Some(state) if state == "cancelled" => CancelClaim::Cancelled,
                Some(state) => CancelClaim::Ended(state),
            })
        })
    }

    /// The event that opened a run; `None` if there is no such run.
    pub async fn kept_event(&self, run_id: &str) -> Result<Option<KeptEvent>, DbError> {
        run!(self, "the event of a run", connection => {
            sqlx::query_as!(
                KeptEvent,
                "SELECT event_source AS source, event_time AS time, traceparent, event_data AS data
                 FROM runs WHERE run_id = $1",
                run_id,
            )
            .fetch_optional(connection)
            .await
        })
    }

    /// Lets a quarantined run or publication go on at its cursor, because its very message is about to be sent again: so
    /// nothing is written to the outbox. `digest` keeps another event with the same id from doing it. `false`: nothing
    /// of that event is quarantined.
    pub async fn release_quarantined(&self, event_id: &str, digest: &[u8; 32]) -> Result<bool, DbError> {
        run!(self, "the release of a quarantined event", connection => {
            let released = sqlx::query_scalar!(
                r#"
                WITH run AS (
                    UPDATE runs SET state = 'running', last_error = NULL, deaths = 0, deaths_since = NULL
                    WHERE run_id = $1 AND digest = $2 AND state = 'failed' AND pruned_since IS NULL
                    RETURNING run_id
                ), publication AS (
                    UPDATE publications SET state = 'running', last_error = NULL, deaths = 0, deaths_since = NULL
                    WHERE event_id = $1 AND digest = $2 AND state = 'failed'
                      AND NOT EXISTS (SELECT FROM runs AS r
                                      WHERE r.run_id = publications.run_id AND r.pruned_since IS NOT NULL)
                    RETURNING event_id
                )
                SELECT (SELECT count(*) FROM run) + (SELECT count(*) FROM publication) AS "count!"
                "#,
                event_id,
                digest,
            )
            .fetch_one(connection)
            .await?;
            Ok(released > 0)
        })
    }

    /// Whether the run or publication of this event is quarantined: what [`release_quarantined`](Self::release_quarantined)
    /// would let go on.
    pub async fn is_quarantined(&self, event_id: &str, digest: &[u8; 32]) -> Result<bool, DbError> {
        run!(self, "a look for a quarantined event", connection => {
            sqlx::query_scalar!(
                r#"
                SELECT EXISTS (SELECT FROM runs
                               WHERE run_id = $1 AND digest = $2 AND state = 'failed' AND pruned_since IS NULL)
                    OR EXISTS (SELECT FROM publications WHERE event_id = $1 AND digest = $2 AND state = 'failed')
                    AS "quarantined!"
                "#,
                event_id,
                digest,
            )
            .fetch_one(connection)
            .await
        })
    }

    /// Lets a cancelled or failed run go on at its cursor, with no death to its name, and writes its event to the outbox,
    /// together or not at all. `false`: the run is in another state, or retention is removing it, and nothing was written.
    pub async fn reopen_run(&self, run_id: &str, lane: &str, body: &str) -> Result<bool, DbError> {
        // Made once: if the answer is lost, the repeat finds its own row.
        let row = Uuid::new_v4();
        run!(self, "the retry of a run", connection => {
            let done = sqlx::query!(
                r#"
                WITH reopened AS (
                    UPDATE runs SET
                        state = 'running', cancel_requested_at = NULL, cancelled_at = NULL, last_error = NULL,
                        deaths = 0, deaths_since = NULL
                    WHERE run_id = $1 AND state IN ('cancelled', 'failed') AND pruned_since IS NULL
                    RETURNING run_id
                )
                INSERT INTO outbox (event_id, lane, body) SELECT $2, $3, $4 FROM reopened
                "#,
                run_id,
                row,
                lane,
                body,
            )
            .execute(&mut *connection)
            .await?;
            if done.rows_affected() == 1 {
                return Ok(true);
            }
            // Either it was in another state, or this very statement was committed and its answer lost.
            sqlx::query_scalar!(r#"SELECT EXISTS (SELECT FROM outbox WHERE event_id = $1) AS "there!""#, row)
                .fetch_one(connection)
                .await
        })
    }
}

/// Writes the request into the row of a running run, and closes the run if no attempt has it. `None`: there is no such
/// run, or it is over.
pub(super) async fn request_cancel(connection: &mut PgConnection, run_id: &str) -> sqlx::Result<Option<CancelClaim>> {
    let asked = sqlx::query!(
        r#"
        WITH run AS MATERIALIZED (
            -- Locked first, so that an owner cannot come or go between the question and what follows from it.
            SELECT run_id, lease_until IS NULL OR lease_until < clock_timestamp() AS free
            FROM runs
            WHERE run_id = $1 AND state = 'running'
            FOR UPDATE
        )
        UPDATE runs SET
            cancel_requested_at = coalesce(runs.cancel_requested_at, clock_timestamp()),
            state = CASE WHEN run.free THEN 'cancelled' ELSE runs.state END,
            cancelled_at = CASE WHEN run.free THEN clock_timestamp() END,
            owner = CASE WHEN run.free THEN NULL ELSE runs.owner END,
            lease_until = CASE WHEN run.free THEN NULL ELSE runs.lease_until END
        FROM run
        WHERE runs.run_id = run.run_id
        RETURNING run.free AS "free!",
                  coalesce(extract(epoch FROM runs.lease_until - clock_timestamp()), 0)::float8 AS "left!"
        "#,
        run_id,
    )
    .fetch_optional(connection)
    .await?;
    Ok(asked.map(|run| match run.free {
        true => CancelClaim::Cancelled,
        false => CancelClaim::Requested(Duration::from_secs_f64(run.left.max(0.0))),
    }))
}
