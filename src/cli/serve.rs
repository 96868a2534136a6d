//! `write-api serve`: the service.

use std::path::PathBuf;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::app::App;
use crate::config::Config;
use crate::events::recorder::Recording;
use crate::task::{self, Kind};

/// What to do beside serving.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Append the events that were consumed from the queue of the producers, a CloudEvent a line, for
    /// `write-api replay`. A file that cannot be written is told once and never harms the work.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// End the recording before its file is larger than this.
    #[arg(long, value_name = "BYTES", requires = "record", default_value_t = 1024 * 1024 * 1024)]
    record_limit: u64,
}

pub(super) const HELP: &str = "\
Needs: Postgres with the schema (`write-api migrate`), the queues and the topic (`write-api setup`), the partner; \
`write-api check` tells what is missing. Of SQS the permissions sqs:GetQueueUrl, ReceiveMessage, SendMessage, \
DeleteMessage and ChangeMessageVisibility.

Example:
  export WRITE_API_DATABASE_URL=postgres://…  WRITE_API_PARTNER_BASE_URL=https://…  WRITE_API_KAFKA_BROKERS=host:9092
  write-api serve

Then http://HOST:8080/readyz says whether it can work, and http://HOST:8080/metrics how it does.

Exit codes: 0 stopped in order, 1 failed (a port in use, a part that ended by itself) or stopped by a second signal, \
64 wrong usage, 78 wrong configuration.";

/// Builds, starts, and stops in order at the first SIGTERM or SIGINT; a second one exits at once.
pub(super) fn run(config: Config, options: Options) -> anyhow::Result<()> {
    let recording = options.record.map(|file| Recording { file, limit_bytes: options.record_limit });
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("worker").build()?;
    // One worker for all fast events: those that are received together become ready together, and two would wake each other for them
    // again and again. That takes a third and more of what an event costs beyond its calls to SQS. Slow events have the other workers.
    let for_fast_events = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .thread_name("fast events")
        .build()?;
    let handle = for_fast_events.handle().clone();
    // On a worker, whose stack is deep already by the work of others: the main thread's would keep for ever what only the start
    // needs, a third of a megabyte.
    let service = async move {
        // Before anything is started, so that no signal is missed.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut name = async move || {
            tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            }
        };
        let app = App::build(config, recording, handle).await?;
        let stop = async {
            let first = name().await;
            tracing::info!(signal = first, "stopping; a second signal exits at once");
            task::spawn("second signal", async move {
                let second = task::park(name()).await;
                tracing::warn!(signal = second, "exiting at once; unfinished messages come again by themselves");
                std::process::exit(1);
            });
        };
        app.run(stop).await
    };
    let done = runtime.block_on(async { task::spawn_apart(Kind::Service, "service", service).await });
    let done = done.unwrap_or_else(|ended| std::panic::resume_unwind(ended.into_panic()));
    // Whatever still runs on a blocking thread is bounded elsewhere; the process need not wait for it.
    runtime.shutdown_background();
    for_fast_events.shutdown_background();
    done
}
