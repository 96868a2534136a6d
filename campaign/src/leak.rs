//! A leak, planted in an event kind of its own among others that take far more memory and give it back: the profiler has to
//! name the kind and the function, and its samples have to say what the allocator has counted.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aws_sdk_sqs::types::SendMessageBatchRequestEntry;
use local_stack::{Behaviour, Environment, Exposition, Names, PartnerStub, Program, Stack, StackOptions};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Kind and function that leak, as profiles and metrics name them.
const KIND: &str = "planted";
const FUNCTION: &str = "write_api::events::planted::leak";
/// Rounds, each until its slow event is done, and what is sent in one: 112 MiB leak in all.
const ROUNDS: usize = 8;
const LISTINGS: u32 = 5_000;
const UPSERTS: usize = 100;
const LEAKS: usize = 14;
/// Snapshots that the leak must have been at work for. Two are 5 s apart at least.
const SNAPSHOTS: u64 = 4;
/// From a kind that took less there are too few samples.
const ENOUGH: f64 = (100 << 20) as f64;
/// How far samples may be from what was counted. At one sample in 16 KiB it is four times their standard deviation.
const TOLERANCE: f64 = 0.05;
const LIMIT: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(50);

/// Plants the leak in `program`, built with the feature `fault-injection`. `false`: the profiler has not told.
pub async fn prove(program: &Path, artefacts: &Path) -> Result<bool> {
    let begun = Instant::now();
    let problems = tokio::time::timeout(LIMIT, Box::pin(play(program, artefacts))).await;
    let problems = problems.with_context(|| format!("the leak was not through after {LIMIT:?}"))??;
    for problem in &problems {
        println!("leak NOT told: {problem}");
    }
    if problems.is_empty() {
        println!("leak told after {:.0} s", begun.elapsed().as_secs_f64());
    }
    Ok(problems.is_empty())
}

async fn play(program: &Path, artefacts: &Path) -> Result<Vec<String>> {
    let snapshots = artefacts.join("leak");
    if snapshots.exists() {
        fs::remove_dir_all(&snapshots).with_context(|| format!("cannot remove {}", snapshots.display()))?;
    }
    fs::create_dir_all(&snapshots).with_context(|| format!("cannot make {}", snapshots.display()))?;
    let stack = Stack::start(StackOptions::for_tests()).await?;
    let partner = PartnerStub::start(Behaviour { latency_ms: 20, ..Behaviour::default() })?;
    let mut environment = Environment::create(&stack, Names::unique(), &partner.url()).await?;
    environment
        .set("profiling.snapshots.directory", &snapshots.canonicalize()?.display().to_string())
        .set("profiling.snapshots.interval", "5s")
        .set("partner.rate_per_second", "0")
        .set_variable("MALLOC_CONF", "lg_prof_sample:14");
    let program = Program::new(Some(program), environment, "leak")?;
    program.run(&["setup"]).await?;
    program.run(&["seed", "--count", &LISTINGS.to_string()]).await?;
    let service = program.serve().await?;
    let client = stack.sqs().client().await;
    let queue = &program.environment().names().events_queue;
    let queue = client.get_queue_url().queue_name(queue).send().await.context("the queue")?;
    let queue = queue.queue_url.context("a queue without URL")?;

    let admin = program.environment().admin_url();
    let done = async |kind: &str| {
        let labels = [&*format!("kind=\"{kind}\""), "outcome=\"done\""];
        anyhow::Ok(Exposition::read(&admin).await?.sum("write_api_events_total", &labels) as usize)
    };
    let mut round = 0;
    let grew = loop {
        send(&client, &queue, bodies(round)?).await?;
        round += 1;
        // Enough has leaked, and the others are at work on what was just sent.
        if round >= ROUNDS && snapshots_written(&admin).await? >= SNAPSHOTS {
            break verb(&program, &["profile", "grew", &snapshots.display().to_string(), "--json"])?;
        }
        while done("valuations.refresh").await? < round {
            if let Some(status) = service.exited()? {
                bail!("write-api serve ended ({status}); the end of its log:\n{}", service.log_tail());
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    let sent = [("valuations.refresh", round), ("valuations.publish", round), (KIND, round * LEAKS)];
    for (kind, count) in sent.into_iter().chain([("listing.upsert", round * UPSERTS)]) {
        while done(kind).await? < count {
            tokio::time::sleep(LOOK).await;
        }
    }
    let mut problems = not_named(&grew);
    problems.append(&mut not_equal(&program).await?);
    Ok(problems)
}

async fn snapshots_written(admin: &str) -> Result<u64> {
    let labels = [r#"result="written""#];
    Ok(Exposition::read(admin).await?.sum("write_api_snapshots_total", &labels) as u64)
}

/// What `profile grew` does not say as it should.
fn not_named(grew: &Value) -> Vec<String> {
    let (kind, function) = (&grew["kinds"][0], &grew["functions"][0]);
    println!("    grew most: {kind}, in {function}");
    let mut problems = Vec::new();
    if kind["kind"] != KIND {
        problems.push(format!("the kind that grew most is {kind}, not {KIND}"));
    }
    if function["kind"] != KIND || function["function"] != FUNCTION {
        problems.push(format!("the function that grew most is {function}, not {FUNCTION} of {KIND}"));
    }
    problems
}

/// Where samples are not what the allocator has counted: what each kind allocated, and what the leak holds. A block is
/// counted as freed by whoever frees it, so only of what is never freed is it known who holds it; what an event that leaks
/// frees of others, its message and its task, is a hundredth of that.
async fn not_equal(program: &Program) -> Result<Vec<String>> {
    let environment = program.environment();
    let ledger = Exposition::read(&environment.admin_url()).await?;
    let (mut counted, freed) =
        (ledger.by_kind("write_api_allocated_bytes_total"), ledger.by_kind("write_api_freed_bytes_total"));
    // It works on while it is asked, and its C libraries on threads of their own.
    counted.remove("service");
    let held = counted.get(KIND).context("nothing is counted for the leak")? - freed.get(KIND).unwrap_or(&0.0);
    counted.retain(|_, bytes| *bytes >= ENOUGH);
    ensure!(counted.len() >= 2 && counted.contains_key(KIND), "too little to compare: {counted:?}");

    let mut problems = Vec::new();
    for (sample, counted) in [("alloc_space", counted), ("inuse_space", BTreeMap::from([(KIND.to_owned(), held)]))] {
        let top = verb(program, &["profile", "top", &environment.profiling_url(), "--sample", sample, "--json"])?;
        let kinds = top["kinds"].as_array().context("no kinds in the profile")?;
        for (kind, counted) in counted {
            let sampled = kinds.iter().find(|one| one["kind"] == *kind).and_then(|one| one["value"].as_f64());
            let off = sampled.unwrap_or(0.0) / counted - 1.0;
            let mib = |bytes: f64| bytes / 1_048_576.0;
            let line = format!(
                "{sample} of {kind}: {:.1} MiB by samples, {:.1} MiB counted, {:+.1} %",
                mib(sampled.unwrap_or(0.0)),
                mib(counted),
                off * 100.0
            );
            println!("    {line}");
            if off.abs() > TOLERANCE {
                problems.push(line);
            }
        }
    }
    Ok(problems)
}

/// The JSON document that a verb prints.
fn verb(program: &Program, arguments: &[&str]) -> Result<Value> {
    let mut command = Command::new(program.binary());
    let output = command.args(arguments).envs(program.environment().variables()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "write-api {} failed: {said}", arguments.join(" "));
    serde_json::from_slice(&output.stdout).with_context(|| format!("write-api {} printed no JSON", arguments.join(" ")))
}

/// The events of a round: one slow, and among the fast ones those that leak.
fn bodies(round: usize) -> Result<Vec<String>> {
    let time = OffsetDateTime::now_utc().format(&Rfc3339)?;
    let event = |kind: &str, number: usize, data: Value| {
        let id = format!("{kind}-{round}-{number}");
        let (kind, source) = (format!("writeapi.{kind}.v1"), "/campaign");
        json!({"specversion": "1.0", "id": id, "source": source, "type": kind, "time": time, "data": data}).to_string()
    };
    let upsert = |number: usize| {
        let listing = json!({
            "listing_id": number, "zip_code": 98_001, "list_price_cents": 1, "bedrooms": 3, "living_square_feet": 1_500,
            "description": "a home of many words ".repeat(80),
        });
        event("listing.upsert", number, listing)
    };
    let mut bodies = vec![event("valuations.refresh", 0, json!({ "limit": LISTINGS }))];
    bodies.extend((0..LEAKS).map(|number| event("planted.leak", number, json!({}))));
    bodies.extend((1..=UPSERTS).map(upsert));
    Ok(bodies)
}

async fn send(client: &aws_sdk_sqs::Client, queue: &str, bodies: Vec<String>) -> Result<()> {
    let calls = bodies.chunks(10).map(|bodies| async {
        let mut entries = Vec::new();
        for (number, body) in bodies.iter().enumerate() {
            let entry = SendMessageBatchRequestEntry::builder().id(number.to_string()).message_body(body);
            entries.push(entry.build()?);
        }
        let sent = client.send_message_batch().queue_url(queue).set_entries(Some(entries)).send().await?;
        ensure!(sent.failed.is_empty(), "SQS took not all: {:?}", sent.failed);
        Ok(())
    });
    futures::future::try_join_all(calls).await.map(drop)
}
