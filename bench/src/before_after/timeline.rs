//! The curves of one process: memory, processor time, progress.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use local_stack::{KafkaTap, PartnerStub, Sampler, http_client};
use serde::Serialize;
use tokio::task::JoinHandle;

/// Between two points.
const INTERVAL: Duration = Duration::from_millis(100);
/// Between two readings of the live heap, which a process is asked for and works to tell.
const ASK_INTERVAL: Duration = Duration::from_millis(500);

/// One moment.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Point {
    /// Since the process was ready, in seconds.
    pub(crate) seconds: f64,
    /// Resident memory in MiB.
    pub(crate) rss_mib: f64,
    /// What the allocator has handed out and not got back, in MiB, as the process says at /metrics.
    pub(crate) live_mib: f64,
    /// Processor time since the process was ready, in seconds.
    pub(crate) cpu_seconds: f64,
    /// Partner calls so far.
    pub(crate) calls: u64,
    /// Kafka records so far.
    pub(crate) records: u64,
}

/// Watches a process until dropped.
pub(crate) struct Timeline {
    began: Instant,
    points: Arc<Mutex<Vec<Point>>>,
    task: JoinHandle<()>,
}

/// What is watched.
pub(crate) struct Watched {
    pub(crate) process: u32,
    pub(crate) admin_url: String,
    pub(crate) partner: Arc<PartnerStub>,
    pub(crate) tap: Arc<KafkaTap>,
}

impl Timeline {
    pub(crate) fn start(watched: Watched) -> anyhow::Result<Self> {
        let sampler = Sampler::start(watched.process)?;
        let began = Instant::now();
        let points = Arc::new(Mutex::new(Vec::new()));
        let shared = points.clone();
        let task = tokio::spawn(async move {
            let at_start = sampler.cpu_seconds().unwrap_or(0.0);
            let records = watched.tap.count();
            // The partner's count begins anew with each event.
            let (mut calls, mut counted) = (0, watched.partner.stats().requests);
            let mut live: Option<(Instant, f64)> = None;
            let mut ticks = tokio::time::interval(INTERVAL);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                if live.is_none_or(|(asked, _)| asked.elapsed() >= ASK_INTERVAL)
                    && let Some(mib) = live_mib(&watched.admin_url).await
                {
                    live = Some((Instant::now(), mib));
                }
                let count = watched.partner.stats().requests;
                calls += count.checked_sub(counted).unwrap_or(count);
                counted = count;
                // A process that has ended has no more points.
                let (Ok(memory), Ok(cpu)) = (sampler.memory(), sampler.cpu_seconds()) else { break };
                let point = Point {
                    seconds: began.elapsed().as_secs_f64(),
                    rss_mib: memory.rss_mib,
                    live_mib: live.map_or(0.0, |(_, mib)| mib),
                    cpu_seconds: cpu - at_start,
                    calls,
                    records: watched.tap.count().saturating_sub(records),
                };
                shared.lock().unwrap_or_else(PoisonError::into_inner).push(point);
            }
        });
        Ok(Timeline { began, points, task })
    }

    /// Seconds since the start.
    pub(crate) fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// All points so far.
    pub(crate) fn points(&self) -> Vec<Point> {
        self.points.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Timeline {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What the allocator of the process at `admin_url` has handed out, in MiB.
pub(crate) async fn live_mib(admin_url: &str) -> Option<f64> {
    let (_, body) = http_client::get(&format!("{admin_url}/metrics")).await.ok()?;
    let text = std::str::from_utf8(&body).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("write_api_jemalloc_allocated_bytes "))?;
    Some(line.trim().parse::<f64>().ok()? / 1024.0 / 1024.0)
}
