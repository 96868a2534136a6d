//! The books, for `write-api audit`: what the tables say of a run, counted anew from their rows.
//!
//! The statements here are the audit's own. None is shared with those that write the books, and none of the counts kept in
//! `runs` and `publications` is believed: each is held against the rows. Every look at a run is one statement, so it sees
//! one moment; nothing is changed or locked.

use time::OffsetDateTime;
use uuid::Uuid;

use super::{Database, DbError, run};

/// Ids that are shown of a gap; the rest are only counted.
pub const SHOWN: i64 = 10;

/// A run's own row, and what is counted of its valuations at the same moment.
#[derive(Debug, Clone)]
pub struct RunBooks {
    /// running, complete, cancelled, failed.
    pub state: String,
    /// Matches at the opening, as recorded.
    pub selected: i64,
    /// Listings with a valuation, as recorded.
    pub valued: i64,
    /// Listings that failed for good, as recorded.
    pub failed: i64,
    /// Low-water mark, as recorded.
    pub cursor: i64,
    /// Upper bound of the set.
    pub last_listing_id: i64,
    /// Valuations in the table.
    pub rows_valued: i64,
    /// Failures in the table.
    pub rows_failed: i64,
    /// Listings written down at the opening; `None` for a run over all listings.
    pub set_size: Option<i64>,
    /// Whether an attempt has it.
    pub owned: bool,
    /// Since the last committed batch, or the opening, or, of a complete run, its completion.
    pub still_seconds: f64,
    /// Since the completion; `None` unless complete.
    pub completed_seconds: Option<f64>,
    /// When it was completed, in milliseconds since 1970.
    pub completed_at_ms: Option<f64>,
}

/// Listings of a run that its cursor has passed and that have no row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Passed {
    /// There for long when the run was opened: there must be none.
    pub missing: Listings,
    /// Inserted right before, by a statement that may have been committed after their page was read.
    pub young: Listings,
}

/// What Kafka's records of a run have in common.
#[derive(Debug, Clone)]
pub struct RunHead {
    /// Completion in UTC to the microsecond, `2026-03-01T02:00:17.250000`; `None` unless complete.
    pub completed_at: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
}

/// Listings about which something is wrong: how many, and the first [`SHOWN`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listings {
    /// How many.
    pub count: i64,
    /// The first of them, by id.
    pub first: Vec<i64>,
}

/// A row of the outbox.
#[derive(Debug, Clone)]
pub struct OutboxRow {
    /// Its id, which is the event's.
    pub event_id: Uuid,
    /// The lane that it is for.
    pub lane: String,
    /// The event, as it is sent.
    pub body: String,
    /// Whether it was sent.
    pub is_sent: bool,
}

/// A publication, as recorded.
#[derive(Debug, Clone)]
pub struct PublicationBooks {
    /// Id of the publish event.
    pub event_id: String,
    /// running, complete, failed.
    pub state: String,
    /// Records with a delivery report.
    pub published: i64,
    /// Records that Kafka will never take and that were put aside.
    pub quarantined: i64,
    /// Whether a valuation is beyond its cursor.
    pub is_behind: bool,
    /// Since it was opened, or, of a failed one, since it was given up.
    pub since_seconds: f64,
}

/// One row of `valuations`.
#[derive(Debug, Clone)]
pub struct ValuationBooks {
    /// The listing.
    pub listing_id: i64,
    /// Zip code that the partner was asked about.
    pub zip_code: i32,
    /// Price in US cents that the partner was asked about.
    pub list_price_cents: i64,
    /// The answer in US cents; `None` if the listing failed.
    pub valuation_cents: Option<i64>,
    /// 0 to 1; `None` if the listing failed.
    pub confidence: Option<f64>,
}

impl Database {
    /// The runs to be audited, newest first.
    pub async fn audited_runs(
        &self,
        run_id: Option<&str>,
        since: Option<OffsetDateTime>,
    ) -> Result<Vec<String>, DbError> {
        run!(self, "the runs to audit", connection => {
            sqlx::query_scalar!(
                "SELECT run_id FROM runs
                 WHERE ($1::text IS NULL OR run_id = $1) AND ($2::timestamptz IS NULL OR opened_at >= $2)
                   -- Retention removes the rows of these, the run's own last.
                   AND pruned_since IS NULL
                 ORDER BY opened_at DESC, run_id",
                run_id,
                since,
            )
            .fetch_all(connection)
            .await
        })
    }

    /// A run and its rows; `None` if there is no such run, or retention is removing it.
    pub async fn run_books(&self, run_id: &str) -> Result<Option<RunBooks>, DbError> {
        run!(self, "the books of a run", connection => {
            sqlx::query_as!(
                RunBooks,
                r#"
                SELECT r.state, r.selected, r.valued, r.failed, r.cursor, r.last_listing_id,
                       v.valued AS "rows_valued!", v.failed AS "rows_failed!",
                       CASE WHEN r.zip_codes IS NOT NULL
                            THEN (SELECT count(*) FROM run_listings AS l WHERE l.run_id = r.run_id) END AS set_size,
                       r.owner IS NOT NULL AS "owned!",
                       extract(epoch FROM clock_timestamp() - coalesce(r.completed_at, r.progressed_at, r.opened_at))::float8
                           AS "still_seconds!",
                       extract(epoch FROM clock_timestamp() - r.completed_at)::float8 AS completed_seconds,
                       (extract(epoch FROM r.completed_at) * 1000)::float8 AS completed_at_ms
                FROM runs AS r
                CROSS JOIN LATERAL (
                    SELECT count(*) FILTER (WHERE failure IS NULL) AS valued,
                           count(*) FILTER (WHERE failure IS NOT NULL) AS failed
                    FROM valuations WHERE valuations.run_id = r.run_id
                ) AS v
                -- Retention removes the rows of a marked run, its own last.
                WHERE r.run_id = $1 AND r.pruned_since IS NULL
                "#,
                run_id,
            )
            .fetch_optional(connection)
            .await
        })
    }

    /// Which of these runs retention has not begun to remove.
    pub async fn unpruned_runs(&self, run_ids: &[String]) -> Result<Vec<String>, DbError> {
        run!(self, "the runs that are still there", connection => {
            sqlx::query_scalar!("SELECT run_id FROM runs WHERE run_id = ANY ($1) AND pruned_since IS NULL", run_ids)
                .fetch_all(connection)
                .await
        })
    }

    /// What the records of a run have in common; `None` if there is no such run.
    pub async fn run_head(&self, run_id: &str) -> Result<Option<RunHead>, DbError> {
        run!(self, "the head of a run", connection => {
            sqlx::query_as!(
                RunHead,
                r#"
                SELECT to_char(completed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US') AS completed_at, traceparent
                FROM runs WHERE run_id = $1
                "#,
                run_id,
            )
            .fetch_optional(connection)
            .await
        })
    }

    /// Listings of the run's set that its cursor has passed and that have no row. `in_flight_seconds` is the longest that an
    /// insert may take: a listing tells when it was inserted, and not when that was committed.
    pub async fn passed_without_row(&self, run_id: &str, in_flight_seconds: f64) -> Result<Passed, DbError> {
        run!(self, "the listings passed by a run's cursor", connection => {
            let found = sqlx::query!(
                r#"
                WITH passed AS (
                    SELECT l.listing_id, l.created_at > r.opened_at - make_interval(secs => $3) AS young
                    FROM runs AS r JOIN listings AS l
                      ON l.listing_id <= r.cursor AND l.listing_id <= r.last_listing_id AND l.created_at <= r.opened_at
                    WHERE r.run_id = $1 AND r.zip_codes IS NULL
                    UNION ALL
                    SELECT l.listing_id, false
                    FROM runs AS r JOIN run_listings AS l ON l.run_id = r.run_id AND l.listing_id <= r.cursor
                    WHERE r.run_id = $1 AND r.zip_codes IS NOT NULL
                ), missing AS (
                    SELECT listing_id, young FROM passed
                    WHERE NOT EXISTS (
                        SELECT FROM valuations AS v WHERE v.run_id = $1 AND v.listing_id = passed.listing_id)
                )
                SELECT count(*) FILTER (WHERE NOT young) AS "missing!",
                       ARRAY(SELECT listing_id FROM missing WHERE NOT young ORDER BY listing_id LIMIT $2) AS "first_missing!",
                       count(*) FILTER (WHERE young) AS "young!",
                       ARRAY(SELECT listing_id FROM missing WHERE young ORDER BY listing_id LIMIT $2) AS "first_young!"
                FROM missing
                "#,
                run_id,
                SHOWN,
                in_flight_seconds,
            )
            .fetch_one(connection)
            .await?;
            Ok(Passed {
                missing: Listings { count: found.missing, first: found.first_missing },
                young: Listings { count: found.young, first: found.first_young },
            })
        })
    }

    /// Listings of a run over all listings that have a row and were inserted within `in_flight_seconds` before its opening:
    /// they may have been committed right after it, and then they are in the set without being counted.
    pub async fn young_with_row(&self, run_id: &str, in_flight_seconds: f64) -> Result<Listings, DbError> {
        run!(self, "the youngest listings of a run", connection => {
            sqlx::query_as!(
                Listings,
                r#"
                WITH young AS (
                    SELECT v.listing_id
                    FROM runs AS r
                    JOIN valuations AS v ON v.run_id = r.run_id
                    JOIN listings AS l ON l.listing_id = v.listing_id
                    WHERE r.run_id = $1 AND r.zip_codes IS NULL
                      AND l.created_at > r.opened_at - make_interval(secs => $3) AND l.created_at <= r.opened_at
                )
                SELECT count(*) AS "count!",
                       ARRAY(SELECT listing_id FROM young ORDER BY listing_id LIMIT $2) AS "first!"
                FROM young
                "#,
                run_id,
                SHOWN,
                in_flight_seconds,
            )
            .fetch_one(connection)
            .await
        })
    }

    /// Rows for listings that are not of the run's set: there must be none.
    pub async fn outside_the_set(&self, run_id: &str) -> Result<Listings, DbError> {
        run!(self, "the rows outside of a run's set", connection => {
            sqlx::query_as!(
                Listings,
                r#"
                WITH outside AS (
                    SELECT v.listing_id
                    FROM runs AS r JOIN valuations AS v ON v.run_id = r.run_id
                    WHERE r.run_id = $1
                      AND (v.listing_id > r.last_listing_id
                           OR r.zip_codes IS NOT NULL AND NOT EXISTS (
                               SELECT FROM run_listings AS l
                               WHERE l.run_id = r.run_id AND l.listing_id = v.listing_id))
                )
                SELECT count(*) AS "count!",
                       ARRAY(SELECT listing_id FROM outside ORDER BY listing_id LIMIT $2) AS "first!"
                FROM outside
                "#,
                run_id,
                SHOWN,
            )
            .fetch_one(connection)
            .await
        })
    }

    /// Valuations of the run whose listing shows an older one, none, or another under this run's name: there must be none.
    pub async fn not_carried(&self, run_id: &str) -> Result<Listings, DbError> {
        run!(self, "the listings that a run was written to", connection => {
            sqlx::query_as!(
                Listings,
                r#"
                WITH behind AS (
                    SELECT v.listing_id
                    FROM runs AS r
                    JOIN valuations AS v ON v.run_id = r.run_id AND v.failure IS NULL
                    LEFT JOIN listing_valuations AS c ON c.listing_id = v.listing_id
                    WHERE r.run_id = $1
                      AND (c.listing_id IS NULL
                           OR (c.event_time, c.run_id) < (r.event_time, r.run_id COLLATE "C")
                           OR c.run_id = r.run_id
                              AND (c.event_time, c.valuation_cents, c.confidence)
                                  IS DISTINCT FROM (r.event_time, v.valuation_cents, v.confidence))
                )
                SELECT count(*) AS "count!",
                       ARRAY(SELECT listing_id FROM behind ORDER BY listing_id LIMIT $2) AS "first!"
                FROM behind
                "#,
                run_id,
                SHOWN,
            )
            .fetch_one(connection)
            .await
        })
    }

    /// Rows of the outbox with an id, and all for the lane of post-processing whose body has a text.
    pub async fn outbox_rows(&self, id: Uuid, text: &str) -> Result<Vec<OutboxRow>, DbError> {
        run!(self, "the outbox of a run", connection => {
            sqlx::query_as!(
                OutboxRow,
                r#"
                SELECT event_id, lane, body, sent_at IS NOT NULL AS "is_sent!" FROM outbox
                WHERE event_id = $1 OR (lane = 'post_processing' AND strpos(body, $2) > 0)
                ORDER BY event_id
                "#,
                id,
                text,
            )
            .fetch_all(connection)
            .await
        })
    }

    /// The publications of a run, oldest first.
    pub async fn publication_books(&self, run_id: &str) -> Result<Vec<PublicationBooks>, DbError> {
        run!(self, "the publications of a run", connection => {
            sqlx::query_as!(
                PublicationBooks,
                r#"
                SELECT event_id, state, published, quarantined,
                       EXISTS (SELECT FROM valuations AS v
                               WHERE v.run_id = p.run_id AND v.listing_id > p.cursor AND v.failure IS NULL) AS "is_behind!",
                       extract(epoch FROM clock_timestamp()
                               - CASE state WHEN 'failed' THEN coalesce(failed_at, begun_at, opened_at) ELSE opened_at END
                       )::float8 AS "since_seconds!"
                FROM publications AS p WHERE run_id = $1
                ORDER BY opened_at, event_id
                "#,
                run_id,
            )
            .fetch_all(connection)
            .await
        })
    }

    /// Runs that a table has rows of and that are not there, by `table.run_id`. Each id is looked up in the primary key, past
    /// the one before, so that no table is read as a whole.
    pub async fn rows_of_unknown_runs(&self) -> Result<Vec<String>, DbError> {
        run!(self, "the rows of no run", connection => {
            sqlx::query_scalar!(
                r#"
                WITH RECURSIVE valued AS (
                    (SELECT run_id FROM valuations ORDER BY run_id LIMIT 1)
                    UNION ALL
                    SELECT (SELECT v.run_id FROM valuations AS v WHERE v.run_id > valued.run_id ORDER BY v.run_id LIMIT 1)
                    FROM valued WHERE valued.run_id IS NOT NULL
                ), selected AS (
                    (SELECT run_id FROM run_listings ORDER BY run_id LIMIT 1)
                    UNION ALL
                    SELECT (SELECT l.run_id FROM run_listings AS l
                            WHERE l.run_id > selected.run_id ORDER BY l.run_id LIMIT 1)
                    FROM selected WHERE selected.run_id IS NOT NULL
                ), refused AS (
                    (SELECT run_id FROM quarantined_records ORDER BY run_id LIMIT 1)
                    UNION ALL
                    SELECT (SELECT q.run_id FROM quarantined_records AS q
                            WHERE q.run_id > refused.run_id ORDER BY q.run_id LIMIT 1)
                    FROM refused WHERE refused.run_id IS NOT NULL
                ), named AS (
                    SELECT 'valuations' AS name, run_id FROM valued
                    UNION ALL SELECT 'run_listings', run_id FROM selected
                    UNION ALL SELECT 'quarantined_records', run_id FROM refused
                )
                SELECT name || ' of run ' || run_id AS "row!" FROM named
                WHERE run_id IS NOT NULL AND NOT EXISTS (SELECT FROM runs WHERE runs.run_id = named.run_id)
                ORDER BY 1
                "#,
            )
            .fetch_all(connection)
            .await
        })
    }

    /// Current values whose run is not there: how many, and the first as `listing_id (run run_id)`. Where the event's time is
    /// longer ago than `pruned_after_seconds`, the run may have been removed, and its values stay.
    pub async fn current_of_unknown_runs(&self, pruned_after_seconds: f64) -> Result<(i64, Vec<String>), DbError> {
        run!(self, "the current values of no run", connection => {
            let found = sqlx::query!(
                r#"
                WITH unknown AS (
                    SELECT c.listing_id, c.run_id FROM listing_valuations AS c
                    WHERE c.event_time > clock_timestamp() - make_interval(secs => $1)
                      AND NOT EXISTS (SELECT FROM runs AS r WHERE r.run_id = c.run_id)
                )
                SELECT count(*) AS "count!",
                       ARRAY(SELECT listing_id || ' (run ' || run_id || ')' FROM unknown ORDER BY listing_id LIMIT $2)
                           AS "first!: Vec<String>"
                FROM unknown
                "#,
                pruned_after_seconds,
                SHOWN,
            )
            .fetch_one(connection)
            .await?;
            Ok((found.count, found.first))
        })
    }

    /// The listings past `after` of which Kafka must have a record, at most `limit`, by id.
    pub async fn listings_to_publish(&self, run_id: &str, after: i64, limit: i64) -> Result<Vec<i64>, DbError> {
        run!(self, "the listings that a run publishes", connection => {
            sqlx::query_scalar!(
                "SELECT v.listing_id FROM valuations AS v
                 WHERE v.run_id = $1 AND v.listing_id > $2 AND v.failure IS NULL
                   AND NOT EXISTS (SELECT FROM quarantined_records AS q
                                   WHERE q.run_id = v.run_id AND q.listing_id = v.listing_id)
                 ORDER BY v.listing_id
                 LIMIT $3",
                run_id,
                after,
                limit,
            )
            .fetch_all(connection)
            .await
        })
    }

    /// The rows of a run for these listings, in no order.
    pub async fn valuation_books(&self, run_id: &str, listing_ids: &[i64]) -> Result<Vec<ValuationBooks>, DbError> {
        run!(self, "the valuations behind some records", connection => {
            sqlx::query_as!(
                ValuationBooks,
                "SELECT listing_id, zip_code, list_price_cents, valuation_cents, confidence FROM valuations
                 WHERE run_id = $1 AND listing_id = ANY ($2)",
                run_id,
                listing_ids,
            )
            .fetch_all(connection)
            .await
        })
    }
}
