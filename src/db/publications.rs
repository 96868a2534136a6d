//! Publications: post-processing of a run, one publisher per run at a time.

use std::time::Duration;

use serde_json::value::RawValue;
use sqlx::Connection;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::deliveries::{Deaths, QUARANTINE, SUSPECT};
use super::ledger::WorkLedger;
use super::{Database, DbError, run};
use crate::task::Kind;

/// A publication that this process works on.
#[derive(Debug, Clone)]
pub struct OwnedPublication {
    /// Proof of being the run's publisher, named by every write.
    pub token: Uuid,
    /// Every valuation up to this listing id is published.
    pub cursor: i64,
    /// When the run was completed.
    pub completed_at: OffsetDateTime,
    /// W3C trace context of the run's event.
    pub traceparent: Option<String>,
    /// 1 for the first attempt.
    pub attempts: i32,
    /// Attempts in a row that died without progress, right before this one.
    pub deaths: i32,
    /// What the attempts before this one have used.
    pub used: WorkLedger,
}

/// Valuations whose every record has met its end.
#[derive(Debug, Clone)]
pub struct PublishedRange {
    /// They begin after this listing id.
    pub after: i64,
    /// The last listing id.
    pub last: i64,
    /// Records with a delivery report.
    pub published: i64,
    /// Records that Kafka refuses for good.
    pub quarantined: Vec<Quarantined>,
}

impl PublishedRange {
    /// Ranges that follow one another, as one.
    pub fn joined(ranges: impl IntoIterator<Item = Self>) -> Option<Self> {
        ranges.into_iter().reduce(|mut all, next| {
            all.last = next.last;
            all.published += next.published;
            all.quarantined.extend(next.quarantined);
            all
        })
    }
}

/// A record that Kafka refuses for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantined {
    /// The listing.
    pub listing_id: i64,
    /// Name of the error.
    pub code: String,
    /// The error in words.
    pub reason: String,
}

/// What came of claiming a publication.
#[derive(Debug)]
pub enum PublicationClaim {
    /// It is ours.
    Owned(Box<OwnedPublication>),
    /// The run has a publisher, whose lease ends after this time unless it is renewed.
    Busy(Duration),
    /// Attempts died on it: only whoever works alone may have it. What is known of them is recorded; nothing has begun.
    Suspect,
    /// Too many attempts died on it: it has failed.
    Quarantined(Deaths),
    /// It is complete: the event was delivered again.
    Complete,
    /// Another event with the same id came first.
    OtherEvent,
    /// The run is not complete yet.
    RunUnfinished,
    /// There is no such run, or retention is removing it.
    RunUnknown,
}

impl Database {
    /// Takes the publication of a complete run unless the run has a publisher already. Another attempt's token that is
    /// still in the publication is that of an attempt which nobody ended: a death. Only whoever is `alone` may have a
    /// publication that is suspect by them. Where the answer is [`DbError::Unavailable`], it may be `token`'s all the same, until
    /// it is [released](Self::release_publishers).
    pub async fn claim_publication(
        &self,
        event_id: &str,
        digest: &[u8; 32],
        run_id: &str,
        token: Uuid,
        lease: Duration,
        alone: bool,
    ) -> Result<PublicationClaim, DbError> {
        // The token is the same at each try: a repeat after a lost answer finds its own, and counts neither an attempt nor a death.
        run!(self, "the claim of a publication", connection => {
            let mut transaction = connection.begin().await?;
            let run = sqlx::query!(
                r#"
                SELECT completed_at, traceparent, publisher IS NOT NULL AND publisher <> $2 AS "published_by_another!",
                       coalesce(extract(epoch FROM publisher_lease_until - clock_timestamp()), 0)::float8 AS "left!"
                FROM runs WHERE run_id = $1 AND pruned_since IS NULL
                FOR UPDATE
                "#,
                run_id,
                token,
            )
            .fetch_optional(&mut *transaction)
            .await?;
            let Some(run) = run else { return Ok(PublicationClaim::RunUnknown) };
            let Some(completed_at) = run.completed_at else { return Ok(PublicationClaim::RunUnfinished) };
            sqlx::query!(
                "INSERT INTO publications (event_id, digest, run_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
                event_id,
                digest,
                run_id,
            )
            .execute(&mut *transaction)
            .await?;
            let present = sqlx::query!(
                r#"
                SELECT digest, state, deaths, owner IS NOT NULL AND owner <> $2 AS "died!",
                       owner IS NOT DISTINCT FROM $2 AS "ours!", coalesce(begun_at, opened_at) AS "begun_at!",
                       coalesce(deaths_since, begun_at, opened_at) AS "deaths_since!"
                FROM publications WHERE event_id = $1
                "#,
                event_id,
                token,
            )
            .fetch_one(&mut *transaction)
            .await?;
            if present.digest != digest {
                return Ok(PublicationClaim::OtherEvent);
            }
            let quarantined = |count| {
                PublicationClaim::Quarantined(Deaths { count, since: present.deaths_since, last: present.begun_at })
            };
            match present.state.as_str() {
                "complete" => return Ok(PublicationClaim::Complete),
                "failed" => return Ok(quarantined(present.deaths)),
                _ => {}
            }
            if run.published_by_another && run.left > 0.0 {
                return Ok(PublicationClaim::Busy(Duration::from_secs_f64(run.left)));
            }
            let deaths = present.deaths + i32::from(present.died);
            let is_last = deaths >= QUARANTINE;
            if !present.ours && (is_last || deaths >= SUSPECT && !alone) {
                sqlx::query!(
                    r#"
                    UPDATE publications SET
                        owner = NULL, deaths = $2, deaths_since = CASE WHEN $2 > 0 THEN $3::timestamptz END,
                        state = CASE WHEN $4 THEN 'failed' ELSE state END,
                        failed_at = CASE WHEN $4 THEN clock_timestamp() ELSE failed_at END,
                        last_error = CASE WHEN $4
                            THEN 'quarantined: ' || $2 || ' attempts in a row died without progress' ELSE last_error END
                    WHERE event_id = $1
                    "#,
                    event_id,
                    deaths,
                    present.deaths_since,
                    is_last,
                )
                .execute(&mut *transaction)
                .await?;
                transaction.commit().await?;
                return Ok(if is_last { quarantined(deaths) } else { PublicationClaim::Suspect });
            }
            sqlx::query!(
                "UPDATE runs SET publisher = $2, publisher_lease_until = clock_timestamp() + make_interval(secs => $3)
                 WHERE run_id = $1",
                run_id,
                token,
                lease.as_secs_f64(),
            )
            .execute(&mut *transaction)
            .await?;
            let publication = sqlx::query!(
                r#"
                UPDATE publications SET
                    owner = $2, deaths = $3, deaths_since = CASE WHEN $3 > 0 THEN $4::timestamptz END,
                    attempts = attempts + (owner IS DISTINCT FROM $2)::integer,
                    begun_at = CASE WHEN owner IS DISTINCT FROM $2 THEN clock_timestamp() ELSE begun_at END
                WHERE event_id = $1
                RETURNING cursor, attempts, deaths, used AS "used: Json<Box<RawValue>>"
                "#,
                event_id,
                token,
                deaths,
                present.deaths_since,
            )
            .fetch_one(&mut *transaction)
            .await?;
            transaction.commit().await?;
            let used = publication.used.map(|used| WorkLedger::read(Kind::ValuationsPublish, run_id, &used));
            Ok(PublicationClaim::Owned(Box::new(OwnedPublication {
                token,
                cursor: publication.cursor,
                completed_at,
                traceparent: run.traceparent,
                attempts: publication.attempts,
                deaths: publication.deaths,
                used: used.unwrap_or_default(),
            })))
        })
    }

    /// Moves the cursor past `range` and quarantines what was refused of it, together. A record that an earlier publication
    /// of the run had quarantined and this one delivered is no longer quarantined. `false`: the run has another publisher
    /// and nothing was written.
    pub async fn advance_publication(
        &self,
        event_id: &str,
        token: Uuid,
        range: &PublishedRange,
        used: &WorkLedger,
    ) -> Result<bool, DbError> {
        let mut listing_ids = Vec::with_capacity(range.quarantined.len());
        let (mut codes, mut reasons) = (Vec::new(), Vec::new());
        for record in &range.quarantined {
            listing_ids.push(record.listing_id);
            codes.push(record.code.clone());
            reasons.push(record.reason.clone());
        }
        run!(self, "the cursor of a publication", connection => {
            // A repeat after a lost answer finds the cursor there already and counts nothing; what else it writes is there.
            let moved = sqlx::query_scalar!(
                r#"
                WITH owned AS MATERIALIZED (
                    -- The lock and the fence: without this row nothing below has anything to do.
                    SELECT r.run_id FROM publications AS p JOIN runs AS r ON r.run_id = p.run_id
                    WHERE p.event_id = $1 AND r.publisher = $2
                    FOR NO KEY UPDATE OF r
                ), moved AS (
                    UPDATE publications AS p SET
                        published = p.published + CASE WHEN p.cursor < $4 THEN $5::bigint ELSE 0 END,
                        quarantined = p.quarantined + CASE WHEN p.cursor < $4 THEN cardinality($6::bigint[]) ELSE 0 END,
                        cursor = greatest(p.cursor, $4), last_error = NULL, used = $9,
                        deaths = CASE WHEN p.cursor < $4 THEN 0 ELSE p.deaths END,
                        deaths_since = CASE WHEN p.cursor < $4 THEN NULL ELSE p.deaths_since END
                    FROM owned
                    WHERE p.event_id = $1
                    RETURNING p.run_id
                ), delivered AS (
                    DELETE FROM quarantined_records AS q USING owned
                    WHERE q.run_id = owned.run_id AND q.listing_id > $3 AND q.listing_id <= $4
                      -- Not `<> ALL ($6)`, which looks through all of them for each row.
                      AND NOT EXISTS (SELECT FROM unnest($6::bigint[]) AS refused (id) WHERE refused.id = q.listing_id)
                ), refused AS (
                    INSERT INTO quarantined_records AS q (run_id, listing_id, event_id, code, reason)
                    SELECT owned.run_id, record.listing_id, $1, record.code, record.reason
                    FROM owned CROSS JOIN unnest($6::bigint[], $7::text[], $8::text[]) AS record (listing_id, code, reason)
                    ON CONFLICT (run_id, listing_id) DO UPDATE SET
                        event_id = excluded.event_id, code = excluded.code, reason = excluded.reason,
                        quarantined_at = clock_timestamp()
                )
                SELECT EXISTS (SELECT FROM moved) AS "moved!"
                "#,
                event_id,
                token,
                range.after,
                range.last,
                range.published,
                &listing_ids,
                &codes,
                &reasons,
                Json(used) as _,
            )
            .fetch_one(connection)
            .await?;
            Ok(moved)
        })
    }

    /// Our attempt has lived for so long that the earlier deaths say nothing of it: they no longer count.
    pub async fn outlive_publication(&self, event_id: &str, token: Uuid) -> Result<(), DbError> {
        run!(self, "the end of a publication's probation", connection => {
            sqlx::query!(
                "UPDATE publications SET deaths = 0, deaths_since = NULL WHERE event_id = $1 AND owner = $2",
                event_id,
                token,
            )
            .execute(connection)
            .await?;
            Ok(())
        })
    }

    /// Completes the publication and frees the run for another. `false`: the run has another publisher.
    pub async fn complete_publication(
        &self,
        event_id: &str,
        run_id: &str,
        token: Uuid,
        used: &WorkLedger,
    ) -> Result<bool, DbError> {
        run!(self, "the completion of a publication", connection => {
            let done = sqlx::query!(
                r#"
                WITH free AS (
                    UPDATE runs SET publisher = NULL, publisher_lease_until = NULL
                    WHERE run_id = $3 AND publisher = $2
                    RETURNING run_id
                )
                UPDATE publications AS p SET
                    state = 'complete', completed_at = clock_timestamp(), last_error = NULL, owner = NULL, used = $4
                FROM free WHERE p.event_id = $1 AND p.run_id = free.run_id
                "#,
                event_id,
                token,
                run_id,
                Json(used) as _,
            )
            .execute(&mut *connection)
            .await?;
            if done.rows_affected() == 1 {
                return Ok(true);
            }
            // Either the run was lost, or this very statement was committed and its answer lost.
            let complete = sqlx::query_scalar!(
                r#"SELECT state = 'complete' AS "complete!" FROM publications WHERE event_id = $1"#,
                event_id
            )
            .fetch_one(connection)
            .await?;
            Ok(complete)
        })
    }

    /// Gives runs back, so that the next deliveries need not wait for their leases, and ends the attempts also where a run
    /// has another publisher by now: ids of runs and, in the same order, the tokens that publish them, the errors to be
    /// shown to operators, and what was used where that is known.
    pub async fn release_publishers(
        &self,
        run_ids: &[String],
        tokens: &[Uuid],
        errors: &[Option<String>],
        used: &[Option<WorkLedger>],
    ) -> Result<(), DbError> {
        let used: Vec<Option<Json<&WorkLedger>>> = used.iter().map(|used| used.as_ref().map(Json)).collect();
        run!(self, "the release of a publication", connection => {
            sqlx::query!(
                r#"
                WITH ended AS (
                    SELECT * FROM unnest($1::text[], $2::uuid[], $3::text[], $4::jsonb[])
                        AS ended (run_id, token, error, used)
                ), free AS (
                    UPDATE runs SET publisher = NULL, publisher_lease_until = NULL
                    FROM ended WHERE runs.run_id = ended.run_id AND runs.publisher = ended.token
                )
                UPDATE publications AS p SET
                    owner = NULL, last_error = coalesce(ended.error, last_error), used = coalesce(ended.used, p.used)
                FROM ended WHERE p.run_id = ended.run_id AND p.owner = ended.token
                "#,
                run_ids,
                tokens,
                errors as &[Option<String>],
                &used as _,
            )
            .execute(connection)
            .await?;
            Ok(())
        })
    }
}
