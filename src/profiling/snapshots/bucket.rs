//! Snapshots in S3, or in what speaks its protocol: three calls, signed by AWS's own code, with the credentials that SQS is
//! asked with. A client crate for S3 would be many times the size of this file, and bring credentials of its own.

use std::fmt;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail, ensure};
use aws_sigv4::http_request::{
    PayloadChecksumKind, PercentEncodingMode, SignableBody, SignableRequest, SigningSettings, UriPathNormalizationMode,
    sign,
};
use aws_sigv4::sign::v4;
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::sync::OnceCell;
use tokio::time::timeout;
use tokio_rustls::rustls::crypto::ring;

use crate::aws::StandardChain;
use crate::config;
use crate::profiling::pprof::MOST_BYTES;

/// Credentials, connecting, and the whole answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A connection that was not used for so long is closed.
const IDLE: Duration = Duration::from_secs(10);

/// A bucket, or what of it is below a prefix.
pub struct Bucket {
    http: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    credentials: OnceCell<StandardChain>,
    region: String,
    /// `s3://BUCKET/PREFIX`, without a slash at its end.
    url: String,
    /// `http://HOST/BUCKET`. The bucket in the path is what all that speak the protocol understand.
    endpoint: String,
    /// Empty, or with a slash at its end.
    prefix: String,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bucket({})", self.url)
    }
}

impl Bucket {
    /// Looks at no network yet.
    pub fn open(url: &str, settings: &config::S3) -> anyhow::Result<Self> {
        let url = url.trim_end_matches('/');
        let Some((bucket, prefix)) = parts(url) else { bail!("{url} names no bucket; give s3://BUCKET/PREFIX") };
        let connector = HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(ring::default_provider())
            .context("no trusted certificate was found; install ca-certificates")?
            .https_or_http()
            .enable_http1()
            .build();
        let http = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(connector);
        let host = match &settings.endpoint_url {
            Some(endpoint) => endpoint.trim_end_matches('/').to_owned(),
            None => format!("https://s3.{}.amazonaws.com", settings.region),
        };
        Ok(Bucket {
            http,
            credentials: OnceCell::new(),
            region: settings.region.clone(),
            url: url.to_owned(),
            endpoint: format!("{host}/{bucket}"),
            prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") },
        })
    }

    /// Where a file is, for people.
    pub fn place(&self, file: &str) -> String {
        format!("{}/{file}", self.url)
    }

    /// Writes a file; whoever reads it sees all of it or nothing.
    pub async fn put(&self, file: &str, content: Vec<u8>) -> anyhow::Result<()> {
        let put = self.call(Method::PUT, &self.target(file), content).await;
        put.map(drop).with_context(|| format!("cannot write {}", self.place(file)))
    }

    /// Reads a file.
    pub async fn get(&self, file: &str) -> anyhow::Result<Vec<u8>> {
        let got = self.call(Method::GET, &self.target(file), Vec::new()).await;
        Ok(got.with_context(|| format!("cannot read {}", self.place(file)))?.to_vec())
    }

    /// The files with their sizes; not what lies deeper.
    pub async fn list(&self) -> anyhow::Result<Vec<(String, u64)>> {
        let mut files = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let mut target = format!("?delimiter=%2F&list-type=2&prefix={}", encoded(&self.prefix, false));
            if let Some(token) = &token {
                target = format!("?continuation-token={}&{}", encoded(token, false), &target[1..]);
            }
            let page = self.call(Method::GET, &target, Vec::new()).await;
            let page = page.with_context(|| format!("cannot list {}", self.url))?;
            let page = String::from_utf8_lossy(&page).into_owned();
            for object in page.split("<Contents>").skip(1) {
                let (Some(key), Some(size)) = (element(object, "Key"), element(object, "Size")) else { continue };
                let Some(file) = key.strip_prefix(&self.prefix) else { continue };
                let size = size.parse().with_context(|| format!("{}: {size:?} is no size", self.place(file)))?;
                files.push((file.to_owned(), size));
            }
            token = element(&page, "NextContinuationToken");
            if token.is_none() {
                return Ok(files);
            }
        }
    }

    fn target(&self, file: &str) -> String {
        format!("/{}", encoded(&format!("{}{file}", self.prefix), true))
    }

    async fn call(&self, method: Method, target: &str, body: Vec<u8>) -> anyhow::Result<Bytes> {
        let exchange = timeout(TIMEOUT, self.exchange(method, target, body)).await;
        exchange.unwrap_or_else(|_| bail!("no answer within {TIMEOUT:?}"))
    }

    async fn exchange(&self, method: Method, target: &str, body: Vec<u8>) -> anyhow::Result<Bytes> {
        let uri = format!("{}{target}", self.endpoint);
        let chain = self.credentials.get_or_try_init(|| StandardChain::new(&self.region)).await?;
        let identity = chain.credentials().await?.into();
        let mut settings = SigningSettings::default();
        // As S3 wants it, and no other service.
        settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
        settings.percent_encoding_mode = PercentEncodingMode::Single;
        settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
        let signing = v4::SigningParams::builder()
            .identity(&identity)
            .region(&self.region)
            .name("s3")
            .time(SystemTime::now())
            .settings(settings)
            .build()?
            .into();
        let signable = SignableRequest::new(method.as_str(), &uri, std::iter::empty(), SignableBody::Bytes(&body))?;
        let (signature, _) = sign(signable, &signing)?.into_parts();
        let mut request = Request::builder().method(method).uri(&uri).body(Full::new(Bytes::from(body)))?;
        signature.apply_to_request_http1x(&mut request);

        let response = self.http.request(request).await.with_context(|| format!("no answer from {}", self.endpoint))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MOST_BYTES).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!(error))?.to_bytes();
        ensure!(status.is_success(), "{status}{}", reason(&String::from_utf8_lossy(&body)));
        Ok(body)
    }
}

/// Bucket and prefix of an S3 URL.
fn parts(url: &str) -> Option<(&str, &str)> {
    let rest = url.strip_prefix("s3://")?;
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    (!bucket.is_empty() && bucket.bytes().all(plain)).then_some((bucket, prefix))
}

/// As S3 signs it: everything but letters, digits and four signs in hexadecimal.
fn encoded(text: &str, is_path: bool) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(byte.into()),
            b'/' if is_path => encoded.push('/'),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// The text of the first element of that name. S3's answers have no attributes on these, and no element twice in one another.
fn element(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    let plain = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&apos;", "'");
    // Last, so that what it uncovers is not read again.
    Some(plain.replace("&amp;", "&"))
}

/// What S3 says of a refusal.
fn reason(xml: &str) -> String {
    let said: Vec<String> = ["Code", "Message"].iter().filter_map(|name| element(xml, name)).collect();
    if said.is_empty() { String::new() } else { format!(": {}", said.join(": ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(endpoint_url: Option<&str>) -> config::S3 {
        config::S3 { endpoint_url: endpoint_url.map(str::to_owned), region: "eu-west-1".to_owned() }
    }

    #[test]
    fn a_url_names_a_bucket_and_what_is_below_it() {
        let bucket = Bucket::open("s3://profiles/write-api/eu 1/", &settings(None)).expect("good");
        assert_eq!(bucket.place("a.pb.gz"), "s3://profiles/write-api/eu 1/a.pb.gz");
        assert_eq!(bucket.endpoint, "https://s3.eu-west-1.amazonaws.com/profiles");
        assert_eq!(bucket.target("a+b.pb.gz"), "/write-api/eu%201/a%2Bb.pb.gz");
        let bucket = Bucket::open("s3://profiles", &settings(Some("http://127.0.0.1:9000/"))).expect("good");
        assert_eq!(bucket.endpoint, "http://127.0.0.1:9000/profiles");
        assert_eq!(bucket.target("a.pb.gz"), "/a.pb.gz");
        for wrong in ["", "s3://", "s3:///x", "profiles", "https://profiles", "s3://user:secret@profiles"] {
            let error = Bucket::open(wrong, &settings(None)).expect_err("no bucket").to_string();
            assert!(error.contains("s3://BUCKET/PREFIX"), "{error}");
        }
    }

    #[test]
    fn answers_are_read() {
        let page =
            "<ListBucketResult><Contents><Key>a/x&amp;lt;.gz</Key><Size>12</Size></Contents><Contents><Key>b</Key>";
        assert_eq!(element(page, "Key").as_deref(), Some("a/x&lt;.gz"));
        assert_eq!(element(page, "Size").as_deref(), Some("12"));
        assert_eq!(element(page, "NextContinuationToken"), None);
        assert_eq!(reason("<Error><Code>NoSuchBucket</Code><Message>gone</Message></Error>"), ": NoSuchBucket: gone");
        assert_eq!(reason("<html>"), "");
    }
}
