//! One round: a world, work, faults in the middle of it, rest, and the check of everything.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;
use local_stack::Stack;

use crate::checker::{self, Allowances, Observed, Violation};
use crate::faults::{Injection, Kind, Scene};
use crate::world::{CONNECTIONS, Size, World};

/// Until gauges and pools are at rest after the last work.
const REST: Duration = Duration::from_secs(10);
/// How much more resident memory than at its start a process may have when it is at rest: allocator, pools, statements.
const RESIDENT: u64 = 64 << 20;
/// The partner's server counts a call when it gets to it; on a machine that is busy with other things, two calls that were
/// sent in different seconds can be counted in one.
const COUNTING_TOLERANCE: u64 = 20;

/// What a round is.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its number in the campaign.
    pub number: u64,
    /// Where all its choices come from.
    pub seed: u64,
    /// What is broken in it, in turn.
    pub kinds: Vec<Kind>,
    /// How often something is broken.
    pub injections: usize,
    /// Points for those kinds that need one, used in turn.
    pub points: Vec<String>,
    /// Listings and page.
    pub size: Size,
    /// A mistake that is made on purpose in the service.
    pub planted: Option<&'static str>,
}

/// What came of a round.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The fault log.
    pub injections: Vec<Injection>,
    /// Promises that were broken.
    pub violations: Vec<Violation>,
    /// Why what was broken says nothing about the service, if so: only promises about time, on a machine that was too busy
    /// for the servers to answer within the service's limits.
    pub starved: Option<String>,
    /// Messages put in.
    pub messages: u64,
    /// Listings valued or failed, over all runs.
    pub states: u64,
    /// Records read from the topic.
    pub records: u64,
    /// Partner calls that were made again.
    pub repeated: u64,
    /// How many of them deaths and changes of owners explain; errors of the partner explain more.
    pub repeats_explained: u64,
    /// How long it took.
    pub took: Duration,
}

/// Plays a round. Its files are below `directory` and stay there if a promise was broken.
pub async fn play(spec: &Spec, stack: &Stack, program: &Path, directory: &Path) -> Result<Outcome> {
    let begun = Instant::now();
    let directory = directory.join(format!("round-{}", spec.number));
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let mut world = World::create(stack, program, spec.size, spec.seed, &directory).await?;
    if let Some(bug) = spec.planted {
        world.variables.push(("WRITE_API_PLANTED_BUG".to_owned(), bug.to_owned()));
    }
    for kind in &spec.kinds {
        kind.prepare(&mut world, stack).await.with_context(|| format!("cannot make ready for {kind}"))?;
    }
    let mut scene = Scene::new(&mut world, stack, Rng::with_seed(spec.seed));
    let mut outcome = Outcome::default();
    let ended = tokio::time::timeout(spec.size.limit, act(spec, &mut scene, &mut outcome)).await;
    outcome.injections = std::mem::take(&mut scene.log);
    outcome.violations.append(&mut scene.violations);
    let broken = match ended {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("{error:#}")),
        Err(_) => Some(format!("no end after {:?}; left: {:?}", spec.size.limit, world.left().await)),
    };
    outcome.violations.extend(broken.map(|what| Violation { invariant: "I6", what }));
    if !outcome.violations.is_empty() && outcome.violations.iter().all(Violation::is_about_time) {
        outcome.starved = world.starved();
    }
    outcome.messages = world.workload.inputs.messages;
    outcome.took = begun.elapsed();
    if outcome.violations.is_empty() {
        world.remove(stack).await?;
        fs::remove_dir_all(&directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    } else {
        keep(spec, &outcome, stack, &directory)?;
        // The processes end with the world; the next round must not meet them.
        world.remove(stack).await?;
    }
    Ok(outcome)
}

async fn act(spec: &Spec, scene: &mut Scene<'_>, outcome: &mut Outcome) -> Result<()> {
    scene.world.start().await?;
    scene.world.more(2).await?;
    let mut points = spec.points.iter().cycle();
    for (kind, _) in spec.kinds.iter().cycle().zip(0..spec.injections) {
        let point = if kind.needs_points() { points.next().map(String::as_str) } else { None };
        scene.inject(*kind, point).await.with_context(|| format!("while {kind} was injected"))?;
        if !scene.violations.is_empty() {
            // A world that is broken proves nothing more.
            return Ok(());
        }
    }
    let recovery = spec.size.recovery;
    if let Some(left) = scene.world.rest(recovery).await? {
        let what = format!("work is left {recovery:?} after the last fault: {left}");
        outcome.violations.push(Violation { invariant: "I6", what });
        // What cannot be complete would be reported again by every check.
        return Ok(());
    }
    at_rest(scene.world).await?;
    let observed = scene.world.observe().await?;
    let attempts: u64 = observed.runs.iter().map(|run| u64::try_from(run.attempts - 1).unwrap_or(0)).sum();
    let (replicas, size) = (scene.world.replicas.len() as u64, scene.world.size);
    let allowances = Allowances {
        repeated_calls: scene.repeated_calls(attempts),
        calls_per_second: size.rate * replicas + size.rate * replicas / COUNTING_TOLERANCE,
        connections: CONNECTIONS * i64::try_from(replicas)?,
        descriptors: size.in_flight + 64,
        resident: RESIDENT,
    };
    outcome.repeated = observed.partner.repeated_requests;
    outcome.repeats_explained = allowances.repeated_calls;
    outcome.states = observed.valuations.len() as u64;
    outcome.records = observed.records.len() as u64;
    outcome.violations.append(&mut checker::check(&scene.world.workload.inputs, &observed, &allowances));
    if spec.kinds.iter().all(|kind| kind.leaves_the_owner_alone()) {
        undisturbed(scene.world, &observed, &mut outcome.violations)?;
    }
    if spec.kinds.iter().all(|kind| *kind == Kind::Term) {
        for run in observed.runs.iter().filter(|run| run.deaths.is_some_and(|deaths| deaths > 0)) {
            let what = format!("the run {} was charged {:?} deaths by orderly ends", run.run_id, run.deaths);
            outcome.violations.push(Violation { invariant: "term", what });
        }
    }
    Ok(())
}

/// Where nothing happened to an owner, no run is begun twice and no message is delivered while it is worked on.
fn undisturbed(world: &World, observed: &Observed, violations: &mut Vec<Violation>) -> Result<()> {
    let mut add = |what| violations.push(Violation { invariant: "delivery", what });
    for run in observed.runs.iter().filter(|run| run.attempts != 1) {
        add(format!("the run {} was begun {} times, and nothing happened to its owner", run.run_id, run.attempts));
    }
    for replica in &world.replicas {
        let log = fs::read_to_string(replica.log())?;
        for message in checker::delivered_while_at_work(&log) {
            add(format!("the message {message} was delivered again while {} worked on it", replica.name));
        }
    }
    Ok(())
}

/// Waits until the processes say that nothing is going on, or the limit: the check tells what is.
async fn at_rest(world: &World) -> Result<()> {
    let begun = Instant::now();
    loop {
        let mut busy = false;
        for replica in &world.replicas {
            busy |= !replica.figures().await?.not_at_rest.is_empty();
        }
        if !busy || begun.elapsed() > REST {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Writes what is needed to understand a broken promise beside the logs of the processes.
fn keep(spec: &Spec, outcome: &Outcome, stack: &Stack, directory: &Path) -> Result<()> {
    let violations: Vec<String> = outcome.violations.iter().map(ToString::to_string).collect();
    fs::write(directory.join("violations.txt"), violations.join("\n"))?;
    fs::write(directory.join("faults.json"), serde_json::to_vec_pretty(&outcome.injections)?)?;
    fs::write(directory.join("round.txt"), format!("{spec:#?}\n"))?;
    for log in ["postgres.log", "sqs.log", "kafka.log"] {
        let from: PathBuf = stack.directory().join(log);
        if from.exists() {
            fs::copy(&from, directory.join(log)).with_context(|| format!("cannot copy {}", from.display()))?;
        }
    }
    Ok(())
}
