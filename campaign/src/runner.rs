//! Plays rounds, several at a time, and says what came of them.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use local_stack::{Stack, StackOptions};

use crate::faults::{KINDS, Kind, points_in};
use crate::leak;
use crate::options::{Options, Profile};
use crate::planted::PLANTED;
use crate::report::Report;
use crate::round::{self, Outcome, Spec};
use crate::schedule::Schedule;

/// Rounds before a runner takes fresh servers: the broker and the emulator keep all in memory.
const ROUNDS_PER_STACK: u64 = 40;
/// A round is played so often at most.
const PLAYS: u32 = 3;
/// Faults that the profile for every change must hit.
const LEAST_HITS: u64 = 60;
/// A planted mistake must be found out within this.
const PLANTED_LIMIT: Duration = Duration::from_secs(300);

/// Does what the options say. `false`: a promise was broken, a kind of fault never hit, or a mistake was not found out.
pub async fn run(options: Options) -> Result<bool> {
    let points = points_in(&options.sources)?;
    if options.list {
        KINDS.iter().for_each(|(name, _)| println!("{name}"));
        points.iter().for_each(|point| println!("crash-point {point}"));
        return Ok(true);
    }
    let program = options.program.canonicalize();
    let program = program.with_context(|| format!("{} is not there: build it first", options.program.display()))?;
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..) >> 24);
    if options.leak {
        return leak::prove(&program, &options.artefacts).await;
    }
    let kinds = wanted(&options, &points)?;
    let schedule = Schedule { seed, kinds, points, profile: options.profile };
    let artefacts = options.artefacts.join(seed.to_string());
    let campaign = Campaign { options, schedule, program, artefacts };
    if campaign.options.planted {
        return Box::pin(campaign.planted()).await;
    }
    let kept = Box::pin(campaign.rounds()).await?;
    let Options { profile, faults, round, artefacts, .. } = &campaign.options;
    let is_all = *profile == Profile::Ci && faults.is_empty() && round.is_none();
    Ok((!is_all || leak::prove(&campaign.program, artefacts).await?) && kept)
}

/// The kinds asked for. Without a list: all that can be injected.
fn wanted(options: &Options, points: &[String]) -> Result<Vec<Kind>> {
    if options.faults.is_empty() {
        let all = KINDS.iter().map(|(_, kind)| *kind);
        let mut can = Vec::new();
        for kind in all {
            if kind.needs_points() && points.is_empty() {
                println!("NOT PLAYED: {kind}: there are no fault points in {}", options.sources.display());
            } else if let Some(reason) = kind.unplayable() {
                println!("NOT PLAYED: {kind}: {reason}");
            } else {
                can.push(kind);
            }
        }
        return Ok(can);
    }
    let known = || KINDS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let named = options.faults.iter().map(|name| {
        Kind::named(name).with_context(|| format!("--faults {name:?} is no kind of fault; known are {}", known()))
    });
    let named: Vec<Kind> = named.collect::<Result<_>>()?;
    if let Some(kind) = named.iter().find(|kind| kind.needs_points() && points.is_empty()) {
        bail!("--faults {kind} needs fault points, and there are none in {}", options.sources.display());
    }
    for kind in &named {
        if let Some(reason) = kind.unplayable() {
            bail!("--faults {kind} cannot be played: {reason}");
        }
    }
    Ok(named)
}

struct Campaign {
    options: Options,
    schedule: Schedule,
    program: PathBuf,
    artefacts: PathBuf,
}

impl Campaign {
    async fn rounds(&self) -> Result<bool> {
        let begun = Instant::now();
        let Self { options, schedule, .. } = self;
        println!(
            "seed {}, {} kinds of faults, {} fault points",
            schedule.seed,
            schedule.kinds.len(),
            schedule.points.len()
        );
        let first = options.round.unwrap_or(0);
        let next = AtomicU64::new(first);
        let report = Mutex::new(Report::default());
        let least = schedule.least();
        let last = match (options.round, options.profile) {
            (Some(round), _) => round + 1,
            (None, Profile::Ci) => least,
            (None, _) => u64::MAX,
        };
        // Every kind and every point has its turn, however short the time is.
        let is_due = |number: u64| {
            number < last && (number < least || begun.elapsed() < Duration::from_secs(options.minutes * 60))
        };
        let runners = (0..options.parallel.max(1)).map(|_| async {
            let mut stack = None;
            let mut played = 0;
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if !is_due(number) {
                    return anyhow::Ok(());
                }
                let servers = match stack.take() {
                    Some(servers) if played % ROUNDS_PER_STACK != 0 => servers,
                    _ => Stack::start(StackOptions::for_tests()).await?,
                };
                played += 1;
                let mut spec = schedule.round(number);
                // Whether a fault meets work is luck: where all missed it, two more rounds with other choices. A round of
                // which the machine had too much is played again as it is; the last time, it counts.
                for play in 1..=PLAYS {
                    let outcome = Box::pin(round::play(&spec, &servers, &self.program, &self.artefacts)).await;
                    let outcome = outcome.with_context(|| format!("round {number} ({:?})", spec.kinds))?;
                    self.tell(&spec, &outcome);
                    if let (Some(why), true) = (&outcome.starved, play < PLAYS) {
                        println!("    not judged and played again: {why}");
                        lock(&report).starved += 1;
                        continue;
                    }
                    lock(&report).add(&spec, &outcome);
                    let met = outcome.injections.iter().any(|injection| injection.hits_at_work > 0);
                    if met || !outcome.violations.is_empty() || options.profile != Profile::Ci {
                        break;
                    }
                    spec = Spec { seed: spec.seed.wrapping_add(1), ..schedule.round(number) };
                }
                stack = Some(servers);
            }
        });
        futures::future::try_join_all(runners).await?;

        let report = report.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        println!("\n{}", report.text(&schedule.points, begun.elapsed()));
        let never = if options.round.is_some() { Vec::new() } else { report.never_hit(&schedule.kinds) };
        if options.faults.is_empty() {
            for (kind, reason) in KINDS.iter().filter_map(|(_, kind)| Some((kind, kind.unplayable()?))) {
                println!("NOT PLAYED: {kind}: {reason}");
            }
        }
        if !never.is_empty() {
            println!("never hit in the middle of work: {}", never.join(", "));
        }
        if report.violations > 0 {
            println!("logs and fault logs: {}", self.artefacts.display());
        }
        let too_few = options.profile == Profile::Ci && options.faults.is_empty() && report.hits() < LEAST_HITS;
        if too_few {
            println!("too few faults hit: {} of {LEAST_HITS} at least", report.hits());
        }
        Ok(report.violations == 0 && never.is_empty() && !too_few)
    }

    fn tell(&self, spec: &Spec, outcome: &Outcome) {
        let kinds: Vec<&str> = spec.kinds.iter().map(|kind| kind.name()).collect();
        let (hits, at_work) = outcome
            .injections
            .iter()
            .fold((0, 0), |(hits, at_work), one| (hits + one.hits, at_work + one.hits_at_work));
        println!(
            "round {:4} {:20} {:3.0} s: {} injected, {hits} hits, {at_work} at work, {} messages, {} violations",
            spec.number,
            kinds.join("+"),
            outcome.took.as_secs_f64(),
            outcome.injections.len(),
            outcome.messages,
            outcome.violations.len()
        );
        if outcome.violations.is_empty() {
            return;
        }
        for injection in &outcome.injections {
            let crate::faults::Injection { at, kind, target, proof, .. } = injection;
            println!("    {at:6.2} s {kind} {target}: {proof}");
        }
        for violation in outcome.violations.iter().take(20) {
            println!("    {violation}");
        }
        let kinds: Vec<&str> = self.schedule.kinds.iter().map(|kind| kind.name()).collect();
        println!(
            "    again: scripts/campaign --profile {} --seed {} --faults {} --round {}",
            self.options.profile.to_possible_value().map_or_else(String::new, |profile| profile.get_name().to_owned()),
            self.schedule.seed,
            kinds.join(","),
            spec.number
        );
    }

    /// One mistake after the other, each until the first broken promise or the limit.
    async fn planted(&self) -> Result<bool> {
        let wanted = &self.options.mistakes;
        if let Some(unknown) = wanted.iter().find(|name| !PLANTED.iter().any(|planted| planted.name == **name)) {
            let known: Vec<&str> = PLANTED.iter().map(|planted| planted.name).collect();
            bail!("--mistakes {unknown:?} is none; known are {}", known.join(", "));
        }
        let chosen =
            PLANTED.iter().filter(|planted| wanted.is_empty() || wanted.iter().any(|name| name == planted.name));
        let chosen: Vec<_> = chosen.collect();
        let mut caught = 0;
        for planted in &chosen {
            // Fresh servers: a round that is cut off at the limit leaves them as broken as they were.
            let stack = Stack::start(StackOptions::for_tests()).await?;
            let begun = Instant::now();
            let kinds = planted.kinds();
            ensure!(!kinds.is_empty(), "the mistake {} has no faults", planted.name);
            let mut schedule = Schedule { kinds: kinds.clone(), ..self.schedule.clone() };
            if !planted.points.is_empty() {
                schedule.points = planted.points.iter().map(|&point| point.to_owned()).collect();
            }
            let artefacts = self.artefacts.join(planted.name);
            let mut found = None;
            for number in 0.. {
                if begun.elapsed() > PLANTED_LIMIT {
                    break;
                }
                let spec = Spec { planted: Some(planted.name), ..schedule.round(number % kinds.len() as u64) };
                // Other choices each time the kinds are through.
                let spec = Spec { number, seed: spec.seed.wrapping_add(number), ..spec };
                let left = PLANTED_LIMIT.saturating_sub(begun.elapsed());
                let play = Box::pin(round::play(&spec, &stack, &self.program, &artefacts));
                match tokio::time::timeout(left, play).await {
                    Ok(outcome) => {
                        let outcome = outcome?;
                        found = outcome.violations.into_iter().next().filter(|_| outcome.starved.is_none());
                    }
                    Err(_) => break,
                }
                if found.is_some() {
                    break;
                }
            }
            let took = begun.elapsed().as_secs_f64();
            match found {
                Some(violation) => {
                    caught += 1;
                    println!("{:28} caught after {took:3.0} s by {:?}: {violation}", planted.name, planted.faults);
                }
                None => println!("{:28} NOT caught in {took:3.0} s by {:?}", planted.name, planted.faults),
            }
        }
        println!("caught {caught} of {}", chosen.len());
        Ok(caught == chosen.len())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
