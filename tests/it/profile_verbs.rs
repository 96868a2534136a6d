//! `write-api profile`: what it says of files, of a directory of snapshots, and of a running service.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use local_stack::Behaviour;
use serde_json::Value;
use write_api::profiling::pprof::Profile;

use crate::harness::{SOON, World, text, until};
use crate::snapshots::taken;

/// A world whose service writes snapshots, is sampled densely, and holds a thousand calls for as long as anybody looks.
async fn world() -> Result<World> {
    let mut world = World::new(Behaviour { latency_ms: 60_000, ..Behaviour::default() }).await?;
    let directory = world.path("snapshots");
    world
        .set("profiling.snapshots.directory", directory.display())
        .set("profiling.snapshots.interval", "5s")
        .set("partner.rate_per_second", 0)
        .set("partner.request_timeout", "2m")
        .set("partner.total_timeout", "20m")
        .set("shutdown.grace", "3s");
    world.set_variable("MALLOC_CONF", "lg_prof_sample:12");
    world.expect_work_left();
    world.listings(1_000).await?;
    Ok(world)
}

fn json(world: &World, arguments: &[&str]) -> Result<Value> {
    let out = world.done(arguments)?;
    serde_json::from_str(&out).with_context(|| out.clone())
}

#[tokio::test]
async fn what_grew_while_a_slow_event_is_worked_on_is_named_from_snapshots_files_and_the_service_itself() -> Result<()>
{
    let world = world().await?;
    let directory = world.path("snapshots");
    let service = world.serve().await?;
    taken(&directory, "start", |_| true).await?;
    let idle = world.path("idle.pb.gz").display().to_string();
    let said = world.done(&["profile", "fetch", service.profiling_url(), "--output", &idle])?;
    ensure!(said.contains(&idle), "{said}");
    let mode = fs::metadata(&idle)?.permissions().mode() & 0o777;
    ensure!(mode == 0o600 && !Profile::decode(&fs::read(&idle)?)?.samples.is_empty(), "{mode:o}");

    world.refresh(&[])?;
    until("calls", SOON, async || Ok((world.partner.stats().in_flight == 1_000).then_some(()))).await?;
    let refresh = "valuations.refresh";
    taken(&directory, "interval", |record| record.events_in_flight.contains_key(refresh)).await?;

    // From the snapshots, which the settings say where they are.
    let grew = world.done(&["profile", "grew"])?;
    let first = grew.lines().next().context("nothing said")?;
    ensure!(first.starts_with(&format!("{refresh} grew most")), "{grew}");
    ensure!(grew.lines().nth(1).is_some_and(|line| line.contains("write_api::")), "{grew}");
    let grown = json(&world, &["profile", "grew", "--json"])?;
    ensure!(grown["kinds"][0]["kind"] == refresh && grown["functions"][0]["kind"] == refresh, "{grown}");

    // From a file and the service.
    let output = world.path("change").display().to_string();
    let diff = world.done(&["profile", "diff", &idle, service.profiling_url(), "--output", &output])?;
    ensure!(diff.starts_with("inuse_space: +") && diff.contains(refresh), "{diff}");
    let svg = fs::read_to_string(format!("{output}.svg"))?;
    ensure!(svg.contains("rgb(250,") && svg.contains(refresh), "no flame graph of a difference");
    let difference = Profile::decode(&fs::read(format!("{output}.pb.gz"))?)?;
    let held = difference.sample_type("inuse_space").context("no inuse_space")?;
    let sum: i64 = difference.samples.iter().map(|sample| sample.values[held]).sum();
    ensure!(sum >= 1 << 20, "a difference of {sum} bytes for a thousand calls");
    let files = world.done(&["profile", "grew", &idle, &format!("{}#last", directory.display())])?;
    ensure!(files.starts_with(refresh), "{files}");

    let top = json(&world, &["profile", "top", service.profiling_url(), "--json"])?;
    let kinds = top["kinds"].as_array().context("no kinds")?;
    let sum: i64 = kinds.iter().filter_map(|kind| kind["value"].as_i64()).sum();
    ensure!(kinds.iter().any(|kind| kind["kind"] == refresh) && Some(sum) == top["total"].as_i64(), "{top}");
    ensure!(kinds.is_sorted_by_key(|kind| std::cmp::Reverse(kind["value"].as_i64())), "{top}");
    ensure!(top["functions"].as_array().is_some_and(|all| !all.is_empty() && all.len() <= 20), "{top}");

    let output = world.path("flame.svg").display().to_string();
    world.done(&["profile", "flamegraph", &format!("{}#peak", directory.display()), "--output", &output])?;
    ensure!(fs::read_to_string(&output)?.contains(refresh), "no {refresh} in the flame graph");
    world.finish(service).await
}

#[tokio::test]
async fn snapshots_are_listed_and_chosen_by_process_and_number() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let directory = world.path("snapshots");
    let nothing = world.cli(&["profile", "list"])?;
    let said = text(&nothing.stderr);
    ensure!(nothing.status.code() == Some(1) && said.contains("profiling.snapshots.directory"), "{said}");
    world.set("profiling.snapshots.directory", directory.display());
    let mut starts = Vec::new();
    for _ in 0..2 {
        let service = world.serve().await?;
        let known = starts.last().copied().unwrap_or(0);
        starts.push(taken(&directory, "start", |record| record.start_ms > known).await?.start_ms);
        world.finish(service).await?;
    }
    let list = world.done(&["profile", "list"])?;
    ensure!(list.starts_with("4 snapshots in "), "{list}");
    for start in &starts {
        ensure!(list.contains(&format!("--start {start}")), "{start} is not in {list}");
    }
    let ours = |list: &Value| list.as_array().map_or(0, Vec::len);
    let all = json(&world, &["profile", "list", "--json"])?;
    ensure!(ours(&all) == 4 && all[0]["reason"] == "start" && all[3]["reason"] == "stop", "{all}");
    ensure!(all[0]["profile"].as_str().is_some_and(|path| Path::new(path).is_file()), "{all}");
    let first = starts[0].to_string();
    let of_first = json(&world, &["profile", "list", "--start", &first, "--json"])?;
    ensure!(ours(&of_first) == 2 && of_first[1]["start_ms"].as_u64() == Some(starts[0]), "{of_first}");

    let place = directory.display().to_string();
    let name = |arguments: &[&str]| -> Result<String> {
        let top = json(&world, &[&["profile", "top", "--json"], arguments].concat())?;
        Ok(top["source"].as_str().unwrap_or_default().to_owned())
    };
    ensure!(name(&[&place])?.contains(&format!("{}_000002_stop", starts[1])), "the last of the newest process");
    ensure!(name(&[&format!("{place}#first"), "--start", &first])?.contains(&format!("{first}_000001_start")));
    ensure!(name(&[&format!("{place}#2"), "--start", &first])?.contains("_000002_stop"));
    for (arguments, reason) in [
        (vec!["profile", "top", "/nonexistent"], "/nonexistent: there is no such file or directory"),
        (vec!["profile", "top", "#nothing"], "first, last, peak"),
        (vec!["profile", "grew", &format!("{place}#peak")], "leave out what is after #"),
        (vec!["profile", "grew", &place, "--every", "3"], "for one running service"),
        (vec!["profile", "top", "http://127.0.0.1:1", "--start", "3"], "choose a process"),
        (vec!["profile", "fetch", &place, "--mode", "block"], "for a running service"),
        (vec!["profile", "fetch", &place, "--seconds", "3"], "for a running service"),
        (vec!["profile", "top", "https://x:secret@host"], "forward its port"),
        (vec!["profile", "list", "--host", "nobody"], "no snapshot"),
        (vec!["profile", "grew", "http://127.0.0.1:1"], "cannot get"),
    ] {
        let output = world.cli(&arguments)?;
        let said = text(&output.stderr);
        ensure!(output.status.code() == Some(1) && said.contains(reason), "{arguments:?}: {said}");
        ensure!(!said.contains("secret"), "{said}");
    }
    let one = format!("{place}#9");
    let gone = text(&world.cli(&["profile", "top", &one])?.stderr);
    ensure!(gone.contains("no snapshot 9") && gone.contains("profile list"), "{gone}");
    Ok(())
}

#[tokio::test]
async fn a_service_with_a_token_is_asked_with_the_one_of_the_settings_or_of_the_url() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    world.set("profiling.token", "0123456789abcdef");
    let service = world.serve().await?;
    let url = service.profiling_url().to_owned();
    world.done(&["profile", "top", &url])?;
    world.set("profiling.token", "");
    let refused = world.cli(&["profile", "top", &url])?;
    ensure!(refused.status.code() == Some(1) && text(&refused.stderr).contains("401"), "{}", text(&refused.stderr));
    world.done(&["profile", "top", &url.replace("http://", "http://x:0123456789abcdef@")])?;
    let wrong = world.cli(&["profile", "fetch", &url.replace("http://", "http://x:a-wrong-one@")])?;
    let said = text(&wrong.stderr);
    ensure!(wrong.status.code() == Some(1) && !said.contains("a-wrong-one"), "{said}");
    world.finish(service).await
}
