//! The answers of the health and metrics pages.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::health::{Health, Turning};
use crate::metrics::Metrics;

pub(super) async fn index() -> &'static str {
    concat!(
        "WriteApi ",
        env!("CARGO_PKG_VERSION"),
        "\n\n/livez    do the loops turn?\n/readyz   can work be done?\n/metrics  Prometheus' text format\n"
    )
}

pub(super) async fn livez(State(health): State<Health>) -> Response {
    let loops = health.loops();
    let (code, status) = match loops.iter().all(Turning::is_well) {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "stale"),
    };
    let loops: Vec<Value> = loops
        .into_iter()
        .map(|turning| {
            json!({
                "ok": turning.is_well(),
                "name": turning.name,
                "last_turn_seconds_ago": seconds(turning.silent),
                "limit_seconds": seconds(turning.limit),
                "ended": turning.ended,
            })
        })
        .collect();
    answer(code, json!({ "status": status, "loops": loops }))
}

pub(super) async fn readyz(State(health): State<Health>) -> Response {
    let not_ready: Vec<Value> = health
        .not_ready()
        .into_iter()
        .map(|missing| {
            let since = OffsetDateTime::from(missing.since).format(&Rfc3339).ok();
            json!({ "name": missing.name, "reason": missing.reason, "since": since })
        })
        .collect();
    let (code, status) = match (health.is_draining(), not_ready.is_empty()) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        (false, false) => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
        (false, true) => (StatusCode::OK, "ready"),
    };
    answer(code, json!({ "status": status, "not_ready": not_ready }))
}

pub(super) async fn metrics(State(metrics): State<Arc<Metrics>>) -> Response {
    // Reading /proc and the allocator's figures takes a fraction of a millisecond, less than a thread's start.
    let text = metrics.render();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// In whole milliseconds: people read this page.
fn seconds(duration: Duration) -> f64 {
    duration.as_millis() as f64 / 1000.0
}

fn answer(code: StatusCode, body: Value) -> Response {
    // A cached answer about now is a wrong one.
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (code, headers, format!("{body}\n")).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use http_body_util::BodyExt;
    use tower_service::Service;

    use super::*;

    async fn ask(health: &Health, method: &str, path: &str) -> (StatusCode, String, Response) {
        let mut router = super::super::router(health.clone(), Arc::new(Metrics::new()));
        let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
        let (parts, body) = router.call(request).await.unwrap().into_parts();
        let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
        (parts.status, text, Response::from_parts(parts, Body::empty()))
    }

    async fn get(health: &Health, path: &str) -> (u16, Value) {
        let (status, text, _) = ask(health, "GET", path).await;
        (status.as_u16(), serde_json::from_str(&text).expect(&text))
    }

    #[tokio::test]
    async fn livez_names_the_loop_that_does_not_turn() {
        let health = Health::new();
        let beat = health.beat("poll writeapi-events", Duration::from_millis(30));
        let _other = health.beat("keeper", Duration::from_secs(60));
        let (status, body) = get(&health, "/livez").await;
        assert_eq!((status, &body["status"], body["loops"].as_array().unwrap().len()), (200, &json!("ok"), 2));
        assert!(body["loops"][1]["last_turn_seconds_ago"].as_f64().unwrap() < 60.0, "{body}");
        tokio::time::sleep(Duration::from_millis(60)).await;
        let (status, body) = get(&health, "/livez").await;
        assert_eq!((status, &body["status"]), (503, &json!("stale")));
        let [stale, well] = [&body["loops"][0], &body["loops"][1]];
        assert_eq!((&stale["name"], &stale["ok"]), (&json!("poll writeapi-events"), &json!(false)));
        assert_eq!((&stale["limit_seconds"], &stale["ended"]), (&json!(0.03), &json!(false)));
        assert!(stale["last_turn_seconds_ago"].as_f64().unwrap() >= 0.06);
        assert_eq!((&well["name"], &well["ok"]), (&json!("keeper"), &json!(true)));
        beat.touch();
        assert_eq!(get(&health, "/livez").await.0, 200);
    }

    #[tokio::test]
    async fn readyz_names_what_is_away_why_and_since_when() {
        let health = Health::new();
        let database = health.dependency("database");
        let kafka = health.dependency("kafka");
        let (status, body) = get(&health, "/readyz").await;
        assert_eq!((status, body["not_ready"].as_array().unwrap().len()), (503, 2));
        assert_eq!(body["not_ready"][0]["reason"], "not seen yet");
        database.up();
        kafka.up();
        assert_eq!(get(&health, "/readyz").await, (200, json!({ "status": "ready", "not_ready": [] })));
        kafka.down("no broker at localhost:9092");
        let (status, body) = get(&health, "/readyz").await;
        assert_eq!((status, &body["status"]), (503, &json!("not ready")));
        assert_eq!(body["not_ready"][0]["name"], "kafka");
        assert_eq!(body["not_ready"][0]["reason"], "no broker at localhost:9092");
        let since = OffsetDateTime::parse(body["not_ready"][0]["since"].as_str().unwrap(), &Rfc3339).unwrap();
        assert!((OffsetDateTime::now_utc() - since).abs() < time::Duration::seconds(5));
        // Away is not dead: a restart would not bring the neighbour back.
        assert_eq!(get(&health, "/livez").await.0, 200);
    }

    #[tokio::test]
    async fn a_service_that_drains_is_not_ready_and_alive() {
        let health = Health::new();
        health.dependency("database").up();
        health.drain();
        let (status, body) = get(&health, "/readyz").await;
        assert_eq!((status, &body["status"]), (503, &json!("draining")));
        assert_eq!(get(&health, "/livez").await.0, 200);
    }

    #[tokio::test]
    async fn metrics_are_prometheus_text() {
        let (status, text, response) = ask(&Health::new(), "GET", "/metrics").await;
        assert_eq!(status, 200);
        assert!(text.contains("\nprocess_resident_memory_bytes "), "{text}");
        assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    }

    #[tokio::test]
    async fn other_paths_and_methods_are_refused() {
        let health = Health::new();
        assert_eq!(ask(&health, "GET", "/").await.0, 200);
        assert_eq!(ask(&health, "GET", "/nothing").await.0, 404);
        let (status, _, response) = ask(&health, "POST", "/livez").await;
        assert_eq!(
            (status, &response.headers()["allow"]),
            (StatusCode::METHOD_NOT_ALLOWED, &"GET,HEAD".parse().unwrap())
        );
    }
}
