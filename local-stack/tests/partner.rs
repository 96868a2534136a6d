//! The partner stub over the wire.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use local_stack::partner::{RequiredHeader, RetryAfter, Stats, valuation};
use local_stack::{Behaviour, PartnerStub, http_client};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// One keep-alive connection to a stub.
struct Caller(SendRequest<Full<Bytes>>);

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Caller {
    async fn connect(stub: &PartnerStub) -> Result<Self> {
        let url = stub.url();
        let stream = TcpStream::connect(url.trim_start_matches("http://")).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self(sender))
    }

    async fn value(&mut self, key: &str, listing_id: i64, list_price_cents: i64) -> Result<Answer> {
        let body = json!({
            "listing_id": listing_id, "zip_code": 98_002, "list_price_cents": list_price_cents,
            "bedrooms": 3, "living_square_feet": 1_180,
        });
        self.post(Some(key), body.to_string()).await
    }

    async fn post(&mut self, key: Option<&str>, body: String) -> Result<Answer> {
        self.0.ready().await?;
        let mut request = Request::post("/v1/valuations").header("host", "partner").header("x-token", "s3");
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let response = self.0.send_request(request.body(Full::from(body))?).await?;
        let (parts, body) = response.into_parts();
        Ok(Answer { status: parts.status, headers: parts.headers, body: body.collect().await?.to_bytes() })
    }
}

fn stub(behaviour: Behaviour) -> Result<PartnerStub> {
    PartnerStub::start(behaviour)
}

/// Calls for listings `first..`, one connection each, all at once.
async fn call_at_once(stub: &PartnerStub, first: i64, calls: i64) -> Result<Vec<(Answer, Duration)>> {
    let mut tasks = JoinSet::new();
    for listing in first..first + calls {
        let mut caller = Caller::connect(stub).await?;
        tasks.spawn(async move {
            let started = Instant::now();
            let answer = caller.value(&format!("run:{listing}"), listing, 1_000).await?;
            anyhow::Ok((answer, started.elapsed()))
        });
    }
    tasks.join_all().await.into_iter().collect()
}

#[tokio::test]
async fn an_answer_follows_from_the_request_and_a_repeat_gets_the_first_one() -> Result<()> {
    let stub = stub(Behaviour::default())?;
    let mut caller = Caller::connect(&stub).await?;
    let first = caller.value("run:17", 17, 50_000_000).await?;
    let repeated = caller.value("run:17", 17, 99_000_000).await?;
    let other_run = caller.value("run-2:17", 17, 99_000_000).await?;

    let expected = valuation(17, 50_000_000);
    let body: Value = serde_json::from_slice(&first.body)?;
    assert_eq!(
        body,
        json!({"listing_id": 17, "valuation_cents": expected.valuation_cents, "confidence": expected.confidence()})
    );
    assert_eq!(first.body, repeated.body);
    assert_ne!(first.body, other_run.body);
    let stats = stub.stats();
    assert_eq!((stats.requests, stats.distinct_keys, stats.repeated_requests, stats.effects), (3, 2, 1, 2));
    assert_eq!((stats.connections, stats.in_flight), (1, 0));
    Ok(())
}

#[tokio::test]
async fn requests_outside_the_contract_get_400() -> Result<()> {
    let stub = stub(Behaviour::default())?;
    let mut caller = Caller::connect(&stub).await?;
    let good =
        json!({"listing_id": 17, "zip_code": 98_002, "list_price_cents": 1, "bedrooms": 3, "living_square_feet": 9});
    let mut extra = good.clone();
    extra["run_id"] = json!("run");
    let mut missing = good.clone();
    missing.as_object_mut().context("an object")?.remove("bedrooms");
    let cases = [
        (None, good.to_string()),
        (Some("17"), good.to_string()),
        (Some("run:18"), good.to_string()),
        (Some("run:17"), extra.to_string()),
        (Some("run:17"), missing.to_string()),
        (Some("run:17"), "{".to_owned()),
    ];
    let count = cases.len() as u64;
    for (key, body) in cases {
        let answer = caller.post(key, body.clone()).await?;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{key:?} {body}");
    }
    let stats = stub.stats();
    assert_eq!((stats.by_status, stats.distinct_keys), (BTreeMap::from([(400, count)]), 0));
    Ok(())
}

#[tokio::test]
async fn the_rate_cap_holds_over_any_second() -> Result<()> {
    let stub = stub(Behaviour { rate_cap: 20, retry_after: RetryAfter::Seconds(2), ..Behaviour::default() })?;
    let answers = call_at_once(&stub, 0, 50).await?;
    let refused: Vec<_> = answers.iter().filter(|(answer, _)| answer.status == StatusCode::TOO_MANY_REQUESTS).collect();
    assert_eq!(refused.len(), 30);
    assert!(refused.iter().all(|(answer, _)| answer.headers["retry-after"] == "2"));

    let stats = stub.stats();
    assert_eq!((stats.requests, stats.max_in_one_second, stats.effects), (50, 50, 20));
    tokio::time::sleep(Duration::from_millis(1_050)).await;
    let answers = call_at_once(&stub, 100, 20).await?;
    assert!(answers.iter().all(|(answer, _)| answer.status == StatusCode::OK));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_thousand_calls_at_once_are_answered_after_the_latency() -> Result<()> {
    let stub = stub(Behaviour { latency_ms: 300, ..Behaviour::default() })?;
    let answers = call_at_once(&stub, 0, 1_000).await?;
    assert!(answers.iter().all(|(answer, _)| answer.status == StatusCode::OK));
    let least = answers.iter().map(|(_, elapsed)| *elapsed).min().context("no answers")?;
    assert!(least >= Duration::from_millis(300), "{least:?}");
    let stats = stub.stats();
    assert_eq!((stats.requests, stats.effects, stats.connections), (1_000, 1_000, 1_000));
    assert!(stats.max_in_flight > 500, "{stats:?}");
    Ok(())
}

#[tokio::test]
async fn control_changes_what_it_names_and_reset_forgets() -> Result<()> {
    let stub = stub(Behaviour { latency_ms: 1, ..Behaviour::default() })?;
    let changes = json!({"errors": {"503": 1.0}, "retry_after": {"date": 5}, "forced": {"17": 404}});
    http_client::post_json(&format!("{}/control", stub.url()), &changes).await?;
    assert!(http_client::post_json(&format!("{}/control", stub.url()), &json!({"latencies": 5})).await.is_err());

    let mut caller = Caller::connect(&stub).await?;
    let unavailable = caller.value("run:1", 1, 1_000).await?;
    assert_eq!(unavailable.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(unavailable.headers["retry-after"].to_str()?.ends_with(" GMT"));
    assert_eq!(caller.value("run:17", 17, 1_000).await?.status, StatusCode::NOT_FOUND);

    let (_, body) = http_client::get(&format!("{}/stats", stub.url())).await?;
    let stats: Stats = serde_json::from_slice(&body)?;
    assert_eq!((stats.by_status, stats.effects), (BTreeMap::from([(404, 1), (503, 1)]), 0));

    http_client::post_json(&format!("{}/reset", stub.url()), &json!({})).await?;
    assert_eq!(stub.stats().requests, 0);
    Ok(())
}

#[tokio::test]
async fn bad_manners_are_counted_and_leave_their_effect_where_they_should() -> Result<()> {
    let stub = stub(Behaviour { drop_ratio: 1.0, ..Behaviour::default() })?;
    assert!(Caller::connect(&stub).await?.value("run:1", 1, 1_000).await.is_err(), "the connection is closed");

    stub.control(|behaviour| (behaviour.drop_ratio, behaviour.garbage_ratio) = (0.0, 1.0))?;
    let mut caller = Caller::connect(&stub).await?;
    for listing in 2..32 {
        let answer = caller.value(&format!("run:{listing}"), listing, 1_000).await?;
        assert_eq!(answer.status, StatusCode::OK);
        assert_ne!(serde_json::from_slice::<Value>(&answer.body).ok(), serde_json::from_str(&right(listing))?);
    }

    stub.control(|behaviour| (behaviour.garbage_ratio, behaviour.hang_ratio) = (0.0, 1.0))?;
    let hung = tokio::time::timeout(Duration::from_millis(100), caller.value("run:99", 99, 1_000)).await;
    assert!(hung.is_err(), "an answer came");
    assert_eq!(stub.stats().in_flight, 1);
    drop(caller);
    wait_until(|| stub.stats().in_flight == 0).await?;

    let stats = stub.stats();
    assert_eq!((stats.dropped, stats.garbage, stats.hung, stats.abandoned), (1, 30, 1, 1));
    assert_eq!(stats.effects, 31, "the hung call has none");
    Ok(())
}

fn right(listing_id: i64) -> String {
    let answer = valuation(listing_id, 1_000);
    json!({"listing_id": listing_id, "valuation_cents": answer.valuation_cents, "confidence": answer.confidence()})
        .to_string()
}

#[tokio::test]
async fn a_credential_is_asked_for() -> Result<()> {
    let required = RequiredHeader { name: "x-token".into(), value: "s3".into() };
    let stub = stub(Behaviour { required_header: Some(required), ..Behaviour::default() })?;
    let mut caller = Caller::connect(&stub).await?;
    assert_eq!(caller.value("run:1", 1, 1_000).await?.status, StatusCode::OK);
    stub.control(|behaviour| {
        behaviour.required_header = Some(RequiredHeader { name: "x-token".into(), value: "s4".into() });
    })?;
    assert_eq!(caller.value("run:2", 2, 1_000).await?.status, StatusCode::UNAUTHORIZED);
    Ok(())
}

async fn wait_until(condition: impl Fn() -> bool) -> Result<()> {
    tokio::time::timeout(Duration::from_secs(5), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .context("it did not become true in 5 s")
}
