//! A secured listener in front of a broker: TLS, and authentication by SASL, as a cluster outside of this machine
//! demands them. librdkafka's mock cluster has neither.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, anyhow};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto};

use super::sasl::{Exchange, Step, User};
use crate::background::Background;
use crate::certificates::Certificate;

/// The largest frame that is taken: a client that speaks something else must not make the gateway allocate what its
/// first bytes say.
const FRAME_BYTES: usize = 64 * 1024 * 1024;

/// Kafka's numbers of the requests that the gateway knows, and the only ones before a client has said who it is.
const API_VERSIONS: i16 = 18;
const SASL_HANDSHAKE: i16 = 17;
const SASL_AUTHENTICATE: i16 = 36;
/// Kafka's error codes.
const UNSUPPORTED_SASL_MECHANISM: i16 = 33;
const SASL_AUTHENTICATION_FAILED: i16 = 58;

/// What a gateway demands.
#[derive(Clone, Debug, Default)]
pub struct Security {
    /// The gateway's certificate; without one, connections are plain.
    pub certificate: Option<Certificate>,
    /// The certificate of an authority: clients must show one that it issued.
    pub clients_of: Option<PathBuf>,
    /// The one user that there is; without one, nobody is asked.
    pub user: Option<User>,
}

/// A listener on 127.0.0.1. Ends, closing its connections, when dropped.
///
/// Brokers name their own addresses to clients, which then connect there. The gateway puts its own in their place, so
/// all that its clients send goes through it.
#[derive(Debug)]
pub struct Gateway {
    gate: Arc<Gate>,
    proxy: Background,
}

/// What its connections share.
#[derive(Debug)]
struct Gate {
    broker: SocketAddr,
    user: Option<User>,
    admitted: AtomicU64,
}

impl Gateway {
    /// Starts a gateway to the broker at `bootstrap` (127.0.0.1:port).
    pub fn to(bootstrap: &str, security: &Security) -> Result<Self> {
        let broker = bootstrap.parse().with_context(|| format!("the broker {bootstrap} is no address"))?;
        let acceptor = security.certificate.as_ref().map(|own| acceptor(own, security)).transpose()?;
        let gate = Arc::new(Gate { broker, user: security.user.clone(), admitted: AtomicU64::new(0) });
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let shared = gate.clone();
        let proxy = Background::serve("kafka gateway", address, move |listener| accept(listener, acceptor, shared))?;
        Ok(Self { gate, proxy })
    }

    /// host:port for Kafka clients.
    #[must_use]
    pub fn bootstrap(&self) -> String {
        self.proxy.address().to_string()
    }

    /// Connections that met all demands.
    #[must_use]
    pub fn admitted(&self) -> u64 {
        self.gate.admitted.load(Ordering::Relaxed)
    }
}

fn acceptor(own: &Certificate, security: &Security) -> Result<TlsAcceptor> {
    let provider = Arc::new(crypto::ring::default_provider());
    let chain = certificates(&own.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&own.key).map_err(|e| anyhow!("{}: {e}", own.key.display()))?;
    let config = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let config = match &security.clients_of {
        None => config.with_no_client_auth(),
        Some(authority) => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(certificates(authority)?);
            config
                .with_client_cert_verifier(WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build()?)
        }
    };
    Ok(TlsAcceptor::from(Arc::new(config.with_single_cert(chain, key)?)))
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect);
    read.map_err(|error| anyhow!("{}: {error}", file.display()))
}

async fn accept(listener: TcpListener, acceptor: Option<TlsAcceptor>, gate: Arc<Gate>) {
    while let Ok((near, _)) = listener.accept().await {
        let (acceptor, gate) = (acceptor.clone(), gate.clone());
        tokio::spawn(async move {
            let gateway = near.local_addr()?;
            near.set_nodelay(true)?;
            let ended = match acceptor {
                None => gate.carry(near, gateway).await,
                Some(acceptor) => gate.carry(acceptor.accept(near).await?, gateway).await,
            };
            if let Err(error) = &ended {
                tracing::debug!(%error, "a connection to the gateway ended");
            }
            ended
        });
    }
}

impl Gate {
    async fn carry(&self, near: impl AsyncRead + AsyncWrite, gateway: SocketAddr) -> io::Result<()> {
        let mut far = TcpStream::connect(self.broker).await?;
        far.set_nodelay(true)?;
        let (mut near_in, mut near_out) = tokio::io::split(Box::pin(near));
        if let Some(user) = &self.user {
            authenticate(user, &mut near_in, &mut near_out, &mut far).await?;
        }
        self.admitted.fetch_add(1, Ordering::Relaxed);
        let (mut far_in, mut far_out) = far.into_split();
        let answers = async {
            loop {
                let mut frame = read_frame(&mut far_in).await?;
                put_in_place_of(self.broker, gateway, &mut frame);
                write_frame(&mut near_out, &frame).await?;
            }
        };
        // Whichever side ends, both do.
        tokio::select! {
            copied = tokio::io::copy(&mut near_in, &mut far_out) => copied.map(drop),
            ended = answers => ended,
        }
    }
}

/// Answers a client until it has said who it is; one that cannot is refused and cut off.
async fn authenticate(
    user: &User,
    near_in: &mut (impl AsyncRead + Unpin),
    near_out: &mut (impl AsyncWrite + Unpin),
    far: &mut TcpStream,
) -> io::Result<()> {
    let refused = |why: &str| io::Error::new(io::ErrorKind::PermissionDenied, why.to_owned());
    let mut exchange: Option<Exchange> = None;
    loop {
        let frame = read_frame(near_in).await?;
        let request = Request::parse(&frame).ok_or_else(|| refused("a request that cannot be read"))?;
        let mut answer = request.correlation.to_be_bytes().to_vec();
        match request.api {
            API_VERSIONS => {
                write_frame(far, &frame).await?;
                answer = read_frame(far).await?;
                if request.version <= 2 {
                    add_sasl(&mut answer);
                }
                write_frame(near_out, &answer).await?;
            }
            SASL_HANDSHAKE => {
                let mechanism = request.text().ok_or_else(|| refused("a handshake without a mechanism"))?;
                let known = mechanism == user.mechanism;
                exchange = known.then(|| Exchange::new(user));
                answer.extend(if known { 0 } else { UNSUPPORTED_SASL_MECHANISM }.to_be_bytes());
                answer.extend(1_i32.to_be_bytes());
                answer.extend((user.mechanism.len() as i16).to_be_bytes());
                answer.extend(user.mechanism.as_bytes());
                write_frame(near_out, &answer).await?;
            }
            SASL_AUTHENTICATE => {
                let exchange = exchange.as_mut().ok_or_else(|| refused("authentication before the handshake"))?;
                let said = request.bytes().ok_or_else(|| refused("authentication without bytes"))?;
                let step = exchange.step(said);
                let (code, reply) = match &step {
                    Step::Continue(reply) | Step::Admitted(reply) => (0, reply.as_slice()),
                    Step::Refused => (SASL_AUTHENTICATION_FAILED, &[][..]),
                };
                answer.extend(code.to_be_bytes());
                // No message: a null string.
                answer.extend((-1_i16).to_be_bytes());
                answer.extend((reply.len() as i32).to_be_bytes());
                answer.extend(reply);
                write_frame(near_out, &answer).await?;
                match step {
                    Step::Continue(_) => {}
                    Step::Admitted(_) => return Ok(()),
                    Step::Refused => return Err(refused("a wrong user or password")),
                }
            }
            other => return Err(refused(&format!("request {other} from nobody we know"))),
        }
    }
}

/// A request's header, version 1, and its body.
struct Request<'a> {
    api: i16,
    version: i16,
    correlation: i32,
    body: &'a [u8],
}

impl<'a> Request<'a> {
    fn parse(frame: &'a [u8]) -> Option<Self> {
        let (api, rest) = frame.split_first_chunk()?;
        let (version, rest) = rest.split_first_chunk()?;
        let (correlation, rest) = rest.split_first_chunk()?;
        let (client_id, rest) = rest.split_first_chunk()?;
        let client_id = usize::try_from(i16::from_be_bytes(*client_id)).unwrap_or(0);
        Some(Self {
            api: i16::from_be_bytes(*api),
            version: i16::from_be_bytes(*version),
            correlation: i32::from_be_bytes(*correlation),
            body: rest.get(client_id..)?,
        })
    }

    fn text(&self) -> Option<&'a str> {
        let (length, rest) = self.body.split_first_chunk()?;
        std::str::from_utf8(rest.get(..usize::try_from(i16::from_be_bytes(*length)).ok()?)?).ok()
    }

    fn bytes(&self) -> Option<&'a [u8]> {
        let (length, rest) = self.body.split_first_chunk()?;
        rest.get(..usize::try_from(i32::from_be_bytes(*length)).ok()?)
    }
}

/// Adds the two requests of SASL to the broker's list of what it understands: correlation, error code, count, and six
/// bytes for each (key, first and last version).
fn add_sasl(answer: &mut Vec<u8>) {
    const COUNT: std::ops::Range<usize> = 6..10;
    let Some(count) = answer.get(COUNT).and_then(|count| <[u8; 4]>::try_from(count).ok()) else { return };
    let count = u32::from_be_bytes(count);
    let end = COUNT.end + 6 * count as usize;
    if end > answer.len() {
        return;
    }
    let more = [SASL_HANDSHAKE, 0, 1, SASL_AUTHENTICATE, 0, 0].into_iter().flat_map(i16::to_be_bytes);
    answer.splice(end..end, more);
    answer.splice(COUNT, (count + 2).to_be_bytes());
}

/// Replaces a broker's address by another wherever an answer names it. Both are on 127.0.0.1, so lengths stay.
fn put_in_place_of(broker: SocketAddr, gateway: SocketAddr, frame: &mut [u8]) {
    let mut named = broker.ip().to_string().into_bytes();
    named.extend(i32::from(broker.port()).to_be_bytes());
    let port = i32::from(gateway.port()).to_be_bytes();
    let mut begin = 0;
    while let Some(found) = frame[begin..].windows(named.len()).position(|window| window == named) {
        let end = begin + found + named.len();
        frame[end - port.len()..end].copy_from_slice(&port);
        begin = end;
    }
}

async fn read_frame(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let length = from.read_u32().await? as usize;
    if length > FRAME_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    let mut frame = vec![0; length];
    from.read_exact(&mut frame).await?;
    Ok(frame)
}

async fn write_frame(to: &mut (impl AsyncWrite + Unpin), frame: &[u8]) -> io::Result<()> {
    let mut message = (frame.len() as u32).to_be_bytes().to_vec();
    message.extend(frame);
    to.write_all(&message).await?;
    to.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_replaced_wherever_it_is_named() {
        let (broker, gateway) = (SocketAddr::from(([127, 0, 0, 1], 9092)), SocketAddr::from(([127, 0, 0, 1], 20_000)));
        let named = |port: i32| [b"127.0.0.1".as_slice(), &port.to_be_bytes()].concat();
        let mut frame = [named(9092), vec![7; 3], named(9093), named(9092)].concat();
        put_in_place_of(broker, gateway, &mut frame);
        assert_eq!(frame, [named(20_000), vec![7; 3], named(9093), named(20_000)].concat());
    }

    #[test]
    fn the_requests_of_sasl_are_added_to_the_list() {
        let mut answer = [&[0, 0, 0, 9, 0, 0, 0, 0, 0, 1][..], &[0, 18, 0, 0, 0, 2], &[0, 0, 0, 0]].concat();
        add_sasl(&mut answer);
        let expected =
            [&[0, 0, 0, 9, 0, 0, 0, 0, 0, 3][..], &[0, 18, 0, 0, 0, 2], &[0, 17, 0, 0, 0, 1], &[0, 36, 0, 0, 0, 0]];
        assert_eq!(answer, [&expected.concat()[..], &[0, 0, 0, 0]].concat());
    }
}
