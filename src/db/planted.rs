//! Mistakes in statements, made on purpose for the campaign to find: see [`crate::fault`].

use std::sync::{Mutex, PoisonError};

use sqlx::AssertSqlSafe;
use time::OffsetDateTime;
use uuid::Uuid;

use super::outbox::OutboxRow;
use super::runs::Progress;
use super::valuations::Answers;
use super::{Database, DbError, run};
use crate::fault;

/// Whoever is the owner: a late one writes as well.
pub async fn owner(database: &Database, run_id: &str, token: Uuid) -> Result<Uuid, DbError> {
    let owner: Option<Uuid> = run!(database, "the owner of a run", connection => {
        sqlx::query_scalar("SELECT owner FROM runs WHERE run_id = $1").bind(run_id).fetch_optional(connection).await
    })
    .map(Option::flatten)?;
    Ok(owner.unwrap_or(token))
}

/// A batch in a table without its key, or counted as new when it is repeated. `None`: neither is ordered.
pub async fn commit_answers(
    database: &Database,
    run_id: &str,
    token: Uuid,
    answers: &Answers,
    cursor: i64,
) -> Option<Result<Option<Progress>, DbError>> {
    let (conflict, counted) = match () {
        () if fault::planted("no-unique-key") => ("", "inserted"),
        () if fault::planted("retry-commit-as-new") => ("ON CONFLICT DO NOTHING", "answer"),
        () => return None,
    };
    let statement = format!(
        "WITH run AS MATERIALIZED (
             SELECT run_id, event_time FROM runs WHERE run_id = $1 AND owner = $2 AND state = 'running' FOR UPDATE
         ), answer AS (
             SELECT * FROM unnest(
                 $3::bigint[], $4::integer[], $5::bigint[], $6::bigint[], $7::double precision[], $8::text[])
                 AS a (listing_id, zip_code, list_price_cents, valuation_cents, confidence, failure)
         ), inserted AS (
             INSERT INTO valuations
                 (run_id, listing_id, zip_code, list_price_cents, valuation_cents, confidence, failure)
             SELECT run.run_id, answer.* FROM run CROSS JOIN answer
             {conflict}
             RETURNING listing_id, valuation_cents, confidence
         ), current AS (
             INSERT INTO listing_valuations AS present (listing_id, run_id, event_time, valuation_cents, confidence)
             SELECT i.listing_id, run.run_id, run.event_time, i.valuation_cents, i.confidence
             FROM run CROSS JOIN inserted AS i WHERE i.valuation_cents IS NOT NULL ORDER BY i.listing_id
             ON CONFLICT (listing_id) DO UPDATE SET
                 run_id = excluded.run_id, event_time = excluded.event_time,
                 valuation_cents = excluded.valuation_cents, confidence = excluded.confidence
             WHERE (excluded.event_time, excluded.run_id) > (present.event_time, present.run_id)
         ), count AS (
             SELECT count(*) FILTER (WHERE valuation_cents IS NOT NULL) AS valued,
                    count(*) FILTER (WHERE valuation_cents IS NULL) AS failed
             FROM {counted}
         )
         UPDATE runs SET valued = runs.valued + count.valued, failed = runs.failed + count.failed,
             cursor = greatest(runs.cursor, $9), deaths = 0, deaths_since = NULL
         FROM run CROSS JOIN count WHERE runs.run_id = run.run_id
         RETURNING runs.valued, runs.failed, count.valued + count.failed"
    );
    let done: Result<Option<(i64, i64, i64)>, DbError> = run!(database, "a batch of valuations", connection => {
        if conflict.is_empty() {
            sqlx::query("ALTER TABLE valuations DROP CONSTRAINT IF EXISTS valuations_pkey").execute(&mut *connection).await?;
        }
        sqlx::query_as(AssertSqlSafe(statement.as_str()))
            .bind(run_id)
            .bind(token)
            .bind(&answers.listing_ids)
            .bind(&answers.zip_codes)
            .bind(&answers.list_prices_cents)
            .bind(&answers.valuations_cents)
            .bind(&answers.confidences)
            .bind(&answers.failures)
            .bind(cursor)
            .fetch_optional(connection)
            .await
    });
    Some(done.map(|done| done.map(|(valued, failed, inserted)| Progress { valued, failed, inserted })))
}

/// Rows past the last one that was seen: what is committed late, or was there at the start, is never seen.
pub async fn claim_outbox(database: &Database, limit: i64) -> Result<Vec<OutboxRow>, DbError> {
    static SEEN: Mutex<Option<OffsetDateTime>> = Mutex::new(None);
    let seen = *SEEN.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(OffsetDateTime::now_utc);
    let rows: Vec<(Uuid, String, String, OffsetDateTime)> = run!(database, "a claim of outbox rows", connection => {
        sqlx::query_as(
            "SELECT event_id, lane, body, created_at FROM outbox WHERE created_at > $1 ORDER BY created_at LIMIT $2",
        )
        .bind(seen)
        .bind(limit)
        .fetch_all(connection)
        .await
    })?;
    if let Some((_, _, _, last)) = rows.last() {
        *SEEN.lock().unwrap_or_else(PoisonError::into_inner) = Some(*last);
    }
    Ok(rows.into_iter().map(|(event_id, lane, body, _)| OutboxRow { event_id, lane, body }).collect())
}
