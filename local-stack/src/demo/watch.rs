//! From the sending of the events until everything is done.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use local_stack::{Exposition, Histogram, Ideal, KafkaTap, Memory, PartnerStub, Process, Program, Sampler, thousands};

use super::Settings;
use super::database::{Database, Run};
use super::progress::{Moment, Progress};
use super::queues::Queues;

/// How often the database and the stub are asked how far everything is.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// How often the service is asked.
const METRICS_INTERVAL: Duration = Duration::from_secs(1);
/// How long records and fast events may come in after post-processing is complete. What is not there then is wrong.
const STRAGGLERS: Duration = Duration::from_secs(30);
/// How long everything may take, beside ten times the ideal, before the demo gives up.
const PATIENCE: Duration = Duration::from_secs(300);

/// Everything that is watched.
pub(super) struct Watch<'a> {
    pub(super) settings: &'a Settings,
    pub(super) ideal: Option<Ideal>,
    /// Id of the nightly event and of its run.
    pub(super) run_id: &'a str,
    pub(super) program: &'a Program,
    pub(super) serve: &'a Process,
    pub(super) sampler: &'a Sampler,
    pub(super) partner: &'a PartnerStub,
    pub(super) tap: &'a KafkaTap,
    pub(super) database: &'a mut Database,
    pub(super) queues: &'a Queues,
    pub(super) progress: &'a mut Progress,
}

/// What was seen.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) run: Run,
    /// When the nightly event was sent, in seconds since 1970.
    pub(super) sent_at: f64,
    /// The same by the sampler's clock.
    pub(super) sent_at_sample: f64,
    /// Memory of the service just before.
    pub(super) before: Memory,
    /// Processor time of the service from then until everything was done.
    pub(super) cpu_seconds: f64,
    pub(super) fast_done: u64,
    /// Times of the fast events that ended until the run was complete.
    pub(super) fast_beside: Histogram,
}

/// What the service says of its fast events.
#[derive(Default)]
struct Fast {
    asked: Option<Instant>,
    done: u64,
    seconds: Histogram,
}

impl Watch<'_> {
    /// Sends the events and watches until everything is done, or should have been.
    pub(super) async fn run(mut self) -> Result<Watched> {
        let begin = Exposition::read(&self.program.environment().admin_url()).await?.fast_event_seconds();
        let before = self.sampler.memory()?;
        let (cpu, sent_at_sample) = (self.sampler.cpu_seconds()?, self.sampler.now());
        let sent_at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        self.queues.send_refresh(self.run_id, self.settings.limit).await?;
        let producer = self.send_fast_events()?;

        let started = Instant::now();
        let limit = PATIENCE + Duration::from_secs_f64(10.0 * self.ideal.map_or(0.0, |ideal| ideal.seconds));
        let mut fast = Fast::default();
        let mut fast_beside = None;
        let mut published_since = None::<Instant>;
        let run = loop {
            if let Some(status) = self.serve.exited()? {
                let (log, tail) = (self.program.log().display(), self.serve.log_tail());
                bail!("write-api serve ended ({status}); its log is {log}, the end of it:\n{tail}");
            }
            let run = self.database.run(self.run_id).await?;
            let completed = run.as_ref().is_some_and(|run| run.completed_at.is_some());
            let is_edge = completed && fast_beside.is_none();
            if is_edge || fast.asked.is_none_or(|asked| asked.elapsed() >= METRICS_INTERVAL) {
                let page = Exposition::read(&self.program.environment().admin_url()).await?;
                fast = Fast {
                    asked: Some(Instant::now()),
                    done: page.fast_events_done(),
                    seconds: page.fast_event_seconds().since(&begin),
                };
            }
            if is_edge {
                fast_beside = Some(fast.seconds.clone());
            }
            self.show(run.as_ref(), &fast)?;
            if let Some(run) = run
                && run.published_at.is_some()
            {
                let since = *published_since.get_or_insert_with(Instant::now);
                if self.all_is_in(&run, &fast) || since.elapsed() >= STRAGGLERS {
                    break run;
                }
            }
            ensure!(
                started.elapsed() < limit,
                "the run {} is not done {limit:?} after its event was sent; the log of the service is {}",
                self.run_id,
                self.program.log().display(),
            );
            tokio::time::sleep(LOOK_INTERVAL).await;
        };
        let cpu_seconds = self.sampler.cpu_seconds()? - cpu;
        if let Some(producer) = producer {
            // All its events were done, or there was time enough for that.
            let status = producer.wait(Duration::ZERO)?.context("write-api send upsert has not ended")?;
            ensure!(
                status.success(),
                "write-api send upsert failed ({status}); the end of its log:\n{}",
                producer.log_tail()
            );
        }
        let fast_beside = fast_beside.unwrap_or_default();
        Ok(Watched { run, sent_at, sent_at_sample, before, cpu_seconds, fast_done: fast.done, fast_beside })
    }

    /// Starts to send the fast events, spread over the time that the slow one takes at best.
    fn send_fast_events(&mut self) -> Result<Option<Process>> {
        let number = self.settings.upserts;
        let sent = format!("sent valuations.refresh ({})", thousands(self.settings.limit.into()));
        if number == 0 {
            self.progress.step(&sent);
            return Ok(None);
        }
        let seconds = self.ideal.map_or(1.0, |ideal| ideal.seconds.max(1.0));
        let rate = (f64::from(number) / seconds).ceil();
        self.progress.step(&format!("{sent}; now {rate} listing.upsert a second"));
        self.program.start(&["send", "upsert", "--sample", &number.to_string(), "--rate", &rate.to_string()]).map(Some)
    }

    fn all_is_in(&self, run: &Run, fast: &Fast) -> bool {
        let all = |count: u64, expected: i64| i64::try_from(count).is_ok_and(|count| count >= expected);
        all(self.tap.distinct_ids(), run.valued) && fast.done >= self.settings.upserts.into()
    }

    fn show(&mut self, run: Option<&Run>, fast: &Fast) -> Result<()> {
        let count = |value: i64| u64::try_from(value).unwrap_or(0);
        self.progress.show(&Moment {
            valued: run.map_or(0, |run| count(run.valued)),
            selected: run.map_or(0, |run| count(run.selected)),
            published: self.tap.count(),
            upserts_done: fast.done,
            upserts: self.settings.upserts.into(),
            in_flight: self.partner.stats().in_flight,
            rss_mib: self.sampler.memory()?.rss_mib,
        });
        Ok(())
    }
}
