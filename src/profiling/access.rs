//! Who may take a profile.
//!
//! A profile shows names, sizes and load, and costs time. Without a token the listener is on loopback, where the only
//! stranger is a web page in a browser on the same machine. A page whose own name was made to resolve to this address (DNS
//! rebinding) sends that name in `Host`, and is refused. One that asks for this address cannot read the answer, but would have
//! the work done: browsers say where such a request comes from (`Sec-Fetch-Site`, `Origin`), and it is refused too. With a
//! token every request has to bring it, also on loopback.

use std::net::{IpAddr, Ipv6Addr};

use axum::extract::Request;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use subtle::ConstantTimeEq;

use super::failure;
use crate::config::{self, Secret};

/// The rule of one listener.
pub(super) struct Access {
    token: Option<Secret>,
}

/// Why a request is not let in.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Method,
    Token,
    Host,
    Site,
}

impl Access {
    pub fn new(profiling: &config::Profiling) -> Self {
        Access { token: profiling.token.clone() }
    }

    pub fn decide(&self, request: &Request) -> Result<(), Refusal> {
        let headers = request.headers();
        let allowed = match &self.token {
            Some(token) => brings(headers, token).then_some(()).ok_or(Refusal::Token),
            None => names_this_machine(headers).then_some(()).ok_or(Refusal::Host),
        };
        // HEAD is refused as well: its answer would cost a profile.
        let is_read = match *request.method() {
            Method::GET => true,
            // A long list of addresses does not fit into a query.
            Method::POST => request.uri().path() == "/debug/pprof/symbol",
            _ => false,
        };
        let own = if is_of_another_site(headers) { Err(Refusal::Site) } else { Ok(()) };
        allowed.and(own).and(if is_read { Ok(()) } else { Err(Refusal::Method) })
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Refusal::Method => {
                let text = "only GET";
                ([(header::ALLOW, "GET")], failure(StatusCode::METHOD_NOT_ALLOWED, text)).into_response()
            }
            Refusal::Token => {
                let text = "the token of profiling.token is needed: `Authorization: Bearer TOKEN`, or http://x:TOKEN@HOST:PORT/...";
                let ask = [(header::WWW_AUTHENTICATE, "Basic realm=\"profiling\", charset=\"UTF-8\"")];
                (ask, failure(StatusCode::UNAUTHORIZED, text)).into_response()
            }
            Refusal::Site => {
                failure(StatusCode::FORBIDDEN, "a web page of another site asks for this; open the address itself")
            }
            Refusal::Host => failure(
                StatusCode::FORBIDDEN,
                "ask by localhost, 127.0.0.1 or [::1]; other names need a token (profiling.token)",
            ),
        }
    }
}

/// Whether the request brings the token, as `Bearer` or as the password of `Basic`, which is how a URL carries it.
fn brings(headers: &HeaderMap, token: &Secret) -> bool {
    let Some((scheme, credentials)) = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
    else {
        return false;
    };
    let brought = if scheme.eq_ignore_ascii_case("bearer") {
        credentials.trim().as_bytes().to_vec()
    } else if scheme.eq_ignore_ascii_case("basic") {
        let decoded = STANDARD.decode(credentials.trim()).unwrap_or_default();
        match decoded.iter().position(|byte| *byte == b':') {
            Some(colon) => decoded[colon + 1..].to_vec(),
            None => return false,
        }
    } else {
        return false;
    };
    // In constant time, so that the time of the answer does not tell how much of a guess is right.
    brought.ct_eq(token.reveal().as_bytes()).into()
}

/// Whether a browser says that a page of another site asks. Programs send neither header.
fn is_of_another_site(headers: &HeaderMap) -> bool {
    let own = |origin: &[u8]| {
        let host = headers.get(header::HOST).map(|host| host.as_bytes()).unwrap_or_default();
        origin.strip_prefix(b"http://").or(origin.strip_prefix(b"https://")) == Some(host)
    };
    let site = headers.get("sec-fetch-site").map(|site| site.as_bytes());
    site.is_some_and(|site| site != b"same-origin" && site != b"none")
        || headers.get(header::ORIGIN).is_some_and(|origin| !own(origin.as_bytes()))
}

/// Whether `Host` is a name that only this machine has for itself; the port does not matter.
fn names_this_machine(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next().and_then(|host| host.to_str().ok()), hosts.next()) else {
        return false;
    };
    let Ok(authority) = host.parse::<axum::http::uri::Authority>() else {
        return false;
    };
    let name = authority.host();
    if let Some(address) = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
        return address.parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback());
    }
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn decided(headers: &[(&str, &str)]) -> Result<(), Refusal> {
        let mut request = Request::builder().uri("/debug/pprof/heap");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Access { token: None }.decide(&request.body(Body::empty()).expect("a request"))
    }

    #[test]
    fn programs_and_this_machines_own_pages_are_let_in() {
        let host = ("host", "localhost:6060");
        // Typed into the browser, and a link of the index page.
        assert_eq!(decided(&[host, ("sec-fetch-site", "none")]), Ok(()));
        assert_eq!(decided(&[host, ("sec-fetch-site", "same-origin"), ("origin", "http://localhost:6060")]), Ok(()));
    }

    #[test]
    fn pages_of_others_are_refused() {
        let host = ("host", "127.0.0.1:6060");
        for site in ["cross-site", "same-site"] {
            assert_eq!(decided(&[host, ("sec-fetch-site", site)]), Err(Refusal::Site), "{site}");
        }
        for origin in ["https://evil.example", "null", "http://127.0.0.1:8080", "http://127.0.0.1:6060.evil.example"] {
            assert_eq!(decided(&[host, ("origin", origin)]), Err(Refusal::Site), "{origin}");
        }
    }
}
