//! The stub's HTTP side.

use std::future;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use time::OffsetDateTime;
use tokio::net::TcpListener;

use super::behaviour::{Behaviour, Fate};
use super::ledger::{End, Ledger};
use super::mischief::{Mischief, Payload, Spoiled, Spoiler};
use super::wire::{KeyHash, Valuation, ValuationRequest, valuation};
use crate::background::accept;

const BODY_BYTES: usize = 64 * 1024;
/// The same requests in the same order meet the same fates.
const SEED: u64 = 17_000;

/// Headers of an answer with many.
const MANY_HEADERS: usize = 10_000;

type Answer = Response<Payload>;

/// What the connections of one stub share.
#[derive(Debug)]
pub(super) struct State {
    behaviour: Mutex<Arc<Behaviour>>,
    /// When the latency's ramp was set.
    ramp_begun: Mutex<Instant>,
    ledger: Mutex<Ledger>,
    dice: Mutex<fastrand::Rng>,
}

impl State {
    pub(super) fn new(behaviour: Behaviour) -> Self {
        Self {
            behaviour: Mutex::new(Arc::new(behaviour)),
            ramp_begun: Mutex::new(Instant::now()),
            ledger: Mutex::default(),
            dice: Mutex::new(fastrand::Rng::with_seed(SEED)),
        }
    }

    pub(super) fn behaviour(&self) -> Arc<Behaviour> {
        lock(&self.behaviour).clone()
    }

    pub(super) fn set_behaviour(&self, behaviour: Behaviour) -> Result<()> {
        behaviour.check()?;
        let before = std::mem::replace(&mut *lock(&self.behaviour), Arc::new(behaviour.clone()));
        if before.latency_ramp != behaviour.latency_ramp {
            *lock(&self.ramp_begun) = Instant::now();
        }
        Ok(())
    }

    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves connections until dropped.
pub(super) async fn serve(listener: TcpListener, state: Arc<State>) {
    loop {
        let stream = accept("partner stub", &listener).await;
        state.ledger().connect();
        let state = state.clone();
        let spoiler = Spoiler::default();
        let stream = Spoiled::new(stream, spoiler.clone());
        let service = service_fn(move |request| route(state.clone(), spoiler.clone(), request));
        tokio::spawn(async move {
            // A client that goes away, and a connection dropped on purpose, end here too: the ledger has them.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// An error closes the connection without an answer.
async fn route(state: Arc<State>, spoiler: Spoiler, request: Request<Incoming>) -> io::Result<Answer> {
    match (request.method(), request.uri().path()) {
        (&Method::POST, "/v1/valuations") => value(&state, &spoiler, request).await,
        (&Method::GET, "/stats") => {
            let stats = state.ledger().stats();
            Ok(json(StatusCode::OK, serde_json::to_vec_pretty(&stats)?))
        }
        (&Method::POST, "/reset") => {
            state.ledger().reset(Instant::now());
            Ok(json(StatusCode::OK, "{}"))
        }
        (&Method::POST, "/control") => {
            Ok(control(&state, request.into_body()).await.unwrap_or_else(|e| bad_request(&e)))
        }
        (_, "/v1/valuations" | "/stats" | "/control" | "/reset") => Ok(problem(
            StatusCode::METHOD_NOT_ALLOWED,
            "wrong method: POST /v1/valuations, /control, /reset; GET /stats",
        )),
        (_, path) => Ok(problem(StatusCode::NOT_FOUND, &format!("nothing at {path}"))),
    }
}

async fn control(state: &State, body: Incoming) -> Result<Answer> {
    let behaviour = state.behaviour().merge(&read(body).await?)?;
    let answer = serde_json::to_vec_pretty(&behaviour)?;
    state.set_behaviour(behaviour)?;
    Ok(json(StatusCode::OK, answer))
}

async fn value(state: &State, spoiler: &Spoiler, request: Request<Incoming>) -> io::Result<Answer> {
    let visit = Visit::begin(state);
    let behaviour = state.behaviour();
    let admitted = state.ledger().admit(visit.arrived, behaviour.rate_cap);

    let (key, call) = match parse(request).await {
        Ok((parts, call)) => {
            if !is_authorized(&parts, &behaviour) {
                return Ok(visit.answer(problem(StatusCode::UNAUTHORIZED, "the required header is missing or wrong")));
            }
            match key_of(&parts, call.listing_id) {
                Ok(key) => (key, call),
                Err(error) => return Ok(visit.answer(bad_request(&error))),
            }
        }
        Err(error) => return Ok(visit.answer(bad_request(&error))),
    };
    state.ledger().note_key(key);
    if !admitted {
        return Ok(visit.answer(refusal(StatusCode::TOO_MANY_REQUESTS, &behaviour)));
    }

    let draw = lock(&state.dice).f64();
    let fate = behaviour.fate(call.listing_id, draw);
    let apply = || state.ledger().apply(key, || valuation(call.listing_id, call.list_price_cents));
    // What has an effect has it now: a client that gives up waiting leaves it behind.
    let made = (!matches!(fate, Fate::Refuse(_) | Fate::Hang)).then(apply);
    if fate == Fate::Hang {
        state.ledger().hang();
        return future::pending().await;
    }
    let latency = behaviour.latency(visit.arrived.saturating_duration_since(*lock(&state.ramp_begun)));
    if !latency.is_zero() {
        tokio::time::sleep_until((visit.arrived + latency).into()).await;
    }
    match (fate, made) {
        (Fate::Answer, Some(valuation)) => Ok(visit.answer(json(StatusCode::OK, valuation.json()))),
        (Fate::Garbage, Some(valuation)) => {
            let body = nonsense(valuation, lock(&state.dice).u8(..));
            visit.end(End::Garbled);
            Ok(json(StatusCode::OK, body))
        }
        (Fate::Mischief(mischief), Some(valuation)) => {
            let answer = bad_delivery(valuation, mischief)?;
            spoiler.spoil(mischief);
            visit.end(End::Spoiled(mischief));
            Ok(answer)
        }
        (Fate::Refuse(status), _) => Ok(visit.answer(refusal(status, &behaviour))),
        _ => {
            visit.end(End::Dropped);
            Err(io::Error::other("dropped on purpose"))
        }
    }
}

/// One request's stay: in flight from `begin` until it is answered or the client goes away, which drops it.
struct Visit<'a> {
    state: &'a State,
    arrived: Instant,
    end: End,
}

impl<'a> Visit<'a> {
    fn begin(state: &'a State) -> Self {
        let arrived = Instant::now();
        state.ledger().arrive(arrived);
        Self { state, arrived, end: End::Abandoned }
    }

    fn answer(self, answer: Answer) -> Answer {
        self.end(End::Answered(answer.status().as_u16()));
        answer
    }

    fn end(mut self, end: End) {
        self.end = end;
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        self.state.ledger().leave(Instant::now(), self.end);
    }
}

async fn read(body: Incoming) -> Result<Bytes> {
    Ok(Limited::new(body, BODY_BYTES).collect().await.map_err(anyhow::Error::from_boxed)?.to_bytes())
}

async fn parse(request: Request<Incoming>) -> Result<(http::request::Parts, ValuationRequest)> {
    let (parts, body) = request.into_parts();
    let call = serde_json::from_slice(&read(body).await?).context("the body is no valuation request")?;
    Ok((parts, call))
}

fn key_of(parts: &http::request::Parts, listing_id: i64) -> Result<KeyHash> {
    let key = parts.headers.get("idempotency-key").context("there is no Idempotency-Key")?;
    KeyHash::of(key.as_bytes(), listing_id).map_err(|reason| anyhow!(reason))
}

fn is_authorized(parts: &http::request::Parts, behaviour: &Behaviour) -> bool {
    behaviour.required_header.as_ref().is_none_or(|required| {
        parts.headers.get(required.name.as_str()).is_some_and(|value| value.as_bytes() == required.value.as_bytes())
    })
}

/// A body that a client must not take for a valuation.
fn nonsense(valuation: Valuation, dice: u8) -> String {
    match dice % 3 {
        0 => format!(r#"{{"listing_id":{},"valuation_cents":"a lot","confidence":true}}"#, valuation.listing_id),
        1 => {
            let mut whole = valuation.json();
            whole.truncate(whole.len() / 2);
            whole
        }
        _ => Valuation { listing_id: valuation.listing_id.wrapping_add(1), ..valuation }.json(),
    }
}

/// The right answer, with what is wrong about the answer itself. The connection spoils the others.
fn bad_delivery(valuation: Valuation, mischief: Mischief) -> io::Result<Answer> {
    let mut answer = json(StatusCode::OK, valuation.json());
    match mischief {
        Mischief::HangInHeader | Mischief::HangInBody | Mischief::Drip | Mischief::HalfClose => {}
        Mischief::ManyHeaders => {
            for index in 0..MANY_HEADERS {
                let name = HeaderName::try_from(format!("x-filler-{index}")).map_err(io::Error::other)?;
                answer.headers_mut().insert(name, HeaderValue::from_static("nothing"));
            }
        }
        Mischief::HugeBody | Mischief::EndlessBody => {
            *answer.body_mut() = Payload::huge(mischief == Mischief::HugeBody);
        }
        Mischief::GzipBomb => {
            answer.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            *answer.body_mut() = Payload::bomb()?;
        }
    }
    Ok(answer)
}

fn json(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Payload::from(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

fn problem(status: StatusCode, detail: &str) -> Answer {
    json(status, serde_json::json!({ "error": detail }).to_string())
}

fn bad_request(error: &anyhow::Error) -> Answer {
    problem(StatusCode::BAD_REQUEST, &format!("{error:#}"))
}

fn refusal(status: StatusCode, behaviour: &Behaviour) -> Answer {
    let mut answer = problem(status, status.canonical_reason().unwrap_or("refused"));
    if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
        && let Some(value) = behaviour.retry_after.header(OffsetDateTime::now_utc())
        && let Ok(value) = HeaderValue::from_str(&value)
    {
        answer.headers_mut().insert(header::RETRY_AFTER, value);
    }
    answer
}
