//! Recomputes the world as it must be from what was put into it, and holds the world that is against it.
//!
//! It knows the contracts (events, partner, topic, dead-letter queues) and the names of tables, and shares no code with the
//! service: a mistake made there is not made here too. Each invariant has a file:
//!
//! - `books`: every listing of every accepted event ends in exactly one state (I1), nothing is applied twice (I2);
//! - `sending`: result, outbox row and post-processing exist together or not at all (I3);
//! - `topic`: the records are the expected ones, byte by byte (I4);
//! - `letters`: dead-letter queues hold what was refused and nothing else (I5); `copies`: why a message may be there twice;
//! - `order`: older never over newer;
//! - `deliveries`: healthy work is not delivered again;
//! - `rest`: nothing is left over in queues and processes (I6, I7), the partner's limit was held (I8).

mod books;
mod copies;
mod deliveries;
mod letters;
mod observed;
mod order;
mod rest;
mod sending;
#[cfg(test)]
mod tests;
mod topic;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

pub use deliveries::delivered_while_at_work;
pub use observed::{Current, Figures, Letter, Listing, Observed, Publication, Run, Sent, Valuation};

use crate::workload::{Home, Inputs, Selection};

/// One promise broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The invariant: `I1` to `I8`, `order`, `repeats` (of I2) or what a kind of fault wants besides.
    pub invariant: &'static str,
    /// What was found and what should have been.
    pub what: String,
}

impl Violation {
    /// Whether a machine that is too busy for the emulators breaks it as well: work that was not done in time, a lease that
    /// could not be kept.
    #[must_use]
    pub fn is_about_time(&self) -> bool {
        ["I6", "delivery", "repeats", "term"].contains(&self.invariant)
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.invariant, self.what)
    }
}

/// What the faults that hit may have cost, and the limits of the world.
#[derive(Clone, Debug, Default)]
pub struct Allowances {
    /// Partner calls that may have been made again because their answers were lost with a process or an owner.
    pub repeated_calls: u64,
    /// The most partner calls in any second.
    pub calls_per_second: u64,
    /// Connections to the database of all replicas together.
    pub connections: i64,
    /// Descriptors that a process may have open beyond those it started with: pools of connections.
    pub descriptors: u64,
    /// Resident memory in bytes that a process may have beyond what it started with.
    pub resident: u64,
}

/// Everything that is wrong.
#[must_use]
pub fn check(inputs: &Inputs, observed: &Observed, allowances: &Allowances) -> Vec<Violation> {
    let world = World::new(inputs, observed, allowances);
    let mut found = Findings::default();
    books::check(&world, &mut found);
    sending::check(&world, &mut found);
    topic::check(&world, &mut found);
    letters::check(&world, &mut found);
    order::check(&world, &mut found);
    rest::check(&world, &mut found);
    found.0
}

/// Violations found; of each kind of finding the first few are told and the others counted.
#[derive(Default)]
struct Findings(Vec<Violation>);

impl Findings {
    fn add(&mut self, invariant: &'static str, what: impl Into<String>) {
        const TOLD: usize = 20;
        let same = self.0.iter().filter(|violation| violation.invariant == invariant).count();
        match same {
            0..TOLD => self.0.push(Violation { invariant, what: what.into() }),
            TOLD => self.0.push(Violation { invariant, what: "and more".into() }),
            _ => {}
        }
    }
}

/// Both worlds, with what several invariants need.
struct World<'a> {
    inputs: &'a Inputs,
    observed: &'a Observed,
    allowances: &'a Allowances,
    /// Rows of `valuations` by run and listing; a listing has more than one row only if something is wrong.
    rows: BTreeMap<&'a str, BTreeMap<i64, Vec<&'a Valuation>>>,
    /// What each upsert event wrote: of two with one id, what was not refused. None if that is not one of them.
    written: BTreeMap<&'a str, Home>,
    /// What each listing may have looked like when a refresh read it.
    versions: BTreeMap<i64, Vec<Home>>,
}

impl<'a> World<'a> {
    fn new(inputs: &'a Inputs, observed: &'a Observed, allowances: &'a Allowances) -> Self {
        let mut rows: BTreeMap<&str, BTreeMap<i64, Vec<&Valuation>>> = BTreeMap::new();
        for row in &observed.valuations {
            rows.entry(&row.run_id).or_default().entry(row.listing_id).or_default().push(row);
        }
        let mut versions: BTreeMap<i64, Vec<Home>> = BTreeMap::new();
        let refused: BTreeSet<&str> = observed.letters.iter().map(|letter| letter.body.as_str()).collect();
        let written: BTreeMap<&str, Home> = inputs
            .upserts
            .iter()
            .filter_map(|(id, upsert)| {
                let mut kept = upsert.variants.iter().filter(|(_, body)| !refused.contains(body.as_str()));
                Some((id.as_str(), kept.next().filter(|_| kept.next().is_none())?.0))
            })
            .collect();
        for home in inputs.listings.iter().copied().chain(written.values().copied()) {
            versions.entry(home.id).or_default().push(home);
        }
        Self { inputs, observed, allowances, rows, written, versions }
    }

    fn run(&self, id: &str) -> Option<&'a Run> {
        self.observed.runs.iter().find(|run| run.run_id == id)
    }

    /// The variant of a refresh that won, and its body's rivals. `None` if the run is of none of them.
    fn winner(&self, id: &str) -> Option<(&'a Selection, Vec<&'a str>)> {
        let refresh = self.inputs.refreshes.get(id)?;
        let won = match &refresh.variants[..] {
            [only] => only,
            several => {
                let data: serde_json::Value = serde_json::from_str(self.run(id)?.event_data.as_deref()?).ok()?;
                several.iter().find(|(_, body)| {
                    serde_json::from_str::<serde_json::Value>(body).is_ok_and(|event| event["data"] == data)
                })?
            }
        };
        let rivals = refresh.variants.iter().filter(|variant| variant.1 != won.1).map(|(_, body)| body.as_str());
        Some((&won.0, rivals.collect()))
    }

    /// The listings that a selection must have, and those that it may have besides: those that came by events while it may
    /// or may not have been opened.
    fn selected(&self, selection: &Selection) -> (BTreeSet<i64>, BTreeSet<i64>) {
        let wanted = |home: &&Home| selection.zip_codes.as_ref().is_none_or(|zips| zips.contains(&home.zip_code));
        let limit = selection.limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(0));
        let seeded: BTreeSet<i64> = self.inputs.listings.iter().filter(wanted).map(|home| home.id).collect();
        // Events bring listings with greater ids than all of the beginning.
        let must: BTreeSet<i64> = seeded.iter().copied().take(limit).collect();
        let room_left = must.len() < limit && selection.zip_codes.is_none();
        let new = self.written.values().map(|home| home.id);
        let may =
            new.filter(|id| room_left && !seeded.contains(id) && *id > self.inputs.listings.len() as i64).collect();
        (must, may)
    }
}
