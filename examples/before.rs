//! The service as it was before, and as its first repair left it: what `scripts/before-after` compares WriteApi with.
//!
//! Not a strawman: it receives by the same SDK, reads by the same driver, lets the same allocator sample, and serves the same
//! heap endpoint and metrics. No record waits for others where it is sent alone. What differs is what the old service did
//! wrong, and its choice of tools: calls go through hyper's pooled client, records through rdkafka's own wrapper, uncompressed.
//!
//! Without `--fix`, one event is: one query with `OFFSET 0 LIMIT n` that decodes every row with all its columns; one partner
//! call after another, each answer written by itself; then, in the same event, one Kafka record after another.
//!
//! With `--fix article` it is what the repair made of it: pages of 1,000 by `OFFSET`, the 1,000 calls of a page in parallel,
//! the next page when all of them are back; post-processing is an event of its own, which reads all answers and sends all
//! records at once.
//!
//! It is configured as the service is, by `WRITE_API_*`, and keeps its answers in a table of its own.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aws_sdk_sqs::types::Message;
use aws_smithy_http_client::tls;
use bytes::Bytes;
use clap::{Parser, ValueEnum};
use futures::future::try_join_all;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::postgres::{PgPoolOptions, PgRow};
use sqlx::{FromRow as _, PgPool};
use time::{Date, OffsetDateTime};
use write_api::config::Config;
use write_api::health::Health;
use write_api::metrics::Metrics;
use write_api::task::{self, Kind, Stage};
use write_api::{admin, profiling, telemetry};

/// The service's allocator, so that heap profiles are alike.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Rows of a page of the repair, and its calls in parallel.
const PAGE: i64 = 1_000;
/// The longest that SQS hides a message, so that nothing has to extend it.
const VISIBILITY: Duration = Duration::from_secs(12 * 3600);
const POLL: Duration = Duration::from_secs(20);
/// The longest that an admin page or a profile may take.
const PAGE_LIMIT: Duration = Duration::from_secs(120);

#[derive(Debug, Parser)]
#[command(about = "WriteApi as it was before its repair, for comparison")]
struct Arguments {
    /// Repaired as the article tells it, instead of not at all
    #[arg(long, value_enum)]
    fix: Option<Fix>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Fix {
    Article,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let config = Config::load(None, std::env::vars(), &[])
        .map_err(|errors| anyhow::anyhow!("the settings are wrong: {errors:?}"))?;
    telemetry::init(&config.log)?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve(arguments, config))
}

async fn serve(arguments: Arguments, config: Config) -> Result<()> {
    profiling::sample_allocations(true)?;
    let listener = admin::bind("admin.listen", config.admin.listen).await?;
    let pages = admin::router(Health::new(), Arc::new(Metrics::new()));
    task::spawn("admin", admin::serve(listener, pages, PAGE_LIMIT, std::future::pending()));
    let listener = admin::bind("profiling.listen", config.profiling.listen).await?;
    let pages = profiling::router(&config.profiling);
    task::spawn("profiling", admin::serve(listener, pages, PAGE_LIMIT, std::future::pending()));

    let worker = Arc::new(Worker::start(&config, arguments.fix).await?);
    let events = worker.queue(&config.lanes.events.queue).await?;
    let post_processing = worker.queue(&config.lanes.post_processing.queue).await?;
    tracing::info!(fix = ?arguments.fix, "started");
    tokio::try_join!(
        worker.clone().consume(events, post_processing.clone()),
        worker.clone().consume(post_processing.clone(), post_processing.clone()),
    )?;
    Ok(())
}

/// What every event uses.
struct Worker {
    fix: Option<Fix>,
    sqs: aws_sdk_sqs::Client,
    database: PgPool,
    partner: Partner,
    producer: FutureProducer,
    topic: String,
}

/// A row with all its columns, as an object-relational mapper reads it.
#[derive(sqlx::FromRow)]
#[expect(dead_code, reason = "that the old service decoded what it did not need is the point")]
struct Listing {
    listing_id: i64,
    zip_code: i32,
    list_price_cents: i64,
    bedrooms: i16,
    living_square_feet: i32,
    listed_on: Option<Date>,
    bathrooms: Option<f32>,
    lot_square_feet: Option<i32>,
    floors: Option<f32>,
    waterfront: Option<bool>,
    view_rating: Option<i16>,
    condition_rating: Option<i16>,
    grade_rating: Option<i16>,
    year_built: Option<i16>,
    year_renovated: Option<i16>,
    latitude: Option<f64>,
    longitude: Option<f64>,
    description: Option<String>,
    attributes: Option<Value>,
    event_time: OffsetDateTime,
    event_id: String,
    created_at: OffsetDateTime,
}

/// A function of its own, so that the heap profile names it and not whoever it was compiled into.
#[inline(never)]
fn decode_listing(row: PgRow) -> sqlx::Result<Listing> {
    Listing::from_row(&row)
}

/// The partner's answer.
#[derive(Clone, Copy, Deserialize, sqlx::FromRow)]
struct Valuation {
    listing_id: i64,
    valuation_cents: i64,
    confidence: f64,
}

/// An event of either kind.
#[derive(Deserialize)]
struct Event {
    id: String,
    #[serde(rename = "type")]
    kind: String,
    data: Data,
}

#[derive(Deserialize)]
struct Data {
    #[serde(default)]
    limit: i64,
    /// The most partner calls that are made. The rows are read and held whatever it is: with it, hours of one call after
    /// another are cut short.
    calls: Option<usize>,
}

impl Worker {
    async fn start(config: &Config, fix: Option<Fix>) -> Result<Self> {
        let mut aws = aws_config::defaults(aws_config::BehaviorVersion::latest())
            .http_client(
                aws_smithy_http_client::Builder::new()
                    .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring))
                    .build_https(),
            )
            .region(aws_sdk_sqs::config::Region::new(config.aws.region.clone()));
        if let Some(endpoint) = &config.aws.endpoint_url {
            aws = aws.endpoint_url(endpoint);
        }
        let database = PgPoolOptions::new()
            .max_connections(config.database.max_connections)
            .connect(config.database.url.reveal())
            .await
            .context("database.url")?;
        sqlx::query(
            "CREATE TABLE IF NOT EXISTS before_valuations (
                 run_id text NOT NULL, listing_id bigint NOT NULL,
                 valuation_cents bigint NOT NULL, confidence double precision NOT NULL,
                 PRIMARY KEY (run_id, listing_id))",
        )
        .execute(&database)
        .await?;
        let producer = ClientConfig::new()
            .set("bootstrap.servers", &config.kafka.brokers)
            .set("enable.idempotence", "true")
            .set(
                "linger.ms",
                match fix {
                    // One record after another: each would wait the default of 5 ms for others that cannot come.
                    None => "0",
                    // All at once, as in the service.
                    Some(Fix::Article) => "1",
                },
            )
            .create()?;
        Ok(Self {
            fix,
            sqs: aws_sdk_sqs::Client::new(&aws.load().await),
            database,
            partner: Partner::new(&config.partner.base_url.to_string()),
            producer,
            topic: config.kafka.topic.clone(),
        })
    }

    async fn queue(&self, name: &str) -> Result<String> {
        let answer = self.sqs.get_queue_url().queue_name(name).send().await;
        answer.with_context(|| format!("the queue {name}"))?.queue_url.context("SQS gave no URL")
    }

    /// Receives, and works on each event on a task of its own.
    async fn consume(self: Arc<Self>, queue: String, post_processing: String) -> Result<()> {
        loop {
            let received = self
                .sqs
                .receive_message()
                .queue_url(&queue)
                .max_number_of_messages(10)
                .visibility_timeout(VISIBILITY.as_secs() as i32)
                .wait_time_seconds(POLL.as_secs() as i32)
                .send()
                .await?;
            for message in received.messages.unwrap_or_default() {
                let (worker, queue, post_processing) = (self.clone(), queue.clone(), post_processing.clone());
                task::spawn_event("event", async move {
                    if let Err(error) = worker.work_on(&message, &queue, &post_processing).await {
                        tracing::error!(error = format!("{error:#}"), "the event failed");
                    }
                });
            }
        }
    }

    async fn work_on(&self, message: &Message, queue: &str, post_processing: &str) -> Result<()> {
        let event: Event = serde_json::from_str(message.body().unwrap_or_default())?;
        if event.kind.contains("publish") {
            task::identify(Kind::ValuationsPublish, &event.id);
            self.publish_all_at_once(&event.id).await?;
        } else {
            task::identify(Kind::ValuationsRefresh, &event.id);
            match self.fix {
                None => self.one_after_another(&event).await?,
                Some(Fix::Article) => self.page_after_page(&event, post_processing).await?,
            }
        }
        let receipt = message.receipt_handle().context("a message without a receipt")?;
        self.sqs.delete_message().queue_url(queue).receipt_handle(receipt).send().await?;
        tracing::info!(id = event.id, kind = event.kind, "done");
        Ok(())
    }

    /// The old way.
    async fn one_after_another(&self, event: &Event) -> Result<()> {
        let listings = task::in_stage(Stage::Read, self.listings(0, event.data.limit)).await?;
        let mut valuations = Vec::with_capacity(listings.len());
        for listing in listings.iter().take(event.data.calls.unwrap_or(usize::MAX)) {
            let valuation = task::in_stage(Stage::Call, self.partner.value(&event.id, listing)).await?;
            task::in_stage(Stage::Write, self.write(&event.id, &[valuation])).await?;
            valuations.push(valuation);
        }
        for valuation in &valuations {
            task::in_stage(Stage::Publish, self.publish(&event.id, valuation)).await?;
        }
        Ok(())
    }

    /// The repair.
    async fn page_after_page(&self, event: &Event, post_processing: &str) -> Result<()> {
        let mut offset = 0;
        while offset < event.data.limit {
            let limit = PAGE.min(event.data.limit - offset);
            let listings = task::in_stage(Stage::Read, self.listings(offset, limit)).await?;
            let calls = listings.iter().map(|listing| self.partner.value(&event.id, listing));
            let valuations = task::in_stage(Stage::Call, try_join_all(calls)).await?;
            task::in_stage(Stage::Write, self.write(&event.id, &valuations)).await?;
            if listings.len() < PAGE as usize {
                break;
            }
            offset += PAGE;
        }
        let next = json!({ "id": event.id, "type": "publish", "data": {} }).to_string();
        self.sqs.send_message().queue_url(post_processing).message_body(next).send().await?;
        Ok(())
    }

    async fn publish_all_at_once(&self, run_id: &str) -> Result<()> {
        let valuations = sqlx::query_as::<_, Valuation>(
            "SELECT listing_id, valuation_cents, confidence FROM before_valuations WHERE run_id = $1",
        );
        let valuations = task::in_stage(Stage::Read, valuations.bind(run_id).fetch_all(&self.database)).await?;
        let sent = valuations.iter().map(|valuation| self.publish(run_id, valuation));
        task::in_stage(Stage::Publish, try_join_all(sent)).await?;
        Ok(())
    }

    async fn listings(&self, offset: i64, limit: i64) -> Result<Vec<Listing>> {
        let listings = sqlx::query("SELECT * FROM listings ORDER BY listing_id OFFSET $1 LIMIT $2");
        Ok(listings.bind(offset).bind(limit).try_map(decode_listing).fetch_all(&self.database).await?)
    }

    async fn write(&self, run_id: &str, valuations: &[Valuation]) -> Result<()> {
        let (mut ids, mut cents, mut confidences) = (Vec::new(), Vec::new(), Vec::new());
        for valuation in valuations {
            ids.push(valuation.listing_id);
            cents.push(valuation.valuation_cents);
            confidences.push(valuation.confidence);
        }
        let insert = sqlx::query(
            "INSERT INTO before_valuations
             SELECT $1, * FROM unnest($2::bigint[], $3::bigint[], $4::double precision[])",
        );
        insert.bind(run_id).bind(ids).bind(cents).bind(confidences).execute(&self.database).await?;
        Ok(())
    }

    async fn publish(&self, run_id: &str, valuation: &Valuation) -> Result<()> {
        let key = valuation.listing_id.to_string();
        let value = json!({
            "run_id": run_id,
            "listing_id": valuation.listing_id,
            "valuation_cents": valuation.valuation_cents,
            "confidence": valuation.confidence,
        })
        .to_string();
        let record = FutureRecord::to(&self.topic).key(&key).payload(&value);
        self.producer.send(record, PAGE_LIMIT).await.map_err(|(error, _)| error)?;
        Ok(())
    }
}

/// The other team's API.
struct Partner {
    client: Client<HttpConnector, Full<Bytes>>,
    url: String,
}

impl Partner {
    fn new(base_url: &str) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Self { client, url: format!("{}/v1/valuations", base_url.trim_end_matches('/')) }
    }

    async fn value(&self, run_id: &str, listing: &Listing) -> Result<Valuation> {
        let body = json!({
            "listing_id": listing.listing_id,
            "zip_code": listing.zip_code,
            "list_price_cents": listing.list_price_cents,
            "bedrooms": listing.bedrooms,
            "living_square_feet": listing.living_square_feet,
        });
        let request = http::Request::post(&self.url)
            .header("content-type", "application/json")
            .header("idempotency-key", format!("{run_id}:{}", listing.listing_id))
            .body(Full::from(body.to_string()))?;
        let answer = self.client.request(request).await?;
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        ensure!(status.is_success(), "the partner answered {status}: {}", String::from_utf8_lossy(&body));
        Ok(serde_json::from_slice(&body)?)
    }
}
