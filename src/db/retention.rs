//! Removal of what is old: finished runs with all that belongs to them, and rows of tables that stand alone.
//!
//! A run is marked first, and its own row goes last: whoever is killed in between leaves a marked run, which the next
//! round finds again and which nobody can retry or publish meanwhile. Rows locked by another process are skipped, so
//! several may remove at once. All ages are by the clock of the database, and `now()` rather than `clock_timestamp()`
//! because only what is stable within a statement can be looked up in an index. The rows to be removed are collected into
//! an array first, which is looked up in the primary key; a join may read the whole run for each batch.

use std::time::Duration;

use super::{Database, DbError, run};

/// Tables with rows of a run, in the order in which they are emptied; the run's own row goes when they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunTable {
    /// Valuations.
    Valuations,
    /// The set of a run by zip codes.
    RunListings,
    /// Records that Kafka refused.
    QuarantinedRecords,
    /// Publications.
    Publications,
}

impl RunTable {
    /// All of them, in order.
    pub const ALL: [RunTable; 4] =
        [RunTable::Valuations, RunTable::RunListings, RunTable::QuarantinedRecords, RunTable::Publications];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            RunTable::Valuations => "valuations",
            RunTable::RunListings => "run_listings",
            RunTable::QuarantinedRecords => "quarantined_records",
            RunTable::Publications => "publications",
        }
    }
}

/// Tables whose rows belong to no run and age by a time of their own. A table that is added here needs an index of that
/// time, an arm in [`Database::prune_rows`], and the right DELETE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimedTable {
    /// Sent events, by the time of sending. What is not sent stays, however old.
    Outbox,
    /// Messages whose handling died or was never ended, by its beginning.
    Deliveries,
    /// What upsert events said, by the time they were applied.
    ListingEvents,
}

impl TimedTable {
    /// All of them.
    pub const ALL: [TimedTable; 3] = [TimedTable::Outbox, TimedTable::Deliveries, TimedTable::ListingEvents];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            TimedTable::Outbox => "outbox",
            TimedTable::Deliveries => "deliveries",
            TimedTable::ListingEvents => "listing_events",
        }
    }
}

impl Database {
    /// Marks up to `limit` runs that ended longer than `age` ago, the oldest first, and gives their ids; those marked
    /// earlier are among them. A complete run is left alone until it was published and its publications are as old.
    pub async fn mark_old_runs(&self, age: Duration, limit: i64) -> Result<Vec<String>, DbError> {
        run!(self, "the marking of old runs", connection => {
            // OFFSET 0 keeps the planner from reading all publications to look up those of few runs.
            sqlx::query_scalar!(
                r#"
                UPDATE runs SET pruned_since = coalesce(pruned_since, clock_timestamp())
                WHERE run_id IN (
                    SELECT r.run_id FROM runs AS r
                    WHERE r.state <> 'running'
                      AND coalesce(r.completed_at, r.cancelled_at,
                                   r.begun_at, r.opened_at)
                          < now() - make_interval(secs => $1)
                      AND (r.pruned_since IS NOT NULL
                           OR (r.publisher IS NULL OR r.publisher_lease_until < now())
                              AND (r.state <> 'complete' OR EXISTS (
                                  SELECT FROM publications AS p WHERE p.run_id = r.run_id OFFSET 0))
                              AND NOT EXISTS (
                                  SELECT FROM publications AS p
                                  WHERE p.run_id = r.run_id
                                    AND (p.state = 'running'
                                         OR coalesce(p.completed_at, p.failed_at, p.opened_at)
                                            >= now() - make_interval(secs => $1))
                                  OFFSET 0))
                    ORDER BY coalesce(r.completed_at, r.cancelled_at,
                                      r.begun_at, r.opened_at)
                    LIMIT $2
                    FOR NO KEY UPDATE OF r SKIP LOCKED
                )
                RETURNING run_id
                "#,
                age.as_secs_f64(),
                limit,
            )
            .fetch_all(connection)
            .await
        })
    }

    /// Removes up to `limit` rows of a marked run from one table and says how many; 0 if there are none, or others are at
    /// them.
    pub async fn prune_run_rows(&self, table: RunTable, run_id: &str, limit: i64) -> Result<u64, DbError> {
        run!(self, "the removal of old rows of a run", connection => {
            let removal = match table {
                RunTable::Valuations => sqlx::query!(
                    "DELETE FROM valuations WHERE run_id = $1 AND listing_id = ANY (ARRAY(
                         SELECT listing_id FROM valuations WHERE run_id = $1
                         ORDER BY listing_id LIMIT $2 FOR UPDATE SKIP LOCKED))",
                    run_id,
                    limit,
                ),
                RunTable::RunListings => sqlx::query!(
                    "DELETE FROM run_listings WHERE run_id = $1 AND listing_id = ANY (ARRAY(
                         SELECT listing_id FROM run_listings WHERE run_id = $1
                         ORDER BY listing_id LIMIT $2 FOR UPDATE SKIP LOCKED))",
                    run_id,
                    limit,
                ),
                RunTable::QuarantinedRecords => sqlx::query!(
                    "DELETE FROM quarantined_records WHERE run_id = $1 AND listing_id = ANY (ARRAY(
                         SELECT listing_id FROM quarantined_records WHERE run_id = $1
                         ORDER BY listing_id LIMIT $2 FOR UPDATE SKIP LOCKED))",
                    run_id,
                    limit,
                ),
                RunTable::Publications => sqlx::query!(
                    "DELETE FROM publications WHERE event_id = ANY (ARRAY(
                         SELECT event_id FROM publications WHERE run_id = $1 LIMIT $2 FOR UPDATE SKIP LOCKED))",
                    run_id,
                    limit,
                ),
            };
            Ok(removal.execute(connection).await?.rows_affected())
        })
    }

    /// Removes the row of a marked run if nothing is left that belongs to it. `false`: something is, or it is gone.
    pub async fn prune_run(&self, run_id: &str) -> Result<bool, DbError> {
        run!(self, "the removal of an old run", connection => {
            // Rows that another process has removed and not committed are still seen, so none can be left behind.
            // min, because for EXISTS the planner would read a table from its start that it takes to be full of such rows.
            let done = sqlx::query!(
                "DELETE FROM runs WHERE run_id = $1 AND pruned_since IS NOT NULL
                   AND (SELECT min(listing_id) FROM valuations WHERE run_id = $1) IS NULL
                   AND (SELECT min(listing_id) FROM run_listings WHERE run_id = $1) IS NULL
                   AND NOT EXISTS (SELECT FROM quarantined_records WHERE run_id = $1)
                   AND NOT EXISTS (SELECT FROM publications WHERE run_id = $1)",
                run_id,
            )
            .execute(connection)
            .await?;
            Ok(done.rows_affected() == 1)
        })
    }

    /// Removes up to `limit` rows older than `age` from a table, the oldest first, and says how many.
    pub async fn prune_rows(&self, table: TimedTable, age: Duration, limit: i64) -> Result<u64, DbError> {
        run!(self, "the removal of old rows", connection => {
            let removal = match table {
                TimedTable::Outbox => sqlx::query!(
                    "DELETE FROM outbox WHERE event_id = ANY (ARRAY(
                         SELECT event_id FROM outbox WHERE sent_at < now() - make_interval(secs => $1)
                         ORDER BY sent_at LIMIT $2 FOR UPDATE SKIP LOCKED))",
                    age.as_secs_f64(),
                    limit,
                ),
                TimedTable::Deliveries => sqlx::query!(
                    "DELETE FROM deliveries WHERE message_id IN (
                         SELECT message_id FROM deliveries WHERE begun_at < now() - make_interval(secs => $1)
                         ORDER BY begun_at LIMIT $2 FOR UPDATE SKIP LOCKED)",
                    age.as_secs_f64(),
                    limit,
                ),
                TimedTable::ListingEvents => sqlx::query!(
                    "DELETE FROM listing_events WHERE event_id IN (
                         SELECT event_id FROM listing_events WHERE applied_at < now() - make_interval(secs => $1)
                         ORDER BY applied_at LIMIT $2 FOR UPDATE SKIP LOCKED)",
                    age.as_secs_f64(),
                    limit,
                ),
            };
            Ok(removal.execute(connection).await?.rows_affected())
        })
    }
}
