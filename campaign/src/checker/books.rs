//! I1, the books balance, and I2, nothing is applied twice.

use std::collections::BTreeSet;

use local_stack::partner::valuation;

use super::{Findings, Valuation, World};

pub(super) fn check(world: &World<'_>, found: &mut Findings) {
    let mut keys = 0;
    let mut valued = 0;
    for id in world.inputs.refreshes.keys() {
        let Some(run) = world.run(id) else {
            found.add("I1", format!("the refresh {id} has no run"));
            continue;
        };
        if run.state != "complete" || run.held {
            found.add("I1", format!("the run {id} is {} and held is {}", run.state, run.held));
        }
        let Some((selection, _)) = world.winner(id) else {
            found.add("I1", format!("the run {id} is of no event that was sent: {:?}", run.event_data));
            continue;
        };
        let (must, may) = world.selected(selection);
        let rows = world.rows.get(id.as_str());
        let has: BTreeSet<i64> = rows.into_iter().flat_map(|rows| rows.keys().copied()).collect();
        for missing in must.difference(&has) {
            found.add("I1", format!("listing {missing} of the run {id} has no state"));
        }
        for stranger in has.iter().filter(|listing| !must.contains(listing) && !may.contains(listing)) {
            found.add("I1", format!("listing {stranger} has a state in the run {id} and is not of its set"));
        }
        let all = rows.into_iter().flat_map(|rows| rows.values().flatten());
        let (good, bad): (Vec<&Valuation>, Vec<&Valuation>) = all.copied().partition(|row| row.failure.is_none());
        let (counted, rows_counted) = ((run.valued, run.failed), (good.len() as i64, bad.len() as i64));
        if counted != rows_counted {
            found.add("I1", format!("the run {id} counts (valued, failed) {counted:?}, rows say {rows_counted:?}"));
        }
        // A listing whose event is committed in the very moment of the opening is in the set and may not be in its count.
        let in_the_moment = may.intersection(&has).count() as i64;
        let uncounted = (good.len() + bad.len()) as i64 - run.selected;
        if !(0..=in_the_moment).contains(&uncounted) {
            let selected = run.selected;
            found.add("I1", format!("the run {id} selected {selected}, {uncounted} more or fewer have a state"));
        }
        keys += has.len() as u64;
        valued += good.len() as u64;
    }
    for run in &world.observed.runs {
        if !world.inputs.refreshes.contains_key(&run.run_id) {
            found.add("I1", format!("nobody asked for the run {}", run.run_id));
        }
    }
    rows(world, found);
    for write in &world.observed.strangers {
        found.add("I2", write.clone());
    }
    partner(world, found, keys, valued);
}

fn rows(world: &World<'_>, found: &mut Findings) {
    for (run, listings) in &world.rows {
        for (listing, rows) in listings {
            if rows.len() > 1 {
                found.add("I2", format!("listing {listing} has {} states in the run {run}", rows.len()));
            }
            rows.iter().for_each(|row| state(world, found, row));
        }
    }
}

/// Whether the state is one that the partner's contract gives for a version of the listing.
fn state(world: &World<'_>, found: &mut Findings, row: &Valuation) {
    let Valuation { run_id, listing_id, .. } = row;
    let versions = world.versions.get(listing_id).map_or(&[][..], Vec::as_slice);
    let asked = (row.zip_code, row.list_price_cents);
    if !versions.iter().any(|home| (home.zip_code, home.price_cents) == asked) {
        found.add("I1", format!("listing {listing_id} of the run {run_id} never had zip code and price {asked:?}"));
    }
    let unwanted = world.inputs.unwanted.contains_key(listing_id);
    match (&row.failure, row.valuation_cents, row.confidence) {
        (Some(_), None, None) if unwanted => {}
        (Some(failure), ..) => {
            found.add("I1", format!("listing {listing_id} of the run {run_id} failed and must not have: {failure}"));
        }
        (None, Some(cents), Some(confidence)) if !unwanted => {
            // The partner answers a repeated key as it did the first time, so a listing that changed in between has the
            // answer for what it was.
            let right = versions.iter().any(|home| {
                let right = valuation(*listing_id, home.price_cents);
                right.valuation_cents == cents && right.confidence() == confidence
            });
            if !right {
                found
                    .add("I1", format!("listing {listing_id} of the run {run_id} has {cents} and {confidence}, wrong"));
            }
        }
        other => found.add("I1", format!("listing {listing_id} of the run {run_id} cannot be {other:?}")),
    }
}

/// The partner's side of the books.
fn partner(world: &World<'_>, found: &mut Findings, keys: u64, valued: u64) {
    let stats = &world.observed.partner;
    if stats.distinct_keys != keys {
        found.add("I2", format!("the partner saw {} keys, the runs have {keys} listings", stats.distinct_keys));
    }
    // A hit that has its effect and whose answer is lost counts once, however often the key comes.
    if stats.effects != valued {
        found.add("I2", format!("the partner made {} valuations, the runs have {valued}", stats.effects));
    }
    let bad = stats.requests.saturating_sub(stats.by_status.get(&200).copied().unwrap_or(0)) + stats.garbage;
    let final_ones: u64 = [400, 404, 410, 422].iter().filter_map(|status| stats.by_status.get(status)).sum();
    let answered_badly = bad.saturating_sub(final_ones);
    let most = world.allowances.repeated_calls + answered_badly;
    if stats.repeated_requests > most {
        let seen = stats.repeated_requests;
        found.add("repeats", format!("the partner got {seen} repeated calls, the faults explain {most}: {stats:?}"));
    }
}
