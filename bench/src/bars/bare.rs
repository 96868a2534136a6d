//! Loops that do one thing and nothing else, to measure the service by. Each runs in a process of its own, this program
//! started again, so that its processor time is its own.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use futures::future::try_join_all;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;
use write_api::config::Config;
use write_api::kafka::{Record, Records, Valuation};

use crate::processors::busy_seconds;

/// The argument that makes this program one of the loops.
pub(crate) const ARGUMENT: &str = "bare-loop";

/// Calls in flight, as many as the service has.
const IN_FLIGHT: u32 = 1_000;
/// Polls of the queue at a time: as many as the service may have.
const POLLS: usize = 8;

/// What a loop did.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Loop {
    pub(crate) count: f64,
    pub(crate) seconds: f64,
    /// User and system time of the process.
    pub(crate) cpu_seconds: f64,
    /// And of all processes meanwhile, those that it talked to too.
    pub(crate) busy_seconds: f64,
}

/// Runs a loop in a process of its own.
pub(crate) async fn run(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Loop> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(ARGUMENT).args(arguments).envs(variables.iter().copied()).stdout(Stdio::piped());
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    ensure!(output.status.success(), "the bare loop {arguments:?} failed: {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The loop that was asked for; prints what it did.
pub(crate) async fn main(arguments: &[String]) -> Result<()> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["calls", url, count] => calls(url, count.parse()?).await?,
        ["read", url, run] => read(url, run).await?,
        ["produce", brokers, topic, url, run] => produce(brokers, topic, &records(url, run).await?)?,
        ["receive", endpoint, queue, count] => receive(endpoint, queue, count.parse()?).await?,
        _ => bail!("no such loop: {arguments:?}"),
    };
    println!("{}", serde_json::to_string(&done)?);
    Ok(())
}

/// Begins when a loop is warm, as the service is that is measured by it.
struct Clock {
    began: Instant,
    cpu_seconds: f64,
    busy_seconds: f64,
}

impl Clock {
    fn start() -> Result<Self> {
        Ok(Self { cpu_seconds: cpu_seconds()?, busy_seconds: busy_seconds()?, began: Instant::now() })
    }

    /// What was done until now.
    fn done(&self, count: f64) -> Result<Loop> {
        let seconds = self.began.elapsed().as_secs_f64();
        let cpu_seconds = cpu_seconds()? - self.cpu_seconds;
        Ok(Loop { count, seconds, cpu_seconds, busy_seconds: busy_seconds()? - self.busy_seconds })
    }
}

/// The partner calls of the service by hyper's own pooled client.
async fn calls(url: &str, count: u32) -> Result<Loop> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client = Client::builder(TokioExecutor::new()).build(connector);
    // Each worker opens its connection.
    all_calls(&client, url, "warm-up", IN_FLIGHT).await?;
    let clock = Clock::start()?;
    all_calls(&client, url, &format!("bare-{count}"), count).await?;
    clock.done(count.into())
}

async fn all_calls(client: &Client<HttpConnector, Full<Bytes>>, url: &str, run: &str, count: u32) -> Result<()> {
    let next = Arc::new(AtomicU32::new(0));
    let (url, run): (Arc<str>, Arc<str>) = (format!("{url}/v1/valuations").into(), run.into());
    let workers = (0..IN_FLIGHT).map(|_| {
        let (client, next, url, run) = (client.clone(), next.clone(), url.clone(), run.clone());
        tokio::spawn(async move {
            loop {
                let listing = next.fetch_add(1, Ordering::Relaxed);
                if listing >= count {
                    return anyhow::Ok(());
                }
                let body = format!(
                    r#"{{"listing_id":{listing},"zip_code":98101,"list_price_cents":50000000,"bedrooms":3,"living_square_feet":1800}}"#
                );
                let request = http::Request::post(&*url)
                    .header("content-type", "application/json")
                    .header("idempotency-key", format!("{run}:{listing}"))
                    .body(Full::from(body))?;
                let answer = client.request(request).await?;
                ensure!(answer.status().is_success(), "the partner answered {}", answer.status());
                answer.into_body().collect().await?;
            }
        })
    });
    for worker in try_join_all(workers).await? {
        worker?;
    }
    Ok(())
}

/// Listing, zip code, price, valuation, confidence.
type ValuedRow = (i64, i32, i64, Option<i64>, Option<f64>);

/// Rows of a page, as the service publishes them by default.
fn page_size() -> Result<usize> {
    let defaults = Config::load(None, std::iter::empty(), &[]).map_err(|errors| anyhow!("the defaults: {errors:?}"))?;
    Ok(defaults.kafka.page_size)
}

/// The valuations of a run, page by page.
async fn read(url: &str, run: &str) -> Result<Loop> {
    let mut connection = PgConnection::connect(url).await?;
    let size = page_size()?;
    page(&mut connection, run, i64::MIN, size).await?;
    let clock = Clock::start()?;
    let (mut cursor, mut rows) = (i64::MIN, 0);
    loop {
        let page = page(&mut connection, run, cursor, size).await?;
        let Some(last) = page.last() else { return clock.done(f64::from(rows)) };
        cursor = last.0;
        rows += i32::try_from(page.len())?;
    }
}

async fn page(connection: &mut PgConnection, run: &str, cursor: i64, size: usize) -> Result<Vec<ValuedRow>> {
    let page = sqlx::query_as(
        "SELECT listing_id, zip_code, list_price_cents, valuation_cents, confidence
         FROM valuations WHERE run_id = $1 AND listing_id > $2 ORDER BY listing_id LIMIT $3",
    );
    Ok(page.bind(run).bind(cursor).bind(size as i64).fetch_all(connection).await?)
}

/// The records of a run, as the service makes them.
async fn records(url: &str, run: &str) -> Result<Vec<Record>> {
    let mut connection = PgConnection::connect(url).await?;
    let made = Records::new(run, OffsetDateTime::now_utc(), None);
    let (mut records, mut cursor, size) = (Vec::new(), i64::MIN, page_size()?);
    loop {
        let page = page(&mut connection, run, cursor, size).await?;
        let Some(last) = page.last() else { return Ok(records) };
        cursor = last.0;
        for (listing_id, zip_code, list_price_cents, valuation_cents, confidence) in page {
            let (Some(valuation_cents), Some(confidence)) = (valuation_cents, confidence) else { continue };
            let valuation = Valuation { listing_id, zip_code, list_price_cents, valuation_cents, confidence };
            records.push(made.record(&valuation));
        }
    }
}

/// Records to the topic as fast as librdkafka takes them, with the service's guarantees. They are the service's, made beforehand, for
/// one record again and again would be compressed to next to nothing; headers are made as they are sent, since librdkafka keeps them.
fn produce(brokers: &str, topic: &str, records: &[Record]) -> Result<Loop> {
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("compression.type", "lz4")
        .set("partitioner", "murmur2_random")
        .create()?;
    let produce = |records: &[Record]| {
        for record in records {
            let mut record = BaseRecord::to(topic).key(&record.key).payload(&record.value).headers(record.headers());
            while let Err((error, back)) = producer.send(record) {
                let KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull) = error else {
                    return Err(error.into());
                };
                producer.poll(Duration::from_millis(10));
                record = back;
            }
            producer.poll(Duration::ZERO);
        }
        anyhow::Ok(producer.flush(Duration::from_secs(120))?)
    };
    // It connects, and learns of every partition.
    produce(&records[..records.len().min(page_size()?)])?;
    let clock = Clock::start()?;
    produce(records)?;
    clock.done(records.len() as f64)
}

/// Messages received and deleted, ten at a time, and nothing done with them.
async fn receive(endpoint: &str, queue: &str, count: u64) -> Result<Loop> {
    let client = aws_sdk_sqs::Client::new(
        &aws_config::defaults(aws_config::BehaviorVersion::latest())
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .endpoint_url(endpoint)
            .region(aws_sdk_sqs::config::Region::from_static("us-east-1"))
            .load()
            .await,
    );
    let url = bench::event::queue_url(&client, queue).await?;
    let received = Arc::new(AtomicU64::new(0));
    // Begun when the first messages are gone, so that each poll has its connection or will have it soon. The last delete ends
    // it: whoever polls then still waits for a message that does not come.
    let counted: Arc<Mutex<Option<(Clock, u64, Loop)>>> = Arc::default();
    let polls = (0..POLLS).map(|_| {
        let (client, url, received) = (client.clone(), url.clone(), received.clone());
        let counted = counted.clone();
        tokio::spawn(async move {
            while received.load(Ordering::Relaxed) < count {
                let answer = client.receive_message().queue_url(&url).max_number_of_messages(10).wait_time_seconds(1);
                let messages = answer.send().await?.messages.unwrap_or_default();
                if messages.is_empty() {
                    continue;
                }
                received.fetch_add(messages.len() as u64, Ordering::Relaxed);
                let mut delete = client.delete_message_batch().queue_url(&url);
                for (index, message) in messages.iter().enumerate() {
                    let receipt = message.receipt_handle().context("a message without a receipt")?;
                    delete = delete.entries(
                        aws_sdk_sqs::types::DeleteMessageBatchRequestEntry::builder()
                            .id(index.to_string())
                            .receipt_handle(receipt)
                            .build()?,
                    );
                }
                delete.send().await?;
                let mut counted = counted.lock().unwrap_or_else(PoisonError::into_inner);
                // Looked at in turn, so that it only grows.
                let received = received.load(Ordering::Relaxed);
                match &mut *counted {
                    Some((clock, before, done)) => *done = clock.done((received - *before) as f64)?,
                    None => {
                        let clock = Clock::start()?;
                        let nothing = clock.done(0.0)?;
                        *counted = Some((clock, received, nothing));
                    }
                }
            }
            anyhow::Ok(())
        })
    });
    for poll in try_join_all(polls).await? {
        poll?;
    }
    let counted = counted.lock().unwrap_or_else(PoisonError::into_inner).take();
    Ok(counted.context("no message was received")?.2)
}

/// Processor time of this process so far.
fn cpu_seconds() -> Result<f64> {
    // SAFETY: all zeros are a valid structure, which the call fills.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: it is given a valid structure.
    let result = unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    ensure!(result == 0, "getrusage: {}", std::io::Error::last_os_error());
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    Ok(seconds(usage.ru_utime) + seconds(usage.ru_stime))
}
