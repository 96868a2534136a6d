//! The second reading of the files: events in batches to SQS, each when it is due.
//!
//! A few batches are on their way at once, and their ends are taken in the order of the file; so whatever the state says
//! was sent, everything before it was sent too.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures::{TryStreamExt, stream};
use time::OffsetDateTime;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};
use uuid::Uuid;

use super::input::{Decoded, Input, Walk};
use super::meter::Meter;
use super::pace::Pace;
use super::report::Summary;
use super::state::{State, Trail};
use super::survey::Survey;
use super::{Kinds, Options};
use crate::config::Backoff;
use crate::events::envelope::{self, MAX_BODY_BYTES};
use crate::events::{outgoing, request};
use crate::queue::batch;
use crate::queue::sqs::{Queue, Sent, Sqs};

/// Batches on their way at once. An interrupted replay sends at most these again.
const IN_FLIGHT: usize = 8;

/// How long a due event may wait for others of its batch.
const COMPANY: Duration = Duration::from_millis(100);

/// Times that a batch, or what SQS did not take of it, is sent; a call's own retries not counted.
const TRIES: u32 = 8;

/// Waits between them.
const RETRY: Backoff = Backoff { base: Duration::from_millis(200), cap: Duration::from_secs(5) };

/// How often the meter is looked at while nothing happens.
const LOOK: Duration = Duration::from_millis(100);

/// Sends what the survey found.
pub(super) struct Sending<'a> {
    pub(super) sqs: &'a Sqs,
    pub(super) queue: &'a Queue,
    pub(super) inputs: &'a [Input],
    pub(super) survey: &'a Survey,
    pub(super) options: &'a Options,
}

impl Sending<'_> {
    /// Sends everything, and keeps `state`.
    pub(super) async fn run(&self, state: &mut State) -> anyhow::Result<Summary> {
        let began = Instant::now();
        let pace = self.options.pace();
        let total = self.survey.events();
        let mut meter = Meter::new("sent", Some(total), pace.planned(total, self.survey.span()));
        let mut kinds = Kinds::new();
        let mut sent = 0;
        let batches = Batches {
            walk: Walk::new(self.inputs, &self.survey.lines),
            trail: self.survey.start.clone(),
            to_pass: self.survey.start.lines,
            skip_invalid: self.options.skip_invalid,
            pace,
            identities: self.options.new_ids.then(|| Identities { replay_id: state.replay_id(), last: None }),
            held: None,
        };
        let batches = stream::try_unfold(batches, async |mut batches| {
            Ok::<_, anyhow::Error>(batches.next().await?.map(|batch| (batch, batches)))
        });
        let mut done = std::pin::pin!(batches.map_ok(|batch| self.send(batch)).try_buffered(IN_FLIGHT));
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let result = loop {
            tokio::select! {
                batch = done.try_next() => match batch {
                    Ok(Some(batch)) => {
                        sent += batch.items.len() as u64;
                        for item in &batch.items {
                            *kinds.entry(item.kind).or_default() += 1;
                        }
                        if let Err(error) = state.passed(&batch.trail, batch.items.len() as u64) {
                            break Err(error);
                        }
                    }
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error),
                },
                _ = looks.tick() => {}
            }
            meter.show(sent);
        };
        drop(meter);
        let hint = match state.file() {
            Some(file) => format!("the same command goes on from there, by {file}"),
            None => "with --resume, a replay can go on where it was".to_owned(),
        };
        result.with_context(|| format!("the replay stopped after {sent} of {total} events ({hint})"))?;
        Ok(Summary { kinds, queue: self.queue.name.to_string(), took: began.elapsed() })
    }

    /// Sends a batch until SQS has all of it.
    async fn send(&self, batch: Batch) -> anyhow::Result<Batch> {
        let mut left: Vec<&Item> = batch.items.iter().collect();
        for attempt in 1.. {
            let bodies: Vec<&str> = left.iter().map(|item| item.body.as_str()).collect();
            let error = match self.sqs.send_batch(self.queue, &bodies).await {
                Ok(results) => {
                    let mut failed = None;
                    let mut again = Vec::new();
                    for (item, result) in left.iter().zip(results) {
                        match result {
                            Sent::Accepted => {}
                            Sent::Refused(why) => bail!("{}: SQS refuses the event: {why}", item.place),
                            Sent::Failed(why) => {
                                again.push(*item);
                                failed = Some(anyhow::anyhow!("{}: SQS did not take the event: {why}", item.place));
                            }
                        }
                    }
                    left = again;
                    match failed {
                        None => break,
                        Some(failed) => failed,
                    }
                }
                Err(error) if error.is_missing_queue() => return Err(error.into()),
                Err(error) => error.into(),
            };
            if attempt == TRIES {
                return Err(error.context(format!("tried {TRIES} times")));
            }
            tracing::warn!(attempt, unsent = left.len(), "a batch is sent again: {error:#}");
            sleep(RETRY.wait(attempt)).await;
        }
        Ok(batch)
    }
}

/// An event to be sent.
struct Item {
    body: String,
    kind: &'static str,
    /// `FILE:LINE`.
    place: String,
    due: Option<Instant>,
    /// Up to it.
    trail: Trail,
}

/// Events that travel together.
#[derive(Default)]
struct Batch {
    items: Vec<Item>,
    bytes: usize,
    /// Up to its last event.
    trail: Trail,
}

impl Batch {
    fn has_room_for(&self, item: &Item) -> bool {
        let in_time = match (self.items.first().and_then(|first| first.due), item.due) {
            (Some(first), Some(due)) => due <= first + COMPANY,
            _ => true,
        };
        batch::has_room(self.items.len(), self.bytes, item.body.len()) && in_time
    }

    fn push(&mut self, item: Item) {
        self.bytes += item.body.len();
        self.trail = item.trail.clone();
        self.items.push(item);
    }
}

/// Makes batches from lines.
struct Batches<'a> {
    walk: Walk<'a>,
    trail: Trail,
    /// Lines that were sent before.
    to_pass: u64,
    skip_invalid: bool,
    pace: Pace,
    identities: Option<Identities>,
    /// Read, and for the next batch.
    held: Option<Item>,
}

impl Batches<'_> {
    /// The next batch, when its last event is due: so each is late by [`COMPANY`] at most, and none is early.
    async fn next(&mut self) -> anyhow::Result<Option<Batch>> {
        let mut batch = Batch::default();
        while let Some(item) = self.held.take().map_or_else(|| self.read(), |item| Ok(Some(item)))? {
            if !batch.has_room_for(&item) {
                self.held = Some(item);
                break;
            }
            batch.push(item);
        }
        let Some(last) = batch.items.last() else { return Ok(None) };
        if let Some(due) = last.due {
            sleep_until(due).await;
        }
        Ok(Some(batch))
    }

    /// The next event.
    fn read(&mut self) -> anyhow::Result<Option<Item>> {
        while self.walk.advance()? {
            let line = self.walk.line();
            if self.to_pass > 0 {
                self.to_pass -= 1;
                continue;
            }
            self.trail.pass(&line);
            let decoded = match line.decode() {
                Ok(Some(decoded)) => decoded,
                Ok(None) => continue,
                Err(_) if self.skip_invalid => continue,
                Err(refusal) => {
                    bail!(
                        "{}: {}: {}: it was another line a moment ago",
                        self.walk.place(),
                        refusal.code,
                        refusal.reason
                    )
                }
            };
            let due = self.pace.due(decoded.event.time);
            let place = self.walk.place();
            let kind = request::kind(&decoded.event).unwrap_or("unknown");
            let body = match &mut self.identities {
                Some(identities) => identities.renew(&decoded, due).with_context(|| place.clone())?,
                None => decoded.text.to_owned(),
            };
            return Ok(Some(Item { body, kind, place, due, trail: self.trail.clone() }));
        }
        Ok(None)
    }
}

/// New ids and times.
struct Identities {
    /// The same file in another replay has other ids; the same replay, resumed, the same.
    replay_id: Uuid,
    last: Option<OffsetDateTime>,
}

impl Identities {
    fn renew(&mut self, decoded: &Decoded<'_>, due: Option<Instant>) -> anyhow::Result<String> {
        let event = &decoded.event;
        // Neither a source nor an id has a line break.
        let id = Uuid::new_v5(&self.replay_id, format!("{}\n{}", event.source, event.id).as_bytes());
        let wait = due.map_or(Duration::ZERO, |due| due.saturating_duration_since(Instant::now()));
        // Later than the one before by what Postgres can tell apart: of two events, the later in the file wins.
        let now = OffsetDateTime::now_utc() + wait;
        let time = self.last.map_or(now, |last| now.max(last + Duration::from_micros(1)));
        self.last = Some(time);
        let unwrapped = envelope::document(decoded.text)
            .and_then(|document| outgoing::with_identity(&document, &id.to_string(), time));
        let body = unwrapped.map_err(|refusal| anyhow::anyhow!("{}: {}", refusal.code, refusal.reason))?;
        let bytes = body.len();
        ensure!(
            bytes <= MAX_BODY_BYTES,
            "with its new id the event has {bytes} bytes, at most {MAX_BODY_BYTES} are accepted"
        );
        Ok(body)
    }
}
