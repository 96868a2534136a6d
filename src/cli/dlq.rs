//! `write-api dlq`: what is in the dead-letter queues, and how it gets out of them.
//!
//! Every verb receives, sends and deletes by itself, message by message: SQS's own redrive takes a whole queue or nothing.
//! What was only looked at is given back at the end, also after Ctrl-C; a second Ctrl-C does not wait for that.

mod discard;
mod filter;
mod letter;
mod list;
mod redrive;

use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use self::filter::{Filters, LaneName};
use self::letter::Letter;
use crate::cli::text::printable;
use crate::cli::{count, print};
use crate::config::Config;
use crate::db::DbError;
use crate::metrics::Metrics;
use crate::queue::attributes::dead_letter_queue;
use crate::queue::dead_letters::{MOST_HELD, Missed, Reader, stopped};
use crate::queue::sqs::{Queue, Sqs, SqsError};

/// Which verb.
#[derive(Debug, Subcommand)]
pub(super) enum Options {
    /// List dead letters: when, what, why.
    ///
    /// Messages are hidden from others while the list is made, and given back at its end.
    #[command(after_long_help = list::LIST_HELP)]
    List(list::ListOptions),
    /// Show all of one dead letter, its reason and its body.
    #[command(after_long_help = list::SHOW_HELP)]
    Show(list::ShowOptions),
    /// Send dead letters to the queue that they came from, then delete them.
    ///
    /// The body is sent unchanged. A quarantined run goes on. Copies of one event are sent once.
    #[command(after_long_help = redrive::HELP)]
    Redrive(redrive::Options),
    /// Delete dead letters for good.
    #[command(after_long_help = discard::HELP)]
    Discard(discard::Options),
}

impl Options {
    /// What the parser cannot see.
    pub(super) fn check(&self) -> Result<(), String> {
        match self {
            Options::Redrive(options) => options.meant.check(),
            Options::Discard(options) => options.check(),
            Options::List(_) | Options::Show(_) => Ok(()),
        }
    }
}

/// Runs the verb.
pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let sqs = Sqs::new(&config.aws, &config.queue, Arc::new(Metrics::new())).await;
    let stop = interrupt()?;
    let done = match options {
        Options::List(options) => list::list(config, &sqs, &stop, options).await,
        Options::Show(options) => list::show(config, &sqs, &stop, options).await,
        Options::Redrive(options) => redrive::run(config, &sqs, &stop, options).await,
        Options::Discard(options) => discard::run(config, &sqs, &stop, options).await,
    };
    done.map_err(|error| with_remedy(error, config))
}

/// The error with what to do about it, where a neighbour is at fault.
fn with_remedy(error: anyhow::Error, config: &Config) -> anyhow::Error {
    let remedy = error.chain().find_map(|cause| match (cause.downcast_ref::<SqsError>(), cause.is::<DbError>()) {
        (Some(error), _) if error.is_missing_queue() => {
            Some("create it with `write-api setup`, or name another in lanes.*.queue".to_owned())
        }
        (Some(_), _) => Some(format!(
            "see aws.endpoint_url ({}), aws.region ({}), the credentials and the network; `write-api check` looks at each \
             queue",
            config.aws.endpoint_url.as_deref().unwrap_or("AWS's own"),
            config.aws.region
        )),
        (None, true) => Some(format!(
            "see that Postgres runs at {} and that database.url names it; `write-api check` tells more",
            config.database.address()
        )),
        (None, false) => None,
    });
    match remedy {
        Some(remedy) => anyhow::anyhow!("{error:#}; {remedy}"),
        None => error,
    }
}

/// Which letters a verb changes.
#[derive(Debug, Args)]
struct Meant {
    #[command(flatten)]
    filters: Filters,
    /// Everything, without a filter.
    #[arg(long)]
    all: bool,
    /// At most this many letters of all lanes together; those that are left where they are count as well.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Tell what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Meant {
    fn check(&self) -> Result<(), String> {
        self.filters.check(self.all)
    }

    fn limit(&self) -> u64 {
        self.limit.map_or(u64::MAX, u64::from)
    }
}

/// Why what was read of a lane is not all of it, in words.
fn partial(lane: LaneName, missed: Missed) -> String {
    let lane = lane.as_str();
    match missed {
        Missed::Hidden(number) => format!(
            "{lane}: about {} could not be seen: another command or a consumer has received them, or SQS's count is behind; try again in a minute",
            count(number, "more letter")
        ),
        Missed::TooMany => format!(
            "{lane}: there are more than {MOST_HELD} letters, and SQS does not show more at once; redrive or discard some"
        ),
        Missed::TooSlow => {
            format!("{lane}: SQS answers too slowly to see all letters; redrive or discard some, or try again later")
        }
    }
}

/// Whether the command is to end: heard between messages, so that none is left half done or hidden, and by whatever waits.
type Stop = watch::Receiver<bool>;

fn interrupt() -> anyhow::Result<Stop> {
    let (sender, stop) = watch::channel(false);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    crate::task::spawn("interrupt", async move {
        for is_first in [true, false] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if is_first {
                let _ = sender.send(true);
            }
        }
        eprintln!("write-api: ended at once; letters that were not given back are visible again within a minute");
        std::process::exit(1);
    });
    Ok(stop)
}

/// What `call` gives; `None` if it is still on its way `grace` after the command is to stop.
async fn unless_stopped<T>(stop: &Stop, grace: Duration, call: impl Future<Output = T>) -> Option<T> {
    let over = async {
        stopped(stop.clone()).await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        biased;
        done = call => Some(done),
        () = over => None,
    }
}

const INTERRUPTED: &str = "interrupted; what was only looked at is back in its queue";

/// What to say where a signal came.
fn interrupted() -> anyhow::Error {
    anyhow::anyhow!(INTERRUPTED)
}

/// A lane and its dead-letter queue.
struct DeadLane {
    name: LaneName,
    source_name: String,
    dead: Queue,
}

/// The lanes asked for, or all.
async fn dead_lanes(config: &Config, sqs: &Sqs, stop: &Stop, filters: &Filters) -> anyhow::Result<Vec<DeadLane>> {
    let mut lanes = Vec::new();
    for name in filters.lanes() {
        let source_name = name.queue(config).to_owned();
        let dead = look_up(sqs, stop, &dead_letter_queue(&source_name)).await?;
        lanes.push(DeadLane { name, source_name, dead });
    }
    Ok(lanes)
}

async fn look_up(sqs: &Sqs, stop: &Stop, name: &str) -> anyhow::Result<Queue> {
    Ok(unless_stopped(stop, Duration::ZERO, sqs.queue(name)).await.ok_or_else(interrupted)??)
}

/// The next letters of a queue that pass the filters; `None` at the end or when the command is to stop. An empty list is
/// not the end.
async fn next_letters(
    reader: &mut Reader,
    lane: LaneName,
    filters: &Filters,
    stop: &Stop,
) -> anyhow::Result<Option<Vec<Letter>>> {
    if *stop.borrow() {
        return Ok(None);
    }
    let letters = reader.next().await?;
    Ok(letters.map(|letters| {
        letters.into_iter().map(|letter| Letter::read(lane, letter)).filter(|letter| filters.match_(letter)).collect()
    }))
}

/// The line of one letter.
fn tell(done: &str, letter: &Letter, why: &str) -> anyhow::Result<()> {
    let (lane, kind, code) = (letter.lane.as_str(), letter.kind, printable(&letter.code));
    let (name, why) = (printable(letter.name()), printable(why));
    let line = format!("{done}  {lane}  {kind}  {code}  {name}  message {}", letter.message_id);
    print(format!("{line}{}{why}\n", if why.is_empty() { "" } else { ": " }))
}
