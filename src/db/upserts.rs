//! The upsert of listings: those of several events in one statement.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use sqlx::PgConnection;
use time::{Date, OffsetDateTime};

use super::listings::{Columns, Listing};
use super::{Database, DbError, Tries, run};

/// A listing as an event says it is.
#[derive(Debug)]
pub struct ListingEvent {
    /// What it says.
    pub listing: Listing,
    /// When that was so.
    pub event_time: OffsetDateTime,
    /// The event.
    pub event_id: String,
    /// What tells the event from others with the same id.
    pub digest: [u8; 32],
    /// Length of its data, in bytes.
    pub size: usize,
}

/// How long a statement for several events waits for a lock: whoever holds one holds up all of them.
const LOCK_OF_SEVERAL: Duration = Duration::from_millis(500);

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
    /// Writes the event's listing unless what is there came from a newer event, and the event's digest with it: one statement, so
    /// that of several first events with one id exactly one is applied.
    pub async fn upsert_listing(&self, event: &Arc<ListingEvent>) -> Result<Upsert, DbError> {
        let what = "the upsert of a listing";
        Ok(self.upsert(Tries::new(what), self.lock_timeout, std::slice::from_ref(event)).await?[0])
    }

    /// The same for several events at once; the answers are in their order. No two of them may have the same id or the same
    /// listing. It is tried once, and waits for half a second for a lock: each of them can be tried alone.
    pub async fn upsert_listings(&self, events: &[Arc<ListingEvent>]) -> Result<Vec<Upsert>, DbError> {
        self.upsert(Tries::once("the upsert of listings"), LOCK_OF_SEVERAL, events).await
    }

    /// Statements wait for each other at ids first, then at listings, at both in their order, so that no two wait for each other.
    async fn upsert(
        &self,
        tries: Tries,
        lock_timeout: Duration,
        events: &[Arc<ListingEvent>],
    ) -> Result<Vec<Upsert>, DbError> {
        let lock_timeout = lock_timeout.as_millis().to_string();
        let column = Columns::of(events.iter().map(|event| &event.listing));
        let times: Vec<OffsetDateTime> = events.iter().map(|event| event.event_time).collect();
        let ids: Vec<&str> = events.iter().map(|event| event.event_id.as_str()).collect();
        let digests: Vec<&[u8]> = events.iter().map(|event| event.digest.as_slice()).collect();
        run!(self, tries, connection => {
            let done = sqlx::query!(
                r#"
                WITH given AS (
                    SELECT *
                    FROM unnest(
                        $1::bigint[], $2::integer[], $3::bigint[], $4::smallint[], $5::integer[], $6::date[],
                        $7::real[], $8::integer[], $9::real[], $10::boolean[], $11::smallint[], $12::smallint[],
                        $13::smallint[], $14::smallint[], $15::smallint[], $16::double precision[],
                        $17::double precision[], $18::text[], $19::jsonb[], $20::timestamptz[], $21::text[],
                        $22::bytea[]) WITH ORDINALITY AS given (
                        listing_id, zip_code, list_price_cents, bedrooms, living_square_feet, listed_on, bathrooms,
                        lot_square_feet, floors, waterfront, view_rating, condition_rating, grade_rating, year_built,
                        year_renovated, latitude, longitude, description, attributes, event_time, event_id, digest,
                        place)
                ), first AS (
                    INSERT INTO listing_events (event_id, digest)
                    SELECT event_id, digest FROM given
                    WHERE (SELECT set_config('lock_timeout', $23, true)) IS NOT NULL -- Before the first row.
                    ORDER BY event_id
                    ON CONFLICT (event_id) DO NOTHING
                    RETURNING event_id
                ), written AS (
                    INSERT INTO listings AS present (
                        listing_id, zip_code, list_price_cents, bedrooms, living_square_feet, listed_on, bathrooms,
                        lot_square_feet, floors, waterfront, view_rating, condition_rating, grade_rating, year_built,
                        year_renovated, latitude, longitude, description, attributes, event_time, event_id)
                    SELECT listing_id, zip_code, list_price_cents, bedrooms, living_square_feet, listed_on, bathrooms,
                           lot_square_feet, floors, waterfront, view_rating, condition_rating, grade_rating, year_built,
                           year_renovated, latitude, longitude, description, attributes, event_time, event_id
                    FROM given JOIN first USING (event_id)
                    WHERE (SELECT count(*) FROM first) > 0 -- All ids are taken before the first listing is.
                    ORDER BY listing_id
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
                    RETURNING event_id
                )
                SELECT first.event_id IS NOT NULL AS "first!", written.event_id IS NOT NULL AS "written!",
                       CASE WHEN first.event_id IS NULL
                            THEN (SELECT known.digest FROM listing_events AS known WHERE known.event_id = given.event_id)
                       END AS known
                FROM given LEFT JOIN first USING (event_id) LEFT JOIN written USING (event_id)
                ORDER BY place
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
                &times,
                &ids as &[&str],
                &digests as &[&[u8]],
                lock_timeout.as_str(),
            )
            .fetch_all(&mut *connection)
            .await?;
            let younger = events.iter().zip(&done).filter(|(_, done)| !done.first && done.known.is_none());
            let younger: Vec<&str> = younger.map(|(event, _)| event.event_id.as_str()).collect();
            let younger = digests_of(connection, &younger).await?;
            let upserts = events.iter().zip(&done).map(|(event, done)| {
                if done.first {
                    return Ok(if done.written { Upsert::Written } else { Upsert::Older });
                }
                let known = done.known.as_ref().or_else(|| younger.get(event.event_id.as_str()));
                let known = known.ok_or(sqlx::Error::RowNotFound)?;
                Ok(if *known == event.digest { Upsert::Repeated } else { Upsert::OtherEvent })
            });
            upserts.collect::<sqlx::Result<Vec<Upsert>>>()
        })
    }
}

/// The digests of events that a statement waited for: they are younger than what it can see.
async fn digests_of(connection: &mut PgConnection, event_ids: &[&str]) -> sqlx::Result<HashMap<String, Vec<u8>>> {
    if event_ids.is_empty() {
        return Ok(HashMap::new());
    }
    let found =
        sqlx::query!("SELECT event_id, digest FROM listing_events WHERE event_id = ANY($1)", event_ids as &[&str],);
    Ok(found.fetch_all(connection).await?.into_iter().map(|row| (row.event_id, row.digest)).collect())
}
