//! Profiles of the running service, on `profiling.listen`, in the shape of Go's `net/http/pprof`.
//!
//! | path                  | method | answer                                                                            |
//! |-----------------------|--------|-----------------------------------------------------------------------------------|
//! | `/debug/pprof/`       | GET    | this list, and the options                                                        |
//! | `/debug/pprof/heap`   | GET    | memory that is held, by stack and kind of event; gzipped pprof with symbols inside |
//! | `/debug/pprof/allocs` | GET    | the same profile, beginning with what was ever allocated                          |
//!
//! `go tool pprof http://HOST:6060/debug/pprof/heap` reads it, with a token `http://x:TOKEN@HOST:6060/...`; of two saved
//! files `go tool pprof -base EARLY LATE` shows what grew. Failures are text with the header `X-Go-Pprof: 1`.
//!
//! The way of a heap profile: the allocator calls `sampling` for the stack of one block in many; its dump is read by
//! `jeheap`, addresses are placed by `objects` and named by `symbols`, `heap` makes a [`pprof::Profile`] of it, and `request`
//! answers in the form that was asked for.
//!
//! Profiling must not endanger the work. Who may ask is decided in `access`; only one profile is taken at a time, on
//! a thread of its own (`one_at_a_time`); every request leaves a line in the log.

mod access;
mod allocator;
mod heap;
mod heap_text;
mod jeheap;
mod objects;
mod one_at_a_time;
pub mod pprof;
mod request;
mod sampling;
mod symbols;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use axum::Router;
use axum::body::HttpBody;
use axum::extract::{ConnectInfo, Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::config;

pub use allocator::{MALLOC_CONF, sample_allocations};
pub use heap::{EVENT_KIND, STAGE};

use access::Access;
use heap::View;
use one_at_a_time::{Asked, Interrupt, OneAtATime};
use pprof::{Profile, combine};
use request::{Answer, Options};

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
        .route("/debug/pprof/allocs", get(allocs))
        .with_state(slot)
        .fallback(async || failure(StatusCode::NOT_FOUND, "no such profile; there are: heap, allocs"))
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
    INDEX
}

const INDEX: &str = "\
/debug/pprof/

heap    memory that is held, by stack and by kind of event; sampled every 512 KiB
allocs  the same with what was allocated since the start; go tool pprof shows that first

Read them with go tool pprof -http=: http://HOST:PORT/debug/pprof/heap, or with -top -cum; -tagroot=event_kind puts the
kinds of events on top, -tagfocus=valuations.refresh shows one of them alone.

seconds=N         what changed within N seconds, from 1 to 100
debug=1           text for people
format=collapsed  a line for each stack
format=svg        a flame graph
gc=1              first gives memory that the allocator keeps unused back to the system. Nothing is collected: what the
                  profile shows is the same; the resident set is smaller
force=1           takes the place of a profile that is being taken: there is only one at a time
";

async fn heap(
    state: State<Arc<OneAtATime>>,
    peer: ConnectInfo<SocketAddr>,
    query: Query<Vec<(String, String)>>,
) -> Response {
    memory(View::Heap, state, peer, query).await
}

async fn allocs(
    state: State<Arc<OneAtATime>>,
    peer: ConnectInfo<SocketAddr>,
    query: Query<Vec<(String, String)>>,
) -> Response {
    memory(View::Allocs, state, peer, query).await
}

async fn memory(
    view: View,
    State(slot): State<Arc<OneAtATime>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    Query(pairs): Query<Vec<(String, String)>>,
) -> Response {
    let options = match Options::read(&pairs) {
        Ok(options) => options,
        Err(reason) => return request::refused(&reason),
    };
    let asked = Asked { what: view.name(), peer, force: options.force };
    let taken = slot.run(asked, move |interrupt| {
        if options.gc {
            heap::give_back()?;
        }
        match options.seconds {
            Some(seconds) => {
                let profile = difference(seconds, interrupt, || heap::profile(view))?;
                Ok(Answer::profile(&profile, &format!("{}-delta", view.name()), options.format))
            }
            None if options.debug => Ok(Answer::text(heap_text::text(&heap::profile(view)?))),
            None => Ok(Answer::profile(&heap::profile(view)?, view.name(), options.format)),
        }
    });
    match taken.await {
        Ok(Ok(answer)) => answer.into_response(),
        Ok(Err(error)) => {
            tracing::warn!(error = format!("{error:#}"), profile = view.name(), "no profile");
            failure(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error:#}"))
        }
        Err(busy) => failure(StatusCode::CONFLICT, &busy.to_string()),
    }
}

/// What a second profile has more than a first one that was taken so much earlier.
fn difference(
    apart: Duration,
    interrupt: &Interrupt,
    take: impl Fn() -> anyhow::Result<Profile>,
) -> anyhow::Result<Profile> {
    let begin = Instant::now();
    let first = take()?;
    interrupt.wait(apart.saturating_sub(begin.elapsed()))?;
    let second = take()?;
    let mut difference = combine(&[(&second, 1), (&first, -1)]).context("the two profiles of a difference")?;
    difference.duration_nanos = second.time_nanos - first.time_nanos;
    Ok(difference)
}

/// A failure as Go's tools expect it: text, and a header that says that it is no profile.
fn failure(code: StatusCode, text: &str) -> Response {
    let headers = [("content-type", "text/plain; charset=utf-8"), ("x-go-pprof", "1")];
    (code, headers, format!("{text}\n")).into_response()
}

#[cfg(test)]
mod tests;
