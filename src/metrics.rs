//! Every metric of the service, in the Prometheus text format.
//!
//! A metric belongs here if an operator would graph it or be woken by it. The documentation of a field is also its help
//! text. Units are in the names; labels have few values, all known in advance. There is no global registry: whoever
//! counts something is handed the [`Metrics`].

use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::task::cost::{self, Part};
use crate::task::{For, Kind, registry, usage};

/// Upper bounds in seconds for things that take from a millisecond to hours.
const EVENT_SECONDS: &[f64] = &[
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0,
    30.0, 60.0, 300.0, 1800.0, 7200.0, 36000.0,
];

/// Upper bounds in seconds for calls to a neighbour.
const CALL_SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0];

macro_rules! metrics {
    ($($(#[doc = $help:literal])+ $field:ident: $type:ident($name:literal $(, $arg:expr)*),)+) => {
        /// All metrics, by what they measure.
        pub struct Metrics {
            registry: Registry,
            $($(#[doc = $help])+ pub $field: $type,)+
        }

        impl Metrics {
            /// A fresh set, all at zero.
            pub fn new() -> Self {
                let registry = Registry::new();
                $(
                    let help = concat!($($help),+).trim();
                    let $field = build::$type($name, help $(, $arg)*);
                    registry.register(Box::new($field.clone())).expect("metric names are unique");
                )+
                Metrics { registry, $($field,)+ }
            }
        }
    };
}

metrics! {
    /// Events by kind and outcome: done, cancelled, forwarded, retried, deferred, released, lost, dead_lettered.
    events: IntCounterVec("write_api_events_total", &["kind", "outcome"]),
    /// Time from the start of an event's task to its outcome, by kind.
    event_seconds: HistogramVec("write_api_event_duration_seconds", EVENT_SECONDS, &["kind"]),
    /// Events being worked on, by lane.
    events_in_flight: IntGaugeVec("write_api_events_in_flight", &["lane"]),
    /// Events sent anew because their message was received very often, by lane.
    resent: IntCounterVec("write_api_events_resent_total", &["lane"]),
    /// SQS calls by action and result: ok, error, timeout.
    sqs_calls: IntCounterVec("write_api_sqs_requests_total", &["action", "result"]),
    /// Messages whose visibility was extended, by result: ok, refused, error, late.
    extensions: IntCounterVec("write_api_visibility_extensions_total", &["result"]),
    /// Tries of partner calls by status: the HTTP status, or connect, timeout, broken, stale (a connection that was
    /// kept had been closed by the partner; sent again on a new one).
    partner_calls: IntCounterVec("write_api_partner_requests_total", &["status"]),
    /// Time of one try of a partner call, from its write to its last byte.
    partner_seconds: Histogram("write_api_partner_request_duration_seconds", CALL_SECONDS),
    /// Partner calls in flight.
    partner_in_flight: IntGauge("write_api_partner_in_flight"),
    /// Partner calls that may be in flight: partner.in_flight, and less while the partner shows overload.
    partner_in_flight_limit: IntGauge("write_api_partner_in_flight_limit"),
    /// Repeats of partner calls that the retry budget paid for.
    partner_repeats: IntCounter("write_api_partner_repeats_total"),
    /// Repeats of partner calls that wait because the retry budget is empty.
    partner_repeats_waiting: IntGauge("write_api_partner_repeats_waiting"),
    /// 1 while the partner's breaker is open and no call but probes is made.
    partner_breaker_open: IntGauge("write_api_partner_breaker_open"),
    /// Pages of listings read from Postgres.
    pages: IntCounter("write_api_pages_read_total"),
    /// Batches of answers committed.
    batches: IntCounter("write_api_batches_committed_total"),
    /// Listings that reached their terminal state, by state: valued, failed.
    rows: IntCounterVec("write_api_rows_committed_total", &["state"]),
    /// Writes refused because their owner had lost the run.
    fenced: IntCounter("write_api_fenced_writes_total"),
    /// Kafka delivery reports by result: ok, error.
    kafka_deliveries: IntCounterVec("write_api_kafka_deliveries_total", &["result"]),
    /// Records that Kafka refused for good and that were quarantined.
    kafka_quarantined: IntCounter("write_api_kafka_quarantined_records_total"),
    /// Rows that retention removed, by table.
    pruned: IntCounterVec("write_api_pruned_rows_total", &["table"]),
    /// Outbox rows that wait to be sent.
    outbox_pending: IntGauge("write_api_outbox_pending"),
    /// Age in seconds of the oldest outbox row that waits; 0 without one.
    outbox_lag: IntGauge("write_api_outbox_lag_seconds"),
    /// Outbox rows sent.
    outbox_sent: IntCounter("write_api_outbox_sent_total"),
    /// Events for the recording by result: written; over_limit, failed (it has ended), overrun (the disk was too slow).
    recorded: IntCounterVec("write_api_recorded_events_total", &["result"]),
    /// Bytes that the allocator handed out, by kind of event; `service` for what belongs to none.
    allocated: IntCounterVec("write_api_allocated_bytes_total", &["kind"]),
    /// Bytes that it took back, by kind of event of whoever freed them.
    freed: IntCounterVec("write_api_freed_bytes_total", &["kind"]),
    /// Time in polls of tasks by the wall clock, by kind of event: CPU time, and what a busy machine adds to it.
    busy_seconds: CounterVec("write_api_busy_seconds_total", &["kind"]),
    /// Time waited, by kind of event and by what for: permit, pacing, partner, database, kafka, queue, lock. What waits side
    /// by side counts side by side.
    wait_seconds: CounterVec("write_api_wait_seconds_total", &["kind", "for"]),
    /// Snapshots of the heap by result: written, failed.
    snapshots: IntCounterVec("write_api_snapshots_total", &["result"]),
    /// Bytes of all snapshots of the heap on disk.
    snapshot_bytes: IntGauge("write_api_snapshot_bytes"),
    /// Snapshots of the heap that are still to be sent to S3.
    snapshots_unsent: IntGauge("write_api_snapshots_unsent"),
    /// CPU time of the profiler, by part: requests, snapshots, cpu_samples, heap_samples, wait_stacks, bookkeeping. What happens
    /// inside of other work is an estimate.
    profiler_cpu: CounterVec("write_api_profiler_cpu_seconds_total", &["part"]),
    /// Memory that the profiler holds, by part; that of the allocator at most.
    profiler_memory: IntGaugeVec("write_api_profiler_memory_bytes", &["part"]),
    /// Rates of sampling in force as a share of those that were asked for: 1, and less while the profiler keeps within its budget.
    profiler_rate: Gauge("write_api_profiler_rate_ratio"),
    /// Live tasks.
    tasks: IntGauge("write_api_tasks"),
    /// Bytes in live allocations.
    jemalloc_allocated: IntGauge("write_api_jemalloc_allocated_bytes"),
    /// Bytes in pages with live allocations.
    jemalloc_active: IntGauge("write_api_jemalloc_active_bytes"),
    /// Bytes of the allocator in physical memory, at most.
    jemalloc_resident: IntGauge("write_api_jemalloc_resident_bytes"),
    /// Bytes of address space kept by the allocator without memory behind them.
    jemalloc_retained: IntGauge("write_api_jemalloc_retained_bytes"),
    /// Resident memory of the process in bytes.
    process_rss: IntGauge("process_resident_memory_bytes"),
    /// Processor time of the process, user and system together.
    process_cpu: Counter("process_cpu_seconds_total"),
    /// Open file descriptors of the process.
    process_fds: IntGauge("process_open_fds"),
    /// Start of the process in seconds since the epoch.
    process_start: Gauge("process_start_time_seconds"),
}

use prometheus::{Counter, CounterVec, Gauge};

#[allow(non_snake_case, reason = "one builder for each metric type, named as the type so that the macro finds it")]
mod build {
    use super::*;

    const VALID: &str = "metric names and labels are literals that a test builds";

    pub(super) fn IntCounter(name: &str, help: &str) -> IntCounter {
        IntCounter::new(name, help).expect(VALID)
    }
    pub(super) fn IntGauge(name: &str, help: &str) -> IntGauge {
        IntGauge::new(name, help).expect(VALID)
    }
    pub(super) fn Counter(name: &str, help: &str) -> Counter {
        Counter::new(name, help).expect(VALID)
    }
    pub(super) fn Gauge(name: &str, help: &str) -> Gauge {
        Gauge::new(name, help).expect(VALID)
    }
    pub(super) fn CounterVec(name: &str, help: &str, labels: &[&str]) -> CounterVec {
        CounterVec::new(Opts::new(name, help), labels).expect(VALID)
    }
    pub(super) fn IntCounterVec(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        IntCounterVec::new(Opts::new(name, help), labels).expect(VALID)
    }
    pub(super) fn IntGaugeVec(name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        IntGaugeVec::new(Opts::new(name, help), labels).expect(VALID)
    }
    pub(super) fn Histogram(name: &str, help: &str, buckets: &[f64]) -> Histogram {
        Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())).expect(VALID)
    }
    pub(super) fn HistogramVec(name: &str, help: &str, buckets: &[f64], labels: &[&str]) -> HistogramVec {
        HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels).expect(VALID)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics in the Prometheus text format, version 0.0.4. The figures of the process and of the allocator are
    /// read at this moment.
    pub fn render(&self) -> String {
        self.read_process();
        self.read_allocator();
        self.read_usage();
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("writing to memory cannot fail");
        String::from_utf8(text).expect("the text format is UTF-8")
    }

    fn read_process(&self) {
        if let Some(process) = Process::read() {
            self.process_rss.set(process.rss_bytes);
            self.process_start.set(process.started_at);
            raise(&self.process_cpu, process.cpu_seconds);
        }
        if let Ok(descriptors) = std::fs::read_dir("/proc/self/fd") {
            // One of them is the directory being read.
            self.process_fds.set(descriptors.count() as i64 - 1);
        }
    }

    fn read_usage(&self) {
        self.tasks.set(registry::count() as i64);
        for part in Part::ALL {
            raise(&self.profiler_cpu.with_label_values(&[part.name()]), cost::cpu(part).as_secs_f64());
        }
        for (part, bytes) in cost::memory() {
            self.profiler_memory.with_label_values(&[part]).set(bytes as i64);
        }
        self.profiler_rate.set(1.0 / f64::from(cost::slowdown()));
        for kind in Kind::ALL {
            let (used, name) = (usage::of_kind(kind), kind.name());
            for (counter, now) in [(&self.allocated, used.allocated), (&self.freed, used.freed)] {
                let counter = counter.with_label_values(&[name]);
                counter.inc_by(now.saturating_sub(counter.get()));
            }
            raise(&self.busy_seconds.with_label_values(&[name]), used.busy.as_secs_f64());
            for reason in For::ALL {
                let waited = used.waited(reason).as_secs_f64();
                raise(&self.wait_seconds.with_label_values(&[name, reason.name()]), waited);
            }
        }
    }

    fn read_allocator(&self) {
        use tikv_jemalloc_ctl::{epoch, stats};
        // jemalloc's statistics are a snapshot that advancing the epoch renews.
        if epoch::advance().is_err() {
            return;
        }
        let set = |gauge: &IntGauge, value: tikv_jemalloc_ctl::Result<usize>| {
            if let Ok(bytes) = value {
                gauge.set(bytes as i64);
            }
        };
        set(&self.jemalloc_allocated, stats::allocated::read());
        set(&self.jemalloc_active, stats::active::read());
        set(&self.jemalloc_resident, stats::resident::read());
        set(&self.jemalloc_retained, stats::retained::read());
        // All arenas together. What the allocator has for itself: the tables of its profiler, and the caches of its threads.
        // SAFETY: a size_t, by the allocator's manual.
        let internal = unsafe { tikv_jemalloc_ctl::raw::read::<usize>(b"stats.arenas.4096.internal\0") };
        set(&self.profiler_memory.with_label_values(&["allocator"]), internal);
    }
}

/// Brings a counter up to what somebody else has counted.
fn raise(counter: &Counter, to: f64) {
    counter.inc_by((to - counter.get()).max(0.0));
}

/// What Linux says of this process.
struct Process {
    rss_bytes: i64,
    cpu_seconds: f64,
    started_at: f64,
}

impl Process {
    /// Reads `/proc/self/stat` (see proc(5)); `None` where it is not there.
    fn read() -> Option<Process> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The command name, field 2, may hold spaces and brackets; the fields after it are plain.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<f64>().ok());
        // SAFETY: sysconf reads a constant of the system.
        let (ticks, page) = unsafe { (libc::sysconf(libc::_SC_CLK_TCK), libc::sysconf(libc::_SC_PAGESIZE)) };
        let ticks = ticks as f64;
        let boot = std::fs::read_to_string("/proc/stat").ok()?;
        let boot: f64 = boot.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        Some(Process {
            rss_bytes: field(24)? as i64 * page,
            cpu_seconds: (field(14)? + field(15)?) / ticks,
            started_at: boot + field(22)? / ticks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_what_was_counted_and_the_process() {
        let metrics = Metrics::new();
        metrics.events.with_label_values(&["listing.upsert", "done"]).inc();
        let text = metrics.render();
        assert!(text.contains(r#"write_api_events_total{kind="listing.upsert",outcome="done"} 1"#), "{text}");
        assert!(text.contains("# HELP write_api_pages_read_total Pages of listings read from Postgres."), "{text}");
        assert!(metrics.process_rss.get() > 1_000_000, "{text}");
    }
}
