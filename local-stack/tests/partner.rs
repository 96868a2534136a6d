//! The partner stub over the wire.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use local_stack::partner::{LatencyRamp, Mischief, RequiredHeader, RetryAfter, Stats, valuation};
use local_stack::{Behaviour, PartnerStub, http_client};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
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

/// What a plain socket gets within a second of a request: the bytes, and whether the stub closed its side.
async fn raw_answer(stub: &PartnerStub, listing_id: i64) -> Result<(Vec<u8>, bool)> {
    let mut stream = TcpStream::connect(stub.url().trim_start_matches("http://")).await?;
    let body = json!({
        "listing_id": listing_id, "zip_code": 98_002, "list_price_cents": 1_000,
        "bedrooms": 3, "living_square_feet": 1_180,
    })
    .to_string();
    let request = format!(
        "POST /v1/valuations HTTP/1.1\r\nhost: partner\r\nidempotency-key: run:{listing_id}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await?;
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_millis(2_500), stream.read_to_end(&mut bytes)).await;
    Ok((bytes, read.is_ok()))
}

#[tokio::test]
async fn an_answer_hangs_drips_or_ends_in_its_middle() -> Result<()> {
    let stub = stub(Behaviour::default())?;
    let mut kept = Vec::new();
    let ways = [Mischief::HangInHeader, Mischief::HangInBody, Mischief::Drip, Mischief::HalfClose];
    for (listing, way) in (1..).zip(ways) {
        stub.control(|behaviour| behaviour.mischief = BTreeMap::from([(way, 1.0)]))?;
        kept.push(raw_answer(&stub, listing).await?);
    }
    let whole = |listing| right(listing).len();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let body = |answer: &str| answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());

    let [header, in_body, drip, half] = kept.try_into().map_err(|_| anyhow::anyhow!("four were kept"))?;
    assert_eq!((text(&header.0).as_str(), header.1), ("HTTP/1.1 200 OK\r\ncon", false));
    assert_eq!((body(&text(&in_body.0)).map(|body| body.len()), in_body.1), (Some(whole(2) / 2), false));
    assert!((1..=3).contains(&drip.0.len()) && !drip.1, "{drip:?}");
    assert!("HTTP".starts_with(&text(&drip.0)));
    assert_eq!((body(&text(&half.0)).map(|body| body.len()), half.1), (Some(whole(4) / 2), true));

    let stats = stub.stats();
    assert_eq!(stats.mischief, ways.map(|way| (way, 1)).into());
    assert_eq!((stats.effects, stats.by_status.len()), (4, 0), "the valuations are made");
    Ok(())
}

#[tokio::test]
async fn an_answer_is_larger_than_anybody_wants() -> Result<()> {
    let stub = stub(Behaviour { mischief: BTreeMap::from([(Mischief::ManyHeaders, 1.0)]), ..Behaviour::default() })?;
    let (bytes, _) = raw_answer(&stub, 1).await?;
    assert_eq!(String::from_utf8_lossy(&bytes).matches("x-filler-").count(), 10_000);

    stub.control(|behaviour| behaviour.mischief = BTreeMap::from([(Mischief::GzipBomb, 1.0)]))?;
    let answer = Caller::connect(&stub).await?.value("run:2", 2, 1_000).await?;
    assert_eq!(answer.headers["content-encoding"], "gzip");
    assert!(answer.body.len() < 2_000_000, "{}", answer.body.len());
    let mut unpacked = flate2::read::MultiGzDecoder::new(&answer.body[..]);
    assert_eq!(std::io::copy(&mut unpacked, &mut std::io::sink())?, 1 << 30);

    for (listing, way, length) in [(3, Mischief::HugeBody, Some("1073741824")), (4, Mischief::EndlessBody, None)] {
        stub.control(|behaviour| behaviour.mischief = BTreeMap::from([(way, 1.0)]))?;
        let mut caller = Caller::connect(&stub).await?;
        let body = json!({
            "listing_id": listing, "zip_code": 98_002, "list_price_cents": 1_000,
            "bedrooms": 3, "living_square_feet": 1_180,
        });
        let request = Request::post("/v1/valuations").header("idempotency-key", format!("run:{listing}"));
        let response = caller.0.send_request(request.body(Full::from(body.to_string()))?).await?;
        let announced = response.headers().get("content-length").map(|value| value.to_str()).transpose()?;
        assert_eq!(announced, length);
        let mut body = response.into_body();
        let mut read = 0;
        while read < 64 << 20 {
            let frame = body.frame().await.context("the body has ended")??;
            read += frame.data_ref().map_or(0, Bytes::len);
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_latency_rises_while_the_stub_runs() -> Result<()> {
    let stub = stub(Behaviour::default())?;
    let mut caller = Caller::connect(&stub).await?;
    stub.control(|behaviour| behaviour.latency_ramp = Some(LatencyRamp { to_ms: 400, over_ms: 1_000 }))?;
    let mut took = async |listing: i64| -> Result<Duration> {
        let started = Instant::now();
        caller.value(&format!("run:{listing}"), listing, 1_000).await?;
        Ok(started.elapsed())
    };
    let first = took(1).await?;
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    // Another change does not begin it anew.
    stub.control(|behaviour| behaviour.rate_cap = 1_000)?;
    let last = took(2).await?;
    assert!(first < Duration::from_millis(300), "{first:?}");
    assert!(last >= Duration::from_millis(400), "{last:?}");
    Ok(())
}
