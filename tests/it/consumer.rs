//! The consumer with handlers that panic: the real one, with the real queues, tables and topic, and with the service's own
//! handler inside one that panics where a message says so.
//!
//! It runs in a process of its own, because the client of SQS finds its credentials in the environment.

use std::collections::BTreeSet;
use std::env;
use std::io::Read;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aws_sdk_sqs::types::SendMessageBatchRequestEntry;
use futures::FutureExt;
use futures::future::BoxFuture;
use local_stack::{Behaviour, SqsProxy};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::timeout;
use write_api::config::Config;
use write_api::db::{self, Database, runs};
use write_api::events::{Ended, Events, Gate, GroupCommit, LaneQueues, lane};
use write_api::health::Health;
use write_api::kafka::Publisher;
use write_api::lifecycle::{Company, StopSource};
use write_api::metrics::Metrics;
use write_api::partner::Partner;
use write_api::queue::consumer::{ConsumerParts, consume};
use write_api::queue::keeper::{Keeper, KeeperSettings, Renewals};
use write_api::queue::sqs::Sqs;
use write_api::queue::{Delivery, Handler, Outcome};

use crate::bad_input::{UPSERT, event, listing};
use crate::harness::{Lane, SOON, World};

const TIME: &str = "2026-01-31T02:00:00Z";

/// Messages of the load, unless the environment says otherwise: `TEST_MESSAGES=1000000` for a long one.
const MESSAGES: &str = "TEST_MESSAGES";

/// The lane's limit of events in flight.
const PERMITS: usize = 40;

/// How long the load may go without any progress.
const STILL: Duration = Duration::from_secs(60);

/// Panics where the message says so; counts.
struct Panicking {
    events: Events,
    sqs: aws_sdk_sqs::Client,
    dead_letters: String,
    in_hand: AtomicUsize,
    most_in_hand: AtomicUsize,
    receives: AtomicUsize,
    panics: AtomicUsize,
    /// Messages in the dead-letter queue when the first refusal was concluded.
    first_refused: Mutex<Option<String>>,
    /// Those that wait for each other, each once.
    gathered: watch::Sender<BTreeSet<String>>,
}

/// One message in hand, however that ends.
struct InHand<'a>(&'a AtomicUsize);

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Handler for Panicking {
    fn handle<'a>(&'a self, delivery: &'a Delivery) -> BoxFuture<'a, Outcome> {
        async move {
            let now = self.in_hand.fetch_add(1, Ordering::SeqCst) + 1;
            let _in_hand = InHand(&self.in_hand);
            self.most_in_hand.fetch_max(now, Ordering::SeqCst);
            self.receives.fetch_add(1, Ordering::SeqCst);
            let body = &delivery.message.body;
            let outcome = self.events.handle(delivery).await;
            let panics = body.contains("\"always-") && matches!(outcome, Outcome::Done { .. })
                || body.contains("\"once-") && delivery.message.receive_count == 1;
            if panics {
                self.panics.fetch_add(1, Ordering::SeqCst);
                panic!("as the message says");
            }
            if body.contains("\"gather-") {
                self.gathered.send_modify(|gathered| {
                    gathered.insert(delivery.message.id.clone());
                });
                let mut gathered = self.gathered.subscribe();
                let _ = timeout(SOON, gathered.wait_for(|gathered| gathered.len() == PERMITS)).await;
            }
            outcome
        }
        .boxed()
    }

    fn conclude<'a>(&'a self, delivery: &'a Delivery) -> BoxFuture<'a, ()> {
        async move {
            if delivery.message.body.starts_with("bad-")
                && self.first_refused.lock().expect("no panic holds it").is_none()
            {
                let name = aws_sdk_sqs::types::QueueAttributeName::ApproximateNumberOfMessages;
                let asked = self.sqs.get_queue_attributes().queue_url(&self.dead_letters).attribute_names(name.clone());
                let attributes = asked.send().await.expect("SQS answers").attributes.unwrap_or_default();
                *self.first_refused.lock().expect("no panic holds it") = attributes.get(&name).cloned();
            }
            self.events.conclude(delivery).await;
        }
        .boxed()
    }
}

/// Consumes the common lane until its input ends, then tells what it saw in one line.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a process of its own, started by the tests below"]
async fn consumer_process() -> Result<()> {
    let variables = env::vars();
    let config = Config::load(None, variables, &[]).map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    let (metrics, health) = (Arc::new(Metrics::new()), Health::new());
    let database = Database::new(&config.database)?;
    let sqs = Sqs::new(&config.aws, &config.queue, metrics.clone()).await;
    let keeper = Arc::new(Keeper::start(KeeperSettings {
        aws: config.aws.clone(),
        queue: config.queue.clone(),
        database: db::connect_options(&config.database)?,
        renewals: Renewals {
            owner: |connection, run_ids, tokens, lease| runs::renew_owners(connection, run_ids, tokens, lease).boxed(),
            publisher: |connection, run_ids, tokens, lease| {
                runs::renew_publishers(connection, run_ids, tokens, lease).boxed()
            },
        },
        metrics: metrics.clone(),
        message_beat: health.beat("messages", STILL),
        run_beat: health.beat("runs", STILL),
    })?);
    let way_to_sqs = SqsProxy::start(config.aws.endpoint_url.as_deref().context("no endpoint")?)?;
    let handler = Arc::new(Panicking {
        events: Events {
            database: database.clone(),
            partner: Partner::new(&config.partner, metrics.clone())?,
            publisher: Publisher::new(&config.kafka, metrics.clone())?,
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
            recorder: None,
            metrics: metrics.clone(),
        },
        sqs: way_to_sqs.client().await,
        dead_letters: env::var("TEST_DEAD_LETTERS")?,
        in_hand: AtomicUsize::new(0),
        most_in_hand: AtomicUsize::new(0),
        receives: AtomicUsize::new(0),
        panics: AtomicUsize::new(0),
        first_refused: Mutex::new(None),
        gathered: watch::Sender::default(),
    });
    let (source, stop) = StopSource::new();
    let (_begin, begin) = watch::channel(true);
    let consumer = tokio::spawn(consume(
        ConsumerParts {
            lane: lane::EVENTS,
            settings: config.lanes.events.clone(),
            queue: config.queue.clone(),
            sqs,
            keeper: keeper.clone(),
            handler: handler.clone(),
            metrics: metrics.clone(),
            begin,
            stop,
            beat: health.beat("poll", STILL),
            dependency: health.dependency("queue"),
        },
        Company::new(),
    ));
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
    source.drain(SOON);
    // It takes all permits of the lane: with one that is not given back it would never end.
    let ended = timeout(SOON, consumer).await.is_ok_and(|ended| ended.is_ok());
    let in_flight = metrics.events_in_flight.with_label_values(&[lane::EVENTS]).get();
    let seen = serde_json::json!({
        "all_permits_back": ended,
        "in_flight": in_flight,
        "kept": keeper.len(),
        "most_in_hand": handler.most_in_hand.load(Ordering::SeqCst),
        "receives": handler.receives.load(Ordering::SeqCst),
        "panics": handler.panics.load(Ordering::SeqCst),
        "gathered": handler.gathered.borrow().len(),
        "first_refused": *handler.first_refused.lock().unwrap(),
    });
    println!("\nSEEN {seen}");
    Ok(())
}

/// The process above, at work.
struct Consumer {
    child: tokio::process::Child,
    output: BufReader<tokio::process::ChildStdout>,
}

impl Consumer {
    fn start(world: &World) -> Result<Self> {
        let mut command = tokio::process::Command::new(env::current_exe()?);
        command.args(["consumer::consumer_process", "--exact", "--ignored", "--nocapture"]);
        command.envs(world.environment().variables()).env("TEST_DEAD_LETTERS", world.dead_letter_url(Lane::Events));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(std::fs::File::create(world.path("consumer.log"))?);
        let mut child = command.kill_on_drop(true).spawn()?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Self { child, output })
    }

    /// Stops it and gives what it saw.
    async fn seen(mut self) -> Result<Value> {
        drop(self.child.stdin.take());
        let mut lines = self.output.lines();
        while let Some(line) = timeout(2 * SOON, lines.next_line()).await?? {
            if let Some(seen) = line.strip_prefix("SEEN ") {
                return Ok(serde_json::from_str(seen)?);
            }
        }
        anyhow::bail!("the consumer told nothing")
    }
}

/// Sends bodies by tens.
async fn send(world: &World, bodies: impl Iterator<Item = String>) -> Result<()> {
    let url = world.queue_url_of(Lane::Events);
    let mut bodies = bodies.peekable();
    while bodies.peek().is_some() {
        let entries = bodies.by_ref().take(10).enumerate().map(|(number, body)| {
            SendMessageBatchRequestEntry::builder().id(number.to_string()).message_body(body).build()
        });
        let entries: Vec<_> = entries.collect::<Result<_, _>>()?;
        let sent = world.sqs.send_message_batch().queue_url(url).set_entries(Some(entries)).send().await?;
        ensure!(sent.failed.is_empty(), "{:?}", sent.failed);
    }
    Ok(())
}

/// Waits until the lane has no message, for as long as there are fewer from time to time.
async fn consumed(world: &World) -> Result<()> {
    let mut last = (u64::MAX, Instant::now());
    loop {
        let (visible, hidden) = world.depth(Lane::Events).await?;
        if visible + hidden == 0 {
            return Ok(());
        }
        if visible + hidden < last.0 {
            last = (visible + hidden, Instant::now());
        }
        ensure!(last.1.elapsed() < STILL, "{visible} visible and {hidden} hidden messages stay");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn world() -> Result<World> {
    let mut world = World::new(Behaviour::default()).await?;
    world.set("lanes.events.in_flight", PERMITS).set("queue.wait_time", "1s");
    world.expect_dead_letters();
    Ok(world)
}

#[tokio::test]
async fn a_refusal_is_concluded_when_the_dead_letter_queue_has_it() -> Result<()> {
    let world = world().await?;
    let consumer = Consumer::start(&world)?;
    send(&world, ["bad-one".to_owned()].into_iter()).await?;
    consumed(&world).await?;
    let seen = consumer.seen().await?;
    ensure!(seen["first_refused"] == "1", "{seen}");
    Ok(())
}

#[tokio::test]
async fn whatever_panics_every_permit_comes_back() -> Result<()> {
    const ALWAYS: usize = 2;
    let messages: usize = env::var(MESSAGES).map_or(Ok(400), |messages| messages.parse())?;
    let world = world().await?;
    let consumer = Consumer::start(&world)?;
    let begin = Instant::now();
    let upsert = |id: String, number: usize| event(&id, UPSERT, TIME, listing(number as i64, 100)).to_string();
    // Of ten: eight good, one bad, and one that panics at its first receive.
    let mixed = (0..messages).map(|number| match number % 10 {
        4 => format!("bad-{number}"),
        7 => upsert(format!("once-{number}"), number),
        _ => upsert(format!("good-{number}"), number),
    });
    let always = (0..ALWAYS).map(|number| upsert(format!("always-{number}"), messages + number));
    send(&world, mixed.chain(always)).await?;
    consumed(&world).await?;
    let took = begin.elapsed();

    // All permits at once are at work after all that.
    send(&world, (0..PERMITS).map(|number| upsert(format!("gather-{number}"), messages + ALWAYS + number))).await?;
    consumed(&world).await?;
    let seen = consumer.seen().await?;
    let with = |digit| (0..messages).filter(|number| number % 10 == digit).count();
    let (bad, once) = (with(4), with(7));
    println!("{} receives of {messages} messages in {took:?}: {seen}", seen["receives"]);
    let number = |name: &str| seen[name].as_u64().unwrap_or(u64::MAX) as usize;
    ensure!(seen["all_permits_back"] == true && seen["in_flight"] == 0 && seen["kept"] == 0, "{seen}");
    ensure!(number("most_in_hand") == PERMITS && number("gathered") == PERMITS, "{PERMITS} permits: {seen}");
    // The first death of what always panics leaves no record, the next three do.
    ensure!(number("panics") >= once + 4 * ALWAYS, "{seen}");
    let applied = world.number("SELECT count(*) FROM listings").await?;
    ensure!(applied == (messages - bad + ALWAYS + PERMITS) as i64, "{applied} upserts were applied");
    ensure!(world.number("SELECT count(*) FROM deliveries WHERE token IS NOT NULL").await? == 0);
    // SQS delivers at least once: a message that came once more than it had to may have been refused once more.
    let surplus = number("receives") - (messages + once + 5 * ALWAYS + PERMITS);
    let (mut quarantined, mut refused, mut again) = (0, BTreeSet::new(), 0);
    for letter in world.dead_letters(Lane::Events).await? {
        match letter.code().as_str() {
            "quarantined" if letter.body.contains("always-") => quarantined += 1,
            _ if letter.body.starts_with("bad-") => again += usize::from(!refused.insert(letter.body)),
            _ => anyhow::bail!("unexpected {letter:?}"),
        }
    }
    ensure!((quarantined, refused.len()) == (ALWAYS, bad), "{quarantined} quarantined, {} refused", refused.len());
    ensure!(again <= surplus, "{again} were refused once more, of {surplus} receives more than needed");
    Ok(())
}
