//! How large a world is, and how the service is set in it.

use std::time::Duration;

use local_stack::Environment;

/// The partner's latency.
pub const LATENCY_MS: u64 = 60;
/// How long a message stays hidden from others without its keeper.
pub const VISIBILITY: Duration = Duration::from_secs(4);
/// The service's limit for the renewal of a run's lease: a quarter of the visibility.
pub const RENEWED_WITHIN: Duration = Duration::from_secs(1);
/// The service's limit for an answer of SQS.
pub const SQS_ANSWERS_WITHIN: Duration = Duration::from_secs(2);
/// From SIGTERM to the end.
pub const GRACE: Duration = Duration::from_secs(8);
/// Connections to the database, for each replica.
pub const CONNECTIONS: i64 = 6;

/// How large a world is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Listings of the beginning.
    pub listings: i64,
    /// Listings a page, answers a batch, records a page.
    pub page: u64,
    /// Partner calls in flight, for each replica.
    pub in_flight: u64,
    /// Partner calls a second, for each replica.
    pub rate: u64,
    /// A round that is not over by then makes no progress.
    pub limit: Duration,
    /// Work must be done this long after the last fault.
    pub recovery: Duration,
    /// Processes.
    pub replicas: usize,
    /// Whether the processes get to Postgres through a proxy that can fail.
    pub postgres_proxy: bool,
}

/// Everything smaller and shorter than in production, so that faults meet work in all its parts within seconds.
pub(super) fn apply(environment: &mut Environment, size: Size) {
    let seconds = |time: Duration| format!("{}s", time.as_secs());
    for (key, value) in [
        ("queue.visibility_timeout", seconds(VISIBILITY)),
        ("queue.wait_time", "1s".to_owned()),
        ("queue.request_timeout", seconds(SQS_ANSWERS_WITHIN)),
        ("queue.retry_base", "100ms".to_owned()),
        ("queue.retry_cap", "1s".to_owned()),
        // Fewer than a burst has bad bodies: a permit that is not given back is soon missed.
        ("lanes.events.in_flight", "8".to_owned()),
        ("lanes.valuations.in_flight", "4".to_owned()),
        ("lanes.post_processing.in_flight", "2".to_owned()),
        ("database.max_connections", (CONNECTIONS - 1).to_string()),
        ("database.acquire_timeout", "3s".to_owned()),
        ("database.statement_timeout", "3s".to_owned()),
        ("partner.in_flight", size.in_flight.to_string()),
        ("partner.rate_per_second", size.rate.to_string()),
        ("partner.connect_timeout", "2s".to_owned()),
        ("partner.request_timeout", "3s".to_owned()),
        ("partner.retry_cap", "1s".to_owned()),
        // No listing may fail because the partner was unwell for some time.
        ("partner.max_attempts", "100".to_owned()),
        ("partner.total_timeout", "30m".to_owned()),
        ("refresh.page_size", size.page.to_string()),
        ("kafka.page_size", size.page.to_string()),
        // So that one page can fail while another is being sent behind it.
        ("kafka.pages_in_flight", "4".to_owned()),
        ("kafka.delivery_timeout", "5s".to_owned()),
        ("outbox.poll_interval", "500ms".to_owned()),
        ("outbox.claim_timeout", "5s".to_owned()),
        ("shutdown.grace", seconds(GRACE)),
        ("log.format", "json".to_owned()),
    ] {
        environment.set(key, &value);
    }
}
