//! Older never over newer: what is current comes from the greatest (time, id).

use std::collections::BTreeMap;

use time::OffsetDateTime;

use super::{Findings, World};
use crate::workload::{Home, SEEDED_AT, SEEDED_BY};

pub(super) fn check(world: &World<'_>, found: &mut Findings) {
    listings(world, found);
    valuations(world, found);
}

fn listings(world: &World<'_>, found: &mut Findings) {
    let mut newest: BTreeMap<i64, ((OffsetDateTime, &str), Home)> =
        world.inputs.listings.iter().map(|home| (home.id, ((SEEDED_AT, SEEDED_BY), *home))).collect();
    for (id, upsert) in &world.inputs.upserts {
        // Told by the check of the dead letters.
        let Some(home) = world.written.get(id.as_str()) else { continue };
        let version = (upsert.time, id.as_str());
        let present = newest.entry(home.id).or_insert((version, *home));
        if version > present.0 {
            *present = (version, *home);
        }
    }
    let mut seen = 0;
    for row in &world.observed.listings {
        let is = Home { id: row.listing_id, zip_code: row.zip_code, price_cents: row.list_price_cents };
        let version = (row.event_time, row.event_id.as_str());
        match newest.get(&row.listing_id) {
            Some(right) if *right == (version, is) => seen += 1,
            right => found.add("order", format!("the listing is {is:?} by {version:?} and should be {right:?}")),
        }
    }
    if seen != newest.len() {
        found.add("order", format!("{seen} listings are right, {} were sent", newest.len()));
    }
}

fn valuations(world: &World<'_>, found: &mut Findings) {
    let mut newest: BTreeMap<i64, ((OffsetDateTime, &str), i64, f64)> = BTreeMap::new();
    for row in &world.observed.valuations {
        let (Some(refresh), Some(cents), Some(confidence)) =
            (world.inputs.refreshes.get(&row.run_id), row.valuation_cents, row.confidence)
        else {
            continue;
        };
        let candidate = ((refresh.time, row.run_id.as_str()), cents, confidence);
        let present = newest.entry(row.listing_id).or_insert(candidate);
        if candidate.0 > present.0 {
            *present = candidate;
        }
    }
    let mut seen = 0;
    for row in &world.observed.current {
        let is = (row.run_id.as_str(), row.valuation_cents, row.confidence);
        match newest.get(&row.listing_id) {
            Some(((_, run), cents, confidence)) if (*run, *cents, *confidence) == is => seen += 1,
            right => {
                let listing = row.listing_id;
                found.add("order", format!("the valuation of listing {listing} is {is:?} and should be {right:?}"));
            }
        }
    }
    if seen != newest.len() {
        found.add("order", format!("{seen} current valuations are right, there should be {}", newest.len()));
    }
}
