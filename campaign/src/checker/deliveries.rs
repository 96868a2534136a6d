//! Slow work is never delivered again while it is healthy. The service's log tells each handling's message and its receive
//! count at the handling's end.

use std::collections::BTreeMap;

use serde_json::Value;

/// Messages of one process that were delivered again before an earlier handling had ended: in the log, a receive count
/// that is followed by a smaller one.
#[must_use]
pub fn delivered_while_at_work(log: &str) -> Vec<String> {
    let mut last: BTreeMap<String, u64> = BTreeMap::new();
    let mut found = Vec::new();
    for line in log.lines() {
        let Ok(entry) = serde_json::from_str::<Value>(line) else { continue };
        let fields = if entry["fields"].is_object() { &entry["fields"] } else { &entry };
        let (Some(message), Some(receive)) = (fields["message_id"].as_str(), fields["attempt"].as_u64()) else {
            continue;
        };
        let before = last.insert(message.to_owned(), receive);
        if before.is_some_and(|before| before > receive) {
            found.push(message.to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(message: &str, attempt: u32) -> String {
        format!(r#"{{"message":"event done","message_id":"{message}","attempt":{attempt}}}"#)
    }

    #[test]
    fn a_second_delivery_that_ends_before_the_first_is_found() {
        let log = [line("a", 1), line("b", 2), line("b", 1), line("a", 2), "no JSON".to_owned()].join("\n");
        assert_eq!(delivered_while_at_work(&log), ["b"]);
        assert!(delivered_while_at_work(&[line("a", 1), line("a", 2), line("a", 3)].join("\n")).is_empty());
    }
}
