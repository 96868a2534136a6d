//! I3: a committed result, its outbox row and its post-processing exist together or not at all.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::{Findings, World};

/// The id of the publish event that a run's completion makes.
fn publish_id(run: &str) -> String {
    Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("{run}:publish").as_bytes()).to_string()
}

pub(super) fn check(world: &World<'_>, found: &mut Findings) {
    let complete = world.observed.runs.iter().filter(|run| run.state == "complete");
    let mut expected: BTreeMap<String, &str> = complete.map(|run| (publish_id(&run.run_id), &*run.run_id)).collect();

    let mut sent: BTreeMap<&str, u32> = BTreeMap::new();
    for row in &world.observed.outbox {
        *sent.entry(&row.event_id).or_default() += 1;
        if !expected.contains_key(&row.event_id) || row.lane != "post_processing" {
            found.add(
                "I3",
                format!("the outbox has {} for {}, which no complete run announces", row.event_id, row.lane),
            );
        }
        if !row.sent {
            found.add("I3", format!("the event {} of the outbox was not sent", row.event_id));
        }
    }
    for (id, run) in &expected {
        let rows = sent.get(id.as_str()).copied().unwrap_or(0);
        if rows != 1 {
            found.add("I3", format!("the complete run {run} has {rows} rows in the outbox"));
        }
    }

    expected.extend(world.inputs.publishes.iter().map(|(id, run)| (id.clone(), run.as_str())));
    let mut done: BTreeMap<&str, u32> = BTreeMap::new();
    for publication in &world.observed.publications {
        let (id, run) = (publication.event_id.as_str(), publication.run_id.as_str());
        *done.entry(id).or_default() += 1;
        if expected.get(id) != Some(&run) {
            found.add("I3", format!("nobody asked for the publication {id} of the run {run}"));
        }
        let valued = world.run(run).map_or(0, |run| run.valued);
        if publication.state != "complete" || publication.published != valued {
            let (state, published) = (&publication.state, publication.published);
            found.add("I3", format!("the publication {id} is {state} with {published} records, its run has {valued}"));
        }
    }
    for (id, run) in &expected {
        let rows = done.get(id.as_str()).copied().unwrap_or(0);
        if rows != 1 {
            found.add("I3", format!("the publish event {id} of the run {run} has {rows} publications"));
        }
    }
}
