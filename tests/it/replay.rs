//! Recorded events go to the queue again: all of them, at the pace that was asked for, from where it was interrupted, and
//! nothing at all if a line is bad.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use local_stack::Behaviour;
use serde_json::{Value, json};

use crate::bad_input::{PUBLISH, REFRESH, UPSERT, event, listing, unreadable};
use crate::harness::{LONG, SOON, World, text, until};
use crate::sqs_stub::{Manner, SqsStub};

const NIGHT: &str = "2026-01-31T02:00:00Z";

fn upsert(listing_id: i64) -> Value {
    event(&format!("u-{listing_id}"), UPSERT, NIGHT, listing(listing_id, 50_000_000 + listing_id))
}

fn upserts(count: i64) -> Vec<Value> {
    (1..=count).map(upsert).collect()
}

fn lines(events: &[Value]) -> String {
    events.iter().map(|event| format!("{event}\n")).collect()
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// Files, and a stub to replay them to.
struct Bench {
    stub: SqsStub,
    directory: tempfile::TempDir,
}

impl Bench {
    async fn new(manner: Manner) -> Result<Self> {
        Ok(Self { stub: SqsStub::start(manner).await?, directory: tempfile::tempdir()? })
    }

    fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.directory.path().join(name);
        fs::write(&path, bytes)?;
        Ok(path)
    }

    fn command(&self, file: &Path, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_write-api"));
        command.env_clear().envs(self.stub.settings()).arg("replay").arg(file).args(options);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a replay to its end. The stub answers meanwhile.
    async fn replay(&self, file: &Path, options: &[&str]) -> Result<Output> {
        let mut command = self.command(file, options);
        Ok(tokio::task::spawn_blocking(move || command.output()).await??)
    }

    async fn done(&self, file: &Path, options: &[&str]) -> Result<String> {
        let output = self.replay(file, options).await?;
        ensure!(output.status.code() == Some(0), "{options:?}: {output:?}");
        Ok(text(&output.stdout))
    }

    async fn failed(&self, file: &Path, options: &[&str]) -> Result<String> {
        let output = self.replay(file, options).await?;
        ensure!(output.status.code() == Some(1), "{options:?}: {output:?}");
        Ok(text(&output.stderr))
    }

    /// Whether nearly all batches have ten messages.
    fn batches_are_full(&self) -> bool {
        let batches = self.stub.batches();
        batches.iter().filter(|(messages, _)| *messages == 10).count() * 10 >= batches.len() * 9
    }
}

/// A kind with its number, as the program tells it.
fn tells(said: &str, kind: &str, number: usize) -> Result<()> {
    let told = said.lines().any(|line| line.split_whitespace().eq([kind, &number.to_string()]));
    ensure!(told, "{number} {kind} should be told:\n{said}");
    Ok(())
}

#[tokio::test]
async fn a_night_replayed_does_what_the_night_did_and_once() -> Result<()> {
    const COUNT: i64 = 500;
    let world = World::new(Behaviour::default()).await?;
    let plain = world.path("upserts");
    fs::write(&plain, lines(&upserts(COUNT)))?;
    // Not by its name: packed is what looks packed.
    let packed = world.path("night.json");
    fs::write(&packed, gzip(lines(&[event("night", REFRESH, NIGHT, json!({"limit": COUNT}))]).as_bytes())?)?;
    let (plain, packed) = (plain.to_str().context("UTF-8")?, packed.to_str().context("UTF-8")?);

    let service = world.serve().await?;
    let said = world.done(&["replay", plain])?;
    tells(&said, "listing.upsert", 500)?;
    world.quiet(LONG).await?;
    let of_file = "SELECT count(*) FROM listings WHERE event_id = 'u-' || listing_id
        AND list_price_cents = 50000000 + listing_id AND event_time = '2026-01-31T02:00:00Z'";
    ensure!(world.number(of_file).await? == COUNT);
    let said = world.done(&["replay", packed])?;
    tells(&said, "valuations.refresh", 1)?;
    world.published("night", LONG).await?;
    world.check_run("night", &world.homes(COUNT).await?).await?;

    let said = world.done(&["replay", plain, packed])?;
    ensure!(said.starts_with("sent 501 events to "), "{said}");
    world.quiet(LONG).await?;
    ensure!(world.partner.stats().requests == COUNT as u64, "{:?}", world.partner.stats());
    ensure!(world.number("SELECT count(*) FROM runs").await? == 1, "ids absorb what was there before");

    world.done(&["replay", "--new-ids", plain, packed])?;
    world.quiet(LONG).await?;
    ensure!(world.number("SELECT count(*) FROM runs WHERE state = 'complete'").await? == 2);
    let renewed = "SELECT count(*) FROM listings WHERE event_id NOT LIKE 'u-%' AND event_time > now() - interval '1 h'";
    ensure!(world.number(renewed).await? == COUNT);
    world.finish(service).await
}

#[tokio::test]
async fn a_killed_replay_goes_on_where_it_was() -> Result<()> {
    const COUNT: usize = 2_000;
    // Eight batches of ten are on their way at most.
    const AGAIN: usize = 80;
    for options in [&["--resume"][..], &["--resume", "--new-ids"]] {
        let bench = Bench::new(Manner { latency: Duration::from_millis(20), ..Manner::default() }).await?;
        let events = upserts(COUNT as i64);
        let file = bench.file("events", lines(&events))?;
        let mut child = bench.command(&file, options).spawn()?;
        until("the middle", SOON, async || Ok((bench.stub.taken().len() >= COUNT / 4).then_some(()))).await?;
        child.kill()?;
        child.wait()?;
        let before = bench.stub.taken().len();
        ensure!(before < COUNT, "it was not the middle");

        // Packed meanwhile, and longer: what was sent is still the beginning of it.
        let longer = lines(&[events.clone(), vec![upsert(9_999)]].concat());
        fs::write(&file, gzip(longer.as_bytes())?)?;
        let said = bench.done(&file, options).await?;
        ensure!(said.contains("events were sent before, up to line"), "{said}");
        let ids = bench.stub.ids();
        let all = bench.stub.taken().len();
        ensure!(ids.len() == COUNT + 1, "{} events, each with one id however often it was sent", ids.len());
        ensure!(all - ids.len() <= AGAIN, "{} were sent again", all - ids.len());
        ensure!(bench.batches_are_full(), "{:?}", bench.stub.batches());

        let said = bench.done(&file, options).await?;
        ensure!(said.contains("sent 0 events") && bench.stub.taken().len() == all, "{said}");

        // Another file in the place of what was sent.
        fs::write(&file, longer.replacen("u-7\"", "x-7\"", 1))?;
        let said = bench.failed(&file, options).await?;
        ensure!(said.contains("have changed since") && said.contains("events.progress"), "{said}");
        fs::write(&file, lines(&events[..10]))?;
        let said = bench.failed(&file, options).await?;
        ensure!(said.contains("the files have 10 lines") && said.contains("2001 were sent already"), "{said}");
        fs::write(bench.directory.path().join("events.progress"), "")?;
        let said = bench.failed(&file, options).await?;
        ensure!(said.contains("events.progress is not the state of a replay"), "{said}");
        ensure!(bench.stub.taken().len() == all, "something was sent all the same");
    }
    Ok(())
}

#[tokio::test]
async fn a_bad_line_is_named_and_stops_everything_unless_it_may_be_left_out() -> Result<()> {
    let bench = Bench::new(Manner::default()).await?;
    let bodies = unreadable();
    // The bad ones between good ones, a blank line, and a last one that was cut off.
    let mut content = String::from("\n");
    for (number, (_, body)) in bodies.iter().enumerate() {
        content += &format!("{body}\n{}\n", upsert(number as i64));
    }
    content += r#"{"specversion":"1.0","id":"cut"#;
    let file = bench.file("night", &content)?;

    let said = bench.failed(&file, &[]).await?;
    ensure!(said.contains("nothing was sent") && said.contains("--skip-invalid"), "{said}");
    ensure!(said.contains(&format!("{}:2: invalid_json: ", file.display())), "{said}");
    ensure!(bench.stub.taken().is_empty());

    // A dry run tells all of them, each with the code that the service gives.
    let output = bench.replay(&file, &["--dry-run"]).await?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let said = text(&output.stdout);
    for (number, (code, body)) in bodies.iter().enumerate() {
        let place = format!("{}:{}: {code}: ", file.display(), 2 + 2 * number);
        ensure!(said.lines().any(|line| line.starts_with(&place)), "{place} for {body:.200} is not in\n{said:.5000}");
    }
    ensure!(said.contains("the file ends in this line"), "{said}");
    tells(&said, "listing.upsert", bodies.len())?;

    let said = bench.done(&file, &["--skip-invalid"]).await?;
    tells(&said, "listing.upsert", bodies.len())?;
    ensure!(said.contains(&format!("left out {} lines", bodies.len() + 1)), "{said}");
    ensure!(bench.stub.ids().len() == bodies.len() && bench.stub.taken().len() == bodies.len());

    for (missing, why) in [("nowhere", "cannot be opened"), ("", "is a directory")] {
        let said = bench.failed(&bench.directory.path().join(missing), &[]).await?;
        ensure!(said.contains(why), "{said}");
    }
    Ok(())
}

#[test]
fn a_dry_run_needs_nothing_and_tells_what_the_partner_would_do() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("night");
    let at = |id: &str, kind: &str, time: &str, data: Value| event(id, kind, time, data);
    let events = [
        at("a", REFRESH, "2026-01-31T02:00:00Z", json!({"limit": 17_000})),
        at("b", REFRESH, "2026-01-31T03:00:00Z", json!({"limit": 3_000, "zip_codes": [98_002]})),
        at("c", REFRESH, "2026-01-31T02:30:00Z", json!({})),
        at("d", PUBLISH, "2026-01-31T04:00:00Z", json!({"run_id": "a"})),
    ];
    fs::write(&file, lines(&events))?;
    let run = |options: &[&str], input: Option<&Path>| -> Result<String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_write-api"));
        command.env_clear().env("WRITE_API_PARTNER_RATE_PER_SECOND", "500").args(["replay", "--dry-run"]).args(options);
        match input {
            Some(file) => command.arg("-").stdin(fs::File::open(file)?),
            None => command.arg(&file),
        };
        let output = command.output()?;
        ensure!(output.status.code() == Some(0), "{output:?}");
        Ok(text(&output.stdout))
    };
    let said = run(&["--speed", "60"], None)?;
    tells(&said, "valuations.refresh", 3)?;
    tells(&said, "valuations.publish", 1)?;
    for part in [
        "4 events in 1 file, nothing was sent",
        "times from 2026-01-31T02:00:00Z to 2026-01-31T04:00:00Z: 2 h 0 min",
        "1 event older than the one before",
        "sending takes 2 min 0 s",
        "3 refresh events: 2 of 20000 listings at most, and 1 of all listings",
        "20000 listings take 40 s at partner.rate_per_second = 500, if answers come within 2.0 s on average",
    ] {
        ensure!(said.contains(part), "{part:?} is not in\n{said}");
    }
    ensure!(run(&["--rate", "2"], Some(&file))?.contains("sending takes 2.0 s"), "from stdin");
    Ok(())
}

#[tokio::test]
async fn what_comes_by_a_pipe_is_checked_before_it_is_sent_as_well() -> Result<()> {
    let bench = Bench::new(Manner::default()).await?;
    let state = bench.directory.path().join("state");
    let options = ["--state", state.to_str().context("UTF-8")?];
    let fed = async |content: Vec<u8>| -> Result<Output> {
        let mut command = bench.command(Path::new("-"), &options);
        command.stdin(Stdio::piped());
        tokio::task::spawn_blocking(move || {
            let mut child = command.spawn()?;
            child.stdin.take().context("piped")?.write_all(&content)?;
            Ok(child.wait_with_output()?)
        })
        .await?
    };
    let bad = fed(format!("{}bad\n", lines(&upserts(300))).into_bytes()).await?;
    ensure!(bad.status.code() == Some(1) && text(&bad.stderr).contains("stdin:301: invalid_json"), "{bad:?}");
    ensure!(bench.stub.taken().is_empty());
    let good = fed(gzip(lines(&upserts(300)).as_bytes())?).await?;
    ensure!(good.status.code() == Some(0) && bench.stub.ids().len() == 300, "{good:?}");
    let more = fed(lines(&upserts(305)).into_bytes()).await?;
    ensure!(more.status.code() == Some(0) && bench.stub.taken().len() == 305, "{more:?}");
    Ok(())
}

#[tokio::test]
async fn what_sqs_does_not_take_is_sent_again_and_batches_keep_its_limits() -> Result<()> {
    const LIMIT: usize = 256 * 1024;
    let manner = Manner { at_the_second_try: Some("7\""), failures: 2, ..Manner::default() };
    let bench = Bench::new(manner).await?;
    let mut events = upserts(200);
    for (event, size) in events.iter_mut().zip([90_000, 90_000, 90_000, 250_000, 1_000].into_iter().cycle()).take(50) {
        event["data"]["description"] = json!("x".repeat(size));
    }
    let file = bench.file("events", lines(&events))?;
    bench.done(&file, &[]).await?;
    let ids = bench.stub.ids();
    ensure!(ids.len() == 200 && ids.values().all(|times| *times == 1), "{ids:?}");
    let batches = bench.stub.batches();
    ensure!(batches.iter().all(|(messages, bytes)| *messages <= 10 && *bytes <= LIMIT), "{batches:?}");
    ensure!(batches.iter().any(|(messages, bytes)| *messages == 2 && *bytes > 180_000), "{batches:?}");

    // What it will never take ends the replay by name; what was before it is not sent again.
    bench.stub.change(|manner| manner.never = Some("u-150\""));
    let file = bench.file("again", lines(&upserts(200)))?;
    let said = bench.failed(&file, &["--resume"]).await?;
    let place = format!("{}:150: SQS refuses the event: InvalidMessageContents", file.display());
    ensure!(said.contains(&place) && said.contains("goes on from there"), "{said}");
    bench.stub.change(|manner| manner.never = None);
    let said = bench.done(&file, &["--resume"]).await?;
    ensure!(said.starts_with("140 events were sent before, up to line 140\n"), "{said}");
    ensure!(bench.stub.ids().len() == 200);
    Ok(())
}

#[tokio::test]
async fn a_rate_is_kept_and_progress_is_told() -> Result<()> {
    const RATE: usize = 20;
    const COUNT: usize = 130;
    let bench = Bench::new(Manner::default()).await?;
    let file = bench.file("events", lines(&upserts(COUNT as i64)))?;
    let began = Instant::now();
    let output = bench.replay(&file, &["--rate", "20"]).await?;
    let took = began.elapsed();
    ensure!(output.status.code() == Some(0), "{output:?}");
    let taken = bench.stub.taken();
    ensure!(taken.len() == COUNT);
    // The first is due at once, and a tenth of a second may be made up for.
    let ideal = Duration::from_secs_f64((COUNT - 1) as f64 / RATE as f64);
    ensure!(took > ideal - Duration::from_millis(200) && took < ideal * 2, "{took:?} instead of {ideal:?}");
    for window in taken.windows(RATE * 3 / 2) {
        let span = window[window.len() - 1].at - window[0].at;
        ensure!(span > Duration::from_secs(1), "{} events within {span:?}", window.len());
    }
    let progress = text(&output.stderr);
    ensure!(progress.contains(&format!("of {COUNT} events sent (")) && progress.contains("left"), "{progress:?}");
    Ok(())
}

#[tokio::test]
async fn recorded_gaps_are_kept_at_the_speed_asked_for() -> Result<()> {
    let bench = Bench::new(Manner::default()).await?;
    // The fourth is older than the third.
    let seconds = [0, 10, 20, 5, 40];
    let events = seconds.iter().enumerate().map(|(number, second)| {
        let time = format!("2026-01-31T02:00:{second:02}Z");
        event(&format!("e-{number}"), UPSERT, &time, listing(number as i64, 1))
    });
    let file = bench.file("events", lines(&events.collect::<Vec<_>>()))?;
    bench.done(&file, &["--speed", "10"]).await?;
    let taken = bench.stub.taken();
    let ids: Vec<&str> = taken.iter().filter_map(|taken| taken.body["id"].as_str()).collect();
    ensure!(ids == ["e-0", "e-1", "e-2", "e-3", "e-4"], "the order of the file: {ids:?}");
    let first = taken[0].at;
    for (taken, due) in taken.iter().zip([0, 1, 2, 2, 4].map(Duration::from_secs)) {
        let came = taken.at - first;
        // The first may have been late itself, by the opening of its connection.
        let early = due.saturating_sub(came);
        let late = came.saturating_sub(due);
        ensure!(early < Duration::from_millis(400) && late < Duration::from_millis(900), "{came:?}, due {due:?}");
    }
    Ok(())
}

/// The lines of a packed file.
fn unpacked(path: &Path) -> Result<String> {
    let mut content = String::new();
    GzDecoder::new(fs::File::open(path)?).read_to_string(&mut content)?;
    Ok(content)
}

#[test]
fn the_examples_are_accepted_and_are_what_their_script_makes() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = tempfile::tempdir()?;
    let script = Command::new(root.join("scripts/example-events")).arg(made.path()).output()?;
    ensure!(script.status.success(), "{script:?}");
    let mut found = Vec::new();
    for entry in fs::read_dir(root.join("examples/events"))? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "gz") {
            continue;
        }
        let name = path.file_name().context("a name")?;
        ensure!(unpacked(&path)? == unpacked(&made.path().join(name))?, "{} is another", path.display());
        let output = Command::new(env!("CARGO_BIN_EXE_write-api"))
            .env_clear()
            .args(["replay", "--dry-run"])
            .arg(&path)
            .output()?;
        ensure!(output.status.code() == Some(0), "{output:?}");
        found.push((name.to_string_lossy().into_owned(), text(&output.stdout)));
    }
    found.sort();
    let [(nightly, of_nightly), (upserts, of_upserts)] = &found[..] else { anyhow::bail!("{found:?}") };
    ensure!(nightly == "nightly.ndjson.gz" && upserts == "upserts.ndjson.gz");
    tells(of_nightly, "valuations.refresh", 1)?;
    ensure!(of_nightly.contains("1 refresh event: 17000 listings at most"), "{of_nightly}");
    tells(of_upserts, "listing.upsert", 5_000)?;
    Ok(())
}
