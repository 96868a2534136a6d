//! Connections to the partner: how they are opened, and the idle ones that are kept for the next call.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use anyhow::{Context, bail};
use futures::task::noop_waker_ref;
use http::Uri;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};

use super::http1::Io;
use crate::task::{self, lock};

/// How long addresses are used before they are resolved again. A thousand connections at once are one look-up.
const RESOLVE_EVERY: Duration = Duration::from_secs(5);
/// How long a connection is kept without a call. After an event its memory is to go back within seconds.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long each call has a connection of its own when too many that were kept turned out to be closed.
const NOT_KEPT_FOR: Duration = Duration::from_secs(10);
/// What a kept connection that was closed costs of the trust in keeping them, in what one that served again earns: as many may
/// be closed as the retry budget pays for where nothing else fails.
const CLOSED_COSTS: i64 = 5;
/// The most trust, and what there is at the start: a hundred kept ones may be closed at once, by a restart of the partner, say.
const MOST_TRUST: i64 = 100 * CLOSED_COSTS;
/// How often idle connections are looked over, while there are any.
const REAP_EVERY: Duration = Duration::from_secs(1);

/// An open connection that carries one exchange at a time.
pub(super) struct Connection {
    pub(super) io: Box<dyn Io>,
    /// Whether it has carried an exchange before: if so, the partner may have closed it meanwhile.
    pub(super) used: bool,
}

impl Connection {
    /// Whether nothing has arrived on it. Bytes that nobody asked for, and the end of the stream most of all, make it
    /// useless for the next exchange.
    pub(super) fn is_quiet(&mut self) -> bool {
        let mut byte = [0];
        let mut nothing = TaskContext::from_waker(noop_waker_ref());
        matches!(Pin::new(&mut self.io).poll_read(&mut nothing, &mut ReadBuf::new(&mut byte)), Poll::Pending)
    }
}

/// Opens connections.
pub(super) struct Connector {
    host: String,
    port: u16,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    connect_timeout: Duration,
    addresses: tokio::sync::Mutex<Option<(Instant, Arc<[SocketAddr]>)>>,
}

impl Connector {
    /// For the host of `base_url`. An https URL has the system's trusted certificates loaded, which takes some
    /// milliseconds.
    pub(super) fn new(base_url: &Uri, connect_timeout: Duration) -> anyhow::Result<Self> {
        let https = base_url.scheme_str() == Some("https");
        Connector::with_tls(base_url, connect_timeout, if https { Some(system_tls()?) } else { None })
    }

    fn with_tls(base_url: &Uri, connect_timeout: Duration, tls: Option<TlsConnector>) -> anyhow::Result<Self> {
        let Some(host) = base_url.host() else {
            bail!("partner.base_url = {base_url} names no host; give http://HOST:PORT or https://HOST");
        };
        // An IPv6 address has brackets in a URL only.
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = base_url.port_u16().unwrap_or(if tls.is_some() { 443 } else { 80 });
        let tls = match tls {
            Some(connector) => {
                let name = ServerName::try_from(host.clone())
                    .with_context(|| format!("partner.base_url: {host} is not a name that a certificate can have"))?;
                Some((connector, name))
            }
            None => None,
        };
        Ok(Connector { host, port, tls, connect_timeout, addresses: tokio::sync::Mutex::default() })
    }

    /// Opens a connection within the connect timeout, name look-up and TLS included.
    pub(super) async fn connect(&self) -> anyhow::Result<Connection> {
        let opened = self.open().await;
        opened.with_context(|| format!("cannot connect to the partner at {}:{}", self.host, self.port))
    }

    async fn open(&self) -> anyhow::Result<Connection> {
        let deadline = Instant::now() + self.connect_timeout;
        let resolved = timeout(self.connect_timeout, self.resolve()).await;
        let addresses = resolved.unwrap_or_else(|_| bail!("the name did not resolve in time"))?;
        // From any one of them on, for the load to be shared.
        let first = fastrand::usize(..addresses.len());
        let mut last_error = None;
        for index in 0..addresses.len() {
            let address = addresses[(first + index) % addresses.len()];
            // An equal part of the time that is left, so that an address which swallows packets does not hide the others.
            let part = deadline.saturating_duration_since(Instant::now()) / (addresses.len() - index) as u32;
            match timeout(part, self.open_at(address)).await {
                Ok(Ok(io)) => return Ok(Connection { io, used: false }),
                Ok(Err(error)) => last_error = Some(error.context(address)),
                Err(_) => {
                    let milliseconds = part.as_secs_f64() * 1e3;
                    last_error = Some(anyhow::anyhow!("{address}: timed out after {milliseconds:.0} ms"));
                }
            }
        }
        // They may all be old.
        *self.addresses.lock().await = None;
        Err(last_error.expect("a name resolves to one address at least"))
    }

    async fn open_at(&self, address: SocketAddr) -> anyhow::Result<Box<dyn Io>> {
        let tcp = TcpStream::connect(address).await?;
        // A call is one small write that must not wait for company.
        tcp.set_nodelay(true)?;
        Ok(match &self.tls {
            Some((connector, name)) => {
                Box::new(connector.connect(name.clone(), tcp).await.context("TLS handshake failed")?)
            }
            None => Box::new(tcp),
        })
    }

    async fn resolve(&self) -> anyhow::Result<Arc<[SocketAddr]>> {
        let mut known = self.addresses.lock().await;
        if let Some((resolved, addresses)) = &*known
            && resolved.elapsed() < RESOLVE_EVERY
        {
            return Ok(Arc::clone(addresses));
        }
        let found = lookup_host((self.host.as_str(), self.port)).await.context("the name does not resolve")?;
        let addresses: Arc<[SocketAddr]> = found.collect();
        if addresses.is_empty() {
            bail!("the name resolves to no address");
        }
        *known = Some((Instant::now(), Arc::clone(&addresses)));
        Ok(addresses)
    }
}

/// TLS with the certificates that the system trusts.
fn system_tls() -> anyhow::Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    let loaded = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(loaded.certs);
    if roots.is_empty() {
        let errors: Vec<String> = loaded.errors.iter().map(ToString::to_string).collect();
        bail!(
            "partner.base_url is https and no trusted certificate was found ({}); install ca-certificates",
            errors.join("; ")
        );
    }
    tls(roots)
}

fn tls(roots: RootCertStore) -> anyhow::Result<TlsConnector> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// The idle connections. The last one returned is the first one taken, so that those at the bottom get old and go.
#[derive(Default)]
pub(super) struct Pool {
    idle: Mutex<Idle>,
}

struct Idle {
    /// Oldest first.
    connections: Vec<(Instant, Connection)>,
    /// Whether a task looks after them.
    reaping: bool,
    /// Below zero none is kept for a while.
    trust: i64,
    /// None is kept before this.
    not_before: Option<Instant>,
}

impl Default for Idle {
    fn default() -> Self {
        Idle { connections: Vec::new(), reaping: false, trust: MOST_TRUST, not_before: None }
    }
}

impl Pool {
    /// The connection that was used last and is still good.
    pub(super) fn take(&self) -> Option<Connection> {
        loop {
            let (_, mut connection) = self.lock().connections.pop()?;
            if connection.is_quiet() {
                return Some(connection);
            }
        }
    }

    /// Keeps a connection whose exchange is complete.
    pub(super) fn put(self: &Arc<Self>, mut connection: Connection) {
        let mut idle = self.lock();
        if std::mem::replace(&mut connection.used, true) {
            idle.trust = MOST_TRUST.min(idle.trust + 1);
        }
        self.keep(idle, connection);
    }

    /// Keeps a connection that carried no exchange since it was opened or taken.
    pub(super) fn put_back(self: &Arc<Self>, connection: Connection) {
        self.keep(self.lock(), connection);
    }

    fn keep(self: &Arc<Self>, mut idle: MutexGuard<'_, Idle>, connection: Connection) {
        if idle.not_before.is_some_and(|not_before| Instant::now() < not_before) {
            return;
        }
        idle.connections.push((Instant::now(), connection));
        if !std::mem::replace(&mut idle.reaping, true) {
            task::spawn("idle connections", Pool::reap(Arc::downgrade(self)));
        }
    }

    /// One that was kept was closed by the partner without a word, and cost a repeat. Where too many are, none is kept for
    /// [`NOT_KEPT_FOR`].
    pub(super) fn found_closed(&self) {
        let now = Instant::now();
        let (closed, before) = {
            let mut idle = self.lock();
            idle.trust -= CLOSED_COSTS;
            if idle.trust >= 0 {
                return;
            }
            idle.trust = MOST_TRUST;
            (std::mem::take(&mut idle.connections), idle.not_before.replace(now + NOT_KEPT_FOR))
        };
        drop(closed);
        if before.is_none_or(|before| before <= now) {
            tracing::warn!("the partner closes connections without a word; for a while each call opens one of its own");
        }
    }

    /// Closes connections that have been idle for long. Ends with the last of them, so that an idle service has no
    /// timer here.
    async fn reap(pool: Weak<Pool>) {
        loop {
            task::park(tokio::time::sleep(REAP_EVERY)).await;
            let Some(pool) = pool.upgrade() else { return };
            let Some(expired) = pool.expired() else { return };
            for connection in expired {
                drop(connection);
                // Closing a thousand sockets takes some milliseconds, which others may need.
                tokio::task::yield_now().await;
            }
        }
    }

    /// Removes those that have been idle for long; `None` if there is nothing to look after any more.
    fn expired(&self) -> Option<Vec<(Instant, Connection)>> {
        let mut idle = self.lock();
        if idle.connections.is_empty() {
            idle.connections = Vec::new();
            idle.reaping = false;
            return None;
        }
        let count = idle.connections.partition_point(|(since, _)| since.elapsed() >= IDLE_TIMEOUT);
        Some(idle.connections.drain(..count).collect())
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        lock(&self.idle)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

    use super::*;

    /// Self-signed for localhost, valid for a hundred years.
    const CERTIFICATE: &[u8] = include_bytes!("fixtures/localhost.cert.der");
    /// The same with the same key, valid for the first day of 2020.
    const EXPIRED: &[u8] = include_bytes!("fixtures/expired.cert.der");
    const KEY: &[u8] = include_bytes!("fixtures/localhost.key.der");

    /// A TLS server that sends every byte back.
    async fn echo(certificate: &'static [u8]) -> SocketAddr {
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(KEY));
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|config| {
                config.with_no_client_auth().with_single_cert(vec![CertificateDer::from(certificate)], key)
            })
            .expect("the fixtures are good");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let Ok(mut tls) = acceptor.accept(tcp).await else { continue };
                while let Ok(byte) = tls.read_u8().await {
                    let _ = tls.write_u8(byte).await;
                    let _ = tls.flush().await;
                }
            }
        });
        address
    }

    fn connector(address: SocketAddr, roots: RootCertStore) -> Connector {
        let url = format!("https://localhost:{}", address.port()).parse().expect("a URL");
        Connector::with_tls(&url, Duration::from_secs(1), Some(tls(roots).expect("good"))).expect("good")
    }

    #[tokio::test]
    async fn tls_is_spoken_and_a_quiet_connection_is_known() {
        let address = echo(CERTIFICATE).await;
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(CERTIFICATE)).expect("good");
        let mut connection = connector(address, roots).connect().await.expect("connected");
        connection.io.write_all(b"x").await.expect("sent");
        connection.io.flush().await.expect("sent");
        assert_eq!(connection.io.read_u8().await.expect("received"), b'x');
        assert!(connection.is_quiet(), "session tickets are not an answer");
        connection.io.write_all(b"y").await.expect("sent");
        connection.io.flush().await.expect("sent");
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!connection.is_quiet());
    }

    #[tokio::test]
    async fn a_certificate_that_is_not_trusted_or_not_valid_any_more_is_refused() {
        for (certificate, trusted, why) in [(CERTIFICATE, None, "UnknownIssuer"), (EXPIRED, Some(EXPIRED), "xpired")] {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(trusted.map(CertificateDer::from));
            let error = connector(echo(certificate).await, roots).connect().await.err().expect("refused");
            let message = format!("{error:#}");
            assert!(message.contains("localhost") && message.contains(why), "{message}");
        }
    }

    #[tokio::test]
    async fn a_name_without_an_address_is_named() {
        let url = "http://no-such-host.invalid".parse().expect("a URL");
        let connector = Connector::new(&url, Duration::from_secs(2)).expect("good");
        let message = format!("{:#}", connector.connect().await.err().expect("no address"));
        assert!(message.contains("no-such-host.invalid:80"), "{message}");
    }
}
