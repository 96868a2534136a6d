//! The database at its worst: the server itself, and through a proxy.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use local_stack::PgFault;
use sqlx::AssertSqlSafe;

use super::{Injection, Scene};
use crate::replica::LOOK;

/// Until there is work to be met.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// Until the statements that a fault was ordered for have come.
const HIT_LIMIT: Duration = Duration::from_secs(20);
/// What the server says where nothing may be written.
const NO_WRITES: &str = "in a read-only transaction";
/// In the texts of the statements that commit something.
const COMMITS: [&str; 5] =
    ["INSERT INTO valuations", "INSERT INTO outbox", "UPDATE publications", "INSERT INTO listings", "UPDATE runs"];

/// What happens to the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Trouble {
    /// The server ends at once and is away for some seconds.
    Restart,
    /// One connection is ended by an operator, if there is one in the middle of a statement.
    Backend,
    /// All connections are cut.
    Cut,
    /// A statement is committed and the connection cut before its answer.
    CutAfterCommit,
    /// A connection is cut before a statement gets to the server.
    CutBeforeExecute,
    /// A connection is half-open: nothing gets through and nobody is told.
    Swallow,
    /// Everything takes longer.
    Delay,
    /// 64 kB a second.
    Throttle,
    /// The server takes no writes, from one moment to the next and on the connections that are there, for some seconds.
    ReadOnly,
}

pub(super) async fn inject(scene: &mut Scene<'_>, trouble: Trouble) -> Result<Injection> {
    scene.world.busy(BUSY_LIMIT).await?;
    scene.pause(0..300).await;
    let times = scene.rng.u64(1..=3);
    let matching = scene.rng.choice(COMMITS).unwrap_or_default().to_owned();
    match trouble {
        Trouble::Restart => restart(scene).await,
        Trouble::Backend => backend(scene).await,
        Trouble::Cut => {
            let work = scene.world.at_work().await?;
            let before = hits(scene, &PgFault::Cut)?;
            proxy(scene)?.cut();
            // Counted when the connections have noticed.
            tokio::time::sleep(Duration::from_millis(200)).await;
            let hits = hits(scene, &PgFault::Cut)? - before;
            let hits_at_work = if work.runs + work.publishers > 0 { hits } else { 0 };
            let proof = format!("{hits} connections were cut in the middle of {work:?}");
            Ok(Injection { hits, hits_at_work, proof, interruptions: 1, ..Injection::new("all connections") })
        }
        Trouble::CutAfterCommit => ordered(scene, PgFault::CutAfterCommit { matching }, times).await,
        Trouble::CutBeforeExecute => ordered(scene, PgFault::CutBeforeExecute { matching }, times).await,
        Trouble::Swallow => ordered(scene, PgFault::Swallow, times).await,
        Trouble::Delay => {
            let milliseconds = scene.rng.u64(200..1_000);
            held(scene, PgFault::Delay(milliseconds)).await
        }
        Trouble::Throttle => held(scene, PgFault::Throttle(64_000)).await,
        Trouble::ReadOnly => read_only(scene).await,
    }
}

async fn read_only(scene: &mut Scene<'_>) -> Result<Injection> {
    let before = said(scene, NO_WRITES)?;
    set_read_only(scene, "SET default_transaction_read_only = on").await?;
    let injection = until_said(scene, NO_WRITES, before).await;
    // Whatever came of it: the next rounds have the same server.
    set_read_only(scene, "RESET default_transaction_read_only").await?;
    Ok(Injection { target: "the server".to_owned(), ..injection? })
}

async fn set_read_only(scene: &Scene<'_>, change: &str) -> Result<()> {
    for statement in [format!("ALTER SYSTEM {change}"), "SELECT pg_reload_conf()".to_owned()] {
        let done = sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&scene.world.database).await;
        done.with_context(|| format!("cannot {statement}"))?;
    }
    Ok(())
}

/// Lets a fault last some seconds, and until the server has said `refusal`, which it had said `before` times. The service is
/// not restarted.
pub(super) async fn until_said(scene: &mut Scene<'_>, refusal: &str, before: u64) -> Result<Injection> {
    let time = Duration::from_millis(scene.rng.u64(2_000..6_000));
    let begun = Instant::now();
    let (mut hits, mut hits_at_work) = (0, 0);
    while begun.elapsed() < time || (hits == 0 && begun.elapsed() < HIT_LIMIT) {
        scene.world.check_alive()?;
        hits = said(scene, refusal)? - before;
        let work = scene.world.at_work().await?;
        if work.runs + work.publishers > 0 {
            hits_at_work = hits;
        }
        if scene.world.idle().await? {
            scene.world.more(1).await?;
        }
        tokio::time::sleep(LOOK).await;
    }
    let proof = format!("the server said {hits} times in {:?}: {refusal}", begun.elapsed());
    // A refusal costs no call: its statement is tried again, and whoever gives up shows as another attempt.
    Ok(Injection { hits, hits_at_work, proof, interruptions: 1, ..Injection::new("") })
}

/// How often the server's log has a text.
pub(super) fn said(scene: &Scene<'_>, text: &str) -> Result<u64> {
    let log = scene.stack.directory().join("postgres.log");
    let log = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
    Ok(String::from_utf8_lossy(&log).matches(text).count() as u64)
}

async fn restart(scene: &mut Scene<'_>) -> Result<Injection> {
    let work = scene.world.at_work().await?;
    let down = Duration::from_millis(scene.rng.u64(0..5_000));
    scene.stack.postgres().restart_immediately(down).await?;
    let at_work = work.runs + work.publishers > 0;
    let injection = Injection { interruptions: 1, ..Injection::new("the server") };
    Ok(injection.hit(at_work, format!("it ended in the middle of {work:?} and was away for {down:?}")))
}

async fn backend(scene: &mut Scene<'_>) -> Result<Injection> {
    let ended: Vec<(bool, String, i32)> = sqlx::query_as(
        "SELECT pg_terminate_backend(pid), state, pid FROM (
             SELECT pid, state FROM pg_stat_activity
             WHERE datname = current_database() AND application_name <> 'campaign' AND pid <> pg_backend_pid()
             ORDER BY state = 'active' DESC, random() LIMIT 1) AS one",
    )
    .fetch_all(&scene.world.database)
    .await?;
    let work = scene.world.at_work().await?;
    let injection = Injection::new("a backend");
    Ok(match ended.first() {
        Some((true, state, pid)) => {
            let injection = Injection { interruptions: 1, ..injection };
            injection.hit(work.runs > 0, format!("backend {pid}, {state}, was ended in the middle of {work:?}"))
        }
        _ => injection,
    })
}

/// The fault for the next `times` statements that it fits.
async fn ordered(scene: &mut Scene<'_>, fault: PgFault, times: u64) -> Result<Injection> {
    let before = hits(scene, &fault)?;
    proxy(scene)?.order(fault.clone(), times);
    let is_of_work = matches!(fault, PgFault::CutAfterCommit { .. } | PgFault::CutBeforeExecute { .. });
    let injection = watched(scene, fault, before, HIT_LIMIT, Some(times)).await?;
    // The statements that are met here are those of work itself: after the last one nobody is at work any more.
    let hits_at_work = if is_of_work { injection.hits } else { injection.hits_at_work };
    Ok(Injection { hits_at_work, ..injection })
}

/// The fault for everything, for some time.
async fn held(scene: &mut Scene<'_>, fault: PgFault) -> Result<Injection> {
    let time = Duration::from_millis(scene.rng.u64(2_000..5_000));
    let before = hits(scene, &fault)?;
    proxy(scene)?.hold(fault.clone(), time);
    watched(scene, fault, before, time, None).await
}

/// Counts hits beyond those of `before`, and those in the middle of work, until `times` are there or `limit` is over.
async fn watched(
    scene: &mut Scene<'_>,
    fault: PgFault,
    before: u64,
    limit: Duration,
    times: Option<u64>,
) -> Result<Injection> {
    let begun = Instant::now();
    let mut at_work = 0;
    loop {
        scene.world.check_alive()?;
        let now = hits(scene, &fault)? - before;
        let work = scene.world.at_work().await?;
        if work.runs + work.publishers > 0 {
            at_work = now;
        }
        if begun.elapsed() >= limit || times.is_some_and(|times| now >= times) {
            break;
        }
        if scene.world.idle().await? {
            scene.world.more(1).await?;
        }
        tokio::time::sleep(LOOK).await;
    }
    proxy(scene)?.clear();
    let hits = hits(scene, &fault)? - before;
    let proof = format!("{hits} times by the proxy's count in {:?}", begun.elapsed());
    Ok(Injection { hits, hits_at_work: at_work, proof, interruptions: hits, ..Injection::new(format!("{fault:?}")) })
}

pub(super) fn proxy<'a>(scene: &'a Scene<'_>) -> Result<&'a local_stack::PostgresProxy> {
    scene.world.postgres_proxy.as_ref().context("this world has no proxy before Postgres")
}

fn hits(scene: &Scene<'_>, fault: &PgFault) -> Result<u64> {
    Ok(proxy(scene)?.hits().get(fault.name()).copied().unwrap_or(0))
}
