//! One service and everything around it: a database, queues, a topic and a partner that nobody else uses.

mod observing;
mod settings;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aws_sdk_sqs::types::QueueAttributeName;
use local_stack::{Behaviour, Environment, KafkaTap, PartnerStub, PostgresProxy, SqsProxy, Stack};
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, FromRow};

use crate::faults::disk::SmallDisk;
use crate::owners;
use crate::replica::{LOOK, Replica};
use crate::workload::{LANES, Lane, Message, SEEDED_AT, SEEDED_BY, Workload};

pub use settings::{CONNECTIONS, GRACE, LATENCY_MS, RENEWED_WITHIN, SQS_ANSWERS_WITHIN, Size, VISIBILITY};

/// A world.
#[derive(Debug)]
pub struct World {
    /// The partner.
    pub partner: PartnerStub,
    /// Before SQS: it can fail, and it is the witness of what every process did with which message.
    pub sqs_proxy: SqsProxy,
    /// Before Postgres, where there is one.
    pub postgres_proxy: Option<PostgresProxy>,
    /// The database, past all proxies.
    pub database: PgPool,
    /// The topic, read as it is written.
    tap: KafkaTap,
    /// The queues, past all proxies.
    sqs: aws_sdk_sqs::Client,
    urls: BTreeMap<Lane, [String; 2]>,
    /// Settings of the service.
    pub environment: Environment,
    /// The processes.
    pub replicas: Vec<Replica>,
    /// The database's URL for each of them, with a name of its own.
    logins: Vec<String>,
    /// What was put in.
    pub workload: Workload,
    /// More variables of every process.
    pub variables: Vec<(String, String)>,
    /// When a process was cut off from what it had in hand: it died, was stopped, or a task of it panicked, between these.
    interruptions: Vec<(Instant, Instant)>,
    /// The longest that PostgreSQL took for one of our own statements, in milliseconds.
    longest_look: AtomicU64,
    /// Where logs go.
    pub directory: PathBuf,
    /// Where the tables are, for rounds in which it is full at times.
    pub small_disk: Option<SmallDisk>,
    program: PathBuf,
    /// Its size.
    pub size: Size,
}

/// Who works on what at a moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, FromRow)]
pub struct AtWork {
    /// Runs with an owner.
    pub runs: i64,
    /// Runs with a publisher.
    pub publishers: i64,
    /// Listings with a state, records published: grows with all progress.
    pub progress: i64,
}

impl World {
    /// A world in which nothing runs yet. `program` is the service, built with the feature `fault-injection`.
    pub async fn create(stack: &Stack, program: &Path, size: Size, seed: u64, directory: &Path) -> Result<Self> {
        let workload = Workload::new(seed, size.listings);
        let unwanted = workload.inputs.unwanted.clone();
        let partner =
            PartnerStub::start(Behaviour { latency_ms: LATENCY_MS, forced: unwanted, ..Behaviour::default() })?;
        let mut environment = stack.environment(&partner).await?;
        settings::apply(&mut environment, size);
        let mut setup = Command::new(program);
        setup.arg("setup").envs(environment.variables());
        // The short limit is for the service under faults; nothing is broken yet, and servers that just started are slow.
        let setup = setup.env("WRITE_API_QUEUE_REQUEST_TIMEOUT", "20s").output();
        let setup = setup.with_context(|| format!("cannot run {}", program.display()))?;
        ensure!(setup.status.success(), "setup failed: {}", String::from_utf8_lossy(&setup.stderr));

        let database = PgPoolOptions::new()
            .max_connections(2)
            .acquire_timeout(Duration::from_secs(30))
            .connect_lazy(&format!("{}?application_name=campaign", environment.database_url()))?;
        let sqs = stack.sqs().client().await;
        let names = environment.names().clone();
        let mut urls = BTreeMap::new();
        for lane in LANES {
            let name = match lane {
                Lane::Events => &names.events_queue,
                Lane::Valuations => &names.valuations_queue,
                Lane::PostProcessing => &names.post_processing_queue,
            };
            let mut pair = [String::new(), String::new()];
            for (url, name) in pair.iter_mut().zip([name.clone(), format!("{name}-dlq")]) {
                let found = sqs.get_queue_url().queue_name(&name).send().await;
                *url = found.with_context(|| format!("no queue {name}"))?.queue_url.unwrap_or_default();
            }
            urls.insert(lane, pair);
        }
        let sqs_proxy = SqsProxy::start(stack.sqs().endpoint())?;
        environment.set("aws.endpoint_url", &sqs_proxy.endpoint());
        let mut postgres_proxy = None;
        if size.postgres_proxy {
            let before_postgres = PostgresProxy::start(environment.database_url())?;
            environment.set("database.url", before_postgres.url());
            postgres_proxy = Some(before_postgres);
        }
        let tap = environment.tap()?;
        owners::watch(&database).await?;
        let replicas: Vec<_> = (1..=size.replicas).map(|number| Replica::new(number, program, directory)).collect();
        let mut logins = Vec::new();
        let variables: BTreeMap<&str, &str> = environment.variables().collect();
        let url = variables.get("WRITE_API_DATABASE_URL").context("no database.url")?;
        for replica in &replicas {
            logins.push(owners::log_in_as(&database, url, &replica.name).await?);
        }
        let directory = directory.to_owned();
        let world = Self {
            partner,
            sqs_proxy,
            postgres_proxy,
            database,
            tap,
            sqs,
            urls,
            environment,
            replicas,
            logins,
            workload,
            variables: Vec::new(),
            interruptions: Vec::new(),
            longest_look: AtomicU64::new(0),
            directory,
            small_disk: None,
            program: program.to_owned(),
            size,
        };
        world.write_listings().await?;
        Ok(world)
    }

    async fn write_listings(&self) -> Result<()> {
        let homes = &self.workload.inputs.listings;
        let ids: Vec<i64> = homes.iter().map(|home| home.id).collect();
        let zip_codes: Vec<i32> = homes.iter().map(|home| home.zip_code).collect();
        let prices: Vec<i64> = homes.iter().map(|home| home.price_cents).collect();
        sqlx::query(
            "INSERT INTO listings
                (listing_id, zip_code, list_price_cents, bedrooms, living_square_feet, event_time, event_id)
             SELECT *, 3, 1500, $4, $5 FROM unnest($1::bigint[], $2::integer[], $3::bigint[])",
        )
        .bind(ids)
        .bind(zip_codes)
        .bind(prices)
        .bind(SEEDED_AT)
        .bind(SEEDED_BY)
        .execute(&self.database)
        .await
        .context("cannot write the first listings")?;
        Ok(())
    }

    /// Starts every replica and waits until all are ready.
    pub async fn start(&mut self) -> Result<()> {
        for replica in 0..self.replicas.len() {
            self.spawn(replica, "")?;
        }
        for replica in &mut self.replicas {
            replica.ready().await?;
        }
        Ok(())
    }

    /// Starts a replica with orders for its fault points, none if empty, and waits for nothing.
    pub fn spawn(&mut self, replica: usize, orders: &str) -> Result<()> {
        let mut variables = self.variables.clone();
        variables.push(("WRITE_API_FAULTS".to_owned(), orders.to_owned()));
        variables.push(("WRITE_API_DATABASE_URL".to_owned(), self.logins[replica].clone()));
        self.replicas[replica].spawn(&self.environment, &variables)
    }

    /// A process was cut off from what it had in hand, not before `since`.
    pub fn interrupted(&mut self, since: Instant) {
        self.interrupted_until(since, Instant::now());
    }

    /// As [`World::interrupted`], with its effects lasting until then.
    pub fn interrupted_until(&mut self, since: Instant, until: Instant) {
        self.interruptions.push((since, until));
    }

    /// A command line of the service, with its settings and the first replica's name at the database.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).envs(self.environment.variables()).env("WRITE_API_DATABASE_URL", &self.logins[0]);
        command
    }

    /// Starts a replica without orders and waits until it is ready.
    pub async fn restart(&mut self, replica: usize) -> Result<()> {
        self.spawn(replica, "")?;
        self.replicas[replica].ready().await
    }

    /// A replica that died without an order to. Called often: what nobody killed must not die.
    pub fn check_alive(&self) -> Result<()> {
        for replica in &self.replicas {
            if let Some(status) = replica.exited()? {
                bail!("{} ended by itself: {status}", replica.name);
            }
        }
        Ok(())
    }

    /// Sends messages.
    pub async fn send(&self, messages: Vec<Message>) -> Result<()> {
        for message in messages {
            let url = &self.urls[&message.lane][0];
            self.sqs.send_message().queue_url(url).message_body(message.body).send().await?;
        }
        Ok(())
    }

    /// Some more of everything.
    pub async fn more(&mut self, refreshes: usize) -> Result<()> {
        let complete = self.complete_runs().await?;
        let burst = self.workload.burst(refreshes, &complete);
        self.send(burst).await
    }

    /// Runs that are complete.
    pub async fn complete_runs(&self) -> Result<Vec<String>> {
        let statement = "SELECT run_id FROM runs WHERE state = 'complete' ORDER BY run_id";
        Ok(sqlx::query_scalar(statement).fetch_all(&self.database).await?)
    }

    /// Who works on what.
    pub async fn at_work(&self) -> Result<AtWork> {
        let begun = Instant::now();
        let at_work = sqlx::query_as(
            "SELECT count(owner) AS runs, count(publisher) AS publishers,
                    (coalesce(sum(valued + failed), 0)
                     + (SELECT coalesce(sum(published), 0) FROM publications))::bigint AS progress
             FROM runs",
        )
        .fetch_one(&self.database)
        .await?;
        self.looked(begun);
        Ok(at_work)
    }

    /// A statement of our own that was begun then was answered.
    fn looked(&self, begun: Instant) {
        let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.longest_look.fetch_max(took, Ordering::Relaxed);
    }

    /// Why the machine was too busy for a lease to be kept, if it was: a server took longer for an answer than the service
    /// waits for one, and no fault made it.
    #[must_use]
    pub fn starved(&self) -> Option<String> {
        let (late, longest) = self.sqs_proxy.later_than(SQS_ANSWERS_WITHIN);
        if late > 0 {
            return Some(format!(
                "the SQS emulator took {longest:?}, and {late} times more than {SQS_ANSWERS_WITHIN:?}"
            ));
        }
        let longest = Duration::from_millis(self.longest_look.load(Ordering::Relaxed));
        (longest > RENEWED_WITHIN).then(|| format!("PostgreSQL took {longest:?} for a look at the runs"))
    }

    /// Waits until somebody works on a run, sending more work if there is none left.
    pub async fn busy(&mut self, limit: Duration) -> Result<AtWork> {
        let deadline = Instant::now() + limit;
        loop {
            self.check_alive()?;
            let at_work = self.at_work().await?;
            if at_work.runs > 0 && self.partner.stats().in_flight > 0 {
                return Ok(at_work);
            }
            if self.idle().await? {
                self.more(2).await?;
            }
            ensure!(Instant::now() < deadline, "nobody works on a run after {limit:?}: {at_work:?}");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// A single value from the database.
    pub async fn number(&self, statement: &str) -> Result<i64> {
        let begun = Instant::now();
        let number = sqlx::query_scalar(AssertSqlSafe(statement.to_owned())).fetch_one(&self.database).await?;
        self.looked(begun);
        Ok(number)
    }

    /// Visible and hidden messages of a lane's queue.
    pub async fn depth(&self, lane: Lane) -> Result<(u64, u64)> {
        self.waiting(&self.urls[&lane][0]).await
    }

    /// Visible and hidden messages of a lane's dead-letter queue.
    pub async fn letters_waiting(&self, lane: Lane) -> Result<(u64, u64)> {
        self.waiting(&self.urls[&lane][1]).await
    }

    async fn waiting(&self, url: &str) -> Result<(u64, u64)> {
        let names = [
            QueueAttributeName::ApproximateNumberOfMessages,
            QueueAttributeName::ApproximateNumberOfMessagesNotVisible,
        ];
        let asked = self.sqs.get_queue_attributes().queue_url(url);
        let attributes = asked.set_attribute_names(Some(names.to_vec())).send().await?.attributes.unwrap_or_default();
        let number = |name| attributes.get(name).and_then(|text| text.parse().ok()).unwrap_or(0);
        Ok((number(&names[0]), number(&names[1])))
    }

    /// Whether there is nothing to do: no message, nothing to be sent, nothing half done.
    pub async fn idle(&self) -> Result<bool> {
        for lane in LANES {
            if self.depth(lane).await? != (0, 0) {
                return Ok(false);
            }
        }
        let left = "SELECT (SELECT count(*) FROM outbox WHERE sent_at IS NULL)
                         + (SELECT count(*) FROM runs WHERE state = 'running' OR owner IS NOT NULL OR publisher IS NOT NULL)
                         + (SELECT count(*) FROM publications WHERE state = 'running')";
        Ok(self.number(left).await? == 0)
    }

    /// Waits until there is nothing to do; what is left, if that does not happen.
    pub async fn rest(&self, limit: Duration) -> Result<Option<String>> {
        let deadline = Instant::now() + limit;
        loop {
            self.check_alive()?;
            if self.idle().await? {
                return Ok(None);
            }
            if Instant::now() >= deadline {
                return Ok(Some(self.left().await?));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// A text of what is left to do.
    pub async fn left(&self) -> Result<String> {
        let mut left = Vec::new();
        for lane in LANES {
            left.push(format!("{lane:?} {:?}", self.depth(lane).await?));
        }
        let runs =
            "SELECT concat_ws(' ', run_id, state, valued, failed, selected, 'attempts', attempts, 'owner', owner,
                        'lease', lease_until, 'publisher', publisher, 'now', clock_timestamp(), last_error)
                    FROM runs WHERE state <> 'complete' OR owner IS NOT NULL OR publisher IS NOT NULL";
        left.extend(sqlx::query_scalar(runs).fetch_all(&self.database).await?);
        let publications =
            "SELECT concat_ws(' ', 'publication', event_id, run_id, state, published, attempts, last_error)
                            FROM publications WHERE state <> 'complete'";
        left.extend(sqlx::query_scalar(publications).fetch_all(&self.database).await?);
        left.extend(
            sqlx::query_scalar("SELECT concat_ws(' ', 'outbox', event_id, lane) FROM outbox WHERE sent_at IS NULL")
                .fetch_all(&self.database)
                .await?,
        );
        Ok(left.join("; "))
    }

    /// Removes what the servers would keep of it.
    pub async fn remove(self, stack: &Stack) -> Result<()> {
        drop(self.replicas);
        self.database.close().await;
        drop((self.sqs_proxy, self.postgres_proxy));
        for url in self.urls.values().flatten() {
            self.sqs.delete_queue().queue_url(url).send().await?;
        }
        let admin = PgPoolOptions::new().max_connections(1).connect(&stack.postgres().admin_url()).await?;
        let drop = format!("DROP DATABASE {} WITH (FORCE)", self.environment.names().database);
        sqlx::raw_sql(AssertSqlSafe(drop)).execute(&admin).await?;
        if let Some(disk) = self.small_disk {
            let drop = format!("DROP TABLESPACE {}", disk.tablespace);
            sqlx::raw_sql(AssertSqlSafe(drop)).execute(&admin).await?;
        }
        admin.close().await;
        Ok(())
    }
}
