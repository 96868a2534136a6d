//! The service's settings as types.
//!
//! `config/default.toml` is the manual: each key with its meaning, default and range. [`Config::load`] reports every
//! error at once.

mod layers;
mod manual;
mod read;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use layers::Layers;
pub use layers::{ConfigError, DEFAULTS, ENV_PREFIX, Source, variable};
pub use manual::{Setting, markdown, settings};

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
    /// Removal of what is old.
    pub retention: Retention,
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
    /// A message that was received so often is sent anew instead of given back.
    pub most_receives: u32,
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
    /// Bound on waiting for a connection, the opening of one included.
    pub acquire_timeout: Duration,
    /// Bound on one statement, kept by the server.
    pub statement_timeout: Duration,
}

impl Database {
    /// Where it is, for people, without the password: USER@HOST:PORT/DATABASE.
    pub fn address(&self) -> String {
        match self.url.reveal().parse::<sqlx::postgres::PgConnectOptions>() {
            Ok(url) => {
                let (user, host, port) = (url.get_username(), url.get_host(), url.get_port());
                format!("{user}@{host}:{port}/{}", url.get_database().unwrap_or(user))
            }
            Err(_) => "(hidden)".to_owned(),
        }
    }
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

impl Partner {
    /// The longest that one listing can take: every try fails at its very end, and every wait between two is the longest.
    fn all_tries(&self) -> Duration {
        let waits: Duration = (1..self.max_attempts).map(|attempt| self.retry.ceiling(attempt)).sum();
        self.request_timeout.max(self.connect_timeout) * self.max_attempts + waits
    }
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
    /// Pages of a publication whose records are out and whose cursor is not written; at most half of them, rounded up, are being
    /// sent.
    pub pages_in_flight: usize,
    /// Encryption, `None` for plain text.
    pub tls: Option<KafkaTls>,
    /// Who the service says it is, `None` where brokers do not ask, or go by the client certificate.
    pub sasl: Option<KafkaSasl>,
}

/// Encrypted connections to the brokers, whose certificate and name are always verified.
#[derive(Debug, Clone)]
pub struct KafkaTls {
    /// PEM file of the authorities that are trusted; `None` for the system's.
    pub ca_file: Option<PathBuf>,
    /// The service's own certificate, for brokers that ask for one.
    pub client: Option<ClientCertificate>,
}

/// PEM files that say who a client is.
#[derive(Debug, Clone)]
pub struct ClientCertificate {
    /// The certificate, followed by those of intermediate authorities.
    pub certificate_file: PathBuf,
    /// Its private key, without a passphrase.
    pub key_file: PathBuf,
}

/// A name and a password for the brokers.
#[derive(Debug, Clone)]
pub struct KafkaSasl {
    /// librdkafka's `sasl.mechanism`.
    pub mechanism: &'static str,
    /// User name.
    pub username: String,
    /// Password.
    pub password: Secret,
}

/// The relay of outbox rows.
#[derive(Debug, Clone)]
pub struct Outbox {
    /// How often to look without being woken.
    pub poll_interval: Duration,
    /// How long a claim lasts.
    pub claim_timeout: Duration,
}

/// Removal of what is old.
#[derive(Debug, Clone)]
pub struct Retention {
    /// How long finished runs and sent outbox rows are kept; `None` for ever.
    pub age: Option<Duration>,
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
    /// CPU time that the profiler may use in each second.
    pub cpu_budget: Duration,
    /// Heap profiles kept on disk.
    pub snapshots: Snapshots,
}

/// Heap profiles kept on disk.
#[derive(Debug, Clone)]
pub struct Snapshots {
    /// Where; `None` for nowhere.
    pub directory: Option<PathBuf>,
    /// The longest time between two.
    pub interval: Duration,
    /// The growth during a slow event at which one is taken; 0 for none.
    pub growth_bytes: u64,
    /// What all of them together may take.
    pub budget_bytes: u64,
    /// How many may be kept.
    pub max_count: usize,
    /// How long they are kept.
    pub max_age: Duration,
    /// What the process may have, where it is not the limit of its control group.
    pub memory_limit_bytes: Option<u64>,
    /// Where they are sent as well, `s3://BUCKET/PREFIX`; `None` for nowhere.
    pub s3_url: Option<String>,
    /// How S3 is reached.
    pub s3: S3,
}

/// S3, or what speaks its protocol; credentials come from the standard AWS chain.
#[derive(Debug, Clone)]
pub struct S3 {
    /// Endpoint of what is not AWS, `None` for AWS itself.
    pub endpoint_url: Option<String>,
    /// AWS region.
    pub region: String,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_its_cap() {
        let backoff = Backoff { base: Duration::from_secs(1), cap: Duration::from_secs(10) };
        assert_eq!(backoff.ceiling(1), Duration::from_secs(1));
        assert_eq!(backoff.ceiling(3), Duration::from_secs(4));
        assert_eq!(backoff.ceiling(u32::MAX), Duration::from_secs(10));
    }
}
