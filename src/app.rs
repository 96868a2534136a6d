//! The composition root: builds every part, starts them, and stops them in order.
//!
//! Building and running are two steps: when [`App::build`] returns, the listeners are bound and their addresses logged;
//! nothing has been received yet.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures::FutureExt;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::config::{self, Config};
use crate::db::{self, Database, runs};
use crate::events::recorder::{Recorder, Recording};
use crate::events::relay::{self, Relay};
use crate::events::retention::{self, Retention};
use crate::events::{Ended, Events, Gate, GroupCommit, LaneQueues, cancels, ended, lane};
use crate::health::{Dependency, Health};
use crate::kafka::Publisher;
use crate::lifecycle::{Company, Stop, StopSource};
use crate::metrics::Metrics;
use crate::partner::{BreakerState, Partner};
use crate::profiling::snapshots::{Outcome, Snapshots};
use crate::queue::consumer::{ConsumerParts, consume};
use crate::queue::keeper::{Keeper, KeeperSettings, Renewals};
use crate::queue::sqs::Sqs;
use crate::{admin, profiling, task};

/// Kept of the time to stop for what comes after the last event: Kafka flushed, outbox relayed, connections closed.
const LAST_STEPS: Duration = Duration::from_secs(2);

/// How long the last lines of a recording may take.
const RECORDER_FLUSH: Duration = Duration::from_millis(500);

/// How long the outbox may be relayed a last time. What was committed should not wait for another process, though it may.
const LAST_RELAY: Duration = Duration::from_secs(2);

/// How often Postgres, Kafka and the partner are looked at for `/readyz`.
const LOOK: Duration = Duration::from_secs(5);

/// How long the partner is taken to be well after a connection to it was opened. Each look opens one if none is idle, which
/// an idle service must not do all day.
const PARTNER_STAYS_WELL: Duration = Duration::from_secs(30);

/// How long Kafka may take to answer such a look.
const KAFKA_LOOK: Duration = Duration::from_secs(4);

/// The longest that an admin page may take.
const ADMIN_PAGE: Duration = Duration::from_secs(10);

/// The longest that a profile may take, with the reading of it.
const PROFILE: Duration = Duration::from_secs(120);

/// How long the keeper may be silent beside its calls to SQS; to Postgres they take 15 s at most.
const KEEPER_SILENCE: Duration = Duration::from_secs(60);

/// The service, built and not yet running.
pub struct App {
    config: Config,
    for_fast_events: Handle,
    metrics: Arc<Metrics>,
    health: Health,
    database: Database,
    sqs: Sqs,
    publisher: Publisher,
    keeper: Arc<Keeper>,
    events: Arc<Events>,
    listeners: Option<Listeners>,
    snapshots: Option<Snapshots>,
}

/// Bound before anything starts, so that an address in use is a start-up error.
struct Listeners {
    admin: TcpListener,
    profiling: Option<TcpListener>,
}

impl App {
    /// Builds every part and binds the listeners. Neighbours that are away are no error: the service waits for them. Events of the
    /// common lane are worked on by the runtime `for_fast_events`, all else by the one that this is called in.
    pub async fn build(config: Config, recording: Option<Recording>, for_fast_events: Handle) -> anyhow::Result<App> {
        let metrics = Arc::new(Metrics::new());
        let health = Health::new();
        profiling::sample_allocations(config.profiling.enabled)?;
        let listeners = Listeners::bind(&config).await?;
        let database = Database::new(&config.database)?;
        let sqs = Sqs::new(&config.aws, &config.queue, metrics.clone()).await;
        let keeper = Keeper::start(KeeperSettings {
            aws: config.aws.clone(),
            queue: config.queue.clone(),
            database: db::connect_options(&config.database)?,
            renewals: Renewals {
                owner: |connection, run_ids, tokens, lease| {
                    runs::renew_owners(connection, run_ids, tokens, lease).boxed()
                },
                publisher: |connection, run_ids, tokens, lease| {
                    runs::renew_publishers(connection, run_ids, tokens, lease).boxed()
                },
            },
            metrics: metrics.clone(),
            message_beat: health.beat("keeper of messages", KEEPER_SILENCE + config.queue.request_timeout * 2),
            run_beat: health.beat("keeper of runs", KEEPER_SILENCE),
        })?;
        let publisher = Publisher::new(&config.kafka, metrics.clone())?;
        let events = Arc::new(Events {
            database: database.clone(),
            partner: Partner::new(&config.partner, metrics.clone()).context("the partner's client")?,
            publisher: publisher.clone(),
            sqs: sqs.clone(),
            lanes: Arc::new(LaneQueues::new(sqs.clone(), &config.lanes)),
            refresh: config.refresh.clone(),
            pages: Arc::new(Semaphore::new(config.refresh.pages_ahead)),
            publish_page_size: config.kafka.page_size,
            publish_pages_in_flight: config.kafka.pages_in_flight,
            upserts: GroupCommit::default(),
            outbox: Arc::new(Notify::new()),
            gate: Arc::new(Gate::default()),
            ended: Ended::default(),
            recorder: recording
                .map(|recording| Recorder::start(recording, metrics.clone()))
                .transpose()
                .context("the thread of the recorder")?,
            metrics: metrics.clone(),
        });
        let snapshots = start_snapshots(&config.profiling.snapshots, metrics.clone())?;
        Ok(App {
            metrics,
            health,
            database,
            sqs,
            publisher,
            keeper: Arc::new(keeper),
            events,
            listeners: Some(listeners),
            snapshots,
            for_fast_events,
            config,
        })
    }

    /// Runs until `stop` is ready, then stops in order. Returns within the grace period from then on.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
        let (source, draining) = StopSource::new();
        let (relay_source, relay_stop) = StopSource::new();
        let (last_source, last) = StopSource::new();
        let mut pages = JoinSet::new();
        let mut watchers = JoinSet::new();
        let listeners = self.listeners.take().expect("taken once, here");
        let begin = self.start_watchers(&mut watchers);
        if self.config.profiling.enabled {
            let budget = profiling::keep_to_budget(self.config.profiling.clone());
            task::spawn_in(&mut watchers, "profiler budget", budget);
        }
        let cancels = cancels::watch(
            self.database.clone(),
            self.keeper.clone(),
            self.health.beat("cancels", cancels::silence_limit(&self.database)),
            draining.clone(),
        );
        task::spawn_in(&mut watchers, "cancels", cancels);
        task::spawn_in(&mut watchers, "ended attempts", ended::keep_writing(self.events.clone()));
        if let Some(age) = self.config.retention.age {
            let (database, metrics, health) = (self.database.clone(), self.metrics.clone(), self.health.clone());
            let (mut begin, stop) = (begin.clone(), draining.clone());
            task::spawn_in(&mut watchers, "retention", async move {
                // Not before the schema is known to be whole, however long that takes.
                let _ = task::park(begin.wait_for(|begun| *begun)).await;
                let beat = health.beat("retention", retention::silence_limit(&database));
                Retention { database, age, metrics, beat, stop }.run().await;
            });
        }
        let mut lanes = self.start_lanes(&draining, &begin);
        let mut relay = task::spawn("relay", self.relay(relay_stop).run());
        // After all that reports to them: `/readyz` must not say yes because nobody was asked yet.
        self.start_pages(listeners, &mut pages, &last);
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "started");

        let died = tokio::select! {
            () = task::park(stop) => None,
            ended = lanes.join_next() => Some(format!("a lane ended by itself: {ended:?}")),
            ended = pages.join_next() => Some(format!("a listener ended by itself: {ended:?}")),
        };

        let began = Instant::now();
        // At once: it shows the process at work, and is written while the events end.
        let last_snapshot = self.snapshots.take().map(|snapshots| task::spawn_blocking(|| snapshots.stop()));
        let grace = self.config.shutdown.grace;
        self.health.drain();
        let for_events = grace.saturating_sub(LAST_STEPS);
        source.drain(for_events);
        // New work is no longer begun; tasks end their events, lanes flush their deletes.
        if timeout(for_events, join_all(&mut lanes)).await.is_err() {
            tracing::warn!(left = self.keeper.len(), "the time to stop is over; what still runs is given back");
            source.end();
        }
        let deadline = began + grace.saturating_sub(Duration::from_millis(200));
        let left = || deadline.saturating_duration_since(Instant::now());
        let in_time = timeout(left(), async {
            join_all(&mut lanes).await;
            if let Some(recorder) = &self.events.recorder {
                recorder.flush(RECORDER_FLUSH).await;
            }
            watchers.shutdown().await;
            // Both at once and each with a share of what is left, so that a neighbour that is away costs no other its turn.
            let share = left() / 2;
            relay_source.drain(share);
            let (flushed, relayed, kept) = tokio::join!(
                self.publisher.flush(share),
                timeout(share.min(LAST_RELAY), &mut relay),
                self.events.ended.write_all(&self.database, share),
            );
            if kept > 0 {
                tracing::warn!(ends = kept, "Postgres did not take the ends of attempts; each counts as a death");
            }
            if !flushed {
                tracing::warn!(
                    "Kafka did not take every record in time; their cursor has not moved, so they are sent again"
                );
            }
            if relayed.is_err() {
                tracing::warn!("the outbox was not relayed a last time; what is left in it waits for another process");
                relay.abort();
            }
            self.database.close().await;
            last_source.drain(left());
            join_all(&mut pages).await;
        });
        if in_time.await.is_err() {
            tracing::warn!("the last steps of stopping did not end in time");
        }
        if let Some(last_snapshot) = last_snapshot
            && timeout(left(), last_snapshot).await.is_err()
        {
            tracing::warn!("the last snapshot of the heap was not written in time");
        }
        drop(self.events);
        match Arc::try_unwrap(self.keeper) {
            Ok(keeper) => keeper.stop(),
            Err(_) => tracing::debug!("the keeper is still in use; it ends with the process"),
        }
        tracing::info!(seconds = began.elapsed().as_secs_f64(), "stopped");
        match died {
            Some(died) => anyhow::bail!(died),
            None => Ok(()),
        }
    }

    fn start_lanes(&self, stop: &Stop, begin: &watch::Receiver<bool>) -> JoinSet<()> {
        let lanes = &self.config.lanes;
        let queue = &self.config.queue;
        // A poll, its own bound, and the backoff after it; a loop that waits for permits reports more often.
        let silence = queue.wait_time + queue.request_timeout * 2 + Duration::from_secs(10);
        let company = Company::new();
        let mut set = JoinSet::new();
        let for_slow_events = Handle::current();
        for (name, settings, runtime) in [
            (lane::EVENTS, &lanes.events, &self.for_fast_events),
            (lane::VALUATIONS, &lanes.valuations, &for_slow_events),
            (lane::POST_PROCESSING, &lanes.post_processing, &for_slow_events),
        ] {
            let parts = ConsumerParts {
                lane: name,
                settings: settings.clone(),
                queue: queue.clone(),
                sqs: self.sqs.clone(),
                keeper: self.keeper.clone(),
                handler: self.events.clone(),
                metrics: self.metrics.clone(),
                begin: begin.clone(),
                stop: stop.clone(),
                beat: self.health.beat(format!("poll {name}"), silence),
                dependency: self.health.dependency(format!("queue {}", settings.queue)),
            };
            let _entered = runtime.enter();
            task::spawn_in(&mut set, "lane", consume(parts, company.clone()));
        }
        set
    }

    fn relay(&self, stop: Stop) -> Relay {
        Relay {
            database: self.database.clone(),
            sqs: self.sqs.clone(),
            lanes: self.events.lanes.clone(),
            wake: self.events.outbox.clone(),
            settings: self.config.outbox.clone(),
            metrics: self.metrics.clone(),
            beat: self.health.beat("outbox relay", relay::silence_limit(&self.config.outbox, &self.database)),
            stop,
        }
    }

    /// Starts to look at the neighbours; what is returned tells when the database was first found fit to work with.
    fn start_watchers(&self, watchers: &mut JoinSet<()>) -> watch::Receiver<bool> {
        let (begin, begun) = watch::channel(false);
        let database = watch_database(self.database.clone(), self.health.dependency("database"), begin);
        task::spawn_in(watchers, "look at Postgres", database);
        let (publisher, dependency) = (self.publisher.clone(), self.health.dependency("kafka"));
        task::spawn_in(watchers, "look at Kafka", async move {
            loop {
                match task::park(publisher.check(KAFKA_LOOK)).await {
                    Ok(_) => dependency.up(),
                    Err(error) => dependency.down(error.to_string()),
                }
                task::park(sleep(LOOK)).await;
            }
        });
        let (partner, dependency) = (self.events.partner.clone(), self.health.dependency("partner"));
        task::spawn_in(watchers, "look at the partner", watch_partner(partner, dependency, LOOK, PARTNER_STAYS_WELL));
        begun
    }

    fn start_pages(&self, listeners: Listeners, pages: &mut JoinSet<()>, stop: &Stop) {
        let router = admin::router(self.health.clone(), self.metrics.clone());
        let last = stop.clone();
        task::spawn_in(
            pages,
            "admin",
            admin::serve(listeners.admin, router, ADMIN_PAGE, async move { last.draining().await }),
        );
        if let Some(listener) = listeners.profiling {
            let router = profiling::router(&self.config.profiling);
            let last = stop.clone();
            task::spawn_in(
                pages,
                "profiling",
                admin::serve(listener, router, PROFILE, async move { last.draining().await }),
            );
        }
    }
}

impl Listeners {
    async fn bind(config: &Config) -> anyhow::Result<Self> {
        let admin = admin::bind("admin.listen", config.admin.listen).await?;
        tracing::info!(address = %admin.local_addr()?, "health and metrics at /livez, /readyz, /metrics");
        let profiling = match config.profiling.enabled {
            true => Some(admin::bind("profiling.listen", config.profiling.listen).await?),
            false => None,
        };
        if let Some(listener) = &profiling {
            tracing::info!(address = %listener.local_addr()?, "profiles at /debug/pprof/");
        }
        Ok(Listeners { admin, profiling })
    }
}

/// Starts to keep heap profiles, where a directory for them is set.
fn start_snapshots(settings: &config::Snapshots, metrics: Arc<Metrics>) -> anyhow::Result<Option<Snapshots>> {
    if settings.directory.is_none() {
        return Ok(None);
    }
    let tell = move |outcome| {
        let gauge = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let result = match outcome {
            Outcome::Written { bytes } => {
                metrics.snapshot_bytes.set(gauge(bytes));
                "written"
            }
            Outcome::Failed => "failed",
            Outcome::Sent { left } => {
                metrics.snapshots_unsent.set(gauge(left));
                "sent"
            }
            Outcome::NotSent => "not_sent",
        };
        metrics.snapshots.with_label_values(&[result]).inc();
    };
    Ok(Some(Snapshots::start(settings, tell).context("snapshots of the heap")?))
}

/// Looks at Postgres, and at the schema until it was found whole, and again after each outage: with a migration missing,
/// events would only be received and fail.
async fn watch_database(database: Database, dependency: Dependency, begin: watch::Sender<bool>) {
    let mut schema_is_good = false;
    let mut told = None;
    loop {
        let missing = match database.ping().await {
            Ok(()) if schema_is_good => Ok(None),
            Ok(()) => database.missing_migration().await,
            Err(error) => Err(error),
        };
        schema_is_good = matches!(missing, Ok(None));
        match missing {
            Ok(None) => {
                dependency.up();
                begin.send_replace(true);
            }
            Ok(Some(migration)) => {
                // Once: `/readyz` goes on saying it.
                if told.as_ref() != Some(&migration) {
                    tracing::warn!(migration, "the database's schema lacks a migration; run write-api migrate");
                    told = Some(migration.clone());
                }
                dependency.down(format!("the schema lacks migration {migration}; run `write-api migrate`"));
            }
            Err(error) => dependency.down(error.to_string()),
        }
        task::park(sleep(LOOK)).await;
    }
}

/// Looks at the partner every `look`; if it was well and its breaker is closed, only after `stays_well`.
async fn watch_partner(partner: Partner, dependency: Dependency, look: Duration, stays_well: Duration) {
    let mut seen_well: Option<Instant> = None;
    loop {
        let is_recent = seen_well.is_some_and(|seen| seen.elapsed() < stays_well);
        if !is_recent || partner.breaker_state() != BreakerState::Closed {
            match partner.check().await {
                Ok(()) => {
                    dependency.up();
                    seen_well = Some(Instant::now());
                }
                Err(error) => {
                    dependency.down(format!("{error:#}"));
                    seen_well = None;
                }
            }
        }
        task::park(sleep(look)).await;
    }
}

/// Waits for all tasks; a panic in one is told.
async fn join_all(tasks: &mut JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a task ended badly");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn a_partner_that_is_well_is_seldom_connected_to_and_one_that_is_away_is_looked_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let accepted = Arc::new(AtomicUsize::new(0));
        let server = tokio::spawn({
            let accepted = accepted.clone();
            async move {
                // Closed at once, so that no idle one stands in for the next.
                while listener.accept().await.is_ok() {
                    accepted.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        let settings = [
            ("WRITE_API_DATABASE_URL", "postgres://app@localhost/app".to_owned()),
            ("WRITE_API_PARTNER_BASE_URL", format!("http://{address}")),
            ("WRITE_API_KAFKA_BROKERS", "localhost:9092".to_owned()),
        ];
        let settings = settings.map(|(key, value)| (key.to_owned(), value));
        let config = Config::load(None, settings.into_iter(), &[]).expect("good settings");
        let partner = Partner::new(&config.partner, Arc::new(Metrics::new())).expect("good settings");
        let health = Health::new();
        let (look, stays_well) = (Duration::from_millis(5), Duration::from_millis(500));
        let watcher = tokio::spawn(watch_partner(partner, health.dependency("partner"), look, stays_well));
        let until = async |ready: bool| {
            while health.not_ready().is_empty() != ready {
                sleep(look).await;
            }
        };
        let began = Instant::now();
        timeout(Duration::from_secs(5), until(true)).await.expect("it is well");
        sleep(stays_well * 2).await;
        let accepted = accepted.load(Ordering::SeqCst);
        let most = 2 + began.elapsed().as_millis() / stays_well.as_millis();
        assert!(accepted >= 2 && accepted as u128 <= most, "{accepted} connections, {most} would do");

        server.abort();
        timeout(Duration::from_secs(5), until(false)).await.expect("it is seen to be away");
        let listener = tokio::net::TcpSocket::new_v4().expect("a socket");
        listener.set_reuseaddr(true).expect("a socket");
        listener.bind(address).expect("the port is free");
        let _listener = listener.listen(8).expect("the port is free");
        timeout(stays_well, until(true)).await.expect("it is looked for more often");
        watcher.abort();
    }
}
