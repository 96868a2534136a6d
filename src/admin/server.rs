//! A small HTTP server for pages that are asked for now and then.
//!
//! It is made for few and short conversations and defends itself against others: one request a connection, a bound on
//! the time until its headers are here, a bound on the whole, and a bound on the connections at a time. Who is too slow
//! is cut off; where there are too many, the oldest is, because a probe that has to wait counts as a failed one.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::extract::ConnectInfo;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tower_service::Service;

use crate::config;
use crate::task;

/// Connections at a time.
const CONNECTIONS: usize = 32;

/// From the connection to the end of the request's headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(1);

/// The most of a request's line and headers, in bytes.
const HEADER_BYTES: usize = 16 * 1024;

/// How long an answer that was begun may still take when the server is told to stop.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// How long accepting rests after it failed, which is when file descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens on `address`, the value of the setting `key`, without answering yet. The listener knows its port.
pub async fn bind(key: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!(
            "{key}: cannot listen on {address}; stop what listens there, or set {} to another",
            config::variable(key)
        )
    })
}

/// Answers requests until `stop` is done, then finishes those begun within a second. A connection is cut after
/// `longest`, the time in which the slowest page must have been answered and read. Each request carries its peer as
/// [`ConnectInfo<SocketAddr>`].
pub async fn serve(listener: TcpListener, router: Router, longest: Duration, stop: impl Future<Output = ()>) {
    let mut connections = JoinSet::new();
    let mut open: VecDeque<AbortHandle> = VecDeque::new();
    tokio::pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = task::park(listener.accept()) => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let router = router.clone();
                open.retain(|connection| !connection.is_finished());
                if open.len() >= CONNECTIONS
                    && let Some(oldest) = open.pop_front()
                {
                    oldest.abort();
                }
                open.push_back(task::spawn_in(&mut connections, "connection", async move {
                    // An error here is a client that went away, was too slow or spoke no HTTP: its own affair.
                    let _ = task::park(tokio::time::timeout(longest, answer(stream, peer, router))).await;
                }));
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        // Those that are done, so that the set does not grow.
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    let _ = tokio::time::timeout(STOP_GRACE, async { while connections.join_next().await.is_some() {} }).await;
    connections.shutdown().await;
}

async fn answer(stream: TcpStream, peer: SocketAddr, router: Router) -> hyper::Result<()> {
    let service = hyper::service::service_fn(move |mut request: http::Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(peer));
        let mut router = router.clone();
        async move { Ok::<_, Infallible>(router.call(request).await.unwrap_or_else(|never| match never {})) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;
    use tokio::task::JoinHandle;

    use super::*;

    const LONGEST: Duration = Duration::from_secs(10);

    async fn started(router: Router, longest: Duration) -> (SocketAddr, oneshot::Sender<()>, JoinHandle<()>) {
        let listener = bind("admin.listen", ([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(serve(listener, router, longest, async move { drop(stopped.await) }));
        (address, stop, server)
    }

    /// Sends `text` and reads until the server closes.
    async fn say(address: SocketAddr, text: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    const GET: &str = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

    fn hello() -> Router {
        Router::new().route("/", get(async |ConnectInfo(peer): ConnectInfo<SocketAddr>| format!("hello {}", peer.ip())))
    }

    #[tokio::test]
    async fn a_request_is_answered_and_its_connection_closed() {
        let (address, _stop, _) = started(hello(), LONGEST).await;
        let answer = say(address, &GET.repeat(2)).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello 127.0.0.1"), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
    }

    #[tokio::test]
    async fn too_long_a_header_is_refused() {
        let (address, _stop, _) = started(hello(), LONGEST).await;
        let request = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(2 * HEADER_BYTES));
        let answer = say(address, &request).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    }

    #[tokio::test]
    async fn a_silent_client_is_cut_off() {
        let (address, _stop, _) = started(hello(), Duration::from_millis(200)).await;
        let begin = Instant::now();
        assert_eq!(say(address, "GET / HT").await, "");
        assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    }

    #[tokio::test]
    async fn a_client_slow_with_its_headers_is_cut_off_before_others() {
        let (address, _stop, _) = started(hello(), HEADER_TIMEOUT * 10).await;
        let begin = Instant::now();
        assert_eq!(say(address, "GET / HTTP/1.1\r\nHost: ").await, "");
        assert!(begin.elapsed() < HEADER_TIMEOUT + Duration::from_secs(3), "{:?}", begin.elapsed());
    }

    #[tokio::test]
    async fn a_full_house_lets_a_probe_in_and_the_oldest_out() {
        let (address, _stop, _) = started(hello(), LONGEST).await;
        let mut half_sent = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET / HT").await.unwrap();
            half_sent.push(stream);
        }
        let begin = Instant::now();
        let answer = tokio::time::timeout(HEADER_TIMEOUT, say(address, GET)).await.expect("in a probe's time");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let mut rest = [0];
        let oldest = half_sent[0].read(&mut rest).await;
        assert!(
            !matches!(oldest, Ok(1..)) && begin.elapsed() < HEADER_TIMEOUT,
            "{oldest:?} after {:?}",
            begin.elapsed()
        );
    }

    #[tokio::test]
    async fn stopping_finishes_what_was_begun_and_accepts_no_more() {
        let slow = Router::new().route(
            "/",
            get(async || {
                tokio::time::sleep(Duration::from_millis(300)).await;
                "done"
            }),
        );
        let (address, stop, server) = started(slow, LONGEST).await;
        let begun = tokio::spawn(async move { say(address, GET).await });
        tokio::time::sleep(Duration::from_millis(100)).await;
        stop.send(()).unwrap();
        server.await.unwrap();
        assert!(begun.await.unwrap().ends_with("done"));
        TcpStream::connect(address).await.expect_err("nobody listens");
    }

    #[tokio::test]
    async fn a_taken_address_is_told_with_its_setting() {
        let taken = bind("admin.listen", ([127, 0, 0, 1], 0).into()).await.unwrap();
        let error = bind("admin.listen", taken.local_addr().unwrap()).await.unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("admin.listen") && text.contains("WRITE_API_ADMIN_LISTEN"), "{text}");
        assert!(text.contains(&taken.local_addr().unwrap().to_string()) && text.contains("in use"), "{text}");
    }
}
