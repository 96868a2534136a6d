//! `write-api check`: is everything there that the service needs, and as it should be. Asks each neighbour for real,
//! all at once, and changes nothing.

mod database;
mod queues;
mod report;

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use clap::Args;
use futures::future::{BoxFuture, FutureExt as _, join_all};

use self::report::{Finding, failures};
use crate::config::{self, Config, ConfigError};
use crate::kafka;
use crate::metrics::Metrics;
use crate::partner::Partner;
use crate::profiling;
use crate::queue::sqs::Sqs;
use crate::task;

pub(super) const HELP: &str = "\
Needs: all settings that `serve` needs; what is wrong with them is told first, all at once. Of Postgres a connection, of \
SQS the permissions sqs:GetQueueUrl and sqs:GetQueueAttributes. Nothing is changed, and the partner is not called: a \
connection is opened and closed.

Examples:
  write-api check
  write-api check --json | jq -r '.checks[] | select(.status == \"fail\") | .name'

A line each: `ok`, `warn` (the service works) or `FAIL`, the name, what was found; what to do.

Exit codes: 0 no FAIL, 1 a neighbour is away or not as it should be, 64 wrong usage, 78 wrong configuration.";

/// The longest that one neighbour may take; its own timeouts, from the settings, end sooner by default.
const LIMIT: Duration = Duration::from_secs(30);

/// How long Kafka may take to answer.
const KAFKA_TIMEOUT: Duration = Duration::from_secs(10);

/// How to tell it.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// One JSON document instead of lines: {"ok": false, "checks": [{"status", "name", "found", "fix"}]}.
    #[arg(long)]
    json: bool,
}

/// Prints what is wrong with the configuration; nothing else can be looked at then.
pub(super) fn refuse(errors: &[ConfigError], options: &Options) -> anyhow::Result<()> {
    tell(&errors.iter().map(Finding::from).collect::<Vec<_>>(), options)
}

/// Looks at everything and prints what it found. An error if something failed.
pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let metrics = Arc::new(Metrics::new());
    let sqs = Sqs::new(&config.aws, &config.queue, metrics.clone()).await;
    let mut looks: Vec<(String, BoxFuture<'_, Vec<Finding>>)> =
        vec![("database".to_owned(), database::check(&config.database).boxed())];
    for (key, lane) in [
        ("lanes.events.queue", &config.lanes.events),
        ("lanes.valuations.queue", &config.lanes.valuations),
        ("lanes.post_processing.queue", &config.lanes.post_processing),
    ] {
        let look = queues::check(&sqs, key, &lane.queue, config.queue.visibility_timeout);
        looks.push((format!("queue {}", lane.queue), look.boxed()));
    }
    looks.push(("kafka".to_owned(), kafka_topic(&config.kafka).boxed()));
    looks.push(("partner".to_owned(), partner(&config.partner, metrics).boxed()));
    looks.push(("profiling".to_owned(), heap_profile(&config.profiling).boxed()));

    let looks = looks.into_iter().map(|(name, look)| async move {
        match tokio::time::timeout(LIMIT, look).await {
            Ok(findings) => findings,
            Err(_) => {
                let remedy = "see why it hangs; the timeouts in the settings may be longer than this";
                vec![Finding::fail(name, format!("no answer within {LIMIT:?}"), remedy)]
            }
        }
    });
    let mut findings = vec![Finding::ok("configuration", "every setting is good; `write-api config` shows them")];
    findings.extend(join_all(looks).await.into_iter().flatten());
    tell(&findings, options)?;
    let failed = failures(&findings);
    ensure!(failed == 0, "{failed} of {} checks failed", findings.len());
    Ok(())
}

fn tell(findings: &[Finding], options: &Options) -> anyhow::Result<()> {
    super::print(if options.json { report::json(findings)? } else { report::lines(findings) })
}

async fn kafka_topic(config: &config::Kafka) -> Vec<Finding> {
    let what = format!("topic {} on {}", config.topic, config.brokers);
    vec![match kafka::inspect_topic(config, KAFKA_TIMEOUT).await {
        Ok(topic) if topic.partitions < config.partitions as usize => Finding::warn(
            "kafka",
            format!("{what} has {} partitions, kafka.partitions is {}", topic.partitions, config.partitions),
            "add partitions (keys move to others then), or set kafka.partitions to what is there",
        ),
        Ok(topic) => Finding::ok("kafka", format!("{what} with {} partitions", topic.partitions)),
        Err(error) => Finding::fail("kafka", format!("{what}: {}", error.problem), error.remedy),
    }]
}

async fn partner(config: &config::Partner, metrics: Arc<Metrics>) -> Vec<Finding> {
    let reached = match Partner::new(config, metrics) {
        Ok(partner) => partner.check().await,
        Err(error) => Err(error),
    };
    vec![match reached {
        Ok(()) => Finding::ok("partner", format!("{} takes connections; nothing was sent", config.base_url)),
        Err(error) => Finding::fail(
            "partner",
            format!("{error:#}"),
            "see that it runs and that partner.base_url (WRITE_API_PARTNER_BASE_URL) names it",
        ),
    }]
}

async fn heap_profile(config: &config::Profiling) -> Vec<Finding> {
    if !config.enabled {
        return vec![Finding::ok("profiling", "is off (profiling.enabled)")];
    }
    let dumped = task::spawn_blocking(|| {
        profiling::sample_allocations(true)?;
        profiling::try_heap_dump()
    });
    let token = if config.token.is_some() { "with a token" } else { "on loopback only, without a token" };
    let mut findings = vec![match dumped.await {
        Ok(Ok(bytes)) => Finding::ok("profiling", format!("a heap profile can be taken ({bytes} bytes), {token}")),
        Ok(Err(error)) => {
            Finding::fail("profiling", format!("{error:#}"), "mend that, or set profiling.enabled to false")
        }
        Err(panic) => Finding::fail("profiling", panic.to_string(), "set profiling.enabled to false"),
    }];
    if let Some(directory) = &config.snapshots.directory {
        let directory = directory.display();
        findings.push(match profiling::snapshots::try_directory(&config.snapshots) {
            Ok(()) => Finding::ok("snapshots", format!("a file was written to {directory} and removed")),
            Err(error) => Finding::fail(
                "snapshots",
                format!("{error:#}"),
                "give the service a directory that it may write to (profiling.snapshots.directory), or empty the setting",
            ),
        });
    }
    if let Some(url) = &config.snapshots.s3_url {
        findings.push(match profiling::snapshots::try_bucket(url, &config.snapshots.s3).await {
            Ok(()) => Finding::ok("snapshots", format!("a file was written to {url}")),
            Err(error) => Finding::fail(
                "snapshots",
                format!("{error:#}"),
                "give the service s3:PutObject there and credentials (profiling.snapshots.s3_url), or empty the setting",
            ),
        });
    }
    findings
}
