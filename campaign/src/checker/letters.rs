//! I5: a dead-letter queue holds exactly what had to be refused, unchanged, each with its reason.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Findings, World};
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
    let mut repeated = 0;
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
                repeated += usize::from(*left < 0);
            }
        }
    }
    for ((lane, body, code), left) in expected {
        if left > 0 {
            found.add("I5", format!("{left} dead letters are missing on {lane:?}, refused as {code}: {body:?}"));
        }
    }
    if repeated > world.allowances.repeated_letters {
        let most = world.allowances.repeated_letters;
        found.add("I5", format!("{repeated} dead letters are there again, the faults explain {most}"));
    }
}
