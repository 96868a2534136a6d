//! What the service's log says became of the messages.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// Over all processes that wrote to the log.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Messages {
    /// Handlings that ended, by outcome.
    pub(crate) by_outcome: BTreeMap<String, u64>,
    /// Handlings that panicked.
    pub(crate) panics: u64,
    /// Messages handled again although no earlier handling had given them back, and those that met work on them under way.
    pub(crate) redelivered: u64,
}

pub(crate) fn read(log: &Path) -> Result<Messages> {
    let text = fs::read_to_string(log).with_context(|| format!("cannot read {}", log.display()))?;
    Ok(messages(&text))
}

fn messages(log: &str) -> Messages {
    let mut found = Messages::default();
    let mut handlings: BTreeMap<String, i64> = BTreeMap::new();
    for line in log.lines() {
        let Ok(entry) = serde_json::from_str::<Value>(line) else { continue };
        let fields = if entry["fields"].is_object() { &entry["fields"] } else { &entry };
        let (Some(message), Some(outcome)) = (fields["message_id"].as_str(), fields["outcome"].as_str()) else {
            continue;
        };
        *found.by_outcome.entry(outcome.to_owned()).or_default() += 1;
        let is_panic = fields["error"].as_str().is_some_and(|error| error.contains("panicked"));
        found.panics += u64::from(is_panic);
        // A run that somebody works on already: the message came while it was to be hidden.
        found.redelivered += u64::from(outcome == "deferred");
        let is_given_back = ["retried", "released", "deferred"].contains(&outcome);
        *handlings.entry(message.to_owned()).or_default() += if is_given_back { 0 } else { 1 };
    }
    found.redelivered += handlings.values().map(|ended| (ended - 1).max(0) as u64).sum::<u64>();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ended_twice_or_met_itself_was_delivered_again() {
        let line = |message: &str, outcome: &str, error: &str| {
            format!(r#"{{"level":"INFO","message_id":"{message}","outcome":"{outcome}","error":"{error}"}}"#)
        };
        let log = [
            line("a", "retried", "the handler panicked: ordered"),
            line("a", "done", ""),
            line("b", "released", ""),
            line("b", "done", ""),
            line("c", "done", ""),
            "no JSON".to_owned(),
        ];
        let found = messages(&log.join("\n"));
        assert_eq!((found.panics, found.redelivered, found.by_outcome["done"]), (1, 0, 3));
        let again = [&log[..], &[line("c", "done", ""), line("d", "deferred", ""), line("d", "done", "")]].concat();
        assert_eq!(messages(&again.join("\n")).redelivered, 2);
    }
}
