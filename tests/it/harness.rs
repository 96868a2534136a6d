//! What the tests are written in: a world around the service, the service as a process, and the checks of results.
//!
//! Nothing here waits for a fixed time: [`until`] looks again and again, up to a deadline.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aws_sdk_sqs::types::{MessageSystemAttributeName, QueueAttributeName};
use local_stack::{Behaviour, Ending, Environment, KafkaTap, PartnerStub, Process, http_client, partner};
use serde_json::Value;
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Row};
use tempfile::TempDir;
use tokio::sync::{Semaphore, SemaphorePermit};

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

    /// Runs statements.
    pub async fn sql(&self, statements: &str) -> Result<()> {
        sqlx::raw_sql(AssertSqlSafe(statements.to_owned())).execute(&self.database).await?;
        Ok(())
    }

    /// Listings that the run's cursor has passed without a result: there must be none, whenever one looks.
    pub async fn passed_without_result(&self, id: &str) -> Result<i64> {
        Ok(sqlx::query_scalar(
            "SELECT count(*) FROM runs AS r JOIN listings AS l ON l.listing_id <= r.cursor
             WHERE r.run_id = $1 AND NOT EXISTS
                 (SELECT FROM valuations AS v WHERE v.run_id = r.run_id AND v.listing_id = l.listing_id)",
        )
        .bind(id)
        .fetch_one(&self.database)
        .await?)
    }

    /// Checks that a complete run has one right valuation for each of `homes` and nothing else, that the listings carry
    /// it, that the counts are right, and that its post-processing was sent once.
    pub async fn check_run(&self, id: &str, homes: &[Home]) -> Result<()> {
        let run = self.run(id).await?.with_context(|| format!("no run {id}"))?;
        let count = homes.len() as i64;
        let counts = (run.state.as_str(), run.selected, run.valued, run.failed, run.owned, run.leased);
        ensure!(counts == ("complete", count, count, 0, false, false), "{count} homes, and the run is {run:?}");

        let valuations = sqlx::query(
            "SELECT listing_id, zip_code, list_price_cents, valuation_cents, confidence
             FROM valuations WHERE run_id = $1 ORDER BY listing_id",
        )
        .bind(id)
        .fetch_all(&self.database)
        .await?;
        ensure!(valuations.len() == homes.len(), "{} valuations for {} homes", valuations.len(), homes.len());
        for (row, home) in valuations.iter().zip(homes) {
            let (valuation_cents, confidence) = expected_valuation(home);
            let expected = (home.listing_id, home.zip_code, home.list_price_cents, valuation_cents, confidence);
            let found: (i64, i32, i64, i64, f64) =
                (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?, row.try_get(4)?);
            ensure!(found == expected, "the valuation is {found:?} and should be {expected:?}");
        }

        let different: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM valuations AS v LEFT JOIN listing_valuations AS l USING (listing_id)
             WHERE v.run_id = $1
               AND (l.run_id, l.valuation_cents, l.confidence) IS DISTINCT FROM (v.run_id, v.valuation_cents, v.confidence)",
        )
        .bind(id)
        .fetch_one(&self.database)
        .await?;
        ensure!(different == 0, "{different} listings do not carry their newest valuation");

        let like = format!("%{id}%");
        let sent = "SELECT sent_at IS NOT NULL FROM outbox WHERE body LIKE $1 AND lane = 'post_processing'";
        let sent: Vec<bool> = sqlx::query_scalar(sent).bind(like).fetch_all(&self.database).await?;
        ensure!(sent == [true], "the outbox has {sent:?} for the run");
        Ok(())
    }

    /// Checks that the topic has, for each of `homes`, the one record that follows from the contract, byte by byte; the
    /// same record may be there more than once.
    pub async fn check_records(&self, tap: &KafkaTap, id: &str, homes: &[Home]) -> Result<()> {
        let read = until(&format!("{} records", homes.len()), SOON, async || {
            Ok((tap.distinct_ids() >= homes.len() as u64).then_some(()))
        })
        .await;
        read.with_context(|| format!("{} records, {} distinct", tap.count(), tap.distinct_ids()))?;
        ensure!(tap.missed() == 0, "the broker dropped {} records before they were read", tap.missed());
        let completed_at: String = sqlx::query_scalar(
            "SELECT to_char(completed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US') FROM runs WHERE run_id = $1",
        )
        .bind(id)
        .fetch_one(&self.database)
        .await?;
        let completed_at = format!("{}Z", completed_at.trim_end_matches('0').trim_end_matches('.'));

        let mut expected: BTreeMap<String, ExpectedRecord> = BTreeMap::new();
        for home in homes {
            let record = ExpectedRecord::of(id, home, &completed_at);
            expected.insert(record.headers["ce_id"].clone(), record);
        }
        ensure!(expected.len() == homes.len(), "two homes share a ce_id");
        ensure!(tap.distinct_ids() == homes.len() as u64, "{} distinct records", tap.distinct_ids());
        for record in tap.records() {
            let expected =
                expected.get(record.ce_id()).with_context(|| format!("unexpected {}", text(&record.payload)))?;
            let found =
                ExpectedRecord { key: record.key, value: String::from_utf8(record.payload)?, headers: record.headers };
            ensure!(found == *expected, "the record is\n{found:?}\nand should be\n{expected:?}");
        }
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

    /// Nothing waits, nothing is half done, nobody owns anything.
    async fn check_work_done(&self) -> Result<()> {
        self.quiet(LONG).await?;
        for (left, statement) in [
            ("events in the outbox", "SELECT count(*) FROM outbox WHERE sent_at IS NULL"),
            (
                "runs",
                "SELECT count(*) FROM runs
                 WHERE state NOT IN ('complete', 'cancelled') OR owner IS NOT NULL OR publisher IS NOT NULL",
            ),
            ("publications", "SELECT count(*) FROM publications WHERE state <> 'complete'"),
            (
                "runs whose counts are wrong",
                "SELECT count(*) FROM runs AS r
                 JOIN LATERAL (SELECT count(*), count(valuation_cents), count(failure)
                               FROM valuations WHERE run_id = r.run_id) AS v (rows, valued, failed) ON true
                 WHERE (r.valued, r.failed) <> (v.valued, v.failed) OR r.state = 'complete' AND r.selected <> v.rows",
            ),
        ] {
            let count = self.number(statement).await?;
            ensure!(count == 0, "{count} {left} are left");
        }
        Ok(())
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

/// What the partner answers for a home.
pub fn expected_valuation(home: &Home) -> (i64, f64) {
    let valuation = partner::valuation(home.listing_id, home.list_price_cents);
    (valuation.valuation_cents, f64::from(valuation.confidence_percent) / 100.0)
}

/// A Kafka record, made anew from the contract and not by the service's code.
#[derive(Debug, PartialEq)]
struct ExpectedRecord {
    key: String,
    value: String,
    headers: BTreeMap<String, String>,
}

impl ExpectedRecord {
    fn of(run_id: &str, home: &Home, completed_at: &str) -> Self {
        let (valuation, confidence) = expected_valuation(home);
        let Home { listing_id, zip_code, list_price_cents: price } = *home;
        let delta = valuation - price;
        let assessment = match 100 * i128::from(delta) {
            hundredfold if hundredfold >= 5 * i128::from(price) => "undervalued",
            hundredfold if hundredfold <= -5 * i128::from(price) => "overvalued",
            _ => "fair",
        };
        let value = format!(
            "{{\"run_id\":\"{run_id}\",\"listing_id\":{listing_id},\"zip_code\":{zip_code},\
             \"list_price_cents\":{price},\"valuation_cents\":{valuation},\"delta_cents\":{delta},\
             \"delta_ratio\":{},\"assessment\":\"{assessment}\",\"confidence\":{confidence:?}}}",
            ratio(delta, price)
        );
        let namespace = uuid::uuid!("6ba7b812-9dad-11d1-80b4-00c04fd430c8");
        let ce_id = uuid::Uuid::new_v5(&namespace, format!("{run_id}:{listing_id}").as_bytes());
        let headers = [
            ("ce_id", ce_id.to_string()),
            ("ce_type", "writeapi.listing.valued.v1".to_owned()),
            ("ce_specversion", "1.0".to_owned()),
            ("ce_source", "/writeapi".to_owned()),
            ("ce_time", completed_at.to_owned()),
            ("content-type", "application/json".to_owned()),
        ];
        let headers = headers.map(|(name, value)| (name.to_owned(), value)).into();
        Self { key: listing_id.to_string(), value, headers }
    }
}

/// `delta / price` with four decimals, ties to the even one.
fn ratio(delta: i64, price: i64) -> String {
    let (size, price) = (u128::from(delta.unsigned_abs()) * 10_000, u128::from(price.unsigned_abs()));
    let (down, rest) = (size / price, size % price);
    let rounded = match (2 * rest).cmp(&price) {
        std::cmp::Ordering::Less => down,
        std::cmp::Ordering::Greater => down + 1,
        std::cmp::Ordering::Equal => down + down % 2,
    };
    let sign = if delta < 0 && rounded > 0 { "-" } else { "" };
    format!("{sign}{}.{:04}", rounded / 10_000, rounded % 10_000)
}

/// The program at work. Killed when dropped.
pub struct Service {
    process: Process,
    log: PathBuf,
    admin_url: String,
    profiling_url: String,
    errors_expected: std::cell::Cell<bool>,
    ended_well: std::cell::Cell<bool>,
}

impl Service {
    /// Lines at level ERROR are what the test is about.
    pub fn expect_errors(&self) {
        self.errors_expected.set(true);
    }

    pub fn admin_url(&self) -> &str {
        &self.admin_url
    }

    pub fn profiling_url(&self) -> &str {
        &self.profiling_url
    }

    /// Waits until `/readyz` says yes.
    pub async fn ready(&self) -> Result<()> {
        let url = format!("{}/readyz", self.admin_url);
        let probe = async || http_client::get(&url).await.ok().filter(|(status, _)| status.is_success()).map(drop);
        self.process.ready(SOON, probe).await
    }

    /// Status and body of an admin page.
    pub async fn page(&self, path: &str) -> Result<(u16, String)> {
        let (status, body) = http_client::get(&format!("{}{path}", self.admin_url)).await?;
        Ok((status.as_u16(), text(&body)))
    }

    /// A sample of `/metrics`, by its name with labels as they are written there; 0 if it is not there.
    pub async fn metric(&self, sample: &str) -> Result<f64> {
        let (_, page) = self.page("/metrics").await?;
        let line = page.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        Ok(line.map(str::parse).transpose()?.unwrap_or(0.0))
    }

    /// The end that leaves no time for anything.
    pub async fn kill(self) -> Result<()> {
        self.process.signal(libc::SIGKILL);
        self.exit(SOON).await?;
        self.ended_well.set(true);
        Ok(())
    }

    pub fn signal(&self, signal: libc::c_int) {
        self.process.signal(signal);
    }

    /// Waits for the end.
    pub async fn exit(&self, limit: Duration) -> Result<ExitStatus> {
        let ended = until("the end of the service", limit, async || self.process.exited()).await;
        ended.with_context(|| format!("the end of its log:\n{}", self.process.log_tail()))
    }

    pub fn is_running(&self) -> Result<bool> {
        Ok(self.process.exited()?.is_none())
    }

    /// Everything that it wrote.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }

    /// SIGTERM, exit 0 within the grace period, and no ERROR in the log unless expected.
    pub async fn finish(self) -> Result<()> {
        self.signal(libc::SIGTERM);
        let status = self.exit(Duration::from_secs(25)).await?;
        let log = self.log()?;
        ensure!(status.code() == Some(0), "ended with {status}; its log:\n{log}");
        self.check_log()
    }

    /// No ERROR in the log unless expected, and JSON on every line.
    pub fn check_log(&self) -> Result<()> {
        for line in self.log()?.lines() {
            let entry: Value = serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))?;
            if entry["level"] == "ERROR" && !self.errors_expected.get() {
                bail!("an error in the log: {line}");
            }
        }
        self.ended_well.set(true);
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if !self.ended_well.get() {
            eprintln!("the end of {}:\n{}", self.log.display(), self.process.log_tail());
        }
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
