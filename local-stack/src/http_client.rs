//! Single HTTP requests to the servers of the stack.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// From connecting to the last byte.
const TIMEOUT: Duration = Duration::from_secs(10);

/// GETs `url` (http://host:port/path) and gives the status and the body, over a connection of its own.
pub async fn get(url: &str) -> Result<(StatusCode, Bytes)> {
    send(Request::get(url), Bytes::new()).await.with_context(|| format!("GET {url} failed"))
}

/// POSTs JSON to `url` and gives the body; any status but 2xx is an error.
pub async fn post_json(url: &str, body: &impl serde::Serialize) -> Result<Bytes> {
    let request = Request::post(url).header(header::CONTENT_TYPE, "application/json");
    let (status, answer) =
        send(request, serde_json::to_vec(body)?.into()).await.with_context(|| format!("POST {url} failed"))?;
    ensure!(status.is_success(), "POST {url} answered {status}: {}", String::from_utf8_lossy(&answer));
    Ok(answer)
}

/// PUTs nothing to `url`; any status but 2xx is an error.
pub async fn put(url: &str) -> Result<()> {
    let (status, answer) = send(Request::put(url), Bytes::new()).await.with_context(|| format!("PUT {url} failed"))?;
    ensure!(status.is_success(), "PUT {url} answered {status}: {}", String::from_utf8_lossy(&answer));
    Ok(())
}

async fn send(request: http::request::Builder, body: Bytes) -> Result<(StatusCode, Bytes)> {
    tokio::time::timeout(TIMEOUT, async {
        let url = request.uri_ref().cloned().unwrap_or_default();
        let authority = url.authority().with_context(|| format!("the URL {url} names no host"))?;
        let stream = TcpStream::connect((authority.host(), authority.port_u16().unwrap_or(80))).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let target = Uri::try_from(url.path_and_query().map_or("/", |path| path.as_str()))?;
        let request = request.uri(target).header(header::HOST, authority.as_str()).body(Full::new(body))?;
        let exchange = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = response.into_body().collect().await?.to_bytes();
            anyhow::Ok((status, body))
        };
        // The connection is driven beside the exchange and goes away with it: no task is left behind.
        tokio::select! {
            result = exchange => result,
            Err(error) = connection => Err(error.into()),
        }
    })
    .await
    .with_context(|| format!("no answer after {TIMEOUT:?}"))?
}
