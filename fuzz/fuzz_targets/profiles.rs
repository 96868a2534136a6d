//! Profiles that come from files and from over the network: whatever they are, they are read or refused, and what was read
//! can be used.

#![no_main]

use libfuzzer_sys::fuzz_target;
use write_api::profiling::pprof::{Profile, collapsed, combine};

fuzz_target!(|bytes: &[u8]| {
    let Ok(profile) = Profile::decode(bytes) else { return };
    let again = Profile::decode(&profile.encode()).expect("what was read can be written and read again");
    assert_eq!(again, profile);
    for sample_type in 0..profile.sample_types.len() {
        collapsed(&profile, sample_type, &["event_kind"]);
    }
    let nothing = combine(&[(&profile, 1), (&profile, -1)]).expect("they are of one kind");
    assert!(nothing.samples.is_empty());
});
