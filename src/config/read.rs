//! From layers of text to typed settings: each key with its range, and the pairs that are dangerous together.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::layers::Layers;
use super::{
    Admin, Aws, Backoff, ClientCertificate, Config, ConfigError, Credential, Database, Kafka, KafkaSasl, KafkaTls,
    Lane, Lanes, Log, LogFormat, Outbox, Partner, Profiling, Queue, Refresh, Retention, S3, Secret, Section, Shutdown,
    Snapshots,
};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

/// Two minutes before SQS's 12 h: until they are over, the message must still be hidden from others while calls that are
/// out come back and it is handed over.
const MOST_RECEIVE_CAP: Duration = Duration::from_secs(12 * 3600 - 120);

/// An event may come again until its message has spent 14 days in its queue and 14 in the dead-letter queue, which are what
/// `setup` gives them; a day more, for clocks and late deletes. A run removed before that would begin anew.
const LEAST_RETENTION: Duration = Duration::from_secs((14 + 14 + 1) * 24 * 3600);

impl Config {
    /// Loads defaults, `file` and `environment`; every error at once. What has no default must be there only in the
    /// sections that the caller `needs`; elsewhere a placeholder stands in.
    pub fn load(
        file: Option<&Path>,
        environment: impl Iterator<Item = (String, String)>,
        needs: &[Section],
    ) -> Result<Config, Vec<ConfigError>> {
        let (config, layers) = Config::load_layers(file, environment);
        let needed = |key: &str| needs.iter().any(|section| key.starts_with(section.prefix()));
        let errors: Vec<ConfigError> =
            layers.finish().into_iter().filter(|error| !error.missing || needed(&error.key)).collect();
        if errors.is_empty() { Ok(config) } else { Err(errors) }
    }

    /// The settings as far as they can be read, and the layers with what was noted about each while reading.
    pub(super) fn load_layers(
        file: Option<&Path>,
        environment: impl Iterator<Item = (String, String)>,
    ) -> (Config, Layers) {
        let mut layers = Layers::load(file, environment);
        let config = Config::read(&mut layers);
        config.check_pairs(&mut layers);
        (config, layers)
    }

    fn read(layers: &mut Layers) -> Config {
        let ms = Duration::from_millis;
        let (kafka_tls, kafka_sasl) = kafka_security(layers);
        Config {
            aws: Aws { region: region(layers), endpoint_url: optional_url(layers, "aws.endpoint_url") },
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
                receive_cap: layers.duration("queue.receive_cap", SECOND * 2..=MOST_RECEIVE_CAP),
                most_receives: layers.integer("queue.most_receives", 2..=990),
            },
            database: Database {
                url: database_url(layers),
                max_connections: layers.integer("database.max_connections", 2..=1000),
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
                pages_in_flight: layers.integer("kafka.pages_in_flight", 1..=16) as usize,
                tls: kafka_tls,
                sasl: kafka_sasl,
            },
            outbox: Outbox {
                poll_interval: layers.duration("outbox.poll_interval", ms(10)..=SECOND * 60),
                claim_timeout: layers.duration("outbox.claim_timeout", SECOND..=HOUR),
            },
            retention: retention(layers),
            admin: Admin { listen: layers.socket_address("admin.listen") },
            profiling: Profiling {
                enabled: layers.boolean("profiling.enabled"),
                listen: layers.socket_address("profiling.listen"),
                token: profiling_token(layers),
                cpu_budget: layers.duration("profiling.cpu_budget", ms(1)..=SECOND),
                snapshots: snapshots(layers),
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
        if !self.profiling.enabled && self.profiling.snapshots.directory.is_some() {
            layers.error(
                "profiling.snapshots.directory",
                "is set and profiling.enabled is false, so nothing is sampled",
                "set profiling.enabled, or empty the directory",
            );
        }
        if self.profiling.snapshots.s3_url.is_some() && self.profiling.snapshots.directory.is_none() {
            layers.error(
                "profiling.snapshots.s3_url",
                "is set and profiling.snapshots.directory is not, where snapshots wait until they are sent",
                "set the directory as well",
            );
        }
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
        let all_tries = self.partner.all_tries();
        if all_tries > self.partner.total_timeout {
            layers.error(
                "partner.total_timeout",
                format!(
                    "{:?} is shorter than {} tries (partner.max_attempts) with the waits between them, {all_tries:?}",
                    self.partner.total_timeout, self.partner.max_attempts
                ),
                "make it at least that long, or lower partner.max_attempts or partner.request_timeout",
            );
        }
    }
}

fn retention(layers: &mut Layers) -> Retention {
    let enabled = layers.boolean("retention.enabled");
    let age = layers.duration("retention.age", LEAST_RETENTION..=HOUR * 24 * 3650);
    Retention { age: enabled.then_some(age) }
}

fn region(layers: &mut Layers) -> String {
    layers.required("aws.region", "the region of the queues, such as us-east-1")
}

fn snapshots(layers: &mut Layers) -> Snapshots {
    const MIB: u64 = 1024 * 1024;
    let directory = layers.text("profiling.snapshots.directory", "a path, or nothing");
    let memory_limit = layers.integer("profiling.snapshots.memory_limit_mib", 0..=16_777_216);
    Snapshots {
        directory: (!directory.is_empty()).then(|| PathBuf::from(directory)),
        interval: layers.duration("profiling.snapshots.interval", SECOND * 5..=HOUR * 24),
        growth_bytes: u64::from(layers.integer("profiling.snapshots.growth_mib", 0..=1_048_576)) * MIB,
        budget_bytes: u64::from(layers.integer("profiling.snapshots.budget_mib", 1..=1_048_576)) * MIB,
        max_count: layers.integer("profiling.snapshots.max_count", 3..=1_000_000) as usize,
        max_age: layers.duration("profiling.snapshots.max_age", HOUR..=HOUR * 24 * 366),
        memory_limit_bytes: (memory_limit > 0).then(|| u64::from(memory_limit) * MIB),
        s3_url: s3_url(layers),
        s3: S3 { endpoint_url: optional_url(layers, "profiling.snapshots.s3_endpoint_url"), region: region(layers) },
    }
}

fn s3_url(layers: &mut Layers) -> Option<String> {
    const KEY: &str = "profiling.snapshots.s3_url";
    let url = layers.text(KEY, "s3://BUCKET/PREFIX, or nothing");
    let bucket = url.strip_prefix("s3://").and_then(|rest| rest.split('/').next()).unwrap_or_default();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if !url.is_empty() && (bucket.is_empty() || !bucket.bytes().all(plain)) {
        layers.error(KEY, format!("{url:?} names no bucket"), "give s3://BUCKET/PREFIX, or nothing");
    }
    (!url.is_empty()).then_some(url)
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
    let text = layers.text(key, "an http or https URL, or nothing");
    if text.is_empty() {
        return None;
    }
    http_url(layers, key, &text);
    Some(text)
}

/// Reads `text`, the value of `key`. What comes before an `@` may be a password, so such a value is never shown.
fn http_url(layers: &mut Layers, key: &str, text: &str) -> Option<http::Uri> {
    let fix = "give http://HOST:PORT or https://HOST, where PORT is at most 65535";
    if text.contains('@') {
        layers.hide(key);
        layers.error(key, "has a user or a password in it", fix);
        return None;
    }
    let uri = parse_http_url(text);
    if uri.is_none() {
        layers.error(key, format!("{text:?} is not an http URL"), fix);
    }
    uri
}

fn parse_http_url(text: &str) -> Option<http::Uri> {
    let uri: http::Uri = text.trim_end_matches('/').parse().ok()?;
    let authority = uri.authority()?;
    // A port that is no number of 16 bits reads as if there were none.
    let port_is_good = authority.as_str() == authority.host() || authority.port_u16().is_some();
    let good = matches!(uri.scheme_str(), Some("http" | "https")) && port_is_good && uri.query().is_none();
    good.then_some(uri)
}

fn partner_url(layers: &mut Layers) -> http::Uri {
    let key = "partner.base_url";
    let text = layers.required(key, "the partner's base URL, such as https://valuations.example");
    let uri = if text.is_empty() { None } else { http_url(layers, key, &text) };
    uri.unwrap_or_else(|| http::Uri::from_static("http://localhost"))
}

fn credential(layers: &mut Layers) -> Option<Credential> {
    let header = layers.text("partner.credential_header", "a header name, or nothing");
    let file = layers.text("partner.credential_file", "a path, or nothing");
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

/// A secret, of which `what` says what it is, from `direct` or from the file named by `file`; `None` if neither is set.
fn secret(layers: &mut Layers, direct: &str, file: &str, what: &str) -> Option<Secret> {
    let value = layers.secret(direct, what);
    let path = layers.text(file, "a path, or nothing");
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
    match secret(layers, "database.url", "database.url_file", "postgres://USER@HOST:PORT/DATABASE") {
        Some(url) => {
            // Neither the URL nor the parser's message may be shown: both can hold the password.
            let authority = ["postgres://", "postgresql://"].iter().find_map(|s| url.reveal().strip_prefix(s));
            if authority.is_some_and(hides_its_user) {
                let problem = "has its @ where none belongs; its password seems to hold a / ? or #";
                layers.error("database.url", problem, "write these as %2F, %3F and %23");
            } else if authority.is_none() || url.reveal().parse::<sqlx::postgres::PgConnectOptions>().is_err() {
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

const SECURITY_PROTOCOLS: [&str; 4] = ["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"];
const SASL_MECHANISMS: [&str; 3] = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"];
const USERNAME: &str = "the user that the brokers know";
const PASSWORD: &str = "the user's password";

/// What `kafka.security_protocol` asks for: encryption, and a user name.
fn kafka_security(layers: &mut Layers) -> (Option<KafkaTls>, Option<KafkaSasl>) {
    let protocol = layers.choice("kafka.security_protocol", &SECURITY_PROTOCOLS);
    let encrypted = protocol % 2 == 1;
    (kafka_tls(layers, encrypted), kafka_sasl(layers, protocol >= 2, encrypted))
}

fn kafka_tls(layers: &mut Layers, tls: bool) -> Option<KafkaTls> {
    let mut file = |key: &str| {
        let path = layers.text(key, "a path, or nothing");
        if path.is_empty() {
            return None;
        }
        if !tls {
            // Whoever names an authority believes that the connection is encrypted.
            let fix = "set kafka.security_protocol to ssl or sasl_ssl, or empty this one";
            layers.error(key, "is set, and connections are not encrypted", fix);
            return None;
        }
        if let Err(error) = std::fs::File::open(&path) {
            layers.error(key, format!("{path} cannot be read: {error}"), "name a readable PEM file");
        }
        Some(PathBuf::from(path))
    };
    let ca_file = file("kafka.ca_file");
    let (certificate_file, key_file) = (file("kafka.client_certificate_file"), file("kafka.client_key_file"));
    let client = match (certificate_file, key_file) {
        (Some(certificate_file), Some(key_file)) => Some(ClientCertificate { certificate_file, key_file }),
        (None, None) => None,
        (Some(_), None) => {
            layers.error("kafka.client_key_file", "is missing", "set it, or empty kafka.client_certificate_file");
            None
        }
        (None, Some(_)) => {
            layers.error("kafka.client_certificate_file", "is missing", "set it, or empty kafka.client_key_file");
            None
        }
    };
    tls.then_some(KafkaTls { ca_file, client })
}

fn kafka_sasl(layers: &mut Layers, sasl: bool, tls: bool) -> Option<KafkaSasl> {
    let mechanism = SASL_MECHANISMS[layers.choice("kafka.sasl_mechanism", &SASL_MECHANISMS)];
    if !sasl {
        let username = layers.text("kafka.username", USERNAME);
        let password = layers.secret("kafka.password", PASSWORD);
        let file = layers.text("kafka.password_file", "a path, or nothing");
        for (key, value) in [("kafka.username", username), ("kafka.password", password), ("kafka.password_file", file)]
        {
            if !value.is_empty() {
                let fix = "set kafka.security_protocol to sasl_ssl, or empty this one";
                layers.error(key, "is set, and nobody is told", fix);
            }
        }
        return None;
    }
    if mechanism == "PLAIN" && !tls {
        let fix = "use sasl_ssl, or a SCRAM mechanism, which proves the password without sending it";
        layers.error("kafka.sasl_mechanism", "PLAIN over sasl_plaintext sends the password as it is", fix);
    }
    let username = layers.required("kafka.username", USERNAME);
    let errors_before = layers.error_count();
    let password = secret(layers, "kafka.password", "kafka.password_file", PASSWORD).unwrap_or_else(|| {
        if layers.error_count() == errors_before {
            let fix = "set it, WRITE_API_KAFKA_PASSWORD or kafka.password_file to the user's password";
            layers.missing("kafka.password", fix);
        }
        Secret::new("")
    });
    if password.reveal().contains(char::is_control) {
        // Such as a line break in the middle. librdkafka's own complaint would quote it.
        layers.error("kafka.password", "holds a control character", "write the password alone, on one line");
    }
    Some(KafkaSasl { mechanism, username, password })
}

/// Whether what follows the scheme has an `@` only behind the end of the host: a password that holds a `/` would be
/// taken for a port and shown.
fn hides_its_user(rest: &str) -> bool {
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    !rest[..end].contains('@') && rest[end..].contains('@')
}

fn profiling_token(layers: &mut Layers) -> Option<Secret> {
    let accepts = "at least 16 characters, or nothing";
    let token = secret(layers, "profiling.token", "profiling.token_file", accepts)?;
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

    fn kafka(settings: &[(&str, &str)]) -> Result<Kafka, Vec<String>> {
        let settings = settings.iter().map(|(k, v)| (format!("WRITE_API_KAFKA_{k}"), (*v).to_owned()));
        let loaded = Config::load(None, minimal().into_iter().chain(settings), ALL);
        loaded.map(|config| config.kafka).map_err(|errors| errors.into_iter().map(|error| error.key).collect())
    }

    #[test]
    fn kafka_is_plain_unless_told_and_sasl_goes_with_or_without_tls() {
        let user = [("USERNAME", "app"), ("PASSWORD", "hunter2")];
        let of = |protocol| kafka(&[&user[..], &[("SECURITY_PROTOCOL", protocol)]].concat()).expect(protocol);
        let plain = kafka(&[]).expect("the default");
        assert!(plain.tls.is_none() && plain.sasl.is_none());
        let encrypted = kafka(&[("SECURITY_PROTOCOL", "ssl")]).expect("the system's authorities");
        assert!(encrypted.tls.is_some_and(|tls| tls.ca_file.is_none()) && encrypted.sasl.is_none());
        let both = of("sasl_ssl");
        assert!(both.tls.is_some());
        let sasl = both.sasl.expect("a user");
        assert_eq!((sasl.mechanism, sasl.username.as_str()), ("SCRAM-SHA-512", "app"));
        assert_eq!(sasl.password.reveal(), "hunter2");
        assert!(!format!("{sasl:?}").contains("hunter2"), "{sasl:?}");
        let scram_in_the_clear = of("sasl_plaintext");
        assert!(scram_in_the_clear.tls.is_none() && scram_in_the_clear.sasl.is_some());
    }

    #[test]
    fn half_of_kafkas_security_is_an_error() {
        for (settings, key) in [
            (&[("SECURITY_PROTOCOL", "tls")][..], "kafka.security_protocol"),
            (&[("CA_FILE", "/dev/null")], "kafka.ca_file"),
            (&[("SECURITY_PROTOCOL", "ssl"), ("CA_FILE", "/nowhere/ca.pem")], "kafka.ca_file"),
            (&[("SECURITY_PROTOCOL", "ssl"), ("CLIENT_KEY_FILE", "/dev/null")], "kafka.client_certificate_file"),
            (&[("SECURITY_PROTOCOL", "ssl"), ("CLIENT_CERTIFICATE_FILE", "/dev/null")], "kafka.client_key_file"),
            (&[("PASSWORD", "hunter2")], "kafka.password"),
            (&[("SECURITY_PROTOCOL", "sasl_ssl"), ("PASSWORD", "hunter2")], "kafka.username"),
            (&[("SECURITY_PROTOCOL", "sasl_ssl"), ("USERNAME", "app")], "kafka.password"),
            (&[("SECURITY_PROTOCOL", "sasl_ssl"), ("USERNAME", "app"), ("PASSWORD", "hunter\n2")], "kafka.password"),
            (
                &[
                    ("SECURITY_PROTOCOL", "sasl_plaintext"),
                    ("SASL_MECHANISM", "PLAIN"),
                    ("USERNAME", "app"),
                    ("PASSWORD", "hunter2"),
                ],
                "kafka.sasl_mechanism",
            ),
        ] {
            assert_eq!(kafka(settings).expect_err("wrong"), [key], "{settings:?}");
        }
    }

    #[test]
    fn a_receive_cap_leaves_time_for_the_handover() {
        let with = |cap: &str| vec![("WRITE_API_QUEUE_RECEIVE_CAP".to_owned(), cap.to_owned())].into_iter();
        assert!(Config::load(None, with("11h58m"), &[]).is_ok());
        let errors = Config::load(None, with("12h"), &[]).expect_err("no time is left");
        assert!(errors[0].key == "queue.receive_cap" && errors[0].fix.contains("11h58m"), "{errors:?}");
    }

    #[test]
    fn a_url_with_a_password_is_refused_and_not_shown() {
        for key in ["WRITE_API_PARTNER_BASE_URL", "WRITE_API_AWS_ENDPOINT_URL"] {
            for value in ["https://app:hunter2@partner.example", "htps:/app:hunter2@partner.example"] {
                let wrong = [(key.to_owned(), value.to_owned())];
                let errors = Config::load(None, wrong.into_iter(), &[]).expect_err("a password");
                assert!(errors.len() == 1 && errors[0].problem.contains("password"), "{errors:?}");
                assert!(!format!("{errors:?}").contains("hunter2"), "{errors:?}");
            }
        }
    }

    #[test]
    fn a_port_that_is_none_is_refused() {
        for key in ["WRITE_API_PARTNER_BASE_URL", "WRITE_API_AWS_ENDPOINT_URL"] {
            let load = |url: &str| Config::load(None, [(key.to_owned(), url.to_owned())].into_iter(), &[]);
            for wrong in ["http://127.0.0.1:99999", "http://[::1]:65536/", "https://partner.example:", "http://a:-1"] {
                let errors = load(wrong).expect_err(wrong);
                assert!(errors.len() == 1 && errors[0].to_string().contains("65535"), "{wrong}: {errors:?}");
            }
            for good in ["http://127.0.0.1:65535", "http://[::1]:80/", "http://[::1]/", "https://partner.example/api"] {
                assert!(load(good).is_ok(), "{good}");
            }
        }
    }

    #[test]
    fn nothing_is_removed_while_its_event_may_come_again() {
        let load = |key: &str, value: &str| {
            let setting = (format!("WRITE_API_RETENTION_{key}"), value.to_owned());
            Config::load(None, [setting].into_iter(), &[])
        };
        let day = HOUR * 24;
        assert_eq!(load("ENABLED", "true").expect("the default").retention.age, Some(day * 30));
        assert_eq!(load("ENABLED", "false").expect("off").retention.age, None);
        assert_eq!(load("AGE", "696h").expect("29 days").retention.age, Some(day * 29));
        let errors = load("AGE", "695h59m").expect_err("a message may outlive it");
        assert!(errors.len() == 1 && errors[0].key == "retention.age", "{errors:?}");
        let error = errors[0].to_string();
        assert!(error.contains("695h59m") && error.contains("give a duration from 696h"), "{error}");
    }

    #[test]
    fn a_half_open_connection_to_postgres_is_given_up_within_30_s() {
        let config = Config::load(None, std::iter::empty(), &[]).expect("the defaults");
        assert_eq!(config.database.statement_timeout, Duration::from_secs(20));
    }

    #[test]
    fn the_total_timeout_has_room_for_every_try() {
        let load = |total: &str| {
            let settings =
                [("REQUEST_TIMEOUT", "10s"), ("MAX_ATTEMPTS", "4"), ("RETRY_BASE", "1s"), ("TOTAL_TIMEOUT", total)];
            let settings = settings.map(|(key, value)| (format!("WRITE_API_PARTNER_{key}"), value.to_owned()));
            Config::load(None, settings.into_iter(), &[])
        };
        // Four tries, and 1 s, 2 s and 4 s between them.
        assert!(load("47s").is_ok());
        let errors = load("46s").expect_err("too short");
        assert_eq!(errors.len(), 1, "{errors:?}");
        let error = errors[0].to_string();
        assert!(error.contains("partner.total_timeout") && error.contains("46s") && error.contains("47s"), "{error}");
    }

    #[test]
    fn a_secret_is_not_printed() {
        let config = Config::load(None, minimal().into_iter(), ALL).expect("good");
        assert!(!format!("{config:?}").contains("hunter2"));
        let mut broken = minimal();
        broken[0].1 = "mysql://app:hunter2@localhost/app".to_owned();
        let errors = Config::load(None, broken.into_iter(), ALL).expect_err("wrong scheme");
        assert!(!format!("{errors:?}").contains("hunter2"));
        for password in ["hunter2/x", "1234?hunter2", "1234#hunter2"] {
            let mut broken = minimal();
            broken[0].1 = format!("postgres://app:{password}@localhost/app");
            let errors = Config::load(None, broken.into_iter(), ALL).expect_err("not encoded");
            assert!(errors[0].to_string().contains("%2F") && !format!("{errors:?}").contains("hunter2"), "{errors:?}");
        }
    }
}
