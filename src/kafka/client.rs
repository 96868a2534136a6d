//! The settings and the log of the librdkafka clients.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use crate::config;

/// Settings of every client.
///
/// To be asked for before the first client is made: OpenSSL is started here, so that it does not clean up when the process ends.
/// librdkafka would start it with that, and its threads live until the very end. One in the middle of a handshake was the end of
/// a service that had stopped in order: SIGSEGV, in one of 160 while brokers refused each connection.
pub(super) fn common(kafka: &config::Kafka) -> ClientConfig {
    openssl_sys::init();
    let mut client = ClientConfig::new();
    client
        .set("bootstrap.servers", &kafka.brokers)
        .set("client.id", "write-api")
        // Looking at a topic must not create it, with a number of partitions that nobody chose.
        .set("allow.auto.create.topics", "false")
        // A broker that comes back is used again within two seconds; the default waits up to ten.
        .set("reconnect.backoff.max.ms", "2000")
        .set("socket.connection.setup.timeout.ms", "5000")
        .set("socket.keepalive.enable", "true")
        // Idle connections are closed by brokers and opened again; that is no news.
        .set("log.connection.close", "false")
        .set_log_level(RDKafkaLogLevel::Info);
    secure(&mut client, kafka);
    client
}

/// Encryption and authentication. librdkafka reads the files when a client is made; it verifies the brokers' names by
/// itself.
fn secure(client: &mut ClientConfig, kafka: &config::Kafka) {
    client.set(
        "security.protocol",
        match (&kafka.tls, &kafka.sasl) {
            (None, None) => "plaintext",
            (Some(_), None) => "ssl",
            (None, Some(_)) => "sasl_plaintext",
            (Some(_), Some(_)) => "sasl_ssl",
        },
    );
    if let Some(tls) = &kafka.tls {
        // Each distribution keeps its authorities in another place, and a small image may hold them in none that the
        // linked OpenSSL was built to look at: probing knows them all.
        let authorities = tls.ca_file.as_ref().map_or("probe".into(), |file| file.to_string_lossy());
        client.set("ssl.ca.location", authorities);
        if let Some(own) = &tls.client {
            client.set("ssl.certificate.location", own.certificate_file.to_string_lossy());
            client.set("ssl.key.location", own.key_file.to_string_lossy());
        }
    }
    if let Some(sasl) = &kafka.sasl {
        client.set("sasl.mechanism", sasl.mechanism);
        client.set("sasl.username", &sasl.username);
        client.set("sasl.password", sasl.password.reveal());
    }
}

/// Settings of the producer.
pub(super) fn producer(kafka: &config::Kafka) -> ClientConfig {
    let mut client = common(kafka);
    client
        // Implies acks=all, retries without limit and an order kept across them.
        .set("enable.idempotence", "true")
        .set("compression.type", kafka.compression)
        .set("delivery.timeout.ms", kafka.delivery_timeout.as_millis().to_string())
        // Java's default, so that other producers of a key agree on its partition; librdkafka's own is CRC32.
        .set("partitioner", "murmur2_random")
        // Handing a page over takes some milliseconds, in which batches form; a request costs both sides as much as many records do.
        // A longer one is time lost on each page where few are in flight.
        .set("linger.ms", "1")
        // Full is back-pressure, not an error. Of pages of the default size each publication sends one: seven fill it.
        .set("queue.buffering.max.messages", "20000")
        .set("queue.buffering.max.kbytes", "65536");
    client
}

/// While brokers are away librdkafka tells each kind of error several times a second. Once in this time is enough:
/// `/readyz` says the same, and since when.
const SAME_ERROR: Duration = Duration::from_secs(60);

/// How long an error is worth naming as the cause of what came later. Brokers that are away, or refuse us, are tried
/// again, and complained of, every few seconds.
const RECENT: Duration = Duration::from_secs(10);

/// Passes librdkafka's own log lines on to ours.
#[derive(Default)]
pub(super) struct ClientLog {
    said: Mutex<Vec<(Option<RDKafkaErrorCode>, Instant)>>,
    last_cause: Mutex<Option<(String, Instant)>>,
}

impl ClientLog {
    /// Whether this kind of error was not told for a while. There are few kinds.
    fn is_news(&self, code: Option<RDKafkaErrorCode>) -> bool {
        let now = Instant::now();
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.retain(|(_, at)| now.duration_since(*at) < SAME_ERROR);
        let is_news = !said.iter().any(|(said, _)| *said == code);
        if is_news {
            said.push((code, now));
        }
        is_news
    }

    /// Why a broker could not be used just now, in librdkafka's words: a refused certificate, a wrong password, nobody
    /// there. Its answers to calls say only that there was none.
    pub fn recent_cause(&self) -> Option<String> {
        let last = self.last_cause.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().filter(|(_, at)| at.elapsed() < RECENT).map(|(cause, _)| cause.clone())
    }
}

impl ClientContext for ClientLog {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        match level {
            RDKafkaLogLevel::Emerg
            | RDKafkaLogLevel::Alert
            | RDKafkaLogLevel::Critical
            | RDKafkaLogLevel::Error
            // An unreachable broker is an error to librdkafka; it tries again, and so do we.
            | RDKafkaLogLevel::Warning => tracing::warn!(facility, "librdkafka: {message}"),
            RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => tracing::info!(facility, "librdkafka: {message}"),
            RDKafkaLogLevel::Debug => tracing::debug!(facility, "librdkafka: {message}"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // Asked for where a topic is read, and handed to the reader: an end is no error.
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::PartitionEOF) {
            return;
        }
        // That all brokers are down follows from what was said of each, and says less.
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::AllBrokersDown) {
            *self.last_cause.lock().unwrap_or_else(PoisonError::into_inner) = Some((reason.to_owned(), Instant::now()));
        }
        if self.is_news(error.rdkafka_error_code()) {
            tracing::warn!("librdkafka: {error}: {reason}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_error_is_told_once_in_a_while() {
        let log = ClientLog::default();
        let (down, refused) = (Some(RDKafkaErrorCode::AllBrokersDown), Some(RDKafkaErrorCode::BrokerTransportFailure));
        assert_eq!(
            [down, refused, down, None, None, refused].map(|code| log.is_news(code)),
            [true, true, false, true, false, false]
        );
    }
}
