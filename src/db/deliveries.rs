//! Deliveries: which messages are being handled for at least the second time, and how often that killed somebody.
//!
//! A row is written before anything is done with the message, and removed when that ended in order. Whoever finds a row
//! of another handling knows that nobody ended it, and counts a death. Runs and publications count their own, by the
//! token that is still in their row.

use std::fmt;

use time::OffsetDateTime;
use time::macros::format_description;
use uuid::Uuid;

use super::{Database, DbError, run};

/// From so many deaths in a row on, work is begun only alone: whatever dies then, it was not its neighbour's doing.
pub const SUSPECT: i32 = 2;

/// With so many deaths in a row work is not begun again.
pub const QUARANTINE: i32 = 3;

/// Attempts in a row that were begun and never ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deaths {
    /// How many.
    pub count: i32,
    /// When the first of them was begun.
    pub since: OffsetDateTime,
    /// When the last of them was begun.
    pub last: OffsetDateTime,
}

impl fmt::Display for Deaths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let format = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
        let show = |moment: OffsetDateTime| moment.to_utc().format(format).unwrap_or_else(|_| moment.to_string());
        write!(
            f,
            "work on it was begun {} times in a row and each time the process died or the handler panicked before there \
             was progress; the first of these began at {}, the last at {}",
            self.count,
            show(self.since),
            show(self.last)
        )
    }
}

/// Whether the handling of a message may begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begin {
    /// It has begun, and the record says so.
    Begun,
    /// Only alone; it has not begun.
    Suspect,
    /// Never again; it has not begun.
    Quarantined(Deaths),
}

impl Database {
    /// Records that the handling `token` of a message begins, unless the record of earlier ones speaks against it. Only
    /// whoever is `alone` may handle a suspect. May be repeated with the same token.
    pub async fn begin_delivery(
        &self,
        message_id: &str,
        lane: &str,
        token: Uuid,
        alone: bool,
    ) -> Result<Begin, DbError> {
        run!(self, "the record of a delivery", connection => {
            // The row as it was: another token is that of a handling which nobody ended.
            let row = sqlx::query!(
                r#"
                INSERT INTO deliveries AS present (message_id, lane, token) VALUES ($1, $2, $3)
                ON CONFLICT (message_id) DO UPDATE SET
                    deaths = present.deaths + (present.token IS DISTINCT FROM $3 AND present.token IS NOT NULL)::integer,
                    deaths_since = CASE WHEN present.token <> $3
                        THEN coalesce(present.deaths_since, present.begun_at) ELSE present.deaths_since END,
                    token = CASE
                        WHEN present.token = $3 THEN $3
                        WHEN present.deaths + (present.token IS NOT NULL)::integer < CASE WHEN $4 THEN $6::integer ELSE $5::integer END
                        THEN $3 END,
                    begun_at = CASE
                        WHEN present.token = $3 THEN present.begun_at
                        WHEN present.deaths + (present.token IS NOT NULL)::integer < CASE WHEN $4 THEN $6::integer ELSE $5::integer END
                        THEN clock_timestamp() ELSE present.begun_at END
                RETURNING token, deaths, coalesce(deaths_since, begun_at) AS "since!", begun_at
                "#,
                message_id,
                lane,
                token,
                alone,
                SUSPECT,
                QUARANTINE,
            )
            .fetch_one(connection)
            .await?;
            Ok(if row.token == Some(token) {
                Begin::Begun
            } else if row.deaths < QUARANTINE {
                Begin::Suspect
            } else {
                Begin::Quarantined(Deaths { count: row.deaths, since: row.since, last: row.begun_at })
            })
        })
    }

    /// Removes the records of handlings that ended in order: message ids and, in the same order, their tokens. A record
    /// that another handling has taken over stays.
    pub async fn end_deliveries(&self, message_ids: &[String], tokens: &[Uuid]) -> Result<(), DbError> {
        run!(self, "the end of a delivery", connection => {
            sqlx::query!(
                "DELETE FROM deliveries USING unnest($1::text[], $2::uuid[]) AS ended (message_id, token)
                 WHERE deliveries.message_id = ended.message_id AND deliveries.token = ended.token",
                message_ids,
                tokens,
            )
            .execute(connection)
            .await?;
            Ok(())
        })
    }
}
