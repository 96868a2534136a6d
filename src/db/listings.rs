//! Listings: what they are, the reading of pages, the bulk load.

use std::num::NonZero;

use serde::Deserialize;
use sqlx::types::Json;
use time::{Date, OffsetDateTime};

use super::runs::Set;
use super::{Database, DbError, run};

/// One home for sale as an event brings it. What is `None` was not in the event and stays as it is.
#[derive(Debug, Clone, Deserialize)]
pub struct Listing {
    /// Given by the producer.
    pub listing_id: i64,
    /// US zip code.
    pub zip_code: i32,
    /// Asking price in US cents.
    pub list_price_cents: i64,
    /// Number of bedrooms.
    pub bedrooms: i16,
    /// Living area in square feet.
    pub living_square_feet: i32,
    /// Day on which it came to the market.
    #[serde(default, with = "iso_date")]
    pub listed_on: Option<Date>,
    /// Number of bathrooms.
    pub bathrooms: Option<f32>,
    /// Area of the lot in square feet.
    pub lot_square_feet: Option<i32>,
    /// Number of floors.
    pub floors: Option<f32>,
    /// Whether it overlooks water.
    pub waterfront: Option<bool>,
    /// Quality of the view, 0 to 4.
    pub view_rating: Option<i16>,
    /// Condition, 1 to 5.
    pub condition_rating: Option<i16>,
    /// Grade of construction and design, 1 to 13.
    pub grade_rating: Option<i16>,
    /// Year of construction.
    pub year_built: Option<i16>,
    /// Year of the last renovation, 0 if there was none.
    pub year_renovated: Option<i16>,
    /// Degrees north.
    pub latitude: Option<f64>,
    /// Degrees east.
    pub longitude: Option<f64>,
    /// Text of the advertisement.
    pub description: Option<String>,
    /// What the other fields do not hold.
    pub attributes: Option<serde_json::Map<String, serde_json::Value>>,
}

mod iso_date {
    use serde::{Deserialize, Deserializer, de::Error};
    use time::{Date, macros::format_description};

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Date>, D::Error> {
        let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
        Date::parse(&text, format_description!("[year]-[month]-[day]"))
            .map(Some)
            .map_err(|error| D::Error::custom(format!("{text:?} is not a date like 2015-04-22: {error}")))
    }
}

/// What the refresh needs of a listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRow {
    /// The listing.
    pub listing_id: i64,
    /// US zip code.
    pub zip_code: i32,
    /// Asking price in US cents.
    pub list_price_cents: i64,
    /// Number of bedrooms.
    pub bedrooms: i16,
    /// Living area in square feet.
    pub living_square_feet: i32,
}

impl Database {
    /// The next listings of `set` past `cursor`, at most `limit`, in the order of their ids. A `resumed` run gets only
    /// those that it has no valuation of.
    pub async fn read_page(
        &self,
        set: &Set,
        cursor: i64,
        resumed: bool,
        limit: NonZero<usize>,
    ) -> Result<Vec<PageRow>, DbError> {
        let run_id = resumed.then_some(set.run_id.as_str());
        let limit = limit.get() as i64;
        run!(self, "a page of listings", connection => { match &set.zip_codes {
            None => {
                sqlx::query_as!(
                    PageRow,
                    // OFFSET 0 keeps the planner from turning the probe of one row into a scan of the whole run.
                    r#"
                    SELECT listing_id, zip_code, list_price_cents, bedrooms, living_square_feet
                    FROM listings AS l
                    WHERE listing_id > $1 AND listing_id <= $2 AND created_at <= $3
                      AND ($4::text IS NULL OR NOT EXISTS (
                          SELECT FROM valuations v WHERE v.run_id = $4 AND v.listing_id = l.listing_id OFFSET 0))
                    ORDER BY listing_id
                    LIMIT $5
                    "#,
                    cursor,
                    set.last_listing_id,
                    set.opened_at,
                    run_id,
                    limit,
                )
                .fetch_all(connection)
                .await
            }
            Some(_) => {
                sqlx::query_as!(
                    PageRow,
                    // The set was written down at the opening: a listing that has moved since is still in it, one that has
                    // moved in is not. The limit inside and OFFSET 0 keep both reads along their primary keys.
                    r#"
                    SELECT l.listing_id, l.zip_code, l.list_price_cents, l.bedrooms, l.living_square_feet
                    FROM (
                        SELECT listing_id FROM run_listings AS r
                        WHERE run_id = $1 AND listing_id > $2
                          AND ($3::text IS NULL OR NOT EXISTS (
                              SELECT FROM valuations v WHERE v.run_id = $3 AND v.listing_id = r.listing_id OFFSET 0))
                        ORDER BY listing_id
                        LIMIT $4
                    ) AS of_page
                    CROSS JOIN LATERAL (
                        SELECT c.listing_id, zip_code, list_price_cents, bedrooms, living_square_feet
                        FROM listings AS c WHERE c.listing_id = of_page.listing_id OFFSET 0
                    ) AS l
                    ORDER BY l.listing_id
                    "#,
                    &set.run_id,
                    cursor,
                    run_id,
                    limit,
                )
                .fetch_all(connection)
                .await
            }
        } })
    }

    /// Loads many listings in one statement; those that exist already stay as they are. Returns how many are new.
    pub async fn insert_listings(
        &self,
        listings: &[Listing],
        event_time: OffsetDateTime,
        event_id: &str,
    ) -> Result<u64, DbError> {
        let column = Columns::of(listings.iter());
        run!(self, "the bulk load of listings", connection => {
            let done = sqlx::query!(
                r#"
                INSERT INTO listings (
                    listing_id, zip_code, list_price_cents, bedrooms, living_square_feet, listed_on, bathrooms,
                    lot_square_feet, floors, waterfront, view_rating, condition_rating, grade_rating, year_built,
                    year_renovated, latitude, longitude, description, attributes, event_time, event_id)
                SELECT rows.*, $20::timestamptz, $21::text
                FROM unnest(
                    $1::bigint[], $2::integer[], $3::bigint[], $4::smallint[], $5::integer[], $6::date[], $7::real[],
                    $8::integer[], $9::real[], $10::boolean[], $11::smallint[], $12::smallint[], $13::smallint[],
                    $14::smallint[], $15::smallint[], $16::double precision[], $17::double precision[], $18::text[],
                    $19::jsonb[]) AS rows
                ON CONFLICT (listing_id) DO NOTHING
                "#,
                &column.listing_id,
                &column.zip_code,
                &column.list_price_cents,
                &column.bedrooms,
                &column.living_square_feet,
                &column.listed_on as &[Option<Date>],
                &column.bathrooms as &[Option<f32>],
                &column.lot_square_feet as &[Option<i32>],
                &column.floors as &[Option<f32>],
                &column.waterfront as &[Option<bool>],
                &column.view_rating as &[Option<i16>],
                &column.condition_rating as &[Option<i16>],
                &column.grade_rating as &[Option<i16>],
                &column.year_built as &[Option<i16>],
                &column.year_renovated as &[Option<i16>],
                &column.latitude as &[Option<f64>],
                &column.longitude as &[Option<f64>],
                &column.description as &[Option<&str>],
                &column.attributes as _,
                event_time,
                event_id,
            )
            .execute(connection)
            .await?;
            Ok(done.rows_affected())
        })
    }
}

/// Listings turned on their side, as UNNEST takes them.
#[derive(Default)]
pub(super) struct Columns<'a> {
    pub listing_id: Vec<i64>,
    pub zip_code: Vec<i32>,
    pub list_price_cents: Vec<i64>,
    pub bedrooms: Vec<i16>,
    pub living_square_feet: Vec<i32>,
    pub listed_on: Vec<Option<Date>>,
    pub bathrooms: Vec<Option<f32>>,
    pub lot_square_feet: Vec<Option<i32>>,
    pub floors: Vec<Option<f32>>,
    pub waterfront: Vec<Option<bool>>,
    pub view_rating: Vec<Option<i16>>,
    pub condition_rating: Vec<Option<i16>>,
    pub grade_rating: Vec<Option<i16>>,
    pub year_built: Vec<Option<i16>>,
    pub year_renovated: Vec<Option<i16>>,
    pub latitude: Vec<Option<f64>>,
    pub longitude: Vec<Option<f64>>,
    pub description: Vec<Option<&'a str>>,
    pub attributes: Vec<Option<Json<&'a serde_json::Map<String, serde_json::Value>>>>,
}

impl<'a> Columns<'a> {
    pub fn of(listings: impl Iterator<Item = &'a Listing>) -> Self {
        let mut columns = Columns::default();
        for listing in listings {
            columns.listing_id.push(listing.listing_id);
            columns.zip_code.push(listing.zip_code);
            columns.list_price_cents.push(listing.list_price_cents);
            columns.bedrooms.push(listing.bedrooms);
            columns.living_square_feet.push(listing.living_square_feet);
            columns.listed_on.push(listing.listed_on);
            columns.bathrooms.push(listing.bathrooms);
            columns.lot_square_feet.push(listing.lot_square_feet);
            columns.floors.push(listing.floors);
            columns.waterfront.push(listing.waterfront);
            columns.view_rating.push(listing.view_rating);
            columns.condition_rating.push(listing.condition_rating);
            columns.grade_rating.push(listing.grade_rating);
            columns.year_built.push(listing.year_built);
            columns.year_renovated.push(listing.year_renovated);
            columns.latitude.push(listing.latitude);
            columns.longitude.push(listing.longitude);
            columns.description.push(listing.description.as_deref());
            columns.attributes.push(listing.attributes.as_ref().map(Json));
        }
        columns
    }
}
