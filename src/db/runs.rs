//! Runs: opening, owning, progress, completion, and the owner's part of a cancel.
//!
//! A run has one owner at a time, told by a token. Whoever claims a run gets a fresh token; every later write names it,
//! so an owner that lost the run (its process was suspended, its lease ran out) writes nothing. Leases are measured by
//! the clock of the database alone.

use std::time::Duration;

use serde_json::value::RawValue;
use sqlx::postgres::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::deliveries::{Deaths, QUARANTINE, SUSPECT};
use super::ledger::WorkLedger;
use super::valuations::Answers;
use super::{Database, DbError, operations, run};
use crate::task::Kind;

/// What a refresh event asks for.
#[derive(Debug, Clone)]
pub struct RunRequest<'a> {
    /// Id of the event.
    pub run_id: &'a str,
    /// SHA-256 over source, type and data.
    pub digest: [u8; 32],
    /// CloudEvents source.
    pub source: &'a str,
    /// CloudEvents time.
    pub event_time: OffsetDateTime,
    /// W3C trace context.
    pub traceparent: Option<&'a str>,
    /// Zip codes, without repeats; `None` for all.
    pub zip_codes: Option<&'a [i32]>,
    /// The most listings; `None` for all.
    pub limit: Option<i64>,
    /// The event's data as they came, kept so that the event can be sent again.
    pub data: &'a str,
}

/// The listings of a run, fixed when it was opened.
#[derive(Debug, Clone)]
pub struct Set {
    /// The run.
    pub run_id: String,
    /// Zip codes; `None` for all.
    pub zip_codes: Option<Vec<i32>>,
    /// Upper bound, inclusive.
    pub last_listing_id: i64,
    /// Listings that appeared later are not part of it.
    pub opened_at: OffsetDateTime,
}

/// A run that this process owns.
#[derive(Debug, Clone)]
pub struct OwnedRun {
    /// What is to be done.
    pub set: Set,
    /// Proof of ownership, named by every write.
    pub token: Uuid,
    /// How many listings matched at the opening.
    pub selected: i64,
    /// Every listing up to here is terminal.
    pub cursor: i64,
    /// Listings with a valuation.
    pub valued: i64,
    /// Listings that failed for good.
    pub failed: i64,
    /// 1 for the first attempt.
    pub attempts: i32,
    /// Attempts in a row that died without progress, right before this one.
    pub deaths: i32,
    /// What the attempts before this one have used.
    pub used: WorkLedger,
}

/// What came of claiming a run.
#[derive(Debug)]
pub enum RunClaim {
    /// It is ours.
    Owned(Box<OwnedRun>),
    /// Another attempt works on it; its lease ends after this time unless it is renewed.
    Busy(Duration),
    /// It is complete: the event was delivered again.
    Complete,
    /// Attempts died on it: only whoever works alone may have it. What is known of them is recorded; nothing has begun.
    Suspect,
    /// Too many attempts died on it: it has failed, and goes on only when an operator says so.
    Quarantined(Deaths),
    /// An operator cancelled it: it goes on only when an operator says so.
    Cancelled,
    /// Another event with the same id came first.
    OtherEvent,
}

/// What came of completing a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// It is complete, and its post-processing is in the outbox.
    Complete,
    /// An operator asked for its end first; it is still ours.
    CancelRequested,
    /// It is no longer ours.
    Lost,
}

/// How far a run is after a commit.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Listings with a valuation.
    pub valued: i64,
    /// Listings that failed for good.
    pub failed: i64,
    /// Rows of this batch that were not there before.
    pub inserted: i64,
}

impl Database {
    /// Opens the run if it is new and takes it unless another attempt holds it. Another attempt's token whose lease is over
    /// is that of an attempt which nobody ended: a death. Only whoever is `alone` may have a run that is suspect by them.
    /// Where the answer is [`DbError::Unavailable`], the run may be `token`'s all the same, until it is [released](Self::release_runs).
    pub async fn claim_run(
        &self,
        request: &RunRequest<'_>,
        token: Uuid,
        lease: Duration,
        alone: bool,
    ) -> Result<RunClaim, DbError> {
        // The same at each try: if the answer to the claim is lost, the repeat finds its own token and has the run.
        run!(self, "the claim of a run", connection => {
            // A run can be closed by its owner between two looks; three rounds are more than that needs.
            for _ in 0..3 {
                if let Some(claim) = take_run(connection, request, token, lease, alone).await? {
                    return Ok(claim);
                }
                let found = sqlx::query!(
                    r#"
                    SELECT digest, state, cancel_requested_at IS NOT NULL AS "cancel_requested!", deaths,
                           coalesce(deaths_since, opened_at) AS "deaths_since!", coalesce(begun_at, opened_at) AS "begun_at!",
                           coalesce(extract(epoch FROM lease_until - clock_timestamp()), 0)::float8 AS "left!"
                    FROM runs WHERE run_id = $1
                    "#,
                    request.run_id,
                )
                .fetch_optional(&mut *connection)
                .await?;
                match found {
                    None => open_run(connection, request).await?,
                    Some(run) if run.digest != request.digest => return Ok(RunClaim::OtherEvent),
                    Some(run) if run.state == "complete" => return Ok(RunClaim::Complete),
                    Some(run) if run.state == "cancelled" => return Ok(RunClaim::Cancelled),
                    Some(run) if run.state == "failed" => {
                        let (count, since, last) = (run.deaths, run.deaths_since, run.begun_at);
                        return Ok(RunClaim::Quarantined(Deaths { count, since, last }));
                    }
                    Some(run) if run.left > 0.0 => return Ok(RunClaim::Busy(Duration::from_secs_f64(run.left))),
                    // Its owner died before it could obey.
                    Some(run) if run.cancel_requested => {
                        operations::request_cancel(connection, request.run_id).await?;
                    }
                    Some(_) => {}
                }
            }
            Ok(RunClaim::Busy(lease))
        })
    }

    /// Commits terminal states, counts them and moves the cursor, in one statement that first locks the run's row and
    /// checks the owner. `None`: the run is no longer ours and nothing was written.
    pub async fn commit_answers(
        &self,
        run_id: &str,
        token: Uuid,
        answers: &Answers,
        cursor: i64,
        used: &WorkLedger,
    ) -> Result<Option<Progress>, DbError> {
        #[cfg(feature = "fault-injection")]
        if let Some(done) = super::planted::commit_answers(self, run_id, token, answers, cursor).await {
            return done;
        }
        #[cfg(feature = "fault-injection")]
        let token = match crate::fault::planted("no-owner-check") {
            true => super::planted::owner(self, run_id, token).await?,
            false => token,
        };
        let _turn = self.commit_turn().await?;
        run!(self, "a batch of valuations", connection => {
            sqlx::query_as!(
                Progress,
                r#"
                WITH run AS MATERIALIZED (
                    -- The lock and the fence: without this row nothing below has anything to do.
                    SELECT run_id, event_time, next_rate_since < clock_timestamp() - interval '15 s' AS rate_moves
                    FROM runs
                    WHERE run_id = $1 AND owner = $2 AND state = 'running'
                    FOR UPDATE
                ), answer AS (
                    SELECT * FROM unnest(
                        $3::bigint[], $4::integer[], $5::bigint[], $6::bigint[], $7::double precision[], $8::text[])
                        AS a (listing_id, zip_code, list_price_cents, valuation_cents, confidence, failure)
                ), inserted AS (
                    INSERT INTO valuations
                        (run_id, listing_id, zip_code, list_price_cents, valuation_cents, confidence, failure)
                    SELECT run.run_id, answer.* FROM run CROSS JOIN answer
                    ON CONFLICT (run_id, listing_id) DO NOTHING
                    RETURNING listing_id, valuation_cents, confidence
                ), current AS (
                    -- In the order of ids, so that two runs over the same listings cannot deadlock.
                    INSERT INTO listing_valuations AS present
                        (listing_id, run_id, event_time, valuation_cents, confidence)
                    SELECT inserted.listing_id, run.run_id, run.event_time, inserted.valuation_cents, inserted.confidence
                    FROM run CROSS JOIN inserted
                    WHERE inserted.valuation_cents IS NOT NULL
                    ORDER BY inserted.listing_id
                    ON CONFLICT (listing_id) DO UPDATE SET
                        run_id = excluded.run_id,
                        event_time = excluded.event_time,
                        valuation_cents = excluded.valuation_cents,
                        confidence = excluded.confidence
                    WHERE (excluded.event_time, excluded.run_id) > (present.event_time, present.run_id)
                ), count AS (
                    SELECT count(*) FILTER (WHERE valuation_cents IS NOT NULL) AS valued,
                           count(*) FILTER (WHERE valuation_cents IS NULL) AS failed
                    FROM inserted
                )
                UPDATE runs SET
                    valued = runs.valued + count.valued,
                    failed = runs.failed + count.failed,
                    cursor = greatest(runs.cursor, $9),
                    progressed_at = clock_timestamp(),
                    rate_since = CASE WHEN run.rate_moves THEN runs.next_rate_since ELSE runs.rate_since END,
                    rate_since_rows =
                        CASE WHEN run.rate_moves THEN runs.next_rate_since_rows ELSE runs.rate_since_rows END,
                    next_rate_since = CASE WHEN run.rate_moves THEN clock_timestamp() ELSE runs.next_rate_since END,
                    next_rate_since_rows = CASE WHEN run.rate_moves
                        THEN runs.valued + runs.failed + count.valued + count.failed
                        ELSE runs.next_rate_since_rows END,
                    last_error = NULL,
                    used = $10,
                    -- Rows that were not there before are progress: whatever died before got somewhere.
                    deaths = CASE WHEN count.valued + count.failed > 0 THEN 0 ELSE runs.deaths END,
                    deaths_since = CASE WHEN count.valued + count.failed > 0 THEN NULL ELSE runs.deaths_since END
                FROM run CROSS JOIN count
                WHERE runs.run_id = run.run_id
                RETURNING runs.valued, runs.failed, (count.valued + count.failed) AS "inserted!"
                "#,
                run_id,
                token,
                &answers.listing_ids,
                &answers.zip_codes,
                &answers.list_prices_cents,
                &answers.valuations_cents as &[Option<i64>],
                &answers.confidences as &[Option<f64>],
                &answers.failures as &[Option<String>],
                cursor,
                Json(used) as _,
            )
            .fetch_optional(connection)
            .await
        })
    }

    /// Completes a run whose every listing is terminal and writes the event of its post-processing, together or not at
    /// all. Of a completion and a cancel, the one that has the row first wins.
    pub async fn complete_run(
        &self,
        run_id: &str,
        token: Uuid,
        lane: &str,
        event_id: Uuid,
        body: &str,
        used: &WorkLedger,
    ) -> Result<Completion, DbError> {
        run!(self, "the completion of a run", connection => {
            let done = sqlx::query!(
                r#"
                WITH done AS (
                    UPDATE runs SET
                        state = 'complete', completed_at = clock_timestamp(), cursor = last_listing_id,
                        owner = NULL, lease_until = NULL, last_error = NULL, used = $6
                    WHERE run_id = $1 AND owner = $2 AND state = 'running' AND cancel_requested_at IS NULL
                    RETURNING run_id
                )
                INSERT INTO outbox (event_id, lane, body) SELECT $3, $4, $5 FROM done
                ON CONFLICT (event_id) DO NOTHING
                "#,
                run_id,
                token,
                event_id,
                lane,
                body,
                Json(used) as _,
            )
            .execute(&mut *connection)
            .await?;
            if done.rows_affected() == 1 {
                return Ok(Completion::Complete);
            }
            // Nothing written: a cancel came first, or the run was lost, or this very statement was committed and its
            // answer lost.
            let found = sqlx::query!(
                r#"
                SELECT EXISTS (SELECT FROM outbox WHERE event_id = $3) AS "there!",
                       EXISTS (SELECT FROM runs WHERE run_id = $1 AND owner = $2 AND state = 'running') AS "ours!"
                "#,
                run_id,
                token,
                event_id,
            )
            .fetch_one(connection)
            .await?;
            Ok(match (found.there, found.ours) {
                (true, _) => Completion::Complete,
                (false, true) => Completion::CancelRequested,
                (false, false) => Completion::Lost,
            })
        })
    }

    /// Our attempt has lived for so long that the earlier deaths say nothing of it: they no longer count.
    pub async fn outlive_run(&self, run_id: &str, token: Uuid) -> Result<(), DbError> {
        run!(self, "the end of a run's probation", connection => {
            sqlx::query!(
                "UPDATE runs SET deaths = 0, deaths_since = NULL WHERE run_id = $1 AND owner = $2",
                run_id,
                token,
            )
            .execute(connection)
            .await?;
            Ok(())
        })
    }

    /// Which of the runs owned with these tokens an operator wants cancelled.
    pub async fn cancel_requests(&self, run_ids: &[String], tokens: &[Uuid]) -> Result<Vec<Uuid>, DbError> {
        run!(self, "a look for cancelled runs", connection => {
            sqlx::query_scalar!(
                r#"
                SELECT held.token AS "token!"
                FROM unnest($1::text[], $2::uuid[]) AS held (run_id, token)
                JOIN runs ON runs.run_id = held.run_id AND runs.owner = held.token
                WHERE runs.state = 'running' AND runs.cancel_requested_at IS NOT NULL
                "#,
                run_ids,
                tokens,
            )
            .fetch_all(connection)
            .await
        })
    }

    /// Ends our work on a run whose cancel was requested. `false`: the run is no longer ours and nothing was written.
    pub async fn cancel_owned_run(&self, run_id: &str, token: Uuid, used: &WorkLedger) -> Result<bool, DbError> {
        run!(self, "the end of a cancelled run", connection => {
            let done = sqlx::query!(
                r#"
                UPDATE runs SET
                    state = 'cancelled', cancelled_at = clock_timestamp(), owner = NULL, lease_until = NULL, used = $3
                WHERE run_id = $1 AND owner = $2 AND state = 'running' AND cancel_requested_at IS NOT NULL
                "#,
                run_id,
                token,
                Json(used) as _,
            )
            .execute(&mut *connection)
            .await?;
            if done.rows_affected() == 1 {
                return Ok(true);
            }
            // Either the run was lost, or this very statement was committed and its answer lost.
            let cancelled = sqlx::query_scalar!(
                r#"SELECT state = 'cancelled' AS "cancelled!" FROM runs WHERE run_id = $1"#,
                run_id,
            )
            .fetch_one(connection)
            .await?;
            Ok(cancelled)
        })
    }

    /// Gives runs back, so that the next deliveries need not wait for their leases: ids of runs and, in the same order, the
    /// tokens that own them, the errors to be shown to operators, and what was used where that is known. A run that has another
    /// owner stays as it is.
    pub async fn release_runs(
        &self,
        run_ids: &[String],
        tokens: &[Uuid],
        errors: &[Option<String>],
        used: &[Option<WorkLedger>],
    ) -> Result<(), DbError> {
        let used: Vec<Option<Json<&WorkLedger>>> = used.iter().map(|used| used.as_ref().map(Json)).collect();
        run!(self, "the release of a run", connection => {
            sqlx::query!(
                "UPDATE runs SET owner = NULL, lease_until = NULL, last_error = coalesce(ended.error, last_error),
                                 used = coalesce(ended.used, runs.used)
                 FROM unnest($1::text[], $2::uuid[], $3::text[], $4::jsonb[]) AS ended (run_id, token, error, used)
                 WHERE runs.run_id = ended.run_id AND runs.owner = ended.token",
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

/// Takes a run that is free: `Owned`, or `Suspect` where that is not for us. A run that must not be taken again is
/// closed. `None`: it is not there, or not free, or was closed.
async fn take_run(
    connection: &mut PgConnection,
    request: &RunRequest<'_>,
    token: Uuid,
    lease: Duration,
    alone: bool,
) -> sqlx::Result<Option<RunClaim>> {
    let taken = sqlx::query!(
        r#"
        WITH found AS MATERIALIZED (
            SELECT run_id, owner IS NOT DISTINCT FROM $2 AS ours,
                   deaths + (owner IS NOT NULL AND owner <> $2)::integer AS deaths,
                   CASE WHEN owner IS NOT NULL AND owner <> $2 THEN coalesce(deaths_since, begun_at, clock_timestamp())
                        ELSE deaths_since END AS deaths_since
            FROM runs
            WHERE run_id = $1 AND digest = $4 AND state = 'running'
              AND (owner = $2
                   OR cancel_requested_at IS NULL AND (lease_until IS NULL OR lease_until < clock_timestamp()))
            FOR UPDATE
        ), decided AS (
            SELECT *, NOT ours AND deaths >= $7::integer AS quarantined,
                   ours OR deaths < CASE WHEN $5 THEN $7::integer ELSE $6::integer END AS taken
            FROM found
        )
        UPDATE runs SET
            deaths = decided.deaths,
            deaths_since = decided.deaths_since,
            state = CASE WHEN decided.quarantined THEN 'failed' ELSE 'running' END,
            last_error = CASE WHEN decided.quarantined
                THEN 'quarantined: ' || decided.deaths || ' attempts in a row died without progress'
                ELSE runs.last_error END,
            owner = CASE WHEN decided.taken THEN $2 END,
            lease_until = CASE WHEN decided.taken THEN clock_timestamp() + make_interval(secs => $3) END,
            attempts = runs.attempts + (decided.taken AND NOT decided.ours)::integer,
            begun_at = CASE WHEN decided.taken AND NOT decided.ours THEN clock_timestamp() ELSE runs.begun_at END,
            -- What an earlier attempt did, perhaps long ago, says nothing about how fast this one is.
            rate_since = clock_timestamp(), rate_since_rows = runs.valued + runs.failed,
            next_rate_since = clock_timestamp(), next_rate_since_rows = runs.valued + runs.failed
        FROM decided
        WHERE runs.run_id = decided.run_id
        RETURNING decided.taken AS "taken!", decided.quarantined AS "quarantined!", zip_codes, last_listing_id, opened_at,
                  selected, cursor, valued, failed, attempts, runs.deaths, used AS "used: Json<Box<RawValue>>"
        "#,
        request.run_id,
        token,
        lease.as_secs_f64(),
        &request.digest,
        alone,
        SUSPECT,
        QUARANTINE,
    )
    .fetch_optional(connection)
    .await?;
    let Some(run) = taken.filter(|run| !run.quarantined) else { return Ok(None) };
    if !run.taken {
        return Ok(Some(RunClaim::Suspect));
    }
    Ok(Some(RunClaim::Owned(Box::new(OwnedRun {
        set: Set {
            run_id: request.run_id.to_owned(),
            zip_codes: run.zip_codes,
            last_listing_id: run.last_listing_id,
            opened_at: run.opened_at,
        },
        token,
        selected: run.selected,
        cursor: run.cursor,
        valued: run.valued,
        failed: run.failed,
        attempts: run.attempts,
        deaths: run.deaths,
        used: run.used.map(|used| WorkLedger::read(Kind::ValuationsRefresh, request.run_id, &used)).unwrap_or_default(),
    }))))
}

/// Fixes the set: how many listings match and which is the last of them; by zip codes, which can change, also each one. An
/// empty set ends before the first id.
async fn open_run(connection: &mut PgConnection, request: &RunRequest<'_>) -> sqlx::Result<()> {
    let r = request;
    match r.zip_codes {
        None => {
            sqlx::query!(
                r#"
                INSERT INTO runs
                    (run_id, digest, event_source, event_time, traceparent, event_data, row_limit, last_listing_id, selected)
                SELECT $1, $2, $3, $4, $5, $7, $6, coalesce(max(listing_id), '-9223372036854775808'), count(*)
                FROM (SELECT listing_id FROM listings ORDER BY listing_id LIMIT $6) AS matches
                ON CONFLICT (run_id) DO NOTHING
                "#,
                r.run_id,
                &r.digest,
                r.source,
                r.event_time,
                r.traceparent,
                r.limit,
                r.data,
            )
            .execute(connection)
            .await?;
        }
        Some(zip_codes) => {
            sqlx::query!(
                r#"
                WITH matches AS MATERIALIZED (
                    SELECT listing_id FROM listings WHERE zip_code = ANY ($7) ORDER BY listing_id LIMIT $6
                ), opened AS (
                    INSERT INTO runs
                        (run_id, digest, event_source, event_time, traceparent, event_data, row_limit, zip_codes,
                         last_listing_id, selected)
                    SELECT $1, $2, $3, $4, $5, $8, $6, $7, coalesce(max(listing_id), '-9223372036854775808'), count(*)
                    FROM matches
                    ON CONFLICT (run_id) DO NOTHING
                    RETURNING run_id
                )
                INSERT INTO run_listings (run_id, listing_id)
                SELECT opened.run_id, matches.listing_id FROM opened CROSS JOIN matches
                "#,
                r.run_id,
                &r.digest,
                r.source,
                r.event_time,
                r.traceparent,
                r.limit,
                zip_codes,
                r.data,
            )
            .execute(connection)
            .await?;
        }
    }
    Ok(())
}

/// Renews the leases of runs that are being refreshed. Returns the tokens that still hold theirs; the others have lost
/// their run. Used by the keeper on a connection of its own, so that a full pool cannot cost a lease.
pub async fn renew_owners(
    connection: &mut PgConnection,
    run_ids: &[String],
    tokens: &[Uuid],
    lease: Duration,
) -> sqlx::Result<Vec<Uuid>> {
    sqlx::query_scalar!(
        r#"
        UPDATE runs SET lease_until = clock_timestamp() + make_interval(secs => $3)
        FROM unnest($1::text[], $2::uuid[]) AS held (run_id, token)
        WHERE runs.run_id = held.run_id AND runs.owner = held.token AND runs.state = 'running'
        RETURNING held.token AS "token!"
        "#,
        run_ids,
        tokens,
        lease.as_secs_f64(),
    )
    .fetch_all(connection)
    .await
}

/// As [`renew_owners`], for runs that are being published.
pub async fn renew_publishers(
    connection: &mut PgConnection,
    run_ids: &[String],
    tokens: &[Uuid],
    lease: Duration,
) -> sqlx::Result<Vec<Uuid>> {
    sqlx::query_scalar!(
        r#"
        UPDATE runs SET publisher_lease_until = clock_timestamp() + make_interval(secs => $3)
        FROM unnest($1::text[], $2::uuid[]) AS held (run_id, token)
        WHERE runs.run_id = held.run_id AND runs.publisher = held.token
        RETURNING held.token AS "token!"
        "#,
        run_ids,
        tokens,
        lease.as_secs_f64(),
    )
    .fetch_all(connection)
    .await
}
