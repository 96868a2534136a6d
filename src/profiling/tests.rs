use std::hint::black_box;

use axum::body::Body;
use base64::Engine as _;
use http_body_util::BodyExt;
use tower_service::Service;

use super::*;
use crate::config::{Profiling, S3, Secret, Snapshots};
use crate::task::mark::{self, Kind, Mark, Stage};
use crate::task::usage;

/// Held by tests that take profiles: the allocator's profiler is one for the process.
static PROFILER: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Has the allocator sample or not. Other tests that take profiles hold up the switch.
async fn sample(enabled: bool) {
    while let Err(error) = sample_allocations(enabled) {
        assert!(error.to_string().ends_with("a profile is being taken"), "{error:#}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Has the allocator sample while whoever asked holds what is returned.
async fn sampling() -> tokio::sync::MutexGuard<'static, ()> {
    let alone = PROFILER.lock().await;
    sample(true).await;
    alone
}

const TOKEN: &str = "0123456789abcdef";

fn profiling(token: Option<&str>) -> Profiling {
    let snapshots = Snapshots {
        directory: None,
        interval: Duration::from_secs(30),
        growth_bytes: 0,
        budget_bytes: 1 << 20,
        max_count: 10,
        max_age: Duration::from_secs(3600),
        memory_limit_bytes: None,
        s3_url: None,
        s3: S3 { endpoint_url: None, region: "us-east-1".to_owned() },
    };
    let cpu_budget = Duration::from_millis(10);
    Profiling {
        enabled: true,
        listen: ([127, 0, 0, 1], 0).into(),
        token: token.map(Secret::new),
        cpu_budget,
        snapshots,
    }
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

#[tokio::test]
async fn whoever_asks_too_often_is_told_when_to_come_back_and_strangers_cost_nobody_a_turn() {
    let mut router = router(&profiling(Some(TOKEN)));
    let mut get = async |path: &str, token: &str| {
        let mut request = Request::builder().uri(path).header("authorization", format!("Bearer {token}"));
        request = request.header("host", "localhost");
        let mut request = request.body(Body::empty()).unwrap();
        request.extensions_mut().insert(ConnectInfo(SocketAddr::from(([127, 0, 0, 1], 5000))));
        router.call(request).await.unwrap()
    };
    for _ in 0..100 {
        assert_eq!(get("/debug/pprof/heap?seconds=0", "somebody else's").await.status(), 401);
        assert_eq!(get(INDEX, TOKEN).await.status(), 200);
    }
    // Wrong options make cheap requests.
    let mut passed = 0;
    let refused = loop {
        let response = get("/debug/pprof/heap?seconds=0", TOKEN).await;
        if response.status() != 400 {
            break response;
        }
        passed += 1;
        assert!(passed < 1000, "nothing is limited");
    };
    assert!(passed >= 50, "{passed}");
    assert_eq!((refused.status().as_u16(), refused.headers()["retry-after"].to_str().unwrap()), (429, "1"));
    assert_eq!(refused.headers()["x-go-pprof"], "1");
    let text = refused.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&text).contains("ask again in 1 s"), "{text:?}");
    for free in [INDEX, "/debug/pprof/cmdline"] {
        assert_eq!(get(free, TOKEN).await.status(), 200, "{free}");
    }
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

async fn body_of(path: &str) -> Vec<u8> {
    let (status, body, _) = ask(None, "GET", path, &[("host", "localhost")]).await;
    assert_eq!(status, 200, "{path}: {}", String::from_utf8_lossy(&body));
    body
}

async fn profile_at(path: &str) -> Profile {
    Profile::decode(&body_of(path).await).unwrap()
}

/// All functions that a profile names.
fn functions(profile: &Profile) -> Vec<&str> {
    profile.functions.iter().map(|function| function.name.as_str()).collect()
}

/// The sum of a sample type over the stacks with such a function, and with such a label if one is given.
fn sum(profile: &Profile, sample_type: &str, function: &str, label: Option<(&str, &str)>) -> i64 {
    let index = profile.sample_type(sample_type).unwrap();
    let fits = |sample: &&pprof::Sample| {
        pprof::frames(profile, sample).iter().any(|name| name.ends_with(function))
            && label.is_none_or(|(key, text)| sample.label(key) == Some(text))
    };
    profile.samples.iter().filter(fits).map(|sample| sample.values[index]).sum()
}

/// What [`leaking_function_of_the_test`] holds. Blocks of that size are scaled too, by a ten-millionth, and rounded.
fn assert_64_mib(bytes: i64) {
    const MIB_64: i64 = 64 << 20;
    assert!((MIB_64..MIB_64 + 64).contains(&bytes), "{bytes} bytes are not {MIB_64}");
}

#[tokio::test]
async fn a_profile_has_the_four_sample_types_of_gos() {
    let _alone = sampling().await;
    for (name, default) in [("heap", "inuse_space"), ("allocs", "alloc_space")] {
        let (status, body, response) =
            ask(None, "GET", &format!("/debug/pprof/{name}"), &[("host", "localhost")]).await;
        assert_eq!(status, 200);
        assert_eq!(response.headers()["content-disposition"], format!("attachment; filename=\"{name}\"").as_str());
        let profile = Profile::decode(&body).unwrap();
        let types: Vec<String> =
            profile.sample_types.iter().map(|pprof::ValueType { kind, unit }| format!("{kind}/{unit}")).collect();
        assert_eq!(types, ["alloc_objects/count", "alloc_space/bytes", "inuse_objects/count", "inuse_space/bytes"]);
        assert_eq!(profile.default_sample_type, default);
        assert_eq!((profile.period_type.kind.as_str(), profile.period), ("space", 1 << 19));
        assert!(profile.time_nanos > 0);
        assert!(profile.mappings[0].has_functions, "{:?}", profile.mappings);
    }
}

#[tokio::test]
async fn what_is_freed_leaves_the_heap_and_stays_in_allocs() {
    let _alone = sampling().await;
    let name = "leaking_function_of_the_test";
    let early = profile_at("/debug/pprof/allocs").await;
    let held = leaking_function_of_the_test();
    let late = profile_at("/debug/pprof/allocs").await;
    drop(held);
    let last = profile_at("/debug/pprof/allocs").await;
    let grown = |profile: &Profile, kind| sum(profile, kind, name, None) - sum(&early, kind, name, None);
    assert_eq!([grown(&late, "inuse_objects"), grown(&late, "alloc_objects")], [8, 8]);
    assert_64_mib(grown(&late, "inuse_space"));
    assert_64_mib(grown(&late, "alloc_space"));
    assert_eq!([grown(&last, "inuse_objects"), grown(&last, "inuse_space")], [0, 0]);
    assert_eq!(grown(&last, "alloc_objects"), 8);
    assert_64_mib(grown(&last, "alloc_space"));
    let functions = functions(&late);
    for allocators in ["prof_backtrace", "_rjem_", "do_rallocx", "by_frame_pointers"] {
        assert!(!functions.iter().any(|name| name.contains(allocators)), "{allocators}");
    }
}

#[tokio::test]
async fn memory_is_labelled_with_the_kind_of_event_that_allocated_it() {
    let _alone = sampling().await;
    let name = "leaking_function_of_the_test";
    let mark = |kind, stage| Mark { kind, stage };
    let early = profile_at("/debug/pprof/heap").await;
    let ours = mark::under(mark(Kind::ValuationsRefresh, Stage::Call), leaking_function_of_the_test);
    let plain = leaking_function_of_the_test();
    let late = profile_at("/debug/pprof/heap").await;
    let held = |profile: &Profile, key, text| sum(profile, "inuse_space", name, Some((key, text)));
    let grown = |key, text| held(&late, key, text) - held(&early, key, text);
    assert_64_mib(grown("event_kind", "valuations.refresh"));
    assert_64_mib(grown("stage", "call"));
    assert_64_mib(grown("event_kind", "service"));
    for sample in &late.samples {
        assert!(sample.label("event_kind").is_some(), "{sample:?}");
        assert!(sample.labels.len() <= 2, "each label once: {sample:?}");
    }
    // Whoever frees it: it is the kind's that allocated it.
    mark::under(mark(Kind::ListingUpsert, Stage::Write), || drop(ours));
    let last = profile_at("/debug/pprof/heap").await;
    assert_eq!(held(&last, "event_kind", "valuations.refresh"), held(&early, "event_kind", "valuations.refresh"));
    drop(plain);
}

#[tokio::test]
async fn what_samples_say_of_a_kind_is_what_the_allocator_counted() {
    let _alone = sampling().await;
    let allocated = |profile: &Profile| sum(profile, "alloc_space", "", Some(("event_kind", "planted")));
    let (early, counted) = (profile_at("/debug/pprof/allocs").await, usage::of_kind(Kind::Planted).allocated);
    // 8 GiB in blocks of many sizes, of which about 16,000 are sampled: right to one in a hundred.
    mark::under(Mark { kind: Kind::Planted, stage: Stage::Other }, || {
        for round in 0..131_072_usize {
            drop(black_box(Vec::<u8>::with_capacity(1 + round * 7919 % 131_072)));
        }
    });
    let (late, recounted) = (profile_at("/debug/pprof/allocs").await, usage::of_kind(Kind::Planted).allocated);
    let (sampled, exact) = ((allocated(&late) - allocated(&early)) as f64, (recounted - counted) as f64);
    assert!(exact > 7e9, "{exact}");
    assert!((sampled / exact - 1.0).abs() < 0.05, "{sampled} bytes by samples, {exact} by the allocator's count");
}

/// 16 MiB in four blocks, so large that each is sampled for certain.
#[inline(never)]
fn planted_leak(leaked: &mut Vec<Vec<u8>>) {
    for _ in 0..4 {
        leaked.push(black_box(Vec::with_capacity(4 << 20)));
    }
}

#[tokio::test]
async fn what_grew_over_many_profiles_names_the_kind_that_leaks_and_its_function_first() {
    let _alone = sampling().await;
    let under = |kind| Mark { kind, stage: Stage::Other };
    let counted = || {
        let used = usage::of_kind(Kind::Planted);
        used.allocated as i64 - used.freed as i64
    };
    let (mut leaked, mut in_flight, mut profiles) = (Vec::new(), Vec::new(), Vec::new());
    let before = counted();
    for round in 0..12 {
        mark::under(under(Kind::Planted), || planted_leak(&mut leaked));
        // An event that holds more than all that leaked comes and goes in between, and another one at the very end.
        if [3, 4, 5, 11].contains(&round) {
            in_flight
                .push(mark::under(under(Kind::ValuationsRefresh), || black_box(Vec::<u8>::with_capacity(1 << 30))));
        } else {
            in_flight.clear();
        }
        profiles.push(profile_at("/debug/pprof/heap").await);
    }
    let exact = counted() - before;
    let held = profiles[0].sample_type("inuse_space").unwrap();
    let kinds = growth::rank(&profiles.iter().map(|profile| growth::by_kind(profile, held)).collect::<Vec<_>>());
    assert_eq!((kinds[0].key.as_str(), kinds[0].rose), ("planted", 11), "{kinds:#?}");
    let places: Vec<_> = profiles
        .iter()
        .map(|profile| {
            growth::by_place(profile, held, growth::PROGRAM)
                .into_iter()
                .map(|(place, amount)| (place, amount.own))
                .collect()
        })
        .collect();
    let first = &growth::rank(&places)[0];
    let named = (first.key.kind.as_str(), first.key.function.as_str());
    assert_eq!(named, ("planted", "write_api::profiling::tests::planted_leak"), "{first:?}");
    // What the samples say of the kind is what the allocator has counted for it.
    let sampled = kinds[0].series[11];
    assert!(exact >= 192 << 20, "{exact}");
    assert!((sampled as f64 / exact as f64 - 1.0).abs() < 0.05, "{sampled} bytes by samples, {exact} counted");
    drop((leaked, in_flight));
}

#[tokio::test]
async fn a_difference_shows_what_changed_meanwhile() {
    let _alone = sampling().await;
    let before = leaking_function_of_the_test();
    let held = std::thread::spawn(|| {
        std::thread::sleep(Duration::from_millis(700));
        let held = leaking_function_of_the_test();
        // Until the second profile is taken.
        std::thread::sleep(Duration::from_secs(4));
        held
    });
    let (status, body, response) = ask(None, "GET", "/debug/pprof/heap?seconds=2", &[("host", "localhost")]).await;
    assert_eq!(status, 200);
    assert_eq!(response.headers()["content-disposition"], "attachment; filename=\"heap-delta\"");
    let difference = Profile::decode(&body).unwrap();
    assert_64_mib(sum(&difference, "inuse_space", "leaking_function_of_the_test", None));
    assert!((1_900_000_000..10_000_000_000).contains(&difference.duration_nanos), "{}", difference.duration_nanos);
    drop(held.join().unwrap());
    drop(before);
}

#[tokio::test]
async fn other_forms_are_for_those_without_go() {
    let _alone = sampling().await;
    let held = mark::under(Mark { kind: Kind::ValuationsPublish, stage: Stage::Publish }, leaking_function_of_the_test);
    let text = String::from_utf8(body_of("/debug/pprof/heap?debug=1&gc=1").await).unwrap();
    assert!(text.starts_with("heap profile: ") && text.lines().next().unwrap().ends_with("@ heap/524288"), "{text}");
    assert!(text.contains("leaking_function_of_the_test\n"), "{text}");
    assert!(text.contains("\n# labels: {\"event_kind\":\"valuations.publish\", \"stage\":\"publish\"}\n"), "{text}");

    let collapsed = String::from_utf8(body_of("/debug/pprof/heap?format=collapsed").await).unwrap();
    let ours = |line: &&str| {
        line.starts_with("valuations.publish;publish;")
            && line.contains(";write_api::profiling::tests::leaking_function_")
    };
    let line = collapsed.lines().find(ours).expect(&collapsed);
    assert_64_mib(line.rsplit(' ').next().unwrap().parse().unwrap());

    let svg = String::from_utf8(body_of("/debug/pprof/allocs?format=svg").await).unwrap();
    assert!(svg.contains("allocs: alloc_space") && svg.contains("leaking_function_of_the_test"), "{svg}");
    drop(held);
    for query in ["seconds=0", "seconds=1000", "seconds=1&debug=1", "format=pdf"] {
        let path = format!("/debug/pprof/heap?{query}");
        let (status, _, response) = ask(None, "GET", &path, &[("host", "localhost")]).await;
        assert_eq!((status, response.headers()["x-go-pprof"].to_str().unwrap()), (400, "1"), "{query}");
    }
}

#[tokio::test]
async fn what_samples_nothing_shows_nothing_new() {
    let _alone = sampling().await;
    sample(false).await;
    let unseen = leaking_function_of_the_test();
    let profile = profile_at("/debug/pprof/heap").await;
    assert!(!functions(&profile).iter().any(|name| name.ends_with("leaking_function_of_the_test")), "sampling is off");
    drop(unseen);
    sample(true).await;
}

#[inline(never)]
fn waiting_function_of_the_test(mutex: &std::sync::Mutex<()>) {
    drop(black_box(crate::task::lock(mutex)));
}

/// Whether two threads of a service meet at a lock is luck. Here one has it until the other has waited long enough to be
/// sampled for certain.
#[tokio::test]
async fn a_wait_at_a_lock_is_in_the_mutex_profile_with_its_stack_and_its_kind() {
    use crate::task::{For, contention, places};

    let _alone = sampling().await;
    let mutex = &std::sync::Mutex::new(());
    let long = contention::rate(For::Lock) * 10;
    let is_ours = |row: &places::Row| {
        row.reason == For::Lock && row.place.is_some_and(|place| place.file() == file!()) && row.waited.now > 0
    };
    std::thread::scope(|scope| {
        let held = mutex.lock().unwrap();
        let waiting = Mark { kind: Kind::ValuationsPublish, stage: Stage::Write };
        scope.spawn(move || mark::under(waiting, || waiting_function_of_the_test(mutex)));
        while !places::rows().iter().any(is_ours) {
            std::thread::yield_now();
        }
        std::thread::sleep(long);
        drop(held);
    });
    let profile = profile_at("/debug/pprof/mutex").await;
    let kind = Some((EVENT_KIND, "valuations.publish"));
    let delay = sum(&profile, "delay", "waiting_function_of_the_test", kind);
    assert!(u128::try_from(delay).unwrap() >= long.as_nanos(), "{delay} ns");
    let block = profile_at("/debug/pprof/block").await;
    assert_eq!(sum(&block, "delay", "waiting_function_of_the_test", None), 0, "a lock is no other wait");
    let text = String::from_utf8(body_of("/debug/pprof/mutex?debug=1").await).unwrap();
    assert!(text.contains(" @ 0x") && text.contains("\"waits_for\":\"lock\""), "{text}");
    assert!(
        text.lines().any(|line| line.starts_with("#\t") && line.contains("waiting_function_of_the_test")),
        "{text}"
    );
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

#[tokio::test]
async fn each_address_is_named_once_and_no_more_than_some_at_a_time() {
    let _held: Vec<Vec<u8>> = (0..4).map(|_| vec![1; 4 << 20]).collect();
    let (_, body, _) = ask(None, "GET", "/debug/pprof/heap", &[("host", "localhost")]).await;
    let profile = Profile::decode(&body).unwrap();
    let of_program = |location: &&pprof::Location| location.mapping == Some(0) && !location.lines.is_empty();
    let here = profile.locations.iter().find(of_program).map(|location| format!("{:#x}", location.address)).unwrap();
    let (status, body, _) =
        ask(None, "GET", &format!("/debug/pprof/symbol?{here}+{here}+{here}"), &[("host", "localhost")]).await;
    let text = String::from_utf8(body).unwrap();
    assert!(status == 200 && text.matches(&here).count() == 1 && text.lines().count() == 2, "{status}: {text}");
    let many = vec!["0x1"; MOST_ADDRESSES + 1].join("+");
    let (status, body, _) = ask(None, "GET", &format!("/debug/pprof/symbol?{many}"), &[("host", "localhost")]).await;
    let text = String::from_utf8(body).unwrap();
    assert!(status == 400 && text.contains("4097 addresses"), "{status}: {text}");
}
