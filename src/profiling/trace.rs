//! The last seconds of work as a trace for Perfetto (ui.perfetto.dev) and Chrome (chrome://tracing), in their JSON format.

use std::time::Duration;

use serde_json::{Value, json};

use crate::task::Stage;
use crate::task::trace::{self, CALLS_APART, MOST_SPANS, Span};

/// How far back unless asked for otherwise.
pub(super) const SECONDS: Duration = Duration::from_secs(5);

/// Spans that ended within the last `within`. Stages of one event overlap, so they are async slices, grouped by task.
pub(super) fn json(within: Duration) -> String {
    let (spans, now) = trace::last(within);
    let mut events: Vec<Value> = spans.iter().enumerate().flat_map(|(id, span)| slice(id, span)).collect();
    events.push(json!({ "ph": "M", "pid": 1, "name": "process_name", "args": { "name": "write-api" } }));
    let document = json!({
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "version": env!("CARGO_PKG_VERSION"),
            "taken_at_us": now.as_micros() as u64,
            "seconds": within.as_secs_f64(),
            "spans": spans.len(),
            // But for calls, of which at most one is kept that begins within this time. The ring may have turned over within the time that was asked for.
            "is_complete": spans.len() < MOST_SPANS,
            "calls_apart_us": CALLS_APART.as_micros() as u64,
        },
    });
    format!("{document}\n")
}

fn slice(id: usize, span: &Span) -> [Value; 2] {
    let kind = span.mark.kind.name();
    let name = if span.mark.stage == Stage::Other { kind } else { span.mark.stage.name() };
    let at = |phase: &str, at: Duration| {
        json!({
            "ph": phase, "pid": 1, "tid": span.task, "cat": kind, "name": name, "id": id,
            "ts": at.as_nanos() as f64 / 1000.0,
            "args": { "event_kind": kind, "task": span.task },
        })
    };
    [at("b", span.begin), at("e", span.begin + span.took)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{Kind, identify, in_stage, spawn_event};

    #[tokio::test]
    async fn each_span_begins_and_ends() {
        let task = spawn_event("drawn", async {
            identify(Kind::Planted, "event 11");
            in_stage(Stage::Write, tokio::task::yield_now()).await;
        });
        task.await.unwrap();
        let trace: Value = serde_json::from_str(&json(Duration::from_secs(60))).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let of = |name: &str, phase: &str| {
            events
                .iter()
                .filter(|event| event["name"] == name && event["ph"] == phase && event["cat"] == "planted")
                .count()
        };
        assert!(of("write", "b") > 0 && of("planted", "b") > 0, "{trace}");
        assert_eq!(of("write", "b"), of("write", "e"));
        for event in events.iter().filter(|event| event["ph"] == "b") {
            let end = events.iter().find(|other| other["ph"] == "e" && other["id"] == event["id"]).unwrap();
            assert!(end["ts"].as_f64() >= event["ts"].as_f64(), "{event} {end}");
        }
    }
}
