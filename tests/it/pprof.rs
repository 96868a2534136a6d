//! Profiles of the running service, read with Go's own tools as an operator would.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use local_stack::{Behaviour, http_client};
use write_api::profiling::pprof::Profile;

use crate::harness::{LONG, Lane, SOON, Service, World, text, until};

/// What a flame graph says that has no box.
const NOTHING: &str = "nothing to draw";

/// `go tool pprof` with these arguments, its files in `directory`.
fn go_pprof(directory: &Path, arguments: &[&str]) -> Result<String> {
    let mut go = Command::new("go");
    go.args(["tool", "pprof"]).args(arguments);
    go.env("HOME", directory).env("PPROF_TMPDIR", directory).env("GOFLAGS", "").env("GOTOOLCHAIN", "local");
    let output = go.output().context("cannot run `go`, which reads the profiles: install Go (Debian: golang-go)")?;
    ensure!(output.status.success(), "go tool pprof {arguments:?}: {}", text(&output.stderr));
    Ok(text(&output.stdout))
}

/// A world whose runs go on for as long as anybody wants to look, and whose service is sampled densely: by one sample in
/// 512 KiB, as by default, a thousand calls would be three, and which functions those name would be luck.
async fn slow_world() -> Result<World> {
    let mut world = World::new(Behaviour { latency_ms: 60_000, ..Behaviour::default() }).await?;
    world
        .set("partner.rate_per_second", 0)
        .set("shutdown.grace", "3s")
        .set("partner.request_timeout", "2m")
        .set("partner.total_timeout", "20m")
        // So many profiles in a row may cost more than one percent of a core, and fewer samples than asked for are taken then.
        .set("profiling.cpu_budget", "1s");
    world.set_variable("MALLOC_CONF", "lg_prof_sample:12");
    world.expect_work_left();
    world.listings(3_000).await?;
    Ok(world)
}

/// The same with a service in the middle of a run.
async fn busy() -> Result<(World, Service)> {
    let world = slow_world().await?;
    let service = world.serve().await?;
    world.refresh(&[])?;
    until("calls", SOON, async || Ok((world.partner.stats().in_flight == 1_000).then_some(()))).await?;
    Ok((world, service))
}

/// Lines of `go tool pprof -top`: flat and cumulative bytes by function.
fn functions(report: &str) -> Vec<(i64, &str)> {
    let lines = report.lines().skip_while(|line| !line.contains("flat%")).skip(1);
    let parsed = lines.filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let cumulative: i64 = fields.get(3)?.trim_end_matches('B').parse().ok()?;
        let function = line.split_once(fields[4])?.1.trim();
        Some((cumulative, function))
    });
    parsed.collect()
}

#[tokio::test]
async fn go_tool_pprof_names_the_functions_that_hold_memory() -> Result<()> {
    let (world, service) = busy().await?;
    let directory = world.path("");
    let url = format!("{}/debug/pprof/heap", service.profiling_url());
    let report = go_pprof(&directory, &["-top", "-cum", "-unit=B", "-nodefraction=0", &url])?;
    ensure!(report.contains("Type: inuse_space"), "{report}");
    let functions = functions(&report);
    let most = functions.first().context("an empty profile")?.0;
    ensure!(most >= 512 * 1024, "{report}");
    let own = functions.iter().filter(|(_, name)| name.contains("write_api::")).count();
    ensure!(own >= 3, "{own} functions of write_api in\n{report}");
    let nameless = functions.iter().filter(|(_, name)| name.is_empty() || name.starts_with("0x")).count();
    ensure!(nameless * 10 <= functions.len(), "{nameless} of {} functions have no name:\n{report}", functions.len());
    // The allocator's own frames would take the blame for everything.
    ensure!(!report.contains("_rjem_") && !report.contains("prof_backtrace"), "{report}");
    world.finish(service).await
}

#[tokio::test]
async fn go_tool_pprof_shows_what_grew_between_two_files() -> Result<()> {
    let world = slow_world().await?;
    let service = world.serve().await?;
    let url = format!("{}/debug/pprof/heap", service.profiling_url());
    let save = async |name: &str| -> Result<String> {
        let (status, profile) = http_client::get(&url).await?;
        ensure!(status.is_success(), "{status}: {}", text(&profile));
        let path = world.path(name);
        std::fs::write(&path, profile)?;
        Ok(path.display().to_string())
    };
    let early = save("early.pb.gz").await?;
    world.refresh(&[])?;
    until("calls", SOON, async || Ok((world.partner.stats().in_flight == 1_000).then_some(()))).await?;
    let late = save("late.pb.gz").await?;

    let directory = world.path("");
    let top = ["-top", "-cum", "-unit=B", "-nodefraction=0"];
    let total = |report: &str| functions(report).iter().map(|(bytes, _)| *bytes).max().unwrap_or(0);
    let grown = go_pprof(&directory, &[&top[..], &["-base", &early, &late]].concat())?;
    let whole = go_pprof(&directory, &[&top[..], &[&late]].concat())?;
    ensure!(total(&grown) > 0 && total(&grown) <= total(&whole), "grown:\n{grown}\nwhole:\n{whole}");
    ensure!(functions(&grown).iter().any(|(bytes, name)| *bytes > 0 && name.contains("valuations_refresh")), "{grown}");
    let nothing = go_pprof(&directory, &[&top[..], &["-base", &late, &late]].concat())?;
    ensure!(total(&nothing) == 0, "a profile differs from itself:\n{nothing}");
    world.finish(service).await
}

#[tokio::test]
async fn go_tool_pprof_tells_memory_by_kind_of_event() -> Result<()> {
    let (world, service) = busy().await?;
    let directory = world.path("");
    let save = async |name: &str| -> Result<String> {
        let (status, profile) = http_client::get(&format!("{}/debug/pprof/{name}", service.profiling_url())).await?;
        ensure!(status.is_success(), "{status}: {}", text(&profile));
        let path = world.path(name);
        std::fs::write(&path, profile)?;
        Ok(path.display().to_string())
    };
    let (heap, allocs) = (save("heap").await?, save("allocs").await?);

    let tags = go_pprof(&directory, &["-tags", "-unit=B", &heap])?;
    for label in ["event_kind: Total", "stage: Total", "valuations.refresh", "service", "call"] {
        ensure!(tags.contains(label), "{label} is not in {tags}");
    }
    let top = ["-top", "-cum", "-unit=B", "-nodefraction=0"];
    let total = |arguments: &[&str], file: &str| -> Result<i64> {
        let report = go_pprof(&directory, &[&top[..], arguments, &[file]].concat())?;
        Ok(functions(&report).iter().map(|(bytes, _)| *bytes).max().unwrap_or(0))
    };
    // A thousand calls are out and nothing else is at work.
    let refresh = total(&["-tagfocus=event_kind=valuations.refresh"], &heap)?;
    let calls = total(&["-tagfocus=stage=call"], &heap)?;
    ensure!(refresh >= 1_000 * 1024, "{refresh} bytes for a thousand calls");
    ensure!(calls > refresh / 2 && calls <= refresh, "{calls} of {refresh} bytes for calls");
    ensure!(total(&["-tagfocus=event_kind=valuations.publish"], &heap)? == 0, "nothing was published yet");
    // Together they are all there is.
    let roots = go_pprof(&directory, &[&top[..], &["-tagroot=event_kind", &heap]].concat())?;
    let root = |name: &str| functions(&roots).iter().find(|(_, function)| *function == name).map(|(bytes, _)| *bytes);
    let (service_s, refresh_s) = (root("service"), root("valuations.refresh"));
    ensure!(refresh_s == Some(refresh), "{refresh_s:?} is not {refresh}:\n{roots}");
    let header = roots.lines().find(|line| line.contains("% of ")).context("no header")?.to_owned();
    let all: i64 = header
        .split("% of ")
        .nth(1)
        .and_then(|rest| rest.split("B total").next()?.parse().ok())
        .with_context(|| format!("no total in {header:?}"))?;
    ensure!(service_s.unwrap_or(0) + refresh == all, "{service_s:?} and {refresh} are not {all}");

    let report = go_pprof(&directory, &["-top", &allocs])?;
    ensure!(report.contains("Type: alloc_space"), "{report}");
    ensure!(total(&["-sample_index=alloc_space"], &heap)? > total(&["-sample_index=inuse_space"], &heap)?);
    let raw = go_pprof(&directory, &["-raw", &allocs])?;
    ensure!(raw.contains("alloc_objects/count alloc_space/bytes[dflt] inuse_objects/count inuse_space/bytes"), "{raw}");
    ensure!(raw.contains("PeriodType: space bytes") && raw.contains("event_kind:[valuations.refresh]"), "{raw}");
    // Taking the first of the two is no work of the service, and not in the second.
    ensure!(!raw.contains("profiling::heap::profile"), "{raw}");
    // More than one file has code: the program and the C library at least, and each is known by its own build id.
    let mappings = raw.split("Mappings").nth(1).context("no mappings")?;
    ensure!(mappings.contains("write-api") && mappings.contains("libc.so"), "{mappings}");
    world.finish(service).await
}

#[tokio::test]
async fn the_memory_for_a_profile_goes_back() -> Result<()> {
    const MIB: f64 = 1024.0 * 1024.0;
    let world = World::new(Behaviour::default()).await?;
    let service = world.serve().await?;
    service.ready().await?;
    let resident = async || service.metric("process_resident_memory_bytes").await;
    let before = resident().await?;
    for path in ["heap", "allocs?debug=1", "heap?format=svg"] {
        let (status, profile) = http_client::get(&format!("{}/debug/pprof/{path}", service.profiling_url())).await?;
        ensure!(status.is_success(), "{status}: {}", text(&profile));
    }
    until("memory within 20 MiB of what it was", Duration::from_secs(15), async || {
        Ok((resident().await? < before + 20.0 * MIB).then_some(()))
    })
    .await?;
    world.finish(service).await
}

#[tokio::test]
async fn a_difference_needs_no_file() -> Result<()> {
    let world = slow_world().await?;
    let service = world.serve().await?;
    service.ready().await?;
    let url = format!("{}/debug/pprof/heap?seconds=5", service.profiling_url());
    let difference = tokio::spawn(async move { http_client::get(&url).await });
    world.refresh(&[])?;
    until("calls", SOON, async || Ok((world.partner.stats().in_flight == 1_000).then_some(()))).await?;
    let (status, profile) = difference.await??;
    ensure!(status.is_success(), "{status}: {}", text(&profile));
    let path = world.path("heap-delta");
    std::fs::write(&path, profile)?;
    let file = path.display().to_string();
    let directory = world.path("");
    let report = go_pprof(&directory, &["-top", "-cum", "-unit=B", "-nodefraction=0", &file])?;
    ensure!(report.contains("Duration: "), "{report}");
    ensure!(
        functions(&report).iter().any(|(bytes, name)| *bytes > 0 && name.contains("valuations_refresh")),
        "{report}"
    );
    world.finish(service).await
}

/// Whether it is a line of the collapsed form.
fn counts_something(line: &str) -> bool {
    line.rsplit_once(' ').is_some_and(|(stack, number)| !stack.is_empty() && number.parse::<i64>().is_ok())
}

/// Every profile in every form it has, in the middle of a run: what Go's tools and people are promised.
#[tokio::test]
async fn every_mode_has_every_form() -> Result<()> {
    let (world, service) = busy().await?;
    let directory = world.path("");
    let get = async |path: &str| -> Result<Vec<u8>> {
        let (status, body) = http_client::get(&format!("{}/debug/pprof/{path}", service.profiling_url())).await?;
        ensure!(status.is_success(), "{path}: {status}: {}", text(&body));
        Ok(body.to_vec())
    };
    // No call ends in a minute, and stacks of the other waits are drawn by lot.
    until("the stack of a wait", SOON, async || {
        // Profiles may be asked for once a second, and those below use up what may be asked for at once.
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok(text(&get("block?debug=1").await?).contains('@').then_some(()))
    })
    .await?;
    let opened = async |path: &str| -> Result<String> {
        let file = world.path("profile");
        std::fs::write(&file, get(path).await?)?;
        let file = file.display().to_string();
        let report = go_pprof(&directory, &["-top", "-nodefraction=0", &file])?;
        ensure!(report.contains("Showing nodes"), "{path}: {report}");
        Ok(go_pprof(&directory, &["-raw", &file])? + &report)
    };
    for (mode, types) in [
        ("heap", "alloc_objects/count alloc_space/bytes inuse_objects/count inuse_space/bytes[dflt]"),
        ("allocs", "alloc_objects/count alloc_space/bytes[dflt] inuse_objects/count inuse_space/bytes"),
        ("goroutine", "goroutine/count[dflt] waits/count"),
        ("threadcreate", "threadcreate/count"),
        ("block", "contentions/count delay/nanoseconds[dflt]"),
        ("mutex", "contentions/count delay/nanoseconds[dflt]"),
    ] {
        let report = opened(mode).await?;
        ensure!(report.contains(types), "{mode}: {report}");
        let delta = opened(&format!("{mode}?seconds=1")).await?;
        ensure!(delta.contains(types) && delta.contains("Duration: "), "{mode}?seconds=1: {delta}");
        let people = text(&get(&format!("{mode}?debug=1")).await?);
        // No test can make two threads of the service meet at a lock, so there may be no wait to show: that one is shown
        // with its stack is for the unit tests of profiling.
        let shown = if mode == "mutex" { "--- mutex:" } else { "@" };
        ensure!(!people.contains('\u{fffd}') && people.contains(shown), "{mode}: {people}");
        let lines = text(&get(&format!("{mode}?format=collapsed")).await?);
        ensure!(lines.lines().all(counts_something), "{mode}: {lines}");
        let svg = text(&get(&format!("{mode}?format=svg")).await?);
        ensure!(svg.contains("<svg") && svg.trim_end().ends_with("</svg>"), "{mode}: {svg}");
        if mode != "mutex" {
            ensure!(!lines.is_empty(), "{mode}: no line");
            ensure!(!svg.contains(NOTHING), "{mode}: {svg}");
        }
    }
    let cpu = opened("profile?seconds=2&hz=250").await?;
    ensure!(cpu.contains("samples/count cpu/nanoseconds[dflt]"), "{cpu}");
    ensure!(cpu.contains("PeriodType: cpu nanoseconds") && cpu.contains("Period: 4000000"), "{cpu}");

    // What they show: a thousand calls that wait, in the one task of the run.
    let tasks = text(&get("goroutine?debug=1").await?);
    ensure!(tasks.contains("1000 @ partner\tsrc/partner/client.rs:"), "{tasks}");
    // Each task says where it waits.
    ensure!(!tasks.contains("place unknown"), "{tasks}");
    let tasks = text(&get("goroutine?debug=2").await?);
    ensure!(tasks.contains("kind valuations.refresh, about ") && tasks.contains("created by src/queue/"), "{tasks}");
    let trace: serde_json::Value = serde_json::from_slice(&get("trace?seconds=60").await?)?;
    ensure!(
        trace["traceEvents"].as_array().is_some_and(|events| events.iter().any(|e| e["name"] == "read")),
        "{trace}"
    );
    let line = text(&get("cmdline").await?);
    ensure!(line.contains("write-api\0serve"), "{line:?}");
    let raw = opened("heap").await?;
    let address = raw
        .lines()
        .find(|line| line.contains("write_api::"))
        .and_then(|line| line.split_whitespace().find(|word| word.starts_with("0x")))
        .context("no location of ours")?;
    let named = text(&get(&format!("symbol?{address}")).await?);
    ensure!(named.starts_with("num_symbols: 1\n") && named.contains("write_api"), "{address}: {named}");
    let index = text(&get("").await?);
    ensure!(["heap", "profile", "goroutine", "trace", "seconds=N"].iter().all(|word| index.contains(word)), "{index}");
    world.finish(service).await
}

/// CPU time is charged to the kind of event that used it.
#[tokio::test]
async fn cpu_time_is_told_by_kind_of_event() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 0, ..Behaviour::default() }).await?;
    // So that it goes on for longer than all four profiles of it.
    world.set("partner.rate_per_second", 4_000).set("shutdown.grace", "3s");
    world.expect_work_left();
    world.listings(60_000).await?;
    let service = world.serve().await?;
    service.ready().await?;
    let url = format!("{}/debug/pprof/profile?seconds", service.profiling_url());
    let sampled = tokio::spawn({
        let url = format!("{url}=3&hz=500");
        async move { http_client::get(&url).await }
    });
    world.refresh(&[])?;
    let (status, profile) = sampled.await??;
    ensure!(status.is_success(), "{status}: {}", text(&profile));
    let (_, lines) = http_client::get(&format!("{url}=1&format=collapsed")).await?;
    let lines = text(&lines);
    let of_calls = |line: &str| line.starts_with("valuations.refresh;call;");
    ensure!(lines.lines().any(of_calls) && lines.lines().all(counts_something), "{lines}");
    let (_, as_text) = http_client::get(&format!("{url}=1&debug=1")).await?;
    ensure!(text(&as_text).lines().any(of_calls), "{}", text(&as_text));
    let (_, svg) = http_client::get(&format!("{url}=1&format=svg")).await?;
    let svg = text(&svg);
    ensure!(svg.contains("valuations.refresh") && svg.trim_end().ends_with("</svg>"), "{svg}");
    let file = world.path("cpu").display().to_string();
    std::fs::write(&file, profile)?;
    let directory = world.path("");
    let tags = go_pprof(&directory, &["-tags", &file])?;
    for label in ["event_kind: Total", "valuations.refresh", "thread: Total", "worker", "stage: Total", "call"] {
        ensure!(tags.contains(label), "{label} is not in {tags}");
    }
    let calls = go_pprof(&directory, &["-top", "-cum", "-tagfocus=stage=call", &file])?;
    ensure!(calls.contains("partner::"), "{calls}");
    world.finish(service).await
}

/// Slow events are not worked on by the thread of the fast ones, but for being forwarded, nor fast ones by theirs.
#[tokio::test]
async fn fast_events_have_a_thread_of_their_own() -> Result<()> {
    let mut world = World::new(Behaviour { latency_ms: 0, ..Behaviour::default() }).await?;
    world.set("partner.rate_per_second", 1_000).set("shutdown.grace", "3s");
    world.expect_work_left();
    world.listings(20_000).await?;
    let service = world.serve().await?;
    service.ready().await?;
    let id = world.refresh(&[])?;
    world.run_until(&id, SOON, |run| run.valued > 0).await?;
    until("the end of the forwarding", SOON, async || Ok((world.depth(Lane::Events).await? == (0, 0)).then_some(())))
        .await?;
    let mut sender = tokio::process::Command::from(world.command());
    sender.args(["send", "upsert", "--sample", "2000", "--rate", "500"]).stdout(Stdio::null()).kill_on_drop(true);
    let mut sender = sender.spawn()?;
    let url = format!("{}/debug/pprof/profile?seconds=3&hz=500", service.profiling_url());
    let (status, profile) = http_client::get(&url).await?;
    ensure!(status.is_success(), "{status}: {}", text(&profile));
    ensure!(sender.wait().await?.success(), "the fast events were not sent");
    let profile = Profile::decode(&profile)?;
    let mut threads: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for sample in &profile.samples {
        let label = |key| sample.label(key).with_context(|| format!("a sample without {key}"));
        threads.entry(label("event_kind")?).or_default().insert(label("thread")?);
    }
    ensure!(threads.get("listing.upsert") == Some(&BTreeSet::from(["fast events"])), "{threads:?}");
    ensure!(threads.get("valuations.refresh") == Some(&BTreeSet::from(["worker"])), "{threads:?}");
    world.finish(service).await
}

/// A request that wants the place of another gets it, and the other is told.
#[tokio::test]
async fn a_profile_makes_room_for_one_that_is_wanted_more() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let service = world.serve().await?;
    service.ready().await?;
    let base = format!("{}/debug/pprof", service.profiling_url());
    let long = tokio::spawn({
        let url = format!("{base}/profile?seconds=60");
        async move {
            loop {
                let (status, body) = http_client::get(&url).await?;
                // One of those below may have had the place when this one came: it comes again.
                if !text(&body).contains("has been running") {
                    return anyhow::Ok((status, body));
                }
            }
        }
    });
    let busy = until("the place to be taken", SOON, async || {
        let (status, body) = http_client::get(&format!("{base}/heap")).await?;
        Ok((status.as_u16() == 409).then(|| text(&body)))
    })
    .await?;
    ensure!(busy.contains("profile for 127.0.0.1") && busy.contains("force=1"), "{busy}");
    let (status, _) = http_client::get(&format!("{base}/heap?force=1")).await?;
    ensure!(status.is_success(), "{status}");
    let (status, told) = long.await??;
    ensure!(status.as_u16() == 409 && text(&told).contains("taken by heap"), "{status}: {}", text(&told));
    world.finish(service).await
}

/// GETs the heap profile with a header of one's own; gives the status.
fn status_with(service: &Service, header: &str) -> Result<u16> {
    let address = service.profiling_url().trim_start_matches("http://").to_owned();
    let mut stream = TcpStream::connect(&address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    write!(stream, "GET /debug/pprof/heap HTTP/1.1\r\nHost: {address}\r\n{header}Connection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let line = text(&answer).lines().next().unwrap_or_default().to_owned();
    line.split(' ').nth(1).and_then(|status| status.parse().ok()).with_context(|| format!("no status in {line:?}"))
}

#[tokio::test]
async fn a_token_that_is_set_is_needed() -> Result<()> {
    const TOKEN: &str = "0123456789abcdef-token";
    let mut world = World::new(Behaviour::default()).await?;
    let file = world.path("token");
    std::fs::write(&file, format!("{TOKEN}\n"))?;
    world.set("profiling.token_file", file.display());
    let service = world.serve().await?;
    for wrong in ["", "Authorization: Bearer 0123456789abcdef-guess\r\n", "Authorization: Basic eDp4\r\n"] {
        ensure!(status_with(&service, wrong)? == 401, "{wrong:?} was let in");
    }
    ensure!(status_with(&service, &format!("Authorization: Bearer {TOKEN}\r\n"))? == 200);
    let url = service.profiling_url().replace("http://", &format!("http://x:{TOKEN}@"));
    go_pprof(&world.path(""), &["-top", &format!("{url}/debug/pprof/heap")])?;
    // The pages of health and metrics are for everyone on the other port, and only they are there.
    ensure!(service.page("/livez").await?.0 == 200);
    ensure!(service.page("/debug/pprof/heap").await?.0 == 404);
    world.finish(service).await
}

#[tokio::test]
async fn an_address_that_others_reach_needs_a_token() -> Result<()> {
    let mut world = World::bare(1, Behaviour::default()).await?;
    for listen in ["0.0.0.0:0", "[::]:0", "192.0.2.1:6060"] {
        world.set("profiling.listen", listen);
        let output = world.cli(&["serve"])?;
        let said = text(&output.stderr);
        ensure!(output.status.code() == Some(78), "{listen}: {output:?}");
        ensure!(said.contains("profiling.listen") && said.contains("profiling.token_file"), "{said}");
    }
    Ok(())
}

#[tokio::test]
async fn a_service_without_profiling_has_no_such_listener() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    world.set("profiling.enabled", false);
    let service = world.serve().await?;
    let url = format!("{}/debug/pprof/heap", service.profiling_url());
    ensure!(http_client::get(&url).await.is_err(), "somebody listens");
    world.listings(10).await?;
    let id = world.refresh(&[])?;
    world.published(&id, LONG).await?;
    world.quiet(LONG).await?;
    world.finish(service).await
}
