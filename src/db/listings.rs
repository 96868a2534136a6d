//! Listings: the upsert of one, the reading of pages, the bulk load.

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

/// What came of an upsert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upsert {
    /// The listing is as the event says.
    Written,
    /// What is there came from a newer event.
    Older,
    /// This very event was applied before.
    Repeated,
    /// Another event with the same id came first; nothing was written.
    OtherEvent,
}

impl Database {
    /// Writes `listing` unless what is there came from a newer event, and the event's digest with it: one statement, so
    /// that of several first events with one id exactly one is applied. They wait for each other at their id, which is
    /// taken before the listing.
    pub async fn upsert_listing(
        &self,
        listing: &Listing,
        event_time: OffsetDateTime,
        event_id: &str,
        digest: &[u8; 32],
    ) -> Result<Upsert, DbError> {
        let l = listing;
        let attributes = l.attributes.as_ref().map(Json);
        run!(self, "the upsert of a listing", connection => {
            let done = sqlx::query!(
                r#"
                WITH first AS (
                    INSERT INTO listing_events (event_id, digest) VALUES ($21, $22)
                    ON CONFLICT (event_id) DO NOTHING
                    RETURNING event_id
                ), written AS (
                    INSERT INTO listings AS present (
                        listing_id, zip_code, list_price_cents, bedrooms, living_square_feet, listed_on, bathrooms,
                        lot_square_feet, floors, waterfront, view_rating, condition_rating, grade_rating, year_built,
                        year_renovated, latitude, longitude, description, attributes, event_time, event_id)
                    SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20,
                           first.event_id
                    FROM first
                    ON CONFLICT (listing_id) DO UPDATE SET
                        zip_code = excluded.zip_code,
                        list_price_cents = excluded.list_price_cents,
                        bedrooms = excluded.bedrooms,
                        living_square_feet = excluded.living_square_feet,
                        listed_on = coalesce(excluded.listed_on, present.listed_on),
                        bathrooms = coalesce(excluded.bathrooms, present.bathrooms),
                        lot_square_feet = coalesce(excluded.lot_square_feet, present.lot_square_feet),
                        floors = coalesce(excluded.floors, present.floors),
                        waterfront = coalesce(excluded.waterfront, present.waterfront),
                        view_rating = coalesce(excluded.view_rating, present.view_rating),
                        condition_rating = coalesce(excluded.condition_rating, present.condition_rating),
                        grade_rating = coalesce(excluded.grade_rating, present.grade_rating),
                        year_built = coalesce(excluded.year_built, present.year_built),
                        year_renovated = coalesce(excluded.year_renovated, present.year_renovated),
                        latitude = coalesce(excluded.latitude, present.latitude),
                        longitude = coalesce(excluded.longitude, present.longitude),
                        description = coalesce(excluded.description, present.description),
                        attributes = coalesce(excluded.attributes, present.attributes),
                        event_time = excluded.event_time,
                        event_id = excluded.event_id
                    WHERE (excluded.event_time, excluded.event_id) > (present.event_time, present.event_id)
                    RETURNING listing_id
                )
                SELECT EXISTS (SELECT FROM first) AS "first!", EXISTS (SELECT FROM written) AS "written!",
                       (SELECT digest FROM listing_events WHERE event_id = $21) AS known
                "#,
                l.listing_id,
                l.zip_code,
                l.list_price_cents,
                l.bedrooms,
                l.living_square_feet,
                l.listed_on,
                l.bathrooms,
                l.lot_square_feet,
                l.floors,
                l.waterfront,
                l.view_rating,
                l.condition_rating,
                l.grade_rating,
                l.year_built,
                l.year_renovated,
                l.latitude,
                l.longitude,
                l.description.as_deref(),
                attributes as _,
                event_time,
                event_id,
                digest,
            )
            .fetch_one(&mut *connection)
            .await?;
            if done.first {
                return Ok(if done.written { Upsert::Written } else { Upsert::Older });
            }
            let known = match done.known {
                Some(known) => known,
                // It was waited for, and is younger than what the statement can see.
                None => {
                    sqlx::query_scalar!("SELECT digest FROM listing_events WHERE event_id = $1", event_id)
                        .fetch_one(connection)
                        .await?
                }
            };
            Ok(if known == digest { Upsert::Repeated } else { Upsert::OtherEvent })
        })
    }

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
        let column = Columns::of(listings);
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
                &column.description as &[Option<String>],
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
struct Columns {
    listing_id: Vec<i64>,
    zip_code: Vec<i32>,
    list_price_cents: Vec<i64>,
    bedrooms: Vec<i16>,
    living_square_feet: Vec<i32>,
    listed_on: Vec<Option<Date>>,
    bathrooms: Vec<Option<f32>>,
    lot_square_feet: Vec<Option<i32>>,
    floors: Vec<Option<f32>>,
    waterfront: Vec<Option<bool>>,
    view_rating: Vec<Option<i16>>,
    condition_rating: Vec<Option<i16>>,
    grade_rating: Vec<Option<i16>>,
    year_built: Vec<Option<i16>>,
    year_renovated: Vec<Option<i16>>,
    latitude: Vec<Option<f64>>,
    longitude: Vec<Option<f64>>,
    description: Vec<Option<String>>,
    attributes: Vec<Option<Json<serde_json::Map<String, serde_json::Value>>>>,
}

impl Columns {
    fn of(listings: &[Listing]) -> Self {
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
            columns.description.push(listing.description.clone());
            columns.attributes.push(listing.attributes.clone().map(Json));
        }
        columns
    }
}
