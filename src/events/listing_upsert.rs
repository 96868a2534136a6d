//! `listing.upsert`: one listing, milliseconds.

use super::Events;
use super::envelope::Event;
use super::valuations_refresh::other_event;
use crate::db::DbError;
use crate::db::listings::Listing;
use crate::db::upserts::{ListingEvent, Upsert};
use crate::fault;
use crate::queue::{Outcome, Refusal};
use crate::task::{Stage, in_stage};

/// Reads and checks the data of an upsert event.
pub(super) fn decode(event: &Event<'_>) -> Result<Listing, Refusal> {
    let listing = event.data()?;
    check(&listing)?;
    Ok(listing)
}

/// Writes the listing unless a newer event has written it already, or an event with this id was applied before.
pub(super) async fn handle(events: &Events, event: &Event<'_>, listing: Listing) -> Result<Outcome, Refusal> {
    let digest = event.digest()?;
    let said = ListingEvent {
        listing,
        event_time: event.time,
        event_id: event.id.to_string(),
        digest,
        size: event.data_text().len(),
    };
    fault::point("upsert.before_commit", &event.id);
    let upserted = in_stage(Stage::Write, events.upserts.write(&events.database, said)).await;
    fault::point("upsert.after_commit", &event.id);
    Ok(match upserted {
        Ok(Upsert::Written) => Outcome::Done { rows: 1, note: "".into() },
        Ok(Upsert::Older) => Outcome::Done { rows: 0, note: "a newer event was there already".into() },
        Ok(Upsert::Repeated) => Outcome::Done { rows: 0, note: "this event was there already".into() },
        Ok(Upsert::OtherEvent) => return Err(other_event(&event.id)),
        Err(error @ DbError::Refused { .. }) => {
            return Err(Refusal { code: "invalid_data", reason: error.to_string() });
        }
        Err(error @ DbError::Unavailable { .. }) => Outcome::Retry(error.into()),
    })
}

/// What the types let through and no home has.
fn check(listing: &Listing) -> Result<(), Refusal> {
    let wrong = |field: &str, value: i64| Refusal {
        code: "invalid_data",
        reason: format!("{field} {value} of listing {} must not be negative", listing.listing_id),
    };
    let not_negative = [
        ("zip_code", i64::from(listing.zip_code)),
        ("list_price_cents", listing.list_price_cents),
        ("bedrooms", i64::from(listing.bedrooms)),
        ("living_square_feet", i64::from(listing.living_square_feet)),
    ];
    if let Some((field, value)) = not_negative.into_iter().find(|(_, value)| *value < 0) {
        return Err(wrong(field, value));
    }
    let invalid = |reason| Err(Refusal { code: "invalid_data", reason });
    // A number too large for its type becomes infinite, without an error.
    let finite = [
        ("bathrooms", listing.bathrooms.map(f64::from)),
        ("floors", listing.floors.map(f64::from)),
        ("latitude", listing.latitude),
        ("longitude", listing.longitude),
    ];
    if let Some((field, _)) = finite.iter().find(|(_, value)| value.is_some_and(|value| !value.is_finite())) {
        return invalid(format!("{field} of listing {} is too large a number", listing.listing_id));
    }
    // The cursor of a run starts there, before the first listing.
    if listing.listing_id == i64::MIN {
        return invalid(format!("listing_id {} is reserved, the least is {}", i64::MIN, i64::MIN + 1));
    }
    Ok(())
}
