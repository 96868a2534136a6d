//! Profiles of the running service, on `profiling.listen`, in the shape of Go's `net/http/pprof`.
//!
//! | path                        | answer                                                                       |
//! |-----------------------------|------------------------------------------------------------------------------|
//! | `/debug/pprof/`             | this list, and the options                                                   |
//! | `/debug/pprof/heap`         | memory that is held, by stack and kind of event                              |
//! | `/debug/pprof/allocs`       | the same profile, beginning with what was ever allocated                     |
//! | `/debug/pprof/profile`      | CPU time by stack and kind of event                                          |
//! | `/debug/pprof/goroutine`    | live tasks, by where they wait and where they were spawned                   |
//! | `/debug/pprof/block`        | time spent waiting, by stack                                                 |
//! | `/debug/pprof/mutex`        | time spent waiting for locks, by stack                                       |
//! | `/debug/pprof/threadcreate` | threads, by who creates them                                                 |
//! | `/debug/pprof/trace`        | what events did last, for Perfetto                                           |
//! | `/debug/pprof/cmdline`      | the arguments of the program                                                 |
//! | `/debug/pprof/symbol`       | functions at addresses                                                       |
//!
//! All are read with GET (`symbol` also with POST), and all but the last three are gzipped pprof with symbols inside.
//! `go tool pprof http://HOST:6060/debug/pprof/heap` reads it, with a token `http://x:TOKEN@HOST:6060/...`; of two saved
//! files `go tool pprof -base EARLY LATE` shows what grew. Failures are text with the header `X-Go-Pprof: 1`.
//!
//! The way of a heap profile: the allocator calls `sampling` for the stack of one block in many; its dump is read by
//! `jeheap`, addresses are placed by `objects` and named by `symbols`, `heap` makes a [`pprof::Profile`] of it, and `request`
//! answers in the form that was asked for.
//!
//! Profiling must not endanger the work. Who may ask is decided in `access`, how often in `rate_limit`; only one profile is taken
//! at a time, on a thread of its own (`one_at_a_time`); what all of it costs is kept within a budget (`budget`); every request
//! leaves a line in the log.

mod access;
mod allocator;
mod budget;
mod contention;
mod cpu;
pub mod growth;
mod heap;
mod heap_text;
mod jeheap;
mod modes;
mod objects;
mod one_at_a_time;
pub mod pprof;
mod rate_limit;
mod request;
mod sampling;
pub mod snapshots;
mod symbols;
#[cfg(feature = "task-dump")]
mod task_dump;
mod tasks;
mod threads;
mod trace;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use axum::Router;
use axum::body::HttpBody;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Query, RawQuery, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::config;

pub use allocator::{MALLOC_CONF, sample_allocations};
pub use budget::keep as keep_to_budget;
pub use heap::{EVENT_KIND, STAGE};

use access::Access;
use modes::Mode;
use one_at_a_time::{Asked, Interrupt, Interrupted, OneAtATime};
use pprof::{Profile, combine};
use rate_limit::RateLimit;
use request::{Answer, Format, Options};

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
    let mut router = Router::new()
        .route("/debug/pprof/", get(index))
        .route("/debug/pprof/profile", get(cpu_profile))
        .route("/debug/pprof/trace", get(last_spans))
        .route("/debug/pprof/cmdline", get(command_line))
        .route(
            "/debug/pprof/symbol",
            get(symbols_asked).post(symbols_posted).layer(DefaultBodyLimit::max(MOST_ADDRESSES * ADDRESS_BYTES)),
        );
    for mode in Mode::ALL {
        let answer = async move |slot: Slot, peer: Peer, query: Pairs| lookup(mode, slot, peer, query).await;
        router = router.route(&format!("/debug/pprof/{}", mode.name()), get(answer));
    }
    let gate = Arc::new(Gate { access: Access::new(profiling), rate_limit: RateLimit::new() });
    router
        .with_state(slot)
        .fallback(async || {
            let modes = Mode::ALL.map(Mode::name).join(", ");
            failure(
                StatusCode::NOT_FOUND,
                &format!("no such profile; there are: {modes}, profile, trace, cmdline, symbol"),
            )
        })
        .layer(middleware::from_fn_with_state(gate, guard))
}

/// Addresses that are named in one request. Each may have a name of some kilobytes.
const MOST_ADDRESSES: usize = 4_096;

/// An address as text, with what is between two of them.
const ADDRESS_BYTES: usize = 24;

type Slot = State<Arc<OneAtATime>>;
type Peer = ConnectInfo<SocketAddr>;
type Pairs = Query<Vec<(String, String)>>;

/// What a request has to pass.
struct Gate {
    access: Access,
    rate_limit: RateLimit,
}

impl Gate {
    /// What a request is told that does not pass.
    fn refusal(&self, request: &Request) -> Option<Response> {
        if let Err(refusal) = self.access.decide(request) {
            return Some(refusal.into_response());
        }
        if matches!(request.uri().path(), "/debug/pprof/" | "/debug/pprof/cmdline") {
            // They take no profile and cost nothing.
            return None;
        }
        let (seconds, text) = rate_limit::told(self.rate_limit.take().err()?);
        let retry_after = [(header::RETRY_AFTER, seconds.to_string())];
        Some((retry_after, failure(StatusCode::TOO_MANY_REQUESTS, &text)).into_response())
    }
}

/// Lets a request in or not, and leaves a line about it in the log.
async fn guard(
    State(gate): State<Arc<Gate>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    let begin = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = match gate.refusal(&request) {
        None => next.run(request).await,
        Some(refusal) => refusal,
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

/// The modes with what they show and, where that is known without taking the profile, how many there are of it.
async fn index() -> String {
    let mut text = "/debug/pprof/\n\nprofiles:\n".to_owned();
    for mode in Mode::ALL {
        let count = mode.count().map_or_else(|| "-".to_owned(), |count| count.to_string());
        let _ = writeln!(text, "{count:>6}  {:<13} {}", mode.name(), mode.about());
    }
    text + INDEX
}

const INDEX: &str = "
     -  profile       CPU time by stack and kind of event, for 30 s; hz=N samples a second, 100 unless given
     -  trace         events and their stages within the last 5 s, for ui.perfetto.dev
     -  cmdline       the arguments of the program
     -  symbol        functions at addresses

Read them with go tool pprof -http=: http://HOST:PORT/debug/pprof/heap, or with -top -cum; -tagroot=event_kind puts the
kinds of events on top, -tagfocus=valuations.refresh shows one of them alone.

seconds=N         what changed within N seconds, from 1 to 100; how long profile samples; how far back trace goes
debug=1           text for people
format=collapsed  a line for each stack
format=svg        a flame graph
gc=1              first gives memory that the allocator keeps unused back to the system. Nothing is collected: what the
                  profile shows is the same; the resident set is smaller
force=1           takes the place of a profile that is being taken: there is only one at a time

Fifty requests may come at once, then one a second; this list and cmdline are not counted.
";

/// One of the profiles that show a state.
async fn lookup(mode: Mode, slot: Slot, peer: Peer, query: Pairs) -> Response {
    #[cfg(feature = "task-dump")]
    let runtime = tokio::runtime::Handle::current();
    answered(mode.name(), slot, peer, query, move |options, interrupt| {
        #[cfg(feature = "task-dump")]
        if options.dump && mode == Mode::Goroutine {
            return Ok(Answer::text(task_dump::text(&runtime)?));
        }
        if options.gc {
            heap::give_back()?;
        }
        match options.seconds {
            Some(seconds) => {
                let profile = difference(seconds, interrupt, || mode.take())?;
                Ok(Answer::profile(&profile, &format!("{}-delta", mode.name()), options.format))
            }
            None if options.debug > 0 => Ok(Answer::text(mode.text(options.debug)?)),
            None => Ok(Answer::profile(&mode.take()?, mode.name(), options.format)),
        }
    })
    .await
}

async fn cpu_profile(slot: Slot, peer: Peer, query: Pairs) -> Response {
    answered("profile", slot, peer, query, |options, interrupt| {
        let asked = options.hz.unwrap_or(cpu::HZ);
        let hz = budget::hz(asked);
        let mut profile = cpu::profile(options.seconds.unwrap_or(cpu::SECONDS), hz, interrupt)?;
        let note = (hz < asked).then(|| {
            format!("{hz} samples a second instead of {asked}: the profiler had used more than profiling.cpu_budget")
        });
        profile.comments.extend(note.clone());
        let format = if options.debug > 0 { Format::Collapsed } else { options.format };
        Ok(Answer::profile(&profile, "profile", format).with_note(note))
    })
    .await
}

async fn last_spans(slot: Slot, peer: Peer, query: Pairs) -> Response {
    answered("trace", slot, peer, query, |options, _| {
        Ok(Answer::json(trace::json(options.seconds.unwrap_or(trace::SECONDS)), "trace"))
    })
    .await
}

/// Takes the place, does `work` on a thread of its own and answers with what came of it.
async fn answered(
    what: &'static str,
    State(slot): Slot,
    ConnectInfo(peer): Peer,
    Query(pairs): Pairs,
    work: impl FnOnce(Options, &Interrupt) -> anyhow::Result<Answer> + Send + 'static,
) -> Response {
    let options = match Options::read(what, &pairs) {
        Ok(options) => options,
        Err(reason) => return request::refused(&reason),
    };
    let asked = Asked { what, peer, force: options.force };
    match slot.run(asked, move |interrupt| work(options, interrupt)).await {
        Ok(Ok(answer)) => answer.into_response(),
        Ok(Err(error)) if error.is::<Interrupted>() => {
            tracing::info!(reason = %error, profile = what, "a profile ended early");
            failure(StatusCode::CONFLICT, &error.to_string())
        }
        Ok(Err(error)) => {
            tracing::warn!(error = format!("{error:#}"), profile = what, "no profile");
            failure(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error:#}"))
        }
        Err(busy) => failure(StatusCode::CONFLICT, &busy.to_string()),
    }
}

/// The arguments of the program, separated by zero bytes.
async fn command_line() -> Response {
    match std::fs::read("/proc/self/cmdline") {
        Ok(line) => {
            let text = String::from_utf8_lossy(line.strip_suffix(b"\0").unwrap_or(&line)).into_owned();
            ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response()
        }
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &format!("/proc/self/cmdline: {error}")),
    }
}

async fn symbols_asked(slot: Slot, peer: Peer, RawQuery(query): RawQuery) -> Response {
    named(slot, peer, query.unwrap_or_default()).await
}

async fn symbols_posted(slot: Slot, peer: Peer, addresses: String) -> Response {
    named(slot, peer, addresses).await
}

/// The functions at `addresses` (`0x10+0x20`) of the program, as its profiles have them, each address once. Without addresses it
/// says that it could.
async fn named(State(slot): Slot, ConnectInfo(peer): Peer, addresses: String) -> Response {
    let number = addresses.split('+').filter(|text| !text.is_empty()).count();
    if number > MOST_ADDRESSES {
        return request::refused(&format!("{number} addresses: ask for {MOST_ADDRESSES} at a time"));
    }
    let work = move |_: &Interrupt| Ok(symbols::at(addresses.split('+')));
    match slot.run(Asked { what: "symbol", peer, force: false }, work).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response(),
        Ok(Err(error)) => failure(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error:#}")),
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

/// The time, as profiles have it: nanoseconds since 1970.
fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i64)
}

/// A failure as Go's tools expect it: text, and a header that says that it is no profile.
fn failure(code: StatusCode, text: &str) -> Response {
    let headers = [("content-type", "text/plain; charset=utf-8"), ("x-go-pprof", "1")];
    (code, headers, format!("{text}\n")).into_response()
}

#[cfg(test)]
mod tests;
