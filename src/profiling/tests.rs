use std::hint::black_box;
use std::io::Read as _;
use std::process::Command;

use axum::body::Body;
use base64::Engine as _;
use http_body_util::BodyExt;
use tower_service::Service;

use super::*;
use crate::config::{Profiling, Secret};

/// Held by tests that take profiles: the allocator's profiler is one for the process.
static PROFILER: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

const TOKEN: &str = "0123456789abcdef";

fn profiling(token: Option<&str>) -> Profiling {
    Profiling { enabled: true, listen: ([127, 0, 0, 1], 0).into(), token: token.map(Secret::new) }
}

async fn ask(token: Option<&str>, method: &str, path: &str, headers: &[(&str, &str)]) -> (u16, Vec<u8>, Response) {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut request = request.body(Body::empty()).unwrap();
    request.extensions_mut().insert(ConnectInfo(SocketAddr::from(([127, 0, 0, 1], 5000))));
    let response = router(&profiling(token)).call(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes().to_vec();
    (parts.status.as_u16(), bytes, Response::from_parts(parts, Body::empty()))
}

async fn status(token: Option<&str>, method: &str, path: &str, headers: &[(&str, &str)]) -> u16 {
    ask(token, method, path, headers).await.0
}

const INDEX: &str = "/debug/pprof/";

#[tokio::test]
async fn without_a_token_only_this_machines_own_names_are_answered() {
    for host in ["localhost", "LOCALHOST:6060", "127.0.0.1:6060", "127.0.0.1", "[::1]:6060", "[::1]"] {
        assert_eq!(status(None, "GET", INDEX, &[("host", host)]).await, 200, "{host}");
    }
    for host in
        ["attacker.example", "localhost.attacker.example:6060", "127.0.0.1.attacker.example", "10.0.0.1", "[::2]", ""]
    {
        assert_eq!(status(None, "GET", INDEX, &[("host", host)]).await, 403, "{host}");
    }
    assert_eq!(status(None, "GET", INDEX, &[]).await, 403);
    assert_eq!(status(None, "GET", INDEX, &[("host", "localhost"), ("host", "attacker.example")]).await, 403);
}

#[tokio::test]
async fn a_token_is_demanded_of_every_request() {
    let basic = |text: &str| format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(text));
    let good = [
        format!("Bearer {TOKEN}"),
        format!("bearer {TOKEN}"),
        basic(&format!("x:{TOKEN}")),
        basic(&format!(":{TOKEN}")),
    ];
    for authorization in &good {
        let headers = [("authorization", authorization.as_str()), ("host", "profiles.example")];
        assert_eq!(status(Some(TOKEN), "GET", INDEX, &headers).await, 200, "{authorization}");
    }
    let wrong = [
        String::new(),
        "Bearer".to_owned(),
        "Bearer ".to_owned(),
        format!("Bearer {TOKEN}0"),
        format!("Bearer {}", &TOKEN[1..]),
        TOKEN.to_owned(),
        basic(TOKEN),
        basic(&format!("{TOKEN}:x")),
        "Basic ###".to_owned(),
    ];
    for authorization in &wrong {
        let headers = [("authorization", authorization.as_str()), ("host", "localhost")];
        for path in [INDEX, "/debug/pprof/heap", "/nothing"] {
            let (status, _, response) = ask(Some(TOKEN), "GET", path, &headers).await;
            assert_eq!(status, 401, "{authorization:?} {path}");
            assert!(response.headers()["www-authenticate"].to_str().unwrap().starts_with("Basic "));
        }
    }
    assert_eq!(status(Some(TOKEN), "GET", INDEX, &[("host", "localhost")]).await, 401);
}

#[tokio::test]
async fn only_get_and_only_what_exists() {
    let host = [("host", "localhost")];
    for method in ["POST", "HEAD", "PUT", "OPTIONS"] {
        let (status, _, response) = ask(None, method, "/debug/pprof/heap", &host).await;
        assert_eq!((status, response.headers()["allow"].to_str().unwrap()), (405, "GET"), "{method}");
    }
    let (status, body, response) = ask(None, "GET", "/debug/pprof/nothing", &host).await;
    assert_eq!(status, 404);
    assert!(String::from_utf8(body).unwrap().contains("heap"));
    assert_eq!(response.headers()["x-content-type-options"], "nosniff");
    assert_eq!(response.headers()["x-go-pprof"], "1");
}

/// 64 MiB in blocks so much larger than the distance of two samples that each is sampled.
#[inline(never)]
fn leaking_function_of_the_test() -> Vec<Vec<u8>> {
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(black_box(vec![1_u8; 8 << 20]));
    }
    held
}

async fn heap_profile() -> Vec<u8> {
    let (status, body, response) = ask(None, "GET", "/debug/pprof/heap", &[("host", "localhost")]).await;
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
    assert_eq!(response.headers()["content-disposition"], "attachment; filename=\"heap\"");
    body
}

/// The symbols and other texts of a profile.
fn texts(profile: &[u8]) -> String {
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(profile).read_to_end(&mut bytes).expect("gzip");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The text of `go tool pprof`; `None` where there is no `go`.
fn go_tool_pprof(arguments: &[&str]) -> Option<String> {
    let output = match Command::new("go").args(["tool", "pprof"]).args(arguments).output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("NOT TESTED: `go tool pprof` is not installed (Debian: golang-go)");
            return None;
        }
        Err(error) => panic!("go tool pprof: {error}"),
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

/// The columns flat, flat%, sum%, cum, cum% of a function in the text of `go tool pprof -top`.
fn row<'a>(top: &'a str, function: &str) -> Vec<&'a str> {
    let line = top.lines().find(|line| line.trim_end().ends_with(function));
    line.unwrap_or_else(|| panic!("{function} is not in {top}")).split_whitespace().take(5).collect()
}

#[tokio::test]
async fn a_heap_profile_names_who_holds_memory_and_go_reads_it() {
    let _alone = PROFILER.lock().await;
    sample_allocations(true).expect("MALLOC_CONF was read by the allocator");
    let early = heap_profile().await;
    let held = leaking_function_of_the_test();
    let late = heap_profile().await;
    assert!(!texts(&early).contains("leaking_function_of_the_test"));
    assert!(texts(&late).contains("leaking_function_of_the_test"), "{}", texts(&late));
    assert!(!texts(&late).contains("prof_backtrace"), "the allocator's own frames are left out");
    drop(held);

    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("early"), early).unwrap();
    std::fs::write(path("late"), late).unwrap();
    if let Some(top) = go_tool_pprof(&["-top", "-cum", "-unit=mb", &path("late")]) {
        let megabytes: f64 = row(&top, "leaking_function_of_the_test")[3].trim_end_matches("MB").parse().unwrap();
        assert!((60.0..75.0).contains(&megabytes), "64 MiB are held: {top}");
    }
    if let Some(top) = go_tool_pprof(&["-top", "-unit=mb", "-base", &path("early"), &path("late")]) {
        let flat: f64 = row(&top, "alloc::vec::from_elem")[0].trim_end_matches("MB").parse().unwrap();
        assert!((60.0..75.0).contains(&flat), "the flat view names who asked, not the allocator: {top}");
    }

    sample_allocations(false).unwrap();
    let unseen = leaking_function_of_the_test();
    assert!(!texts(&heap_profile().await).contains("leaking_function_of_the_test"), "sampling is off");
    drop(unseen);
    sample_allocations(true).unwrap();
}

#[tokio::test]
async fn a_second_profile_at_the_same_time_is_refused() {
    let _alone = PROFILER.lock().await;
    let router = router(&profiling(None));
    let get = |mut router: Router| async move {
        let mut request = Request::get("/debug/pprof/heap").header("host", "localhost").body(Body::empty()).unwrap();
        request.extensions_mut().insert(ConnectInfo(SocketAddr::from(([127, 0, 0, 1], 5000))));
        router.call(request).await.unwrap()
    };
    // The first waits for the allocator's control, so that it is still there when the second comes.
    let control = jemalloc_pprof::PROF_CTL.as_ref().expect("prof:true").lock().await;
    let mut first = std::pin::pin!(get(router.clone()));
    assert!(futures::poll!(&mut first).is_pending());
    let second = get(router).await;
    drop(control);
    assert_eq!((first.await.status().as_u16(), second.status().as_u16()), (200, 409));
    let text = second.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&text).contains("heap for 127.0.0.1:5000 has been running for"), "{text:?}");
}
