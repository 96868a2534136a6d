//! I6 and I7, nothing is left over, and I8, the partner's limit was held.

use super::{Findings, World};

pub(super) fn check(world: &World<'_>, found: &mut Findings) {
    let (observed, allowances) = (world.observed, world.allowances);
    for (lane, visible, hidden) in &observed.left {
        if (*visible, *hidden) != (0, 0) {
            found.add("I6", format!("{visible} visible and {hidden} hidden messages are left on {lane:?}"));
        }
    }
    for replica in &observed.replicas {
        let name = &replica.name;
        for gauge in &replica.not_at_rest {
            found.add("I7", format!("{name} is at rest and shows {gauge}"));
        }
        for (what, (at_first, now), more) in [
            ("descriptors", replica.descriptors, allowances.descriptors),
            // Threads that block for others come and go; a thread for each of some work would be many more.
            ("threads", replica.threads, 16),
            ("resident bytes", replica.resident, allowances.resident),
        ] {
            if now > at_first + more {
                found.add("I7", format!("{name} had {at_first} {what} at first and has {now} at rest"));
            }
        }
    }
    if observed.connections > allowances.connections {
        let most = allowances.connections;
        found.add("I7", format!("{} connections to the database, at most {most} belong there", observed.connections));
    }
    if observed.partner.in_flight > 0 {
        found.add("I7", format!("{} partner calls are out at rest", observed.partner.in_flight));
    }
    if observed.partner.max_in_one_second > allowances.calls_per_second {
        let (most, seen) = (allowances.calls_per_second, observed.partner.max_in_one_second);
        found.add("I8", format!("{seen} partner calls in one second, the limit of all replicas is {most}"));
    }
}
