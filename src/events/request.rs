//! What an event asks for: its kind, and its data read and checked. Whoever wants to know whether the service accepts an
//! event asks here, as the service does.

use super::envelope::{
    Event, KIND_PUBLISH, KIND_REFRESH, KIND_UPSERT, LISTING_UPSERT, VALUATIONS_PUBLISH, VALUATIONS_REFRESH,
};
use super::{listing_upsert, valuations_publish, valuations_refresh};
use crate::db::listings::Listing;
use crate::queue::Refusal;

/// What an event asks for.
#[derive(Debug)]
pub enum Request {
    /// Write one listing.
    Upsert(Box<Listing>),
    /// Ask the partner for valuations.
    Refresh(valuations_refresh::Data),
    /// Publish the valuations of a run.
    Publish(valuations_publish::Data),
}

/// The kind of an event in logs and metrics. Its data may still be wrong.
pub fn kind(event: &Event<'_>) -> Result<&'static str, Refusal> {
    match event.kind.as_ref() {
        LISTING_UPSERT => Ok(KIND_UPSERT),
        VALUATIONS_REFRESH => Ok(KIND_REFRESH),
        VALUATIONS_PUBLISH => Ok(KIND_PUBLISH),
        unknown => {
            let reason = format!(
                "type {unknown:?} is unknown; known are {LISTING_UPSERT}, {VALUATIONS_REFRESH}, {VALUATIONS_PUBLISH}"
            );
            Err(Refusal { code: "unknown_type", reason })
        }
    }
}

impl Request {
    /// Reads and checks the data of an event, by its kind.
    pub fn decode(event: &Event<'_>) -> Result<Request, Refusal> {
        Ok(match kind(event)? {
            KIND_UPSERT => Request::Upsert(Box::new(listing_upsert::decode(event)?)),
            KIND_REFRESH => Request::Refresh(valuations_refresh::decode(event)?),
            _ => Request::Publish(valuations_publish::decode(event)?),
        })
    }
}
