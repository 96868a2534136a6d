//! Bodies of messages: whatever they are, they are accepted or refused, and an accepted one keeps its meaning.

#![no_main]

use libfuzzer_sys::fuzz_target;
use write_api::events::envelope::Event;
use write_api::events::outgoing;
use write_api::events::request::{self, Request};

fuzz_target!(|bytes: &[u8]| {
    // A message's body is text: SQS takes nothing else.
    let Ok(body) = std::str::from_utf8(bytes) else { return };
    let event = match Event::decode(body) {
        Ok(event) => event,
        Err(refusal) => {
            assert!(!refusal.code.is_empty() && !refusal.reason.is_empty(), "{refusal:?}");
            return;
        }
    };
    assert!(!event.id.is_empty());
    let digest = event.digest();
    let request = Request::decode(&event);
    assert_eq!(request::kind(&event).is_err(), request.as_ref().is_err_and(|refusal| refusal.code == "unknown_type"));
    let Ok(Request::Refresh(data)) = request else { return };
    // What is kept of a refresh must make the same event again: a retry sends it.
    let digest = digest.expect("an accepted refresh has one");
    let again = outgoing::refresh_event(&event.id, &event.source, event.time, event.traceparent.as_deref(), event.data_text())
        .expect("its data are JSON");
    let again = Event::decode(&again).expect("it is an event again");
    assert_eq!(again.digest().expect("a digest"), digest);
    assert_eq!(again.id, event.id);
    assert_eq!(again.time, event.time);
    let Ok(Request::Refresh(same)) = Request::decode(&again) else { panic!("it asks for something else") };
    assert_eq!(same.zip_codes, data.zip_codes);
    assert_eq!(same.limit, data.limit);
});
