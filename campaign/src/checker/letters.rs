//! I5: a dead-letter queue holds exactly what had to be refused, unchanged, each with its reason.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Findings, World, copies};
use crate::workload::Lane;

/// The longest reason, in bytes.
const REASON_BYTES: usize = 1_024;

pub(super) fn check(world: &World<'_>, found: &mut Findings) {
    // How often each body was refused for what.
    let mut expected: BTreeMap<(Lane, &str, String), i64> = BTreeMap::new();
    for doomed in &world.inputs.doomed {
        *expected.entry((doomed.lane, doomed.body.as_str(), doomed.code.to_owned())).or_default() += 1;
    }
    for id in world.inputs.refreshes.keys() {
        for body in world.winner(id).map(|(_, rivals)| rivals).unwrap_or_default() {
            *expected.entry((Lane::Valuations, body, "id_reused".to_owned())).or_default() += 1;
        }
    }
    for (id, upsert) in world.inputs.upserts.iter().filter(|(_, upsert)| upsert.variants.len() > 1) {
        let Some(winner) = world.written.get(id.as_str()) else {
            let bodies: Vec<&str> = upsert.variants.iter().map(|(_, body)| body.as_str()).collect();
            found.add("I5", format!("of the upserts with one id not exactly one was refused: {bodies:?}"));
            continue;
        };
        for (_, body) in upsert.variants.iter().filter(|(home, _)| home != winner) {
            *expected.entry((Lane::Events, body, "id_reused".to_owned())).or_default() += 1;
        }
    }
    let mut repeated: BTreeMap<&str, u64> = BTreeMap::new();
    for letter in &world.observed.letters {
        let reason: Value = serde_json::from_str(&letter.reason).unwrap_or_default();
        let code = reason["code"].as_str().unwrap_or_default();
        if letter.reason.len() > REASON_BYTES || reason["reason"].as_str().is_none_or(str::is_empty) {
            found.add("I5", format!("the reason {:?} of a dead letter is no reason: {:?}", letter.reason, letter.body));
        }
        match expected.get_mut(&(letter.lane, letter.body.as_str(), code.to_owned())) {
            None => {
                found.add(
                    "I5",
                    format!("unexpected dead letter on {:?}: {} {:?}", letter.lane, letter.reason, letter.body),
                );
            }
            Some(left) => {
                *left -= 1;
                *repeated.entry(&letter.body).or_default() += u64::from(*left < 0);
            }
        }
    }
    for ((lane, body, code), left) in expected {
        if left > 0 {
            found.add("I5", format!("{left} dead letters are missing on {lane:?}, refused as {code}: {body:?}"));
        }
    }
    let explained = copies::with_cause(world.observed);
    for (body, repeated) in repeated {
        let most = explained.get(body).copied().unwrap_or(0);
        if repeated > most {
            found.add(
                "I5",
                format!("a dead letter is there {repeated} times more, what was seen explains {most}: {body:?}"),
            );
        }
    }
}
