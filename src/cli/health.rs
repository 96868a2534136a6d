//! `write-api health`: is the service of this machine alive? For health checks inside a container, so that the image
//! needs no HTTP client.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config::Config;

pub(super) const HELP: &str = "\
Needs: nothing but the settings of the service that runs here.

Example, in a Dockerfile:
  HEALTHCHECK CMD [\"write-api\", \"health\"]
or by hand:
  docker exec CONTAINER write-api health

Whether it can work, and not only lives, is at /readyz.

Exit codes: 0 alive, 1 a loop does not turn, or nobody answers within two seconds, 64 wrong usage, 78 wrong configuration.";

/// From connecting to the last byte; below the limits that platforms give a check.
const LIMIT: Duration = Duration::from_secs(2);

/// The most of an answer that is read.
const ANSWER_BYTES: u64 = 64 * 1024;

/// Prints what `/livez` answers, and fails unless it is 200.
pub(super) async fn run(config: &Config) -> anyhow::Result<()> {
    let address = from_here(config.admin.listen);
    let answer = timeout(LIMIT, ask(address))
        .await
        .unwrap_or_else(|_| bail!("no answer within {LIMIT:?}"))
        .with_context(|| format!("cannot ask {address} (admin.listen); does `write-api serve` run here?"))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    let status = head.split(' ').nth(1).with_context(|| format!("what listens on {address} speaks no HTTP"))?;
    print!("{body}");
    ensure!(status == "200", "/livez answers {status}; above is what it says");
    Ok(())
}

/// A listener on every address is asked on loopback.
pub(super) fn from_here(listen: SocketAddr) -> SocketAddr {
    let loopback: IpAddr = match listen.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(loopback, listen.port())
}

/// HTTP/1.0: the answer is what comes until the server closes, never in chunks.
async fn ask(address: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"GET /livez HTTP/1.0\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES).read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_every_address_is_asked_on_loopback() {
        for (listen, asked) in [
            ("0.0.0.0:8080", "127.0.0.1:8080"),
            ("[::]:8080", "[::1]:8080"),
            ("192.0.2.7:8080", "192.0.2.7:8080"),
            ("127.0.0.1:9", "127.0.0.1:9"),
        ] {
            assert_eq!(from_here(listen.parse().unwrap()), asked.parse().unwrap());
        }
    }
}
