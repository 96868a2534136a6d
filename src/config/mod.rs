//! The service's settings as types.
//!
//! `config/default.toml` is the manual: each key with its meaning, default and range. [`Config::load`] reports every
//! error at once. Settings that are fine alone and dangerous together are refused here too.

mod layers;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use layers::{ConfigError, DEFAULTS, ENV_PREFIX, Source, variable};

use layers::Layers;

/// A value that cannot be printed: `Debug` shows dots, there is no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value that must not reach a log.
    pub fn new(value: impl Into<String>) -> Self {
        Secret(value.into())
    }

    /// The value itself; each call is a place to look at in review.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// All settings of the service.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where SQS is.
    pub aws: Aws,
    /// The three lanes.
    pub lanes: Lanes,
    /// How queues are read and messages kept.
    pub queue: Queue,
    /// Postgres.
    pub database: Database,
    /// The partner's HTTP API.
    pub partner: Partner,
    /// The slow event.
    pub refresh: Refresh,
    /// Kafka, for post-processing.
    pub kafka: Kafka,
    /// The relay of outbox rows.
    pub outbox: Outbox,
    /// Health and metrics listener.
    pub admin: Admin,
    /// Profiling listener.
    pub profiling: Profiling,
    /// Stopping.
    pub shutdown: Shutdown,
    /// Logs.
    pub log: Log,
}

/// A section of the settings that holds something without a default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// `[database]`
    Database,
    /// `[partner]`
    Partner,
    /// `[kafka]`
    Kafka,
}

impl Section {
    fn prefix(self) -> &'static str {
        match self {
            Section::Database => "database.",
            Section::Partner => "partner.",
            Section::Kafka => "kafka.",
        }
    }
}

/// Where SQS is; credentials come from the standard AWS chain.
#[derive(Debug, Clone)]
pub struct Aws {
    /// AWS region.
    pub region: String,
    /// Endpoint of an emulator, `None` for AWS itself.
    pub endpoint_url: Option<String>,
}

/// The three lanes.
#[derive(Debug, Clone)]
pub struct Lanes {
    /// What producers send to.
    pub events: Lane,
    /// `valuations.refresh`.
    pub valuations: Lane,
    /// `valuations.publish`.
    pub post_processing: Lane,
}

/// One SQS queue and its limit.
#[derive(Debug, Clone)]
pub struct Lane {
    /// Queue name; the dead-letter queue is `<queue>-dlq`.
    pub queue: String,
    /// Events worked on at once.
    pub in_flight: usize,
}

/// How queues are read and messages kept.
#[derive(Debug, Clone)]
pub struct Queue {
    /// How long a received message stays hidden unless extended.
    pub visibility_timeout: Duration,
    /// Long poll.
    pub wait_time: Duration,
    /// Bound on every call; a receive gets `wait_time` on top.
    pub request_timeout: Duration,
    /// Polls in flight a lane under load.
    pub max_polls: usize,
    /// How long a delete waits for company.
    pub delete_linger: Duration,
    /// Backoff of failed events.
    pub retry: Backoff,
    /// How long one receive may be held.
    pub receive_cap: Duration,
}

/// Exponential backoff with full jitter.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// Upper bound of the first wait.
    pub base: Duration,
    /// Upper bound of every wait.
    pub cap: Duration,
}

impl Backoff {
    /// The upper bound of the wait after try number `attempt` (1 is the first).
    pub fn ceiling(&self, attempt: u32) -> Duration {
        let doublings = attempt.saturating_sub(1).min(31);
        self.base.saturating_mul(1u32 << doublings).min(self.cap)
    }

    /// A random wait between zero and the ceiling, so that those who failed together do not return together.
    pub fn wait(&self, attempt: u32) -> Duration {
        self.ceiling(attempt).mul_f64(fastrand::f64())
    }
}

/// Postgres.
#[derive(Debug, Clone)]
pub struct Database {
    /// Connection URL, with its password.
    pub url: Secret,
    /// Connections of the pool.
    pub max_connections: u32,
    /// Bound on opening a connection.
    pub connect_timeout: Duration,
    /// Bound on waiting for a free connection.
    pub acquire_timeout: Duration,
    /// Bound on one statement, kept by the server.
    pub statement_timeout: Duration,
}

/// The partner's HTTP API.
#[derive(Debug, Clone)]
pub struct Partner {
    /// Without a trailing slash.
    pub base_url: http::Uri,
    /// Calls in flight, process-wide.
    pub in_flight: usize,
    /// Sends a second, process-wide; `None` for no limit.
    pub rate_per_second: Option<u32>,
    /// Bound on connecting, TLS included.
    pub connect_timeout: Duration,
    /// Bound on one try.
    pub request_timeout: Duration,
    /// Bound on all tries of one listing.
    pub total_timeout: Duration,
    /// Tries made while the breaker was closed.
    pub max_attempts: u32,
    /// Backoff between tries.
    pub retry: Backoff,
    /// The most of one answer's body, in bytes after decompression.
    pub max_response_bytes: usize,
    /// Header that carries the credential, and the file with its value.
    pub credential: Option<Credential>,
}

/// A header whose value is read from a file.
#[derive(Debug, Clone)]
pub struct Credential {
    /// Header name.
    pub header: http::HeaderName,
    /// File with the value; read again when it changes.
    pub file: PathBuf,
}

/// The slow event.
#[derive(Debug, Clone)]
pub struct Refresh {
    /// Listings a page, and rows a batch.
    pub page_size: usize,
    /// How long an unfilled batch waits.
    pub batch_linger: Duration,
    /// Pages read ahead of the calls, process-wide.
    pub pages_ahead: usize,
}

/// Kafka, for post-processing.
#[derive(Debug, Clone)]
pub struct Kafka {
    /// `host:port`, comma-separated.
    pub brokers: String,
    /// Topic of the valuation records.
    pub topic: String,
    /// Partitions given by `setup`.
    pub partitions: u32,
    /// Replicas given by `setup`.
    pub replication_factor: u32,
    /// librdkafka's `compression.type`.
    pub compression: &'static str,
    /// From hand-over to delivery report.
    pub delivery_timeout: Duration,
    /// Valuations a page.
    pub page_size: usize,
}

/// The relay of outbox rows.
#[derive(Debug, Clone)]
pub struct Outbox {
    /// How often to look without being woken.
    pub poll_interval: Duration,
    /// How long a claim lasts.
    pub claim_timeout: Duration,
}

/// Health and metrics listener.
#[derive(Debug, Clone)]
pub struct Admin {
    /// Where to listen.
    pub listen: SocketAddr,
}

/// Profiling listener.
#[derive(Debug, Clone)]
pub struct Profiling {
    /// Starts the listener and the allocator's sampling.
    pub enabled: bool,
    /// Where to listen.
    pub listen: SocketAddr,
    /// Demanded of every request where set.
    pub token: Option<Secret>,
}

/// Stopping.
#[derive(Debug, Clone)]
pub struct Shutdown {
    /// From SIGTERM to the end of the process.
    pub grace: Duration,
}

/// Logs.
#[derive(Debug, Clone)]
pub struct Log {
    /// How lines are written.
    pub format: LogFormat,
    /// A tracing filter.
    pub level: String,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Pretty on a terminal, else JSON.
    Auto,
    /// One JSON object a line.
    Json,
    /// For people.
    Pretty,
}

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

impl Config {
    /// Loads defaults, `file` and `environment`; every error at once. What has no default must be there only in the
    /// sections that the caller `needs`; elsewhere a placeholder stands in.
    pub fn load(
        file: Option<&Path>,
        environment: impl Iterator<Item = (String, String)>,
        needs: &[Section],
    ) -> Result<Config, Vec<ConfigError>> {
        let mut layers = Layers::load(file, environment);
        let config = Config::read(&mut layers);
        config.check_pairs(&mut layers);
        let needed = |key: &str| needs.iter().any(|section| key.starts_with(section.prefix()));
        let errors: Vec<ConfigError> =
            layers.finish().into_iter().filter(|error| !error.missing || needed(&error.key)).collect();
        if errors.is_empty() { Ok(config) } else { Err(errors) }
    }

    fn read(layers: &mut Layers) -> Config {
        let ms = Duration::from_millis;
        Config {
            aws: Aws {
                region: layers.required("aws.region", "the region of the queues, such as us-east-1"),
                endpoint_url: optional_url(layers, "aws.endpoint_url"),
            },
            lanes: Lanes {
                events: lane(layers, "lanes.events"),
                valuations: lane(layers, "lanes.valuations"),
                post_processing: lane(layers, "lanes.post_processing"),
            },
            queue: Queue {
                visibility_timeout: layers.duration("queue.visibility_timeout", SECOND * 2..=HOUR * 12),
                wait_time: layers.duration("queue.wait_time", SECOND..=SECOND * 20),
                request_timeout: layers.duration("queue.request_timeout", ms(100)..=SECOND * 60),
                max_polls: layers.integer("queue.max_polls", 1..=32) as usize,
                delete_linger: layers.duration("queue.delete_linger", Duration::ZERO..=SECOND * 5),
                retry: Backoff {
                    base: layers.duration("queue.retry_base", ms(1)..=HOUR),
                    cap: layers.duration("queue.retry_cap", ms(1)..=HOUR),
                },
                receive_cap: layers.duration("queue.receive_cap", SECOND * 2..=HOUR * 12),
            },
            database: Database {
                url: database_url(layers),
                max_connections: layers.integer("database.max_connections", 2..=1000),
                connect_timeout: layers.duration("database.connect_timeout", ms(100)..=SECOND * 60),
                acquire_timeout: layers.duration("database.acquire_timeout", ms(100)..=SECOND * 300),
                statement_timeout: layers.duration("database.statement_timeout", ms(100)..=HOUR),
            },
            partner: Partner {
                base_url: partner_url(layers),
                in_flight: layers.integer("partner.in_flight", 1..=100_000) as usize,
                rate_per_second: Some(layers.integer("partner.rate_per_second", 0..=1_000_000)).filter(|r| *r > 0),
                connect_timeout: layers.duration("partner.connect_timeout", ms(10)..=SECOND * 60),
                request_timeout: layers.duration("partner.request_timeout", ms(10)..=SECOND * 600),
                total_timeout: layers.duration("partner.total_timeout", ms(10)..=HOUR),
                max_attempts: layers.integer("partner.max_attempts", 1..=100),
                retry: Backoff {
                    base: layers.duration("partner.retry_base", ms(1)..=SECOND * 60),
                    cap: layers.duration("partner.retry_cap", ms(1)..=SECOND * 300),
                },
                max_response_bytes: layers.integer("partner.max_response_bytes", 256..=16_777_216) as usize,
                credential: credential(layers),
            },
            refresh: Refresh {
                page_size: layers.integer("refresh.page_size", 1..=10_000) as usize,
                batch_linger: layers.duration("refresh.batch_linger", ms(1)..=SECOND * 60),
                pages_ahead: layers.integer("refresh.pages_ahead", 1..=10_000) as usize,
            },
            kafka: Kafka {
                brokers: layers.required("kafka.brokers", "host:port of a broker, or several separated by commas"),
                topic: layers.required("kafka.topic", "the topic of the valuation records"),
                partitions: layers.integer("kafka.partitions", 1..=10_000),
                replication_factor: layers.integer("kafka.replication_factor", 1..=100),
                compression: ["none", "lz4"][layers.choice("kafka.compression", &["none", "lz4"])],
                delivery_timeout: layers.duration("kafka.delivery_timeout", ms(100)..=SECOND * 600),
                page_size: layers.integer("kafka.page_size", 1..=10_000) as usize,
            },
            outbox: Outbox {
                poll_interval: layers.duration("outbox.poll_interval", ms(10)..=SECOND * 60),
                claim_timeout: layers.duration("outbox.claim_timeout", SECOND..=HOUR),
            },
            admin: Admin { listen: layers.socket_address("admin.listen") },
            profiling: Profiling {
                enabled: layers.boolean("profiling.enabled"),
                listen: layers.socket_address("profiling.listen"),
                token: profiling_token(layers),
            },
            shutdown: Shutdown { grace: layers.duration("shutdown.grace", SECOND * 3..=HOUR) },
            log: Log {
                format: [LogFormat::Auto, LogFormat::Json, LogFormat::Pretty]
                    [layers.choice("log.format", &["auto", "json", "pretty"])],
                level: log_level(layers),
            },
        }
    }

    /// Settings that are fine alone and dangerous together.
    fn check_pairs(&self, layers: &mut Layers) {
        if self.profiling.enabled && !self.profiling.listen.ip().is_loopback() && self.profiling.token.is_none() {
            layers.error(
                "profiling.listen",
                format!("{} can be reached from outside and no token is set", self.profiling.listen),
                "set profiling.token_file, or listen on 127.0.0.1",
            );
        }
        if self.queue.visibility_timeout.subsec_nanos() != 0 || self.queue.wait_time.subsec_nanos() != 0 {
            layers.error(
                "queue.visibility_timeout",
                format!(
                    "{:?} (or queue.wait_time {:?}) is not in whole seconds",
                    self.queue.visibility_timeout, self.queue.wait_time
                ),
                "SQS counts in whole seconds; give such as \"60s\"",
            );
        }
        let queues = [&self.lanes.events.queue, &self.lanes.valuations.queue, &self.lanes.post_processing.queue];
        if queues[0] == queues[1] || queues[1] == queues[2] || queues[0] == queues[2] {
            layers.error("lanes.valuations.queue", "two lanes share a queue", "give each lane a queue of its own");
        }
        if self.queue.receive_cap <= self.queue.visibility_timeout {
            layers.error(
                "queue.receive_cap",
                format!("{:?} is not longer than queue.visibility_timeout", self.queue.receive_cap),
                "make it longer; work is handed back only after the first extension",
            );
        }
        if self.partner.request_timeout > self.partner.total_timeout {
            layers.error(
                "partner.total_timeout",
                format!("{:?} is shorter than one try (partner.request_timeout)", self.partner.total_timeout),
                "make it at least partner.request_timeout",
            );
        }
    }
}

fn lane(layers: &mut Layers, prefix: &str) -> Lane {
    let key = format!("{prefix}.queue");
    let queue = layers.required(&key, "an SQS queue name");
    if queue.ends_with(".fifo") {
        layers.error(
            &key,
            format!("{queue:?} is a FIFO queue"),
            "use a standard queue: FIFO blocks a group behind one slow event",
        );
    } else if queue.len() > 76 || !queue.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
        layers.error(
            &key,
            format!("{queue:?} is not a queue name"),
            "use at most 76 letters, digits, - and _ (4 more are needed for -dlq)",
        );
    }
    Lane { queue, in_flight: layers.integer(&format!("{prefix}.in_flight"), 1..=10_000) as usize }
}

fn optional_url(layers: &mut Layers, key: &str) -> Option<String> {
    let text = layers.text(key);
    if text.is_empty() {
        return None;
    }
    if parse_http_url(&text).is_none() {
        layers.error(key, format!("{text:?} is not an http URL"), "give http://HOST:PORT or https://HOST");
    }
    Some(text)
}

fn parse_http_url(text: &str) -> Option<http::Uri> {
    let uri: http::Uri = text.trim_end_matches('/').parse().ok()?;
    let good = matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some() && uri.query().is_none();
    good.then_some(uri)
}

fn partner_url(layers: &mut Layers) -> http::Uri {
    let key = "partner.base_url";
    let text = layers.required(key, "the partner's base URL, such as https://valuations.example");
    match parse_http_url(&text) {
        Some(uri) => uri,
        None => {
            if !text.is_empty() {
                layers.error(key, format!("{text:?} is not an http URL"), "give http://HOST:PORT or https://HOST");
            }
            http::Uri::from_static("http://localhost")
        }
    }
}

fn credential(layers: &mut Layers) -> Option<Credential> {
    let header = layers.text("partner.credential_header");
    let file = layers.text("partner.credential_file");
    match (header.is_empty(), file.is_empty()) {
        (true, true) => None,
        (false, false) => match http::HeaderName::from_bytes(header.as_bytes()) {
            Ok(header) => {
                let file = PathBuf::from(file);
                read_secret(layers, "partner.credential_file", &file);
                Some(Credential { header, file })
            }
            Err(_) => {
                let problem = format!("{header:?} is not a header name");
                layers.error("partner.credential_header", problem, "give a name such as Authorization");
                None
            }
        },
        (true, false) => {
            layers.error("partner.credential_header", "is missing", "set it, or empty partner.credential_file");
            None
        }
        (false, true) => {
            layers.error("partner.credential_file", "is missing", "set it, or empty partner.credential_header");
            None
        }
    }
}

/// A secret from `direct` or from the file named by `file`; `None` if neither is set.
fn secret(layers: &mut Layers, direct: &str, file: &str) -> Option<Secret> {
    let value = layers.text(direct);
    let path = layers.text(file);
    match (value.is_empty(), path.is_empty()) {
        (true, true) => None,
        (false, true) => Some(Secret::new(value)),
        (true, false) => read_secret(layers, file, Path::new(&path)),
        (false, false) => {
            layers.error(file, format!("is set, and so is {direct}"), "set only one of the two");
            None
        }
    }
}

fn read_secret(layers: &mut Layers, key: &str, path: &Path) -> Option<Secret> {
    match std::fs::read_to_string(path) {
        Ok(text) if !text.trim().is_empty() => Some(Secret::new(text.trim())),
        Ok(_) => {
            layers.error(key, format!("{} is empty", path.display()), "write the secret into it");
            None
        }
        Err(error) => {
            layers.error(key, format!("{} cannot be read: {error}", path.display()), "name a readable file");
            None
        }
    }
}

fn database_url(layers: &mut Layers) -> Secret {
    let errors_before = layers.error_count();
    match secret(layers, "database.url", "database.url_file") {
        Some(url) => {
            // Neither the URL nor the parser's message may be shown: both can hold the password.
            let scheme_is_good = ["postgres://", "postgresql://"].iter().any(|s| url.reveal().starts_with(s));
            if !scheme_is_good || url.reveal().parse::<sqlx::postgres::PgConnectOptions>().is_err() {
                layers.error("database.url", "is not a Postgres URL", "give postgres://USER@HOST:PORT/DATABASE");
            }
            url
        }
        None => {
            if layers.error_count() == errors_before {
                let fix = "set it, WRITE_API_DATABASE_URL or database.url_file to postgres://USER@HOST:PORT/DATABASE";
                layers.missing("database.url", fix);
            }
            Secret::new("")
        }
    }
}

fn profiling_token(layers: &mut Layers) -> Option<Secret> {
    let token = secret(layers, "profiling.token", "profiling.token_file")?;
    if token.reveal().len() < 16 {
        let problem = format!("has {} characters", token.reveal().len());
        layers.error("profiling.token", problem, "use at least 16, such as the output of `openssl rand -hex 16`");
    }
    Some(token)
}

fn log_level(layers: &mut Layers) -> String {
    let level = layers.required("log.level", "a tracing filter, such as info");
    if let Err(error) = level.parse::<tracing_subscriber::filter::Targets>() {
        layers.error(
            "log.level",
            format!("{level:?} is not a filter: {error}"),
            "give one such as info or warn,write_api=debug",
        );
    }
    level
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &[Section] = &[Section::Database, Section::Partner, Section::Kafka];

    fn minimal() -> Vec<(String, String)> {
        [
            ("WRITE_API_DATABASE_URL", "postgres://app:hunter2@localhost/app"),
            ("WRITE_API_PARTNER_BASE_URL", "http://localhost:9000/"),
            ("WRITE_API_KAFKA_BROKERS", "localhost:9092"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .to_vec()
    }

    #[test]
    fn three_settings_are_enough() {
        let config = Config::load(None, minimal().into_iter(), ALL).expect("defaults are good");
        assert_eq!(config.queue.visibility_timeout, Duration::from_secs(60));
        assert_eq!(config.partner.rate_per_second, Some(1000));
        assert_eq!(config.lanes.valuations.queue, "writeapi-valuations");
    }

    #[test]
    fn all_errors_come_at_once_with_key_source_and_fix() {
        let environment = [
            ("WRITE_API_QUEUE_WAIT_TIME", "30s"),
            ("WRITE_API_PARTNER_IN_FLIGHT", "many"),
            ("WRITE_API_LANES_EVENTS_QUEUE", "x.fifo"),
            ("WRITE_API_PROFILING_LISTEN", "0.0.0.0:6060"),
            ("WRITE_API_NO_SUCH", "1"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()));
        let errors = Config::load(None, environment.into_iter(), ALL).expect_err("eight errors");
        let keys: Vec<&str> = errors.iter().map(|error| error.key.as_str()).collect();
        for key in [
            "queue.wait_time",
            "partner.in_flight",
            "lanes.events.queue",
            "profiling.listen",
            "WRITE_API_NO_SUCH",
            "database.url",
            "partner.base_url",
            "kafka.brokers",
        ] {
            assert!(keys.contains(&key), "{key} is not among {keys:?}");
        }
        assert_eq!(errors.len(), 8, "{errors:?}");
        let wait = errors.iter().find(|error| error.key == "queue.wait_time").expect("seen above").to_string();
        assert!(wait.contains("30s") && wait.contains("WRITE_API_QUEUE_WAIT_TIME"), "{wait}");
    }

    #[test]
    fn what_a_verb_does_not_need_may_be_missing_but_not_wrong() {
        assert!(Config::load(None, std::iter::empty(), &[]).is_ok());
        let wrong = [("WRITE_API_PARTNER_BASE_URL".to_owned(), "nonsense".to_owned())];
        let errors = Config::load(None, wrong.into_iter(), &[]).expect_err("not a URL");
        assert_eq!(errors[0].key, "partner.base_url");
    }

    #[test]
    fn a_secret_is_not_printed() {
        let config = Config::load(None, minimal().into_iter(), ALL).expect("good");
        assert!(!format!("{config:?}").contains("hunter2"));
        let mut broken = minimal();
        broken[0].1 = "mysql://app:hunter2@localhost/app".to_owned();
        let errors = Config::load(None, broken.into_iter(), ALL).expect_err("wrong scheme");
        assert!(!format!("{errors:?}").contains("hunter2"));
    }

    #[test]
    fn backoff_doubles_up_to_its_cap() {
        let backoff = Backoff { base: Duration::from_secs(1), cap: Duration::from_secs(10) };
        assert_eq!(backoff.ceiling(1), Duration::from_secs(1));
        assert_eq!(backoff.ceiling(3), Duration::from_secs(4));
        assert_eq!(backoff.ceiling(u32::MAX), Duration::from_secs(10));
    }
}
