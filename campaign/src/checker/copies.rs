//! Why there may be more messages with one body than were put in. A message moves by a send and a delete: from its queue to
//! another, to the dead-letter queue, or back from there. Where the delete does not follow the send, or the sender cannot
//! know that its send was done, there is one more of it, by the promise that nothing is lost. What the proxy before SQS
//! saw says, for each body, how often that was.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use local_stack::{Action, Done, WatchedCall, WatchedMessage};

use super::Observed;

/// An answer that was on its way for this long may have come too late: the client's limit is twice that, and counts from
/// before the call's way here.
const LATE: Duration = Duration::from_secs(1);

/// A process that was stopped so soon after an answer, or before it, may not have read it.
const UNREAD: Duration = Duration::from_millis(100);

/// A delivery to a process.
#[derive(Debug)]
struct Delivery<'a> {
    message: &'a str,
    body: &'a str,
    received: Instant,
    /// It was given a second time by the proxy, under the same receipt.
    repeats: u64,
    /// The first time that a delete was asked for.
    deleted: Option<Instant>,
    /// A delete was done and its answer came in time.
    is_deleted: bool,
    /// A call that was to keep it hidden did not do it, or its answer was late.
    was_not_kept: bool,
}

/// Copies that have a cause, by body.
pub(super) fn with_cause(observed: &Observed) -> BTreeMap<&str, u64> {
    let mut causes: BTreeMap<&str, u64> = BTreeMap::new();
    let mut sends: BTreeMap<&str, Vec<Instant>> = BTreeMap::new();
    for (call, message) in messages(observed, Action::Send).filter(|(_, message)| message.done != Done::No) {
        sends.entry(&message.body).or_default().push(call.at);
        // Its sender sends it again, at once or when it is received the next time.
        if !in_time(call) {
            *causes.entry(&message.body).or_default() += 1;
        }
    }
    // One that was out when its process was stopped, and for the process took as long as the stop: sent again afterwards.
    for (call, message) in messages(observed, Action::Send).filter(|(call, _)| in_time(call)) {
        let answered = call.at + call.answered_after.unwrap_or_default();
        let is_unread = |since: Instant| call.at <= since && answered + UNREAD >= since;
        let is_again = |sends: &Vec<Instant>| sends.iter().any(|at| *at > call.at + LATE);
        if observed.interruptions.iter().any(|(since, _)| is_unread(*since))
            && sends.get(message.body.as_str()).is_some_and(is_again)
        {
            *causes.entry(&message.body).or_default() += 1;
        }
    }
    let deliveries = deliveries(observed);
    for delivery in deliveries.values() {
        let sends = sends.get(delivery.body).map_or(&[][..], Vec::as_slice);
        let was_sent_by = |end: Instant| sends.iter().any(|at| (delivery.received..=end).contains(at));
        let next = deliveries.values().filter(|other| other.message == delivery.message);
        let next = next.map(|other| other.received).filter(|at| *at > delivery.received).min();
        // While the process had it in hand: until the delete, or until somebody else had it.
        let ends = delivery.deleted.into_iter().chain(next).min();
        let cut = observed
            .interruptions
            .iter()
            .find(|(since, until)| *until >= delivery.received && ends.is_none_or(|end| *since < end));
        let lapsed = next.is_some_and(|next| delivery.deleted.is_none_or(|at| at > next));
        let has_cause = match (delivery.deleted, cut) {
            (Some(at), _) if !delivery.is_deleted => was_sent_by(at),
            (_, Some((_, until))) => lapsed && was_sent_by(*until),
            _ => lapsed && delivery.was_not_kept,
        };
        *causes.entry(delivery.body).or_default() += u64::from(has_cause) + delivery.repeats;
    }
    causes
}

fn messages(observed: &Observed, action: Action) -> impl Iterator<Item = (&WatchedCall, &WatchedMessage)> {
    let calls = observed.sqs_calls.iter().filter(move |call| call.action == action);
    calls.flat_map(|call| call.messages.iter().map(move |message| (call, message)))
}

fn in_time(call: &WatchedCall) -> bool {
    call.answered_after.is_some_and(|after| after < LATE)
}

/// By receipt.
fn deliveries(observed: &Observed) -> BTreeMap<&str, Delivery<'_>> {
    let mut deliveries: BTreeMap<&str, Delivery<'_>> = BTreeMap::new();
    let answered = messages(observed, Action::Receive).filter(|(call, _)| call.answered_after.is_some());
    for (call, message) in answered {
        let new = Delivery {
            message: &message.id,
            body: &message.body,
            // When it was answered, not when the poll began.
            received: call.at + call.answered_after.unwrap_or_default(),
            repeats: 0,
            deleted: None,
            is_deleted: false,
            was_not_kept: false,
        };
        deliveries.entry(&message.receipt).and_modify(|known| known.repeats += 1).or_insert(new);
    }
    for (call, message) in messages(observed, Action::Delete) {
        let Some(delivery) = deliveries.get_mut(message.receipt.as_str()) else { continue };
        delivery.deleted = Some(delivery.deleted.map_or(call.at, |first| first.min(call.at)));
        delivery.is_deleted |= message.done == Done::Yes && in_time(call);
    }
    for (call, message) in messages(observed, Action::Change) {
        let Some(delivery) = deliveries.get_mut(message.receipt.as_str()) else { continue };
        delivery.was_not_kept |= message.done != Done::Yes || !in_time(call);
    }
    deliveries
}
