//! One way at work: an event of each size, then one more of each for its heap profiles.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bench::event::send_refresh;
use local_stack::{
    Environment, KafkaTap, PartnerStub, Process, Program, SqsProxy, forget_peak, peak_rss_mib, thousands,
};
use serde_json::json;
use time::OffsetDateTime;

use write_api::profiling::pprof::Profile;

use crate::heap;
use crate::report::{Figures, Heap, Settings, WayReport};
use crate::timeline::{Timeline, Watched};
use crate::way::Way;

/// The listings of the first event, after which connections and caches are there.
const WARM_UP: u32 = 100;
/// Before memory "before" is taken: the allocator gives freed memory back within three seconds.
const REST: Duration = Duration::from_secs(4);
/// After an event, before memory "after" is taken.
const AFTER: Duration = Duration::from_secs(10);
/// How often it is looked whether an event is done.
const LOOK: Duration = Duration::from_millis(10);
/// How long an event may go on without a call and without a record.
const PATIENCE: Duration = Duration::from_secs(180);

/// Everything that one way needs.
pub(crate) struct Course<'a> {
    pub(crate) way: Way,
    pub(crate) settings: &'a Settings,
    pub(crate) environment: &'a Environment,
    pub(crate) partner: &'a Arc<PartnerStub>,
    pub(crate) sqs: &'a SqsProxy,
    /// The producer's, not through the proxy, which counts what the ways do.
    pub(crate) client: &'a aws_sdk_sqs::Client,
    pub(crate) tap: &'a Arc<KafkaTap>,
    pub(crate) directory: &'a Path,
    pub(crate) say: &'a dyn Fn(&str),
}

/// An event to be sent.
struct Event {
    rows: u32,
    /// The partner calls that it makes.
    calls: u32,
}

impl Course<'_> {
    pub(crate) async fn run(&self) -> Result<WayReport> {
        let (binary, arguments) = self.way.command();
        let binary = local_stack::workspace_binary(binary)?;
        let mut environment = self.environment.clone();
        environment.set_variable("MALLOC_CONF", self.way.allocator());
        let program = Program::new(Some(&binary), environment, &format!("before-after-{}", self.way.file_name()))?;
        let process = program.serve_as(arguments).await?;
        let timeline = Timeline::start(Watched {
            process: process.id(),
            admin_url: self.environment.admin_url(),
            partner: self.partner.clone(),
            tap: self.tap.clone(),
        })?;
        self.finish(&process, Event { rows: WARM_UP, calls: WARM_UP }, None).await.context("the warm-up")?;
        tokio::time::sleep(REST).await;

        let mut events = Vec::new();
        for rows in &self.settings.rows {
            let event = self.event(*rows);
            (self.say)(&format!("  {rows} listings, {} calls", event.calls));
            events.push(self.measure(&process, &timeline, event).await?);
        }

        // Profiles cost memory of the process that takes them, so they are of events of their own, which no figure is of.
        let mut heaps = Vec::new();
        for rows in &self.settings.rows {
            (self.say)(&format!("  {rows} listings once more, for heap profiles"));
            heaps.push(self.profile(&process, *rows).await?);
        }
        let points = timeline.points();
        drop(process);
        Ok(WayReport { way: self.way, events, heaps, points })
    }

    /// What an event holds in its middle that was not held before it.
    async fn profile(&self, process: &Process, rows: u32) -> Result<Heap> {
        let limit = self.settings.calls_of_the_old_ways_profiles().filter(|_| self.way == Way::Before);
        let calls = limit.map_or(rows, |limit| limit.min(rows));
        let file = |when: &str| self.directory.join(format!("{}-{rows}-{when}.pb.gz", self.way.file_name()));
        let early = heap::take(&self.environment.profiling_url(), &file("early")).await?;
        let late = self.finish(process, Event { rows, calls }, Some(&file("late"))).await?.context("no profile")?;
        let title = format!("{}: held in the middle of {} listings", self.way.name(), thousands(rows.into()));
        // A crate has the name of its program, as Rust writes it.
        let growth = heap::growth(&early, &late, &self.way.command().0.replace('-', "_"), &title)?;
        Ok(Heap { rows, growth })
    }

    fn event(&self, rows: u32) -> Event {
        let limit = self.settings.calls_of_the_old_way.filter(|_| self.way == Way::Before);
        Event { rows, calls: limit.map_or(rows, |limit| limit.min(rows)) }
    }

    /// Lets the event happen and takes its figures.
    async fn measure(&self, process: &Process, timeline: &Timeline, event: Event) -> Result<Figures> {
        self.partner.reset();
        let sqs = sqs_calls(self.sqs);
        forget_peak(process.id())?;
        let began = timeline.now();
        let (rows, calls) = (event.rows, event.calls);
        self.finish(process, event, None).await?;
        let (ended, rss_peak_mib) = (timeline.now(), peak_rss_mib(process.id())?);
        let sqs_calls = sqs_calls(self.sqs) - sqs;
        tokio::time::sleep(AFTER).await;
        let stats = self.partner.stats();
        let first_call = stats.first_call.context("no call was made")?;
        let last_answer = stats.last_answer.context("no call was answered")?;
        let points = timeline.points();
        let at = |seconds: f64| {
            let point = points.iter().rev().find(|point| point.seconds <= seconds);
            point.copied().with_context(|| format!("no point of the timeline before {seconds} s"))
        };
        // What comes before the first call, the one query above all, is done once; the rest is done for each call.
        let sent = OffsetDateTime::now_utc().unix_timestamp_nanos() as f64 / 1e9 - (timeline.now() - began);
        let until_first_call = (first_call - sent).clamp(0.0, ended - began);
        let (before, end, after) = (at(began)?, at(ended)?, at(timeline.now())?);
        // A busy process may be looked at some calls later only.
        let once = points.iter().find(|point| point.seconds >= began + until_first_call).copied().unwrap_or(end);
        let calls_by_then = (once.calls - before.calls) as f64;
        let part = (f64::from(rows) - calls_by_then) / (f64::from(calls) - calls_by_then).max(1.0);
        let cpu_seconds = once.cpu_seconds - before.cpu_seconds + (end.cpu_seconds - once.cpu_seconds) * part;
        let within = points.iter().filter(|point| (began..=ended + 1.0).contains(&point.seconds));
        let live_peak_mib = within.map(|point| point.live_mib).fold(before.live_mib, f64::max);
        Ok(Figures {
            rows,
            calls,
            began,
            ended,
            wall_seconds: until_first_call + (ended - began - until_first_call) * f64::from(rows) / f64::from(calls),
            calls_a_second: f64::from(calls) / (last_answer - first_call).max(f64::EPSILON),
            most_in_flight: stats.max_in_flight,
            cpu_seconds,
            rss_before_mib: before.rss_mib,
            rss_peak_mib,
            rss_after_mib: after.rss_mib,
            live_before_mib: before.live_mib,
            live_peak_mib,
            live_after_mib: after.live_mib,
            sqs_calls,
        })
    }

    /// Sends the event and waits until the last of its records was read. Takes a heap profile in the middle of its calls if
    /// there is a file for it.
    async fn finish(&self, process: &Process, event: Event, profile: Option<&Path>) -> Result<Option<Profile>> {
        let records = || self.tap.count() + self.tap.missed();
        let calls = || self.partner.stats().requests;
        let (records_before, calls_before) = (records(), calls());
        self.send(&event).await?;
        let mut taken = None;
        let mut last = (0, 0, Instant::now());
        loop {
            if let Some(status) = process.exited()? {
                bail!("{} ended ({status}); the end of its log:\n{}", self.way.name(), process.log_tail());
            }
            let (calls, records) = (calls() - calls_before, records() - records_before);
            if (calls, records) != (last.0, last.1) {
                last = (calls, records, Instant::now());
            }
            if let Some(file) = profile
                && taken.is_none()
                && calls >= u64::from(event.calls) / 2
            {
                taken = Some(heap::take(&self.environment.profiling_url(), file).await?);
            }
            if records >= u64::from(event.calls) {
                return Ok(taken);
            }
            ensure!(
                last.2.elapsed() < PATIENCE,
                "{}: {calls} calls and {records} records of {} and then nothing for {PATIENCE:?}; the end of its log:\n{}",
                self.way.name(),
                event.calls,
                process.log_tail(),
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn send(&self, event: &Event) -> Result<()> {
        let mut data = json!({ "limit": event.rows });
        if self.way == Way::Before {
            data["calls"] = event.calls.into();
        }
        let id = format!("{}-{}", self.way.file_name(), uuid::Uuid::new_v4());
        send_refresh(self.client, &self.environment.names().events_queue, &id, data).await
    }
}

fn sqs_calls(sqs: &SqsProxy) -> u64 {
    sqs.calls_by_action().values().sum()
}
