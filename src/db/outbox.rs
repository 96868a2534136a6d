//! The outbox: rows written with the results that they announce, claimed and sent by relays.

use std::time::Duration;

use uuid::Uuid;

use super::{Database, DbError, run};

/// A row that this relay claimed.
#[derive(Debug, Clone)]
pub struct OutboxRow {
    /// Id of the row; that of its event, unless the event was sent before.
    pub event_id: Uuid,
    /// The lane that it goes to.
    pub lane: String,
    /// The CloudEvents document.
    pub body: String,
}

/// What waits.
#[derive(Debug, Clone, Copy)]
pub struct Backlog {
    /// Rows that wait to be sent.
    pub pending: i64,
    /// Age of the oldest in seconds; 0 without one.
    pub oldest_seconds: f64,
}

impl Database {
    /// Claims up to `limit` rows that nobody else has claimed and that do not go to one of the lanes `without`, the oldest
    /// first, for `claim`.
    pub async fn claim_outbox(
        &self,
        relay: Uuid,
        limit: i64,
        claim: Duration,
        without: &[String],
    ) -> Result<Vec<OutboxRow>, DbError> {
        #[cfg(feature = "fault-injection")]
        if crate::fault::planted("outbox-by-sequence") {
            return super::planted::claim_outbox(self, limit).await;
        }
        run!(self, "a claim of outbox rows", connection => {
            // SKIP LOCKED: two relays take different rows. Never a cursor over a sequence: that skips late commits.
            sqlx::query_as!(
                OutboxRow,
                r#"
                UPDATE outbox SET claimed_by = $1, claimed_until = clock_timestamp() + make_interval(secs => $3)
                WHERE event_id IN (
                    SELECT event_id FROM outbox
                    WHERE sent_at IS NULL AND (claimed_until IS NULL OR claimed_until < clock_timestamp())
                        AND lane <> ALL ($4)
                    ORDER BY created_at
                    LIMIT $2
                    FOR UPDATE SKIP LOCKED
                )
                RETURNING event_id, lane, body
                "#,
                relay,
                limit,
                claim.as_secs_f64(),
                without,
            )
            .fetch_all(connection)
            .await
        })
    }

    /// Marks rows as sent. A row that another relay sent meanwhile stays as that one marked it.
    pub async fn mark_sent(&self, event_ids: &[Uuid]) -> Result<(), DbError> {
        if event_ids.is_empty() {
            return Ok(());
        }
        run!(self, "the marking of sent outbox rows", connection => {
            sqlx::query!(
                "UPDATE outbox SET sent_at = clock_timestamp() WHERE event_id = ANY ($1) AND sent_at IS NULL",
                event_ids,
            )
            .execute(connection)
            .await?;
            Ok(())
        })
    }

    /// Gives claimed rows back, because sending them failed. Nobody may claim them before `wait` is over.
    pub async fn return_outbox(&self, relay: Uuid, event_ids: &[Uuid], wait: Duration) -> Result<(), DbError> {
        if event_ids.is_empty() {
            return Ok(());
        }
        run!(self, "the return of outbox rows", connection => {
            sqlx::query!(
                "UPDATE outbox SET claimed_by = NULL, claimed_until = clock_timestamp() + make_interval(secs => $3)
                 WHERE event_id = ANY ($2) AND claimed_by = $1 AND sent_at IS NULL",
                relay,
                event_ids,
                wait.as_secs_f64(),
            )
            .execute(connection)
            .await?;
            Ok(())
        })
    }

    /// How much waits, for the metrics.
    pub async fn outbox_backlog(&self) -> Result<Backlog, DbError> {
        run!(self, "a look at the outbox", connection => {
            sqlx::query_as!(
                Backlog,
                r#"
                SELECT count(*) AS "pending!",
                       coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8 AS "oldest_seconds!"
                FROM outbox WHERE sent_at IS NULL
                "#,
            )
            .fetch_one(connection)
            .await
        })
    }
}
