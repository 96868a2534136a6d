//! Every figure of a demo, and which of them are wrong.

use local_stack::partner::Stats;
use local_stack::{Histogram, Ideal, Memory, Sample};
use serde::Serialize;

use super::Settings;
use super::database::{Run, Valuations};

/// All figures of one demo. Names carry the units.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) settings: Settings,
    pub(super) machine: Machine,
    /// Id of the nightly event and of its run.
    pub(super) run_id: String,
    pub(super) rows: Rows,
    /// As the partner stub counted.
    pub(super) partner: Stats,
    pub(super) valuations: Valuations,
    pub(super) kafka: KafkaRecords,
    pub(super) fast_events: FastEvents,
    pub(super) stages: Stages,
    pub(super) memory: MemoryFigures,
    pub(super) cpu: Cpu,
    pub(super) queues: QueueFigures,
    /// Warnings and errors in the log of the service.
    pub(super) log_warnings: u64,
    pub(super) checks: Vec<Check>,
}

/// What the figures were measured on.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    pub(super) cpus: usize,
    /// Whether the service is a build for development.
    pub(super) development_build: bool,
    /// Settings of PostgreSQL that matter for speed.
    pub(super) postgres: Vec<(String, String)>,
}

/// The run, by its own account.
#[derive(Debug, Serialize)]
pub(super) struct Rows {
    pub(super) selected: u64,
    pub(super) valued: u64,
    pub(super) failed: u64,
    /// Records that post-processing had delivered.
    pub(super) published: u64,
    /// How often work on the run was begun.
    pub(super) attempts: u64,
}

impl From<&Run> for Rows {
    fn from(run: &Run) -> Self {
        Self {
            selected: run.selected.cast_unsigned(),
            valued: run.valued.cast_unsigned(),
            failed: run.failed.cast_unsigned(),
            published: run.published.unwrap_or_default().cast_unsigned(),
            attempts: u64::from(run.attempts.cast_unsigned()),
        }
    }
}

/// What the independent consumer read.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct KafkaRecords {
    pub(super) records: u64,
    pub(super) distinct_ids: u64,
    /// Dropped by the broker before they were read.
    pub(super) missed: u64,
}

/// The events of the fast kind.
#[derive(Debug, Serialize)]
pub(super) struct FastEvents {
    pub(super) sent: u64,
    /// By the service's own count.
    pub(super) done: u64,
    /// Listings in the database that were written since they were loaded.
    pub(super) listings_written: u64,
    /// Those that ended between the sending of the slow event and the completion of its run.
    pub(super) beside_the_slow_one: u64,
    /// From the start of the event's task to its outcome; see [`Histogram::quantile`] for how it is found.
    pub(super) p50_seconds: Option<f64>,
    pub(super) p99_seconds: Option<f64>,
}

impl FastEvents {
    /// `beside` is of the events that ended while the slow one ran.
    pub(super) fn new(sent: u64, done: u64, listings_written: u64, beside: &Histogram) -> Self {
        Self {
            sent,
            done,
            listings_written,
            beside_the_slow_one: beside.count() as u64,
            p50_seconds: beside.quantile(0.5),
            p99_seconds: beside.quantile(0.99),
        }
    }
}

/// Wall time of the stages of the slow event, in seconds. `None`: it did not get there.
#[derive(Debug, Serialize)]
pub(super) struct Stages {
    pub(super) sent_to_first_call: Option<f64>,
    pub(super) first_call_to_run_complete: Option<f64>,
    pub(super) run_complete_to_published: Option<f64>,
    pub(super) sent_to_run_complete: Option<f64>,
    pub(super) sent_to_published: Option<f64>,
    /// What the partner's limits allow from the first call to the last answer; `None` without limits.
    pub(super) ideal: Option<Ideal>,
    /// First call to run complete, as a ratio of the ideal.
    pub(super) ratio_to_ideal: Option<f64>,
}

impl Stages {
    /// All times in seconds since 1970.
    pub(super) fn new(
        sent: f64,
        first_call: Option<f64>,
        completed: Option<f64>,
        published: Option<f64>,
        ideal: Option<Ideal>,
    ) -> Self {
        let between = |from: Option<f64>, to: Option<f64>| Some(to? - from?);
        let calls = between(first_call, completed);
        Self {
            sent_to_first_call: between(Some(sent), first_call),
            first_call_to_run_complete: calls,
            run_complete_to_published: between(completed, published),
            sent_to_run_complete: between(Some(sent), completed),
            sent_to_published: between(Some(sent), published),
            ideal,
            ratio_to_ideal: calls.zip(ideal).map(|(calls, ideal)| calls / ideal.seconds),
        }
    }
}

/// Memory of the service.
#[derive(Debug, Serialize)]
pub(super) struct MemoryFigures {
    /// At rest, before its first event.
    pub(super) before: Memory,
    /// The most from the sending of the event until `after`.
    pub(super) peak: Memory,
    /// 10 seconds after everything was done.
    pub(super) after: Memory,
    /// From the start of `serve`.
    pub(super) samples: Vec<Sample>,
}

/// Processor time of the service from the sending of the event until everything was done, the fast events included.
#[derive(Debug, Serialize)]
pub(super) struct Cpu {
    pub(super) seconds: f64,
    pub(super) microseconds_per_listing: Option<f64>,
}

impl Cpu {
    pub(super) fn new(seconds: f64, listings: u64) -> Self {
        let per_listing = (listings > 0).then(|| seconds * 1e6 / listings as f64);
        Self { seconds, microseconds_per_listing: per_listing }
    }
}

/// Messages left at the end.
#[derive(Debug, Serialize)]
pub(super) struct QueueFigures {
    pub(super) left: u64,
    pub(super) dead_letters: u64,
}

/// A count that is known beforehand.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    pub(super) what: &'static str,
    pub(super) expected: u64,
    pub(super) found: u64,
}

impl Report {
    /// Compares every count with what it must be. `distinct_upserts`: listings that the fast events name.
    pub(super) fn check(&mut self, selectable: u64, distinct_upserts: u64) {
        let Self { rows, partner, valuations, kafka, fast_events, queues, .. } = self;
        let refused = partner.by_status.iter().filter(|(status, _)| **status != 200).map(|(_, count)| count).sum();
        // A limit is kept, or the count must be the limit.
        let at_most = |limit: u32, found: u64| found.min(limit.into());
        let checks = [
            ("listings selected", selectable, rows.selected),
            ("listings valued", selectable, rows.valued),
            ("listings failed", 0, rows.failed),
            ("partner calls", selectable, partner.requests),
            ("partner calls repeated", 0, partner.repeated_requests),
            ("partner calls refused", 0, refused),
            (
                "most partner calls in flight",
                at_most(self.settings.in_flight, partner.max_in_flight),
                partner.max_in_flight,
            ),
            ("valuations in the database", selectable, valuations.rows),
            ("valuations equal to the partner's", selectable, valuations.right),
            ("selected listings without a valuation", 0, valuations.missing),
            ("listings whose newest valuation is of this run", selectable, valuations.current),
            ("records published", selectable, rows.published),
            ("Kafka records", selectable, kafka.records),
            ("distinct ce_id of the Kafka records", selectable, kafka.distinct_ids),
            ("Kafka records missed by the consumer", 0, kafka.missed),
            ("fast events done", fast_events.sent, fast_events.done),
            ("listings written by the fast events", distinct_upserts, fast_events.listings_written),
            ("messages left in the queues", 0, queues.left),
            ("messages in the dead-letter queues", 0, queues.dead_letters),
        ];
        self.checks = checks.map(|(what, expected, found)| Check { what, expected, found }).into();
    }

    /// The counts that are wrong, each as a sentence.
    pub(super) fn wrong(&self) -> Vec<String> {
        let wrong = self.checks.iter().filter(|check| check.found != check.expected);
        wrong.map(|Check { what, expected, found }| format!("{what}: {found}, must be {expected}")).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use local_stack::Bound;

    /// A demo of ten listings in which everything went well.
    pub(in crate::demo) fn good() -> Report {
        let memory = |rss_mib| Memory { rss_mib, anonymous_mib: rss_mib / 2.0 };
        let ideal = Ideal { seconds: 2.0, bound: Bound::Rate };
        let histogram = Histogram { buckets: vec![(0.01, 5.0), (f64::INFINITY, 0.0)] };
        let mut report = Report {
            settings: Settings {
                limit: 10,
                seed_count: 10,
                partner_latency_ms: 250,
                partner_rate_cap: 5,
                in_flight: 4,
                upserts: 5,
                service_binary: None,
                once: true,
                json: None,
            },
            machine: Machine { cpus: 2, development_build: false, postgres: Vec::new() },
            run_id: "run-1".to_owned(),
            rows: Rows { selected: 10, valued: 10, failed: 0, published: 10, attempts: 1 },
            partner: Stats {
                requests: 10,
                distinct_keys: 10,
                max_in_flight: 4,
                max_in_one_second: 5,
                by_status: [(200, 10)].into(),
                ..Stats::default()
            },
            valuations: Valuations { rows: 10, right: 10, missing: 0, current: 10 },
            kafka: KafkaRecords { records: 10, distinct_ids: 10, missed: 0 },
            fast_events: FastEvents::new(5, 5, 5, &histogram),
            stages: Stages::new(100.0, Some(100.5), Some(102.6), Some(103.0), Some(ideal)),
            memory: MemoryFigures {
                before: memory(20.0),
                peak: memory(40.0),
                after: memory(21.0),
                samples: Vec::new(),
            },
            cpu: Cpu::new(0.001, 10),
            queues: QueueFigures { left: 0, dead_letters: 0 },
            log_warnings: 0,
            checks: Vec::new(),
        };
        report.check(10, 5);
        report
    }

    #[test]
    fn nothing_is_wrong_when_everything_went_well() {
        assert_eq!(good().wrong(), Vec::<String>::new());
    }

    #[test]
    fn each_wrong_count_is_named_with_both_figures() {
        let mut report = good();
        report.kafka.distinct_ids = 9;
        report.partner.max_in_flight = 5;
        report.partner.by_status.insert(429, 2);
        report.check(10, 5);
        assert_eq!(
            report.wrong(),
            [
                "partner calls refused: 2, must be 0",
                "most partner calls in flight: 5, must be 4",
                "distinct ce_id of the Kafka records: 9, must be 10",
            ]
        );
    }

    #[test]
    fn stages_are_differences_and_a_ratio() {
        let stages = good().stages;
        assert_eq!(stages.sent_to_first_call, Some(0.5));
        assert!((stages.ratio_to_ideal.expect("an ideal") - 1.05).abs() < 1e-9, "{stages:?}");
        let stages = Stages::new(100.0, None, None, None, stages.ideal);
        assert_eq!((stages.sent_to_published, stages.ratio_to_ideal), (None, None));
    }

    #[test]
    fn processor_time_is_shared_by_the_listings() {
        assert_eq!(good().cpu.microseconds_per_listing, Some(100.0));
        assert_eq!(Cpu::new(1.0, 0).microseconds_per_listing, None);
    }
}
