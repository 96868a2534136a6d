//! A partner for the tests: a real TCP server that answers each call as the test says.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// One call as it arrived.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub at: Instant,
    /// The connection that carried it; the first is 0.
    pub connection: usize,
    /// Calls with this key so far, this one included.
    pub attempt: usize,
    pub listing_id: i64,
    /// Status line and headers.
    pub head: String,
    pub body: String,
}

impl Call {
    /// The value of a header.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(header, _)| header.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// What the stub does with a call, step by step.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Send(Vec<u8>),
    Wait(Duration),
    /// Closes the connection in order.
    Close,
    /// Breaks it.
    Reset,
}

/// The running stub. It stops when it is dropped.
pub(super) struct Stub {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    calls: Mutex<Vec<Call>>,
    attempts: Mutex<HashMap<String, usize>>,
    open: AtomicUsize,
    in_flight: AtomicUsize,
    most_in_flight: AtomicUsize,
}

impl Stub {
    /// Starts on a free port; `script` answers.
    pub(super) async fn start(script: impl Fn(&Call) -> Vec<Step> + Send + Sync + 'static) -> Stub {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let shared = Arc::<Shared>::default();
        let script = Arc::new(script);
        let server = Arc::clone(&shared);
        let accepting = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            for number in 0.. {
                let Ok((socket, _)) = listener.accept().await else { return };
                let (server, script) = (Arc::clone(&server), Arc::clone(&script));
                server.open.fetch_add(1, Ordering::SeqCst);
                connections.spawn(async move {
                    let _ = server.serve(socket, number, &*script).await;
                    server.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Stub { address, shared, accepting }
    }

    /// All calls so far.
    pub(super) fn calls(&self) -> Vec<Call> {
        self.shared.calls.lock().expect("no panic").clone()
    }

    /// Connections that are open now.
    pub(super) fn open(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// Calls in flight, at most.
    pub(super) fn most_in_flight(&self) -> usize {
        self.shared.most_in_flight.load(Ordering::SeqCst)
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Shared {
    async fn serve(
        &self,
        mut socket: TcpStream,
        connection: usize,
        script: &(dyn Fn(&Call) -> Vec<Step> + Send + Sync),
    ) -> std::io::Result<()> {
        socket.set_nodelay(true)?;
        let mut received = Vec::new();
        loop {
            let Some((head, body)) = receive(&mut socket, &mut received).await? else { return Ok(()) };
            let in_flight = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
            self.most_in_flight.fetch_max(in_flight, Ordering::SeqCst);
            let call = self.note(connection, head, body);
            let mut ended = Ok(true);
            for step in script(&call) {
                ended = self.act(&mut socket, step).await;
                if !matches!(ended, Ok(true)) {
                    break;
                }
            }
            self.in_flight.fetch_sub(1, Ordering::SeqCst);
            if !ended? {
                return Ok(());
            }
        }
    }

    /// Whether the connection goes on.
    async fn act(&self, socket: &mut TcpStream, step: Step) -> std::io::Result<bool> {
        match step {
            Step::Send(bytes) => socket.write_all(&bytes).await.map(|()| true),
            Step::Wait(time) => {
                tokio::time::sleep(time).await;
                Ok(true)
            }
            Step::Close => Ok(false),
            Step::Reset => {
                socket.set_zero_linger()?;
                Ok(false)
            }
        }
    }

    fn note(&self, connection: usize, head: String, body: String) -> Call {
        let json: serde_json::Value = serde_json::from_str(&body).expect("the body is JSON");
        let mut call = Call {
            at: Instant::now(),
            connection,
            attempt: 0,
            listing_id: json["listing_id"].as_i64().expect("a listing id"),
            head,
            body,
        };
        let key = call.header("idempotency-key").expect("a key").to_owned();
        let mut attempts = self.attempts.lock().expect("no panic");
        let attempt = attempts.entry(key).or_default();
        *attempt += 1;
        call.attempt = *attempt;
        self.calls.lock().expect("no panic").push(call.clone());
        call
    }
}

/// The next request on a connection, `None` at its end.
async fn receive(socket: &mut TcpStream, received: &mut Vec<u8>) -> std::io::Result<Option<(String, String)>> {
    loop {
        if let Some(end) = received.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&received[..end]).into_owned();
            let length: usize = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "))
                .and_then(|length| length.parse().ok())
                .expect("a content length");
            if received.len() >= end + 4 + length {
                let body = String::from_utf8_lossy(&received[end + 4..end + 4 + length]).into_owned();
                received.drain(..end + 4 + length);
                return Ok(Some((head, body)));
            }
        }
        if socket.read_buf(received).await? == 0 {
            return Ok(None);
        }
    }
}

/// A good answer for this listing: it is worth its id in dollars.
pub(super) fn valued(listing_id: i64) -> Vec<Step> {
    let valuation_cents = listing_id * 100;
    ok(&format!(r#"{{"listing_id":{listing_id},"valuation_cents":{valuation_cents},"confidence":0.5}}"#))
}

/// A 200 with this body.
pub(super) fn ok(body: &str) -> Vec<Step> {
    answer(200, "content-type: application/json\r\n", body.as_bytes())
}

/// An answer with an empty body.
pub(super) fn status(status: u16) -> Vec<Step> {
    answer(status, "", b"")
}

/// Any answer; each header ends with its line end.
pub(super) fn answer(status: u16, headers: &str, body: &[u8]) -> Vec<Step> {
    let mut bytes = format!("HTTP/1.1 {status} X\r\n{headers}content-length: {}\r\n\r\n", body.len()).into_bytes();
    bytes.extend_from_slice(body);
    vec![Step::Send(bytes)]
}

/// These bytes as they are.
pub(super) fn raw(bytes: &str) -> Vec<Step> {
    vec![Step::Send(bytes.as_bytes().to_vec())]
}
