//! A kind of event that no producer sends: each leaks memory, for the proof that the profiler names who does it. Compiled in
//! by the feature `fault-injection` alone.

use std::sync::{Mutex, PoisonError};

use super::envelope::Event;
use crate::queue::{Delivery, Outcome};
use crate::task::{self, Kind};

/// CloudEvents type.
const LEAK: &str = "writeapi.planted.leak.v1";

/// What one event takes and never gives back.
const BYTES: usize = 1 << 20;

static LEAKED: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// Handles an event of this kind; `None` for all others.
pub(super) fn handle(event: &Event<'_>, delivery: &Delivery) -> Option<Outcome> {
    if event.kind != LEAK {
        return None;
    }
    delivery.identify(Kind::Planted.name(), &event.id);
    task::identify(Kind::Planted, &event.id);
    leak();
    Some(Outcome::Done { rows: 0, note: "".into() })
}

/// What the profiler has to name.
#[inline(never)]
fn leak() {
    // Written to, so that it is resident.
    LEAKED.lock().unwrap_or_else(PoisonError::into_inner).push(vec![1; BYTES]);
}
