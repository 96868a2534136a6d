//! Profiles of the running service, on `profiling.listen`, in the shape of Go's `net/http/pprof`.
//!
//! | path                | method | answer                                                                              |
//! |---------------------|--------|-------------------------------------------------------------------------------------|
//! | `/debug/pprof/`     | GET    | this list                                                                           |
//! | `/debug/pprof/heap` | GET    | live memory by stack, sampled; gzipped pprof with the symbols inside                 |
//!
//! `go tool pprof http://HOST:6060/debug/pprof/heap` reads it, with a token `http://x:TOKEN@HOST:6060/...`; of two saved
//! files `go tool pprof -base EARLY LATE` shows what grew. Failures are text with the header `X-Go-Pprof: 1`.
//!
//! Profiling must not endanger the work. Who may ask is decided in `access`; only one profile is taken at a time, on
//! a thread of its own (`one_at_a_time`); every request leaves a line in the log.

mod access;
mod allocator;
mod heap;
mod one_at_a_time;
pub mod pprof;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use axum::Router;
use axum::body::HttpBody;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::config;

pub use allocator::{MALLOC_CONF, sample_allocations};

use access::Access;
use one_at_a_time::OneAtATime;

/// Tries out what a heap profile needs: that the allocator samples, and that its dump can be written. Gives the size of
/// the dump in bytes. Blocks.
pub fn try_heap_dump() -> anyhow::Result<u64> {
    let bytes = heap::dump()?.metadata().context("the allocator's dump")?.len();
    anyhow::ensure!(bytes > 0, "the allocator wrote an empty dump");
    Ok(bytes)
}

/// The pages, for a server that tells each request's peer as [`ConnectInfo<SocketAddr>`].
pub fn router(profiling: &config::Profiling) -> Router {
    let slot = Arc::new(OneAtATime::default());
    Router::new()
        .route("/debug/pprof/", get(index))
        .route("/debug/pprof/heap", get(heap))
        .with_state(slot)
        .fallback(async || failure(StatusCode::NOT_FOUND, "no such profile; there are: heap"))
        .layer(middleware::from_fn_with_state(Arc::new(Access::new(profiling)), guard))
}

/// Lets a request in or not, and leaves a line about it in the log.
async fn guard(
    State(access): State<Arc<Access>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    let begin = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = match access.decide(&request) {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    };
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    tracing::info!(
        %peer,
        %method,
        path,
        status = response.status().as_u16(),
        bytes = response.body().size_hint().exact(),
        duration_ms = begin.elapsed().as_millis() as u64,
        "profiling request"
    );
    response
}

async fn index() -> &'static str {
    concat!(
        "/debug/pprof/\n\n",
        "heap  live memory by stack, sampled every 512 KiB: go tool pprof -top -cum http://HOST:PORT/debug/pprof/heap\n"
    )
}

async fn heap(State(slot): State<Arc<OneAtATime>>, ConnectInfo(peer): ConnectInfo<SocketAddr>) -> Response {
    match slot.run("heap", peer, heap::profile).await {
        Ok(Ok(profile)) => {
            let headers = [
                (header::CONTENT_TYPE, "application/octet-stream"),
                (header::CONTENT_DISPOSITION, "attachment; filename=\"heap\""),
            ];
            (headers, profile).into_response()
        }
        Ok(Err(error)) => {
            tracing::warn!(error = format!("{error:#}"), "no heap profile");
            failure(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error:#}"))
        }
        Err(busy) => failure(StatusCode::CONFLICT, &busy.to_string()),
    }
}

/// A failure as Go's tools expect it: text, and a header that says that it is no profile.
fn failure(code: StatusCode, text: &str) -> Response {
    let headers = [("content-type", "text/plain; charset=utf-8"), ("x-go-pprof", "1")];
    (code, headers, format!("{text}\n")).into_response()
}

#[cfg(test)]
mod tests;
