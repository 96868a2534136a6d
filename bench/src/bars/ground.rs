//! The stack that all bars are measured on, and services on it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use bench::event::send_refresh;
use local_stack::{
    Behaviour, Environment, Memory, Names, PartnerStub, Process, Program, Sampler, SqsProxy, Stack, StackOptions,
    forget_peak, peak, peak_rss_mib,
};
use serde_json::json;
use sqlx::{Connection, PgConnection};

use crate::processors::Looks;

/// How often it is looked whether something is done: a statement each, on the processors that are measured.
const LOOK: Duration = Duration::from_millis(20);
/// How long an event may take.
const PATIENCE: Duration = Duration::from_secs(900);

/// Postgres with listings, Kafka, the partner; an SQS whose calls are counted.
pub(crate) struct Ground {
    pub(crate) partner: PartnerStub,
    pub(crate) sqs: SqsProxy,
    /// The producers', which is not counted.
    pub(crate) client: aws_sdk_sqs::Client,
    pub(crate) base: Environment,
    seeded: u32,
    pub(crate) stack: Stack,
}

impl Ground {
    pub(crate) async fn start() -> Result<Self> {
        local_stack::allow_open_files()?;
        let partner = PartnerStub::start(Behaviour::default())?;
        let stack = Stack::start(StackOptions::default()).await?;
        let sqs = SqsProxy::start(stack.sqs().endpoint())?;
        let base = Environment::create(&stack, Names::standard(), &partner.url()).await?;
        Program::new(None, base.clone(), "bench")?.run(&["setup"]).await?;
        Ok(Self { partner, sqs, client: stack.sqs().client().await, base, seeded: 0, stack })
    }

    /// Makes sure that there are so many listings.
    pub(crate) async fn seed(&mut self, listings: u32) -> Result<()> {
        if self.seeded < listings {
            let program = Program::new(None, self.base.clone(), "bench")?;
            program.run(&["seed", "--count", &listings.to_string()]).await?;
            self.seeded = listings;
        }
        Ok(())
    }

    /// A database and a topic apart from the common ones, with so many listings: services on different ones have no work in common.
    pub(crate) async fn apart(&self, listings: u32) -> Result<Environment> {
        let environment = Environment::create(&self.stack, Names::unique(), &self.partner.url()).await?;
        let program = Program::new(None, environment.clone(), "bench")?;
        program.run(&["setup"]).await?;
        program.run(&["seed", "--count", &listings.to_string()]).await?;
        Ok(environment)
    }

    /// Settings for a service on the common data. No limit of the rate unless it is set.
    pub(crate) async fn environment(&self, settings: &[(&str, &str)]) -> Result<Environment> {
        self.environment_on(&self.base, settings).await
    }

    /// As [`environment`](Self::environment), on the data of `base`.
    async fn environment_on(&self, base: &Environment, settings: &[(&str, &str)]) -> Result<Environment> {
        let mut environment = base.beside()?;
        environment.set("aws.endpoint_url", &self.sqs.endpoint());
        environment.set("partner.rate_per_second", "0");
        for (key, value) in settings {
            environment.set(key, value);
        }
        Program::new(None, environment.clone(), "bench")?.run(&["setup"]).await?;
        Ok(environment)
    }

    /// A service that waits for events.
    pub(crate) async fn service(&self, settings: &[(&str, &str)]) -> Result<Service> {
        self.service_on(&self.base, settings).await
    }

    /// As [`service`](Self::service), on the data of `base`.
    pub(crate) async fn service_on(&self, base: &Environment, settings: &[(&str, &str)]) -> Result<Service> {
        Service::start(self.environment_on(base, settings).await?).await
    }

    /// How the partner answers from now on; its counts begin anew.
    pub(crate) fn partner(&self, latency_ms: u64, rate_cap: u32) -> Result<()> {
        self.partner.control(|behaviour| {
            behaviour.latency_ms = latency_ms;
            behaviour.rate_cap = rate_cap;
        })?;
        self.partner.reset();
        Ok(())
    }

    /// SQS calls so far, by action.
    pub(crate) fn sqs_calls(&self) -> BTreeMap<String, u64> {
        self.sqs.calls_by_action()
    }
}

/// A service that was started.
pub(crate) struct Service {
    pub(crate) program: Program,
    pub(crate) process: Process,
    pub(crate) sampler: Sampler,
    pub(crate) database: PgConnection,
}

/// An event that is done. Times are in seconds since 1970.
pub(crate) struct Done {
    pub(crate) sent: f64,
    pub(crate) complete: f64,
    /// When its publishing began.
    pub(crate) publishing: f64,
    pub(crate) published: f64,
    /// Of the service, from the sending until all was published.
    pub(crate) cpu_seconds: f64,
    pub(crate) before: Memory,
    /// Of the resident memory as Linux keeps it, of heap and stacks the most of ten samples a second.
    pub(crate) peak: Memory,
}

impl Service {
    pub(crate) async fn start(environment: Environment) -> Result<Self> {
        let database = PgConnection::connect(environment.database_url()).await.context("the database")?;
        let program = Program::new(None, environment, "bench")?;
        let process = program.serve().await?;
        let sampler = Sampler::start(process.id())?;
        Ok(Self { program, process, sampler, database })
    }

    /// Sends a slow event of so many listings; gives its id.
    pub(crate) async fn send(&self, ground: &Ground, listings: u32) -> Result<String> {
        let id = uuid::Uuid::new_v4().to_string();
        let queue = &self.program.environment().names().events_queue;
        send_refresh(&ground.client, queue, &id, json!({ "limit": listings })).await?;
        Ok(id)
    }

    /// A slow event from its sending until all of it is published, alone with the partner, whose counts are of this event then.
    pub(crate) async fn refresh(&mut self, ground: &Ground, listings: u32) -> Result<Done> {
        ground.partner.reset();
        let done = self.refresh_beside(ground, listings).await?;
        let valued = ground.partner.stats().distinct_keys;
        ensure!(valued == u64::from(listings), "{valued} of {listings} listings valued");
        Ok(done)
    }

    /// As [`refresh`](Self::refresh), while others may talk to the partner too.
    pub(crate) async fn refresh_beside(&mut self, ground: &Ground, listings: u32) -> Result<Done> {
        let process = self.process.id();
        forget_peak(process)?;
        let (sent, sample) = (now(), self.sampler.now());
        let (before, cpu) = (self.sampler.memory()?, self.sampler.cpu_seconds()?);
        let id = self.send(ground, listings).await?;
        let Times { complete, publishing, published } = self.published(&id).await?;
        let cpu_seconds = self.sampler.cpu_seconds()? - cpu;
        let Memory { anonymous_mib, .. } =
            peak(&self.sampler.samples_from(sample)).context("no sample of the memory")?;
        let peak = Memory { rss_mib: peak_rss_mib(process)?, anonymous_mib };
        Ok(Done { sent, complete, publishing, published, cpu_seconds, before, peak })
    }

    pub(crate) fn is_alive(&self) -> Result<()> {
        if let Some(status) = self.process.exited()? {
            bail!("write-api serve ended ({status}); the end of its log:\n{}", self.process.log_tail());
        }
        Ok(())
    }

    /// Publishes a complete run once more; seconds that it took, and processor time of the whole machine meanwhile.
    pub(crate) async fn publish(&mut self, run: &str) -> Result<(f64, f64)> {
        let (before, open): (i64, i64) = sqlx::query_as(
            "SELECT count(*), count(*) FILTER (WHERE completed_at IS NULL) FROM publications WHERE run_id = $1",
        )
        .bind(run)
        .fetch_one(&mut self.database)
        .await?;
        ensure!(open == 0, "{open} publications of the run {run} are still under way");
        self.program.run(&["send", "publish", run]).await?;
        let mut looks = Looks::default();
        let Times { publishing, published, .. } = self.published_after(before, run, Some(&mut looks)).await?;
        Ok((published - publishing, looks.between(publishing, published)))
    }

    /// Waits until all of the event is published.
    pub(crate) async fn published(&mut self, id: &str) -> Result<Times> {
        self.published_after(0, id, None).await
    }

    /// As [`published`](Self::published), of a publication that has so many `before` it; `looks` at the processors meanwhile.
    async fn published_after(&mut self, before: i64, run: &str, mut looks: Option<&mut Looks>) -> Result<Times> {
        let began = Instant::now();
        loop {
            self.is_alive()?;
            looks.as_deref_mut().map_or(Ok(()), Looks::look)?;
            let times: Option<(f64, f64, f64, i32)> = sqlx::query_as(
                "SELECT extract(epoch FROM r.completed_at)::float8, extract(epoch FROM p.begun_at)::float8,
                        extract(epoch FROM p.completed_at)::float8, p.attempts
                 FROM runs r JOIN publications p USING (run_id)
                 WHERE run_id = $1 AND r.completed_at IS NOT NULL AND p.completed_at IS NOT NULL
                 ORDER BY p.completed_at OFFSET $2 LIMIT 1",
            )
            .bind(run)
            .bind(before)
            .fetch_optional(&mut self.database)
            .await?;
            if let Some((complete, publishing, published, attempts)) = times {
                // What began was the last attempt, and the others had published before it.
                ensure!(attempts == 1, "the event {run} was published in {attempts} attempts");
                looks.map_or(Ok(()), Looks::look)?;
                return Ok(Times { complete, publishing, published });
            }
            ensure!(began.elapsed() < PATIENCE, "the event {run} is not done after {PATIENCE:?}");
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// When the calls of an event were done, and when its publishing began and ended.
pub(crate) struct Times {
    complete: f64,
    publishing: f64,
    published: f64,
}

/// Seconds since 1970.
pub(crate) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Waits until `done`, at most `limit`; how long it took.
pub(crate) async fn until(
    what: &str,
    limit: Duration,
    mut done: impl AsyncFnMut() -> Result<bool>,
) -> Result<Duration> {
    let began = Instant::now();
    while !done().await? {
        ensure!(began.elapsed() < limit, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(began.elapsed())
}
