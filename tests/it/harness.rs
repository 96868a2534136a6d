//! What the tests are written in: a world around the service, the service as a process (`service`), and the checks of
//! results (`results`).
//!
//! Nothing here waits for a fixed time: [`until`] looks again and again, up to a deadline.

mod results;
mod service;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aws_sdk_sqs::types::{MessageSystemAttributeName, QueueAttributeName};
use local_stack::{Behaviour, Ending, Environment, PartnerStub, Process};
use serde_json::Value;
use sqlx::AssertSqlSafe;
use sqlx::postgres::{PgPool, PgPoolOptions};
use tempfile::TempDir;
use tokio::sync::{Semaphore, SemaphorePermit};

pub use service::Service;

/// Services that may run at once in this test binary: more would only make each other late.
static SERVICES: Semaphore = Semaphore::const_new(4);

/// Visibility in tests: short, because a killed service's work waits for it.
pub const VISIBILITY: Duration = Duration::from_secs(5);

/// For what takes moments on an idle machine.
pub const SOON: Duration = Duration::from_secs(20);

/// For whole runs.
pub const LONG: Duration = Duration::from_secs(90);

const PROGRAM: &str = env!("CARGO_BIN_EXE_write-api");

/// Calls `probe` until it gives a value; fails after `limit`, naming `what`.
pub async fn until<T>(what: &str, limit: Duration, mut probe: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = probe().await? {
            return Ok(value);
        }
        ensure!(Instant::now() < deadline, "waited {limit:?} in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// One of the three queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    Events,
    Valuations,
    PostProcessing,
}

pub const LANES: [Lane; 3] = [Lane::Events, Lane::Valuations, Lane::PostProcessing];

/// A message that was refused.
#[derive(Debug)]
pub struct DeadLetter {
    pub body: String,
    /// The message attribute `reason`, as text.
    pub reason: String,
}

impl DeadLetter {
    pub fn code(&self) -> String {
        let reason: Value = serde_json::from_str(&self.reason).unwrap_or_default();
        reason["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// A row of `runs`.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct Run {
    pub state: String,
    pub selected: i64,
    pub valued: i64,
    pub failed: i64,
    pub attempts: i32,
    pub cursor: i64,
    pub owned: bool,
    pub leased: bool,
    pub last_error: Option<String>,
}

/// A listing as the partner is asked about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct Home {
    pub listing_id: i64,
    pub zip_code: i32,
    pub list_price_cents: i64,
}

/// Everything around the service.
pub struct World {
    pub partner: PartnerStub,
    pub database: PgPool,
    pub sqs: aws_sdk_sqs::Client,
    environment: Environment,
    urls: BTreeMap<Lane, [String; 2]>,
    directory: TempDir,
    services_started: std::cell::Cell<u32>,
    dead_letters_expected: std::cell::Cell<bool>,
    work_left_expected: std::cell::Cell<bool>,
    _turn: SemaphorePermit<'static>,
}

impl World {
    /// A world for one service at a time, set up by the program itself.
    pub async fn new(behaviour: Behaviour) -> Result<Self> {
        Self::for_services(1, behaviour).await
    }

    /// A world for `services` at once.
    pub async fn for_services(services: u32, behaviour: Behaviour) -> Result<Self> {
        let world = Self::bare(services, behaviour).await?;
        let output = world.cli(&["setup"])?;
        ensure!(output.status.success(), "setup failed: {}", text(&output.stderr));
        world.with_queues().await
    }

    /// A world in which nothing was set up: no schema, no queues.
    pub async fn bare(services: u32, behaviour: Behaviour) -> Result<Self> {
        let turn = SERVICES.acquire_many(services).await?;
        let stack = local_stack::shared().await?;
        let partner = PartnerStub::start(behaviour)?;
        let mut environment = stack.environment(&partner).await?;
        environment.set("queue.visibility_timeout", "5s");
        environment.set("queue.retry_base", "100ms").set("queue.retry_cap", "1s");
        environment.set("outbox.poll_interval", "500ms");
        let database = PgPoolOptions::new().max_connections(3).connect_lazy(environment.database_url())?;
        Ok(Self {
            partner,
            database,
            sqs: stack.sqs().client().await,
            environment,
            urls: BTreeMap::new(),
            directory: tempfile::tempdir()?,
            services_started: Default::default(),
            dead_letters_expected: Default::default(),
            work_left_expected: Default::default(),
            _turn: turn,
        })
    }

    /// Fresh connections to the database instead of those of before, once these are closed.
    pub fn with_new_connections(mut self) -> Result<Self> {
        self.database = PgPoolOptions::new().max_connections(3).connect_lazy(self.environment.database_url())?;
        Ok(self)
    }

    /// Looks the queues up, once they are there.
    pub async fn with_queues(mut self) -> Result<Self> {
        for lane in LANES {
            let name = self.queue_name(lane).to_owned();
            let url = self.queue_url(&name).await?;
            let dead = self.queue_url(&format!("{name}-dlq")).await?;
            self.urls.insert(lane, [url, dead]);
        }
        Ok(self)
    }

    async fn queue_url(&self, name: &str) -> Result<String> {
        let found = self.sqs.get_queue_url().queue_name(name).send().await;
        Ok(found.with_context(|| format!("no queue {name}"))?.queue_url.unwrap_or_default())
    }

    /// The URL of a lane's queue.
    pub fn queue_url_of(&self, lane: Lane) -> &str {
        &self.urls[&lane][0]
    }

    /// The URL of a lane's dead-letter queue.
    pub fn dead_letter_url(&self, lane: Lane) -> &str {
        &self.urls[&lane][1]
    }

    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    pub fn queue_name(&self, lane: Lane) -> &str {
        let names = self.environment.names();
        match lane {
            Lane::Events => &names.events_queue,
            Lane::Valuations => &names.valuations_queue,
            Lane::PostProcessing => &names.post_processing_queue,
        }
    }

    /// Changes a setting for whatever is started from now on.
    pub fn set(&mut self, key: &str, value: impl ToString) -> &mut Self {
        self.environment.set(key, &value.to_string());
        self
    }

    /// Changes a variable that is not the program's own, such as AWS's.
    pub fn set_variable(&mut self, name: &str, value: &str) -> &mut Self {
        self.environment.set_variable(name, value);
        self
    }

    /// A directory that is removed with the world.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Messages in dead-letter queues are what the test is about.
    pub fn expect_dead_letters(&self) {
        self.dead_letters_expected.set(true);
    }

    /// The test ends in the middle of some work.
    pub fn expect_work_left(&self) {
        self.work_left_expected.set(true);
    }

    /// Runs a verb to its end.
    pub fn cli(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.command().args(arguments).output()?)
    }

    /// Runs a verb that must succeed and gives what it printed.
    pub fn done(&self, arguments: &[&str]) -> Result<String> {
        let output = self.cli(arguments)?;
        ensure!(output.status.success(), "{arguments:?} failed: {}", text(&output.stderr));
        Ok(text(&output.stdout).trim().to_owned())
    }

    /// The program with this world's settings.
    pub fn command(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        command.envs(self.environment.variables());
        command
    }

    /// Writes listings 1 to `count`.
    pub async fn listings(&self, count: i64) -> Result<()> {
        self.listings_between(1, count).await
    }

    /// Writes the listings of an id range. Their price is made from their id, and their zip code is 98000 to 98009.
    pub async fn listings_between(&self, first: i64, last: i64) -> Result<()> {
        sqlx::query(
            "INSERT INTO listings
                (listing_id, zip_code, list_price_cents, bedrooms, living_square_feet, event_time, event_id)
             SELECT id, 98000 + id % 10, 10000000 + id * 137, id % 6, 900 + id % 2000, '2015-06-01Z', 'seed'
             FROM generate_series($1::bigint, $2::bigint) AS id",
        )
        .bind(first)
        .bind(last)
        .execute(&self.database)
        .await?;
        Ok(())
    }

    /// The first `limit` listings.
    pub async fn homes(&self, limit: i64) -> Result<Vec<Home>> {
        Ok(sqlx::query_as("SELECT listing_id, zip_code, list_price_cents FROM listings ORDER BY listing_id LIMIT $1")
            .bind(limit)
            .fetch_all(&self.database)
            .await?)
    }

    /// Starts the service and waits until it is ready.
    pub async fn serve(&self) -> Result<Service> {
        let service = self.start()?;
        service.ready().await?;
        Ok(service)
    }

    /// Starts the service with options and waits until it is ready.
    pub async fn serve_with(&self, options: &[&str]) -> Result<Service> {
        let service = self.start_with(options)?;
        service.ready().await?;
        Ok(service)
    }

    /// Starts the service and waits for nothing.
    pub fn start(&self) -> Result<Service> {
        self.start_with(&[])
    }

    fn start_with(&self, options: &[&str]) -> Result<Service> {
        let number = self.services_started.get() + 1;
        self.services_started.set(number);
        let (admin, profiling) = (local_stack::free_port()?, local_stack::free_port()?);
        let mut environment = self.environment.clone();
        environment.set("admin.listen", &format!("127.0.0.1:{admin}"));
        environment.set("profiling.listen", &format!("127.0.0.1:{profiling}"));
        let mut command = Command::new(PROGRAM);
        // As on a read-only root: the service needs no place for temporary files.
        command.arg("serve").args(options).envs(environment.variables()).env("TMPDIR", "/nonexistent");
        let log = self.path(&format!("service-{number}.log"));
        let process = Process::spawn("write-api", command, &log, None, Ending::AT_ONCE)?;
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        Ok(Service {
            process,
            log,
            admin_url: url(admin),
            profiling_url: url(profiling),
            errors_expected: false.into(),
            ended_well: false.into(),
        })
    }

    /// Sends a body to a lane as it is.
    pub async fn put(&self, lane: Lane, body: &str) -> Result<()> {
        self.sqs.send_message().queue_url(&self.urls[&lane][0]).message_body(body).send().await?;
        Ok(())
    }

    /// Sends a refresh by the program, with its options; gives the event's id.
    pub fn refresh(&self, options: &[&str]) -> Result<String> {
        self.done(&[&["send", "refresh"], options].concat())
    }

    /// Messages of a queue that can be received, and those that are hidden.
    pub async fn depth(&self, lane: Lane) -> Result<(u64, u64)> {
        self.depth_of(&self.urls[&lane][0]).await
    }

    async fn depth_of(&self, url: &str) -> Result<(u64, u64)> {
        let names = [
            QueueAttributeName::ApproximateNumberOfMessages,
            QueueAttributeName::ApproximateNumberOfMessagesNotVisible,
        ];
        let asked = self.sqs.get_queue_attributes().queue_url(url).set_attribute_names(Some(names.to_vec()));
        let attributes = asked.send().await?.attributes.unwrap_or_default();
        let number = |name| attributes.get(name).and_then(|text| text.parse().ok()).unwrap_or(0);
        Ok((number(&names[0]), number(&names[1])))
    }

    /// Takes what is in a lane's dead-letter queue.
    pub async fn dead_letters(&self, lane: Lane) -> Result<Vec<DeadLetter>> {
        let url = &self.urls[&lane][1];
        let mut letters = Vec::new();
        loop {
            let request = self.sqs.receive_message().queue_url(url).max_number_of_messages(10);
            let request = request
                .message_attribute_names("All")
                .message_system_attribute_names(MessageSystemAttributeName::ApproximateReceiveCount);
            let messages = request.send().await?.messages.unwrap_or_default();
            if messages.is_empty() {
                return Ok(letters);
            }
            for message in messages {
                let receipt = message.receipt_handle.unwrap_or_default();
                self.sqs.delete_message().queue_url(url).receipt_handle(receipt).send().await?;
                let attributes = message.message_attributes.unwrap_or_default();
                let reason = attributes.get("reason").and_then(|value| value.string_value.clone());
                letters.push(DeadLetter { body: message.body.unwrap_or_default(), reason: reason.unwrap_or_default() });
            }
        }
    }

    /// Waits for `count` dead letters on a lane.
    pub async fn wait_for_dead_letters(&self, lane: Lane, count: usize) -> Result<Vec<DeadLetter>> {
        self.wait_for_dead_letters_within(lane, count, SOON).await
    }

    /// Waits up to `limit` for `count` dead letters on a lane.
    pub async fn wait_for_dead_letters_within(
        &self,
        lane: Lane,
        count: usize,
        limit: Duration,
    ) -> Result<Vec<DeadLetter>> {
        self.expect_dead_letters();
        let mut letters = Vec::new();
        let what = format!("{count} dead letters on {lane:?}");
        until(&what, limit, async || {
            letters.append(&mut self.dead_letters(lane).await?);
            Ok((letters.len() >= count).then_some(()))
        })
        .await
        .with_context(|| format!("there are {letters:?}"))?;
        Ok(letters)
    }

    /// Waits until no queue has a message: everything sent is done or refused.
    pub async fn quiet(&self, limit: Duration) -> Result<()> {
        let mut depths = Vec::new();
        until("empty queues", limit, async || {
            depths.clear();
            for lane in LANES {
                depths.push((lane, self.depth(lane).await?));
            }
            Ok(depths.iter().all(|(_, depth)| *depth == (0, 0)).then_some(()))
        })
        .await
        .with_context(|| format!("left (visible, hidden): {depths:?}"))
    }

    pub async fn run(&self, id: &str) -> Result<Option<Run>> {
        Ok(sqlx::query_as(
            "SELECT state, selected, valued, failed, attempts, cursor, owner IS NOT NULL AS owned,
                    lease_until IS NOT NULL AS leased, last_error
             FROM runs WHERE run_id = $1",
        )
        .bind(id)
        .fetch_optional(&self.database)
        .await?)
    }

    /// Waits until the run is as `wanted`.
    pub async fn run_until(&self, id: &str, limit: Duration, wanted: impl Fn(&Run) -> bool) -> Result<Run> {
        let mut seen = None;
        until(&format!("run {id}"), limit, async || {
            seen = self.run(id).await?;
            Ok(seen.clone().filter(&wanted))
        })
        .await
        .with_context(|| format!("it is {seen:?}"))
    }

    /// Waits until the run is complete and published.
    pub async fn published(&self, id: &str, limit: Duration) -> Result<Run> {
        let run = self.run_until(id, limit, |run| run.state == "complete").await?;
        self.publications(id, 1, limit).await?;
        Ok(run)
    }

    /// Waits until `count` publications of the run are complete.
    pub async fn publications(&self, id: &str, count: i64, limit: Duration) -> Result<()> {
        let what = format!("{count} complete publications of run {id}");
        until(&what, limit, async || {
            let complete = "SELECT count(*) FROM publications WHERE run_id = $1 AND state = 'complete'";
            let complete: i64 = sqlx::query_scalar(complete).bind(id).fetch_one(&self.database).await?;
            Ok((complete >= count).then_some(()))
        })
        .await
    }

    /// A single number from the database.
    pub async fn number(&self, statement: &str) -> Result<i64> {
        Ok(sqlx::query_scalar(AssertSqlSafe(statement.to_owned())).fetch_one(&self.database).await?)
    }

    /// How many statements of the program wait for a lock.
    pub async fn waiting_for_locks(&self) -> Result<i64> {
        self.number(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
             AND application_name = 'write-api' AND wait_event_type = 'Lock'",
        )
        .await
    }

    /// Runs statements.
    pub async fn sql(&self, statements: &str) -> Result<()> {
        sqlx::raw_sql(AssertSqlSafe(statements.to_owned())).execute(&self.database).await?;
        Ok(())
    }

    /// Ends a test: all that was sent is done, the service stops well, and nothing is in a dead-letter queue that should
    /// not be there.
    pub async fn finish(&self, service: Service) -> Result<()> {
        if !self.work_left_expected.get() {
            self.check_work_done().await?;
        }
        service.finish().await?;
        self.check_dead_letters().await
    }

    pub async fn check_dead_letters(&self) -> Result<()> {
        if !self.dead_letters_expected.get() {
            for lane in LANES {
                let letters = self.dead_letters(lane).await?;
                ensure!(letters.is_empty(), "unexpected dead letters on {lane:?}: {letters:?}");
            }
        }
        Ok(())
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
