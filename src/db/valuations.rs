//! Valuations: a batch on its way in, a page on its way out.

use super::{Database, DbError, run};

/// Terminal states of listings, turned on their side as UNNEST takes them. All columns have the same length.
#[derive(Debug, Default)]
pub struct Answers {
    /// The listing.
    pub listing_ids: Vec<i64>,
    /// Zip code that the partner was asked about.
    pub zip_codes: Vec<i32>,
    /// Price in US cents that the partner was asked about.
    pub list_prices_cents: Vec<i64>,
    /// The valuation in US cents, `None` if the listing failed.
    pub valuations_cents: Vec<Option<i64>>,
    /// 0 to 1, `None` if the listing failed.
    pub confidences: Vec<Option<f64>>,
    /// Why it failed, `None` if it was valued.
    pub failures: Vec<Option<String>>,
}

impl Answers {
    /// Columns with room for `rows`.
    pub fn with_capacity(rows: usize) -> Self {
        Answers {
            listing_ids: Vec::with_capacity(rows),
            zip_codes: Vec::with_capacity(rows),
            list_prices_cents: Vec::with_capacity(rows),
            valuations_cents: Vec::with_capacity(rows),
            confidences: Vec::with_capacity(rows),
            failures: Vec::with_capacity(rows),
        }
    }
}

/// A valuation as post-processing needs it.
#[derive(Debug, Clone, PartialEq)]
pub struct Valuation {
    /// The listing.
    pub listing_id: i64,
    /// Zip code that the partner was asked about.
    pub zip_code: i32,
    /// Price in US cents that the partner was asked about.
    pub list_price_cents: i64,
    /// The partner's answer in US cents.
    pub valuation_cents: i64,
    /// The partner's confidence, 0 to 1.
    pub confidence: f64,
}

impl Database {
    /// The valuations of a run past `cursor`, at most `limit`, in the order of listing ids; failed listings have none.
    pub async fn read_valuations(&self, run_id: &str, cursor: i64, limit: usize) -> Result<Vec<Valuation>, DbError> {
        run!(self, "a page of valuations", connection => {
            sqlx::query_as!(
                Valuation,
                r#"
                SELECT listing_id, zip_code, list_price_cents,
                       valuation_cents AS "valuation_cents!", confidence AS "confidence!"
                FROM valuations
                WHERE run_id = $1 AND listing_id > $2 AND failure IS NULL
                ORDER BY listing_id
                LIMIT $3
                "#,
                run_id,
                cursor,
                limit as i64,
            )
            .fetch_all(connection)
            .await
        })
    }
}
