//! Profiles from a running service, over HTTP.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{Request, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config::Secret;
use crate::profiling::pprof::MOST_BYTES;

/// For everything but the profile itself: the service takes a second or two for it.
const LIMIT: Duration = Duration::from_secs(30);

/// A service, or what forwards to it.
#[derive(Debug)]
pub(super) struct Live {
    /// `HOST:PORT`
    pub address: String,
    authorization: Option<Secret>,
}

impl Live {
    /// Reads `http://HOST:PORT`, as `go tool pprof` takes it with a token, `http://x:TOKEN@HOST:PORT`; a path is of no
    /// interest. Without a token in it the one of the settings is sent.
    pub fn parse(url: &str, token: Option<&Secret>) -> anyhow::Result<Self> {
        let parsed: Uri = url.parse().with_context(|| format!("{} is no URL", without_token(url)))?;
        let authority = parsed.authority().with_context(|| format!("{} names no host", without_token(url)))?;
        let address = format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(6060));
        let authorization = match authority.as_str().rsplit_once('@') {
            Some((user, _)) => {
                // As Go's tools do, which is what URLs with a token are written for.
                let user: Vec<u8> = percent_decode_str(user).collect();
                Some(Secret::new(format!("Basic {}", STANDARD.encode(user))))
            }
            None => token.map(|token| Secret::new(format!("Bearer {}", token.reveal()))),
        };
        Ok(Live { address, authorization })
    }

    /// The profile of a mode, such as `heap`, with what changed within `seconds` where that is given.
    pub async fn profile(&self, mode: &str, seconds: Option<u32>) -> anyhow::Result<Vec<u8>> {
        let path = match seconds {
            Some(seconds) => format!("/debug/pprof/{mode}?seconds={seconds}"),
            None => format!("/debug/pprof/{mode}"),
        };
        // A CPU profile takes 30 s unless told otherwise.
        let limit = LIMIT + Duration::from_secs(u64::from(seconds.unwrap_or(30)));
        timeout(limit, self.get(&path))
            .await
            .unwrap_or_else(|_| bail!("no answer within {limit:?}"))
            .with_context(|| format!("cannot get {path} from http://{}", self.address))
    }

    async fn get(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        let stream = TcpStream::connect(&self.address).await.context(
            "is the service there, and this its profiling.listen? In Kubernetes: kubectl port-forward deploy/write-api 6060",
        )?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let mut request = Request::get(path).header(header::HOST, &self.address);
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization.reveal());
        }
        let request = request.body(Empty::<Bytes>::new())?;
        let exchange = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MOST_BYTES).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!(error))?.to_bytes();
            ensure!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body).trim());
            Ok(body.to_vec())
        };
        // The connection is driven beside the exchange and goes away with it.
        tokio::select! {
            done = exchange => done,
            Err(error) = connection => Err(error.into()),
        }
    }
}

/// A URL that may be shown.
pub(super) fn without_token(url: &str) -> String {
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let end = rest.find('/').unwrap_or(rest.len());
            let host = rest[..end].rsplit('@').next().unwrap_or_default();
            format!("{scheme}://{host}{}", &rest[end..])
        }
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_into_the_header_and_nowhere_else() {
        let settings = Secret::new("from-the-settings");
        let live = Live::parse("http://x:TOKEN@pod-1:6060/debug/pprof/", Some(&settings)).unwrap();
        assert_eq!(live.address, "pod-1:6060");
        assert_eq!(live.authorization.as_ref().map(Secret::reveal), Some("Basic eDpUT0tFTg=="));
        assert!(!format!("{live:?}").contains("eDpUT0tFTg"), "{live:?}");
        // What has a meaning of its own in a URL is written as %40.
        let live = Live::parse("http://x:a%40b%25@pod-1:6060", None).unwrap();
        assert_eq!(live.authorization.as_ref().map(Secret::reveal), Some("Basic eDphQGIl"));
        let live = Live::parse("http://[::1]", Some(&settings)).unwrap();
        assert_eq!(live.address, "[::1]:6060");
        assert_eq!(live.authorization.as_ref().map(Secret::reveal), Some("Bearer from-the-settings"));
        assert!(Live::parse("http://127.0.0.1:6060", None).unwrap().authorization.is_none());
        let error = format!("{:#}", Live::parse("http://x:TOKEN@ho st", None).unwrap_err());
        assert!(error.contains("http://ho st") && !error.contains("TOKEN"), "{error}");
    }
}
