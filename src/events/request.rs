//! What an event asks for: its kind, and its data read and checked. Whoever wants to know whether the service accepts an
//! event asks here, as the service does.

use super::envelope::{
    Event, KIND_PUBLISH, KIND_REFRESH, KIND_UPSERT, LISTING_UPSERT, VALUATIONS_PUBLISH, VALUATIONS_REFRESH,
};
use super::{lane, listing_upsert, valuations_publish, valuations_refresh};
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
    /// The lane that slow work is done on; what is fast is done where it arrives.
    pub fn own_lane(&self) -> Option<&'static str> {
        match self {
            Request::Upsert(_) => None,
            Request::Refresh(_) => Some(lane::VALUATIONS),
            Request::Publish(_) => Some(lane::POST_PROCESSING),
        }
    }

    /// Reads and checks the data of an event, by its kind.
    pub fn decode(event: &Event<'_>) -> Result<Request, Refusal> {
        Ok(match kind(event)? {
            KIND_UPSERT => Request::Upsert(Box::new(listing_upsert::decode(event)?)),
            KIND_REFRESH => Request::Refresh(valuations_refresh::decode(event)?),
            _ => Request::Publish(valuations_publish::decode(event)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(kind: &str, data: &str) -> String {
        let body = format!(
            r#"{{"specversion":"1.0","id":"e-1","source":"/t","type":"{kind}","time":"2026-01-31T02:00:00Z","data":{data}}}"#
        );
        let event = Event::decode(&body).expect("a good envelope");
        let refusal = Request::decode(&event).expect_err(data);
        assert_eq!(refusal.code, "invalid_data", "{data}");
        refusal.reason
    }

    #[test]
    fn data_are_an_object_and_nothing_read_by_position() {
        refused(VALUATIONS_REFRESH, "[null,0]");
        refused(VALUATIONS_REFRESH, "[]");
        refused(VALUATIONS_PUBLISH, r#"["night-1"]"#);
        refused(LISTING_UPSERT, "[7,98001,1,1,1]");
    }

    #[test]
    fn numbers_that_no_listing_has_are_refused_by_name() {
        let listing = |id: i64, more: &str| {
            format!(
                r#"{{"listing_id":{id},"zip_code":98001,"list_price_cents":1,"bedrooms":1,"living_square_feet":1{more}}}"#
            )
        };
        for (field, value) in
            [("bathrooms", "1e300"), ("floors", "-1e39"), ("latitude", "1e400"), ("longitude", "91e999")]
        {
            let reason = refused(LISTING_UPSERT, &listing(7, &format!(r#","{field}":{value}"#)));
            assert!(reason.contains(field) || reason.contains("out of range"), "{reason}");
        }
        let reason = refused(LISTING_UPSERT, &listing(i64::MIN, ""));
        assert!(reason.contains("listing_id -9223372036854775808"), "{reason}");
    }
}
