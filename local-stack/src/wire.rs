//! A wire that can be cut: a TCP proxy between a service and one of its neighbours.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use http::Uri;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::background::{Background, accept};

/// What a wire does with its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Bytes go both ways.
    Open,
    /// Connections stay and are accepted, and nothing gets through: a neighbour that hangs.
    Stalled,
    /// Connections are closed, new ones at once: a neighbour that is away.
    Cut,
}

/// A proxy on 127.0.0.1. Ends, closing its connections, when dropped.
///
/// It serves PostgreSQL, SQS and the partner. Kafka's clients go on to the address that the broker names: give them a
/// [broker of their own](crate::Kafka::separate) instead.
#[derive(Debug)]
pub struct Wire {
    url: String,
    flow: watch::Sender<Flow>,
    _proxy: Background,
}

impl Wire {
    /// Starts an open wire to the host and port of `url`.
    pub fn to(url: &str) -> Result<Self> {
        let target = host_and_port(url)?;

        let (flow, watched) = watch::channel(Flow::Open);
        let far: Arc<str> = target.as_str().into();
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let proxy = Background::serve("wire", address, move |listener| forward(listener, far, watched))?;
        Ok(Self { url: url.replacen(&target, &proxy.address().to_string(), 1), flow, _proxy: proxy })
    }

    /// The URL given at the start, with this wire's host and port.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Changes what happens to all connections, present and future.
    pub fn set(&self, flow: Flow) {
        self.flow.send_replace(flow);
    }
}

/// `host:port` of a URL that names both.
pub(crate) fn host_and_port(url: &str) -> Result<String> {
    let target = url.parse::<Uri>().ok().and_then(|uri| uri.authority().cloned());
    let target = target.with_context(|| format!("the URL {url} names no host"))?;
    let port = target.port_u16().with_context(|| format!("the URL {url} names no port"))?;
    Ok(format!("{}:{port}", target.host()))
}

async fn forward(listener: TcpListener, target: Arc<str>, flow: watch::Receiver<Flow>) {
    loop {
        let near = accept("wire", &listener).await;
        drop(tokio::spawn(connection(near, target.clone(), flow.clone())));
    }
}

async fn connection(near: TcpStream, target: Arc<str>, flow: watch::Receiver<Flow>) {
    let mut cut = flow.clone();
    let carry = async {
        let far = TcpStream::connect(&*target).await?;
        far.set_nodelay(true)?;
        let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
        tokio::try_join!(pump(near_in, far_out, flow.clone()), pump(far_in, near_out, flow)).map(drop)
    };
    tokio::select! {
        _ = carry => {}
        _ = cut.wait_for(|flow| *flow == Flow::Cut) => {}
    }
}

/// Carries bytes one way until the reading side ends.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut flow: watch::Receiver<Flow>) -> std::io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let length = from.read(&mut buffer).await?;
        // An error means that the wire has ended, and with it this connection's task.
        let _ = flow.wait_for(|flow| *flow != Flow::Stalled).await;
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
    }
}
