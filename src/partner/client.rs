//! One try of one call: a connection, a turn, an exchange, and what came of it.

use std::sync::Arc;
use std::time::Duration;

use http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_TYPE, HOST, USER_AGENT};
use http::{StatusCode, Uri};
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};
use tokio::sync::SemaphorePermit;
use tokio::time::{Instant, timeout};

use super::breaker::{Breaker, Pass};
use super::budget::Budget;
use super::connection::{Connection, Connector, Pool};
use super::credential::Credential;
use super::http1::{Exchange, ExchangeError};
use super::retry::{Class, Failure, Outcome};
use super::window::Place;
use super::wire::{Request, RunKey, Valuation};
use crate::config;
use crate::fault;
use crate::metrics::Metrics;
use crate::task::{For, wait};

/// Sends requests and reads answers.
pub(super) struct Client {
    /// The part of every message that never changes: request line and headers, without the empty line.
    head: Vec<u8>,
    credential: Option<Arc<Credential>>,
    connector: Connector,
    pool: Arc<Pool>,
    max_response_bytes: usize,
    counters: Counters,
}

/// How a try is made.
pub(super) struct Terms {
    /// How long its exchange may last.
    pub(super) limit: Duration,
    /// Whether it must have a connection that has carried none before.
    pub(super) only_fresh: bool,
}

/// One try and the time it took of its listing, waits for others apart.
pub(super) struct Attempt {
    pub(super) outcome: Outcome,
    pub(super) took: Duration,
}

/// Metrics, found once so that a call looks none of them up.
struct Counters {
    calls: IntCounterVec,
    ok: IntCounter,
    connect: IntCounter,
    timeout: IntCounter,
    broken: IntCounter,
    stale: IntCounter,
    seconds: Histogram,
    in_flight: IntGauge,
}

impl Counters {
    fn new(metrics: &Metrics) -> Self {
        let calls = metrics.partner_calls.clone();
        let status = |label: &str| calls.with_label_values(&[label]);
        Counters {
            ok: status("200"),
            connect: status("connect"),
            timeout: status("timeout"),
            broken: status("broken"),
            stale: status("stale"),
            seconds: metrics.partner_seconds.clone(),
            in_flight: metrics.partner_in_flight.clone(),
            calls,
        }
    }

    fn count(&self, outcome: &Outcome) {
        match outcome {
            Outcome::Valued(_) => self.ok.inc(),
            Outcome::Refused(status) | Outcome::Fault(status) | Outcome::Failed(Failure::Status(status, _)) => {
                self.calls.with_label_values(&[status.as_str()]).inc();
            }
            Outcome::Failed(Failure::Connect(_)) => self.connect.inc(),
            Outcome::Failed(Failure::Timeout(_)) => self.timeout.inc(),
            Outcome::Failed(Failure::Broken(_)) => self.broken.inc(),
            Outcome::Stale => self.stale.inc(),
            Outcome::Withdrawn => {}
        }
    }
}

/// Counts a call as in flight while it lives, dropped futures included.
struct InFlight<'a>(&'a IntGauge);

impl<'a> InFlight<'a> {
    fn new(gauge: &'a IntGauge) -> Self {
        gauge.inc();
        InFlight(gauge)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Client {
    pub(super) fn new(config: &config::Partner, metrics: &Metrics) -> anyhow::Result<Self> {
        Ok(Client {
            head: message_head(&config.base_url),
            credential: config.credential.as_ref().map(Credential::load).transpose()?,
            connector: Connector::new(&config.base_url, config.connect_timeout)?,
            pool: Arc::default(),
            max_response_bytes: config.max_response_bytes,
            counters: Counters::new(metrics),
        })
    }

    /// Opens a connection, or finds that one is open.
    pub(super) async fn reach(&self) -> anyhow::Result<()> {
        let connection = match self.pool.take() {
            Some(connection) => connection,
            None => self.connector.connect().await?,
        };
        self.pool.put_back(connection);
        Ok(())
    }

    /// Makes one try.
    pub(super) async fn attempt(
        &self,
        budget: &Budget,
        breaker: &Breaker,
        pass: &mut Pass<'_>,
        run: &RunKey,
        request: &Request,
        Terms { limit, mut only_fresh }: Terms,
    ) -> Attempt {
        let mut closed_early = false;
        let (outcome, took) = loop {
            // Nothing is sent yet: none of these waits may hold up a run that is closed. Boxed, so that a call which is out
            // does not keep the room that they took.
            let prepared = Box::pin(run.while_open(self.prepare(budget, breaker, pass, only_fresh))).await;
            let (mut connection, preparing, place) = match prepared.unwrap_or(Err((Outcome::Withdrawn, Duration::ZERO)))
            {
                Ok(prepared) => prepared,
                Err((outcome, took)) => break (outcome, took),
            };
            if run.is_closed() || !breaker.honours(pass) {
                self.pool.put_back(connection);
                break (Outcome::Withdrawn, Duration::ZERO);
            }
            // The wait may have been long: what a partner closed meanwhile is opened anew. But one that closes two new
            // connections before anything was sent is not there, though something accepts in its place.
            if !connection.is_quiet() {
                let is_fresh = !connection.used;
                if is_fresh && closed_early {
                    let problem = "the partner closed two connections before a call was sent".to_owned();
                    break (Outcome::Failed(Failure::Connect(problem)), Duration::ZERO);
                }
                closed_early |= is_fresh;
                only_fresh = true;
                continue;
            }

            drop(preparing);
            let message = self.message(run, request);
            fault_point("partner.before_send", run, request);
            let started = Instant::now();
            let in_flight = InFlight::new(&self.counters.in_flight);
            let mut exchange = Exchange::new(&mut *connection.io, self.max_response_bytes);
            let ended = wait(For::Partner, timeout(limit, exchange.run(message))).await;
            drop(in_flight);
            let took = started.elapsed();
            if connection.used && closed_unanswered(&ended, &exchange) {
                self.pool.found_closed();
                break (Outcome::Stale, took);
            }
            fault_point("partner.after_answer", run, request);
            let outcome = outcome(&exchange, ended, limit, request.listing_id);
            if let Some(place) = place {
                note_load(&place, &outcome, took);
            }
            if exchange.reusable() {
                self.pool.put(connection);
            }
            self.counters.seconds.observe(took.as_secs_f64());
            break (outcome, took);
        };
        self.counters.count(&outcome);
        Attempt { outcome, took }
    }

    /// Waits until a call can be sent, and finds a connection for it. The send must be made in the poll that returns. If
    /// there is none, what that means for the try and how long it took.
    ///
    /// A probe has no place in the window: while an outage is on, all places may be taken by calls that hang.
    async fn prepare<'b>(
        &self,
        budget: &'b Budget,
        breaker: &Breaker,
        pass: &mut Pass<'_>,
        only_fresh: bool,
    ) -> Result<(Connection, SemaphorePermit<'b>, Option<Place<'b>>), (Outcome, Duration)> {
        let place = if pass.is_probe() { None } else { Some(budget.window.enter().await) };
        let preparing = budget.prepare().await;
        if !breaker.start(pass) {
            return Err((Outcome::Withdrawn, Duration::ZERO));
        }
        // The connection first: the moment of the send is used when it comes.
        let pooled = if only_fresh { None } else { self.pool.take() };
        let connection = match pooled {
            Some(connection) => connection,
            // Boxed, as is what follows, because it is rare: a future that exists a hundred times must be small.
            None => Box::pin(self.connect()).await?,
        };
        if let Some(credential) = self.credential.as_ref().filter(|credential| credential.is_due()) {
            Box::pin(Arc::clone(credential).refresh()).await;
        }
        budget.grant().await;
        Ok((connection, preparing, place))
    }

    /// Opens a connection; if it cannot, what that means for the try and how long it took.
    async fn connect(&self) -> Result<Connection, (Outcome, Duration)> {
        let started = Instant::now();
        self.connector
            .connect()
            .await
            .map_err(|error| (Outcome::Failed(Failure::Connect(format!("{error:#}"))), started.elapsed()))
    }

    /// The bytes of one call, in one piece.
    fn message(&self, run: &RunKey, request: &Request) -> Vec<u8> {
        use std::io::Write;
        // The credential and the numbers fit into what is added for them; if not, the vector grows once.
        let mut message = Vec::with_capacity(self.head.len() + run.as_str().len() + 384);
        message.extend_from_slice(&self.head);
        if let Some(credential) = &self.credential {
            credential.write_header(&mut message);
        }
        let mut body = [0; MAX_BODY_BYTES];
        let unused = {
            let mut rest = &mut body[..];
            serde_json::to_writer(&mut rest, request).expect("plain numbers are JSON and fit");
            rest.len()
        };
        let body = &body[..MAX_BODY_BYTES - unused];
        write!(
            message,
            "idempotency-key: {}:{}\r\ncontent-length: {}\r\n\r\n",
            run.as_str(),
            request.listing_id,
            body.len()
        )
        .expect("writing to memory cannot fail");
        message.extend_from_slice(body);
        message
    }
}

/// Tells the window what a try says of the partner's load.
fn note_load(place: &Place<'_>, outcome: &Outcome, took: Duration) {
    match outcome {
        Outcome::Valued(_) | Outcome::Refused(_) => place.worked(took),
        Outcome::Failed(failure) => {
            if let Some(overload) = failure.overload() {
                place.overloaded(overload, failure);
            }
        }
        Outcome::Fault(_) | Outcome::Stale | Outcome::Withdrawn => {}
    }
}

/// A place for faults, whose key is that of the call.
fn fault_point(name: &str, run: &RunKey, request: &Request) {
    // Without the feature not even the key is made.
    if cfg!(feature = "fault-injection") {
        fault::point(name, &format!("{}:{}", run.as_str(), request.listing_id));
    }
}

/// Room for the largest body: its names and five numbers.
const MAX_BODY_BYTES: usize = 256;

/// Request line and constant headers.
fn message_head(base_url: &Uri) -> Vec<u8> {
    let path = base_url.path().trim_end_matches('/');
    let authority = base_url.authority().map(|authority| authority.as_str()).unwrap_or_default();
    // Whatever comes before an @ is no part of a Host header.
    let host = authority.rsplit('@').next().unwrap_or_default();
    let user_agent = concat!("write-api/", env!("CARGO_PKG_VERSION"));
    // An answer is a few dozen bytes, which compression makes larger; a proxy that compresses all the same is understood.
    format!(
        "POST {path}/v1/valuations HTTP/1.1\r\n{HOST}: {host}\r\n{USER_AGENT}: {user_agent}\r\n\
         {CONTENT_TYPE}: application/json\r\n{ACCEPT}: application/json\r\n\
         {ACCEPT_ENCODING}: identity, gzip;q=0.5\r\n"
    )
    .into_bytes()
}

type Ended = Result<Result<Vec<u8>, ExchangeError>, tokio::time::error::Elapsed>;

/// Whether the connection ended before the first byte of an answer.
fn closed_unanswered(ended: &Ended, exchange: &Exchange<'_>) -> bool {
    matches!(ended, Ok(Err(ExchangeError::Io(_) | ExchangeError::Closed))) && !exchange.answered()
}

/// What an exchange means for its listing. Of a status that is no 200, the body does not matter, not even whether it
/// came.
fn outcome(exchange: &Exchange<'_>, ended: Ended, limit: Duration, listing_id: i64) -> Outcome {
    if let Some(head) = exchange.head() {
        match Class::of(head.status) {
            Class::Answer => {}
            Class::Final => return Outcome::Refused(head.status),
            Class::Retry => {
                let asks = matches!(head.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
                return Outcome::Failed(Failure::Status(head.status, head.retry_after.filter(|_| asks)));
            }
            Class::Fault => return Outcome::Fault(head.status),
            Class::Nonsense => {
                return Outcome::Failed(Failure::Broken(format!("its status is {}", head.status.as_u16())));
            }
        }
    }
    match ended {
        Ok(Ok(body)) => match Valuation::read(&body, listing_id) {
            Ok(valuation) => Outcome::Valued(valuation),
            Err(problem) => Outcome::Failed(Failure::Broken(problem.to_owned())),
        },
        Ok(Err(error)) => Outcome::Failed(Failure::Broken(error.to_string())),
        Err(_) => Outcome::Failed(Failure::Timeout(limit)),
    }
}
