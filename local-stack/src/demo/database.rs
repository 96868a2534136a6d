//! What the service left in the database, read by a connection of its own and compared with the world as it must be.

use anyhow::{Context, Result};
use local_stack::partner::valuation;
use serde::Serialize;
use sqlx::{Connection, FromRow, PgConnection};

/// Rows read at once.
const PAGE: i64 = 10_000;

/// A run and its post-processing. Times are in seconds since 1970, by the clock of the database, which runs on this
/// machine.
#[derive(Clone, Debug, FromRow)]
pub(super) struct Run {
    pub(super) selected: i64,
    pub(super) valued: i64,
    pub(super) failed: i64,
    pub(super) attempts: i32,
    pub(super) completed_at: Option<f64>,
    pub(super) published: Option<i64>,
    pub(super) published_at: Option<f64>,
}

/// The valuations of a run against the partner's own function.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Valuations {
    /// Rows of the run.
    pub(super) rows: u64,
    /// Rows with the valuation and the confidence that the partner gives for the listing at its price.
    pub(super) right: u64,
    /// Listings that the event selects and that have no row.
    pub(super) missing: u64,
    /// Listings whose newest valuation is this run's.
    pub(super) current: u64,
}

/// A row of `valuations` beside its listing.
#[derive(FromRow)]
struct Row {
    listing_id: i64,
    asked_cents: i64,
    listed_cents: Option<i64>,
    valuation_cents: Option<i64>,
    confidence: Option<f64>,
}

/// A connection for checks.
#[derive(Debug)]
pub(super) struct Database(PgConnection);

impl Database {
    pub(super) async fn connect(url: &str) -> Result<Self> {
        Ok(Self(PgConnection::connect(url).await.with_context(|| format!("cannot connect to {url}"))?))
    }

    /// How far the run is; `None` before it is opened.
    pub(super) async fn run(&mut self, run_id: &str) -> Result<Option<Run>> {
        let run = sqlx::query_as(
            "SELECT r.selected, r.valued, r.failed, r.attempts,
                    extract(epoch FROM r.completed_at)::float8 AS completed_at,
                    p.published, extract(epoch FROM p.completed_at)::float8 AS published_at
             FROM runs r LEFT JOIN publications p USING (run_id) WHERE r.run_id = $1",
        );
        run.bind(run_id).fetch_optional(&mut self.0).await.with_context(|| format!("cannot read the run {run_id}"))
    }

    /// Compares every valuation of the run, which was limited to `limit` listings.
    pub(super) async fn valuations(&mut self, run_id: &str, limit: u32) -> Result<Valuations> {
        let mut found = Valuations::default();
        let mut after = i64::MIN;
        loop {
            let page = sqlx::query_as::<_, Row>(
                "SELECT v.listing_id, v.list_price_cents AS asked_cents, l.list_price_cents AS listed_cents,
                        v.valuation_cents, v.confidence
                 FROM valuations v LEFT JOIN listings l USING (listing_id)
                 WHERE v.run_id = $1 AND v.listing_id > $2 ORDER BY v.listing_id LIMIT $3",
            );
            let page = page.bind(run_id).bind(after).bind(PAGE).fetch_all(&mut self.0).await;
            let page = page.with_context(|| format!("cannot read the valuations of the run {run_id}"))?;
            let Some(last) = page.last() else { break };
            after = last.listing_id;
            found.rows += page.len() as u64;
            found.right += page.iter().filter(|row| row.is_right()).count() as u64;
        }
        let (missing, current): (i64, i64) = sqlx::query_as(
            "SELECT (SELECT count(*) FROM (SELECT listing_id FROM listings ORDER BY listing_id LIMIT $2) expected
                     WHERE NOT EXISTS (SELECT FROM valuations v
                                       WHERE v.run_id = $1 AND v.listing_id = expected.listing_id)),
                    (SELECT count(*) FROM listing_valuations WHERE run_id = $1)",
        )
        .bind(run_id)
        .bind(i64::from(limit))
        .fetch_one(&mut self.0)
        .await
        .context("cannot compare the valuations with the listings")?;
        Ok(Valuations { missing: missing.cast_unsigned(), current: current.cast_unsigned(), ..found })
    }

    /// Listings that an event has written since they were loaded.
    pub(super) async fn listings_written(&mut self) -> Result<u64> {
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM listings WHERE event_id <> 'seed'")
            .fetch_one(&mut self.0)
            .await
            .context("cannot count the listings")?;
        Ok(count.cast_unsigned())
    }
}

impl Row {
    fn is_right(&self) -> bool {
        let expected = valuation(self.listing_id, self.asked_cents);
        // The events beside the run write the prices that were there, so the price asked about is the listing's still.
        self.listed_cents == Some(self.asked_cents)
            && self.valuation_cents == Some(expected.valuation_cents)
            && self.confidence == Some(expected.confidence())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_right_only_in_every_part() {
        let expected = valuation(17, 1_000_000);
        let row = || Row {
            listing_id: 17,
            asked_cents: 1_000_000,
            listed_cents: Some(1_000_000),
            valuation_cents: Some(expected.valuation_cents),
            confidence: Some(expected.confidence()),
        };
        assert!(row().is_right());
        assert!(!Row { listing_id: 18, ..row() }.is_right());
        assert!(!Row { listed_cents: Some(999_999), ..row() }.is_right());
        assert!(!Row { listed_cents: None, ..row() }.is_right());
        assert!(!Row { valuation_cents: Some(expected.valuation_cents + 1), ..row() }.is_right());
        assert!(!Row { valuation_cents: None, confidence: None, ..row() }.is_right());
        assert!(!Row { confidence: Some(expected.confidence() + 0.01), ..row() }.is_right());
    }
}
