//! The loop of a run: read, call, commit, all at once and all bounded.

use std::collections::VecDeque;
use std::num::NonZero;
use std::pin::Pin;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};

use super::super::optional;
use super::progress::{PageNumber, Progress};
use crate::db::DbError;
use crate::db::listings::PageRow;
use crate::db::runs::{self, OwnedRun};
use crate::db::valuations::Answers;
use crate::events::Events;
use crate::events::attempts::used;
use crate::events::gate::{PROBATION, Pass};
use crate::fault;
use crate::partner::{Permit, Request, RunKey, Verdict};
use crate::queue::Delivery;
use crate::queue::lease::StopReason;
use crate::task::{For, Stage, in_stage, stage, wait};

/// How long a handover before SQS's 12 h may wait for calls that are out.
const HANDOVER: Duration = Duration::from_secs(30);

/// How long a cancelled run waits for calls that are out. What does not come in time is asked again if the run is retried.
const CANCEL: Duration = Duration::from_secs(5);

/// Kept of the time to stop for the last commit and for giving the message back.
const LAST_COMMIT: Duration = Duration::from_millis(500);

/// How the work on a run ended.
pub(super) enum Ended {
    /// Every listing of the set is terminal and committed; `rows` of them by this attempt.
    AllTerminal {
        /// Rows committed by this attempt.
        rows: u64,
        /// Listings of the run that are terminal, earlier attempts included.
        terminal: i64,
    },
    /// It was told to stop; what was answered is committed, unless the run was lost.
    Stopped {
        /// Why.
        reason: StopReason,
        /// Rows committed by this attempt.
        rows: u64,
    },
    /// It cannot go on now.
    Failed(anyhow::Error),
}

/// A page in memory, with its place in the process-wide budget.
struct Page {
    number: PageNumber,
    rows: std::vec::IntoIter<PageRow>,
    _place: OwnedSemaphorePermit,
}

/// A page as it was read; `place` goes with it.
type ReadPage = Result<(Vec<PageRow>, OwnedSemaphorePermit), DbError>;

/// An answered call.
struct Answer {
    row: PageRow,
    page: PageNumber,
    verdict: Verdict,
}

pub(super) struct Work<'a> {
    events: &'a Events,
    run: &'a OwnedRun,
    delivery: &'a Delivery,
    /// Let go with the first progress.
    pass: &'a mut Option<Pass>,
    key: RunKey,
    /// Where the next page begins.
    read_to: i64,
    /// The set has no more pages.
    exhausted: bool,
    pages: VecDeque<Page>,
    progress: Progress,
    batch: Answers,
    rows_committed: u64,
    /// Valued and failed listings of the run as of the last commit.
    counted: (i64, i64),
}

impl<'a> Work<'a> {
    pub(super) fn new(
        events: &'a Events,
        run: &'a OwnedRun,
        delivery: &'a Delivery,
        pass: &'a mut Option<Pass>,
    ) -> Self {
        Work {
            events,
            run,
            delivery,
            pass,
            key: RunKey::new(&run.set.run_id),
            read_to: run.cursor,
            exhausted: false,
            pages: VecDeque::new(),
            progress: Progress::new(run.cursor),
            batch: Answers::default(),
            rows_committed: 0,
            counted: (run.valued, run.failed),
        }
    }

    /// Works until all is terminal, or until told to stop. Also returns how many listings were begun and dropped
    /// unanswered.
    pub(super) async fn run(mut self) -> (Ended, usize) {
        let stopped = self.delivery.lease.stopped();
        let mut stopped = std::pin::pin!(stopped);
        let mut calls = FuturesUnordered::new();
        // Kept over the rounds of the loop: a permit that is waited for anew each time would lose its place in the queue.
        let mut permit = Box::pin(self.events.partner.permit());
        let mut reading: Option<BoxFuture<'a, ReadPage>> = None;
        let mut committing: Option<BoxFuture<'a, Result<Option<runs::Progress>, DbError>>> = None;
        let mut linger = std::pin::pin!(sleep_until(Instant::now()));
        let mut probation = std::pin::pin!(sleep_until(Instant::now() + PROBATION));
        let mut outliving: Option<BoxFuture<'a, ()>> = None;

        loop {
            if reading.is_none() && !self.exhausted && self.pages.len() < 2 {
                reading = Some(self.read_page());
            }
            if committing.is_none() && self.batch_is_due(&linger, calls.is_empty()) {
                committing = Some(self.commit());
            }
            if self.exhausted
                && self.pages.is_empty()
                && calls.is_empty()
                && committing.is_none()
                && self.batch.listing_ids.is_empty()
            {
                let terminal = self.counted.0 + self.counted.1;
                return (Ended::AllTerminal { rows: self.rows_committed, terminal }, 0);
            }
            // Back-pressure: while Postgres is slow, answers pile up only as far as the calls that are out.
            let may_call = !self.pages.is_empty() && self.batch.listing_ids.len() < self.events.refresh.page_size;
            tokio::select! {
                biased;
                reason = &mut stopped => {
                    let out = calls.len();
                    if reason == StopReason::Lost {
                        return (self.stopped(reason), out);
                    }
                    drop(permit);
                    return self.wind_down(reason, calls, committing).await;
                }
                done = optional(&mut committing) => {
                    committing = None;
                    if let Err(ended) = self.committed(done) {
                        return (ended, calls.len());
                    }
                }
                Some(answer) = calls.next(), if !calls.is_empty() => {
                    if self.batch.listing_ids.is_empty() {
                        linger.as_mut().reset(Instant::now() + self.events.refresh.batch_linger);
                    }
                    self.collect(answer);
                }
                page = optional(&mut reading) => {
                    reading = None;
                    if let Err(error) = self.page_read(page) {
                        return (Ended::Failed(error.into()), calls.len());
                    }
                }
                granted = &mut permit, if may_call => {
                    permit.set(self.events.partner.permit());
                    if let Some((row, page)) = self.next_row() {
                        // The memory that a call needs before it is first polled is the call's as well.
                        stage(Stage::Call, || calls.push(self.call(row, page, granted)));
                    }
                }
                () = optional(&mut outliving) => {
                    outliving = None;
                    *self.pass = None;
                }
                () = &mut probation, if self.pass.is_some() && outliving.is_none() => outliving = Some(self.outlive()),
                () = &mut linger, if !self.batch.listing_ids.is_empty() && committing.is_none() => {}
            }
        }
    }

    fn outlive(&self) -> BoxFuture<'a, ()> {
        let (events, run) = (self.events, self.run);
        let forget = events.database.outlive_run(&run.set.run_id, run.token);
        events.outlive(&run.set.run_id, run.deaths, forget).boxed()
    }

    fn batch_is_due(&self, linger: &Pin<&mut Sleep>, no_calls: bool) -> bool {
        let rows = self.batch.listing_ids.len();
        let no_more = no_calls && self.exhausted && self.pages.is_empty();
        // After a death the first answer counts: progress that waited for others would be lost with the next one.
        let is_urgent = self.run.deaths > 0 && self.rows_committed == 0;
        rows > 0 && (rows >= self.events.refresh.page_size || linger.is_elapsed() || no_more || is_urgent)
    }

    fn read_page(&self) -> BoxFuture<'a, ReadPage> {
        let (events, run, cursor) = (self.events, self.run, self.read_to);
        let limit = NonZero::new(events.refresh.page_size).expect("config allows no empty pages");
        // Only what an earlier attempt may have left beyond the cursor has to be looked up.
        let resumed = run.attempts > 1;
        in_stage(Stage::Read, async move {
            let place =
                wait(For::Permit, events.pages.clone().acquire_owned()).await.expect("the semaphore is never closed");
            let rows = events.database.read_page(&run.set, cursor, resumed, limit).await?;
            Ok((rows, place))
        })
        .boxed()
    }

    fn page_read(&mut self, page: ReadPage) -> Result<(), DbError> {
        let (rows, place) = page?;
        self.events.metrics.pages.inc();
        self.exhausted = rows.len() < self.events.refresh.page_size;
        if let Some(last) = rows.last() {
            self.read_to = last.listing_id;
            let number = self.progress.page_read(rows.len(), last.listing_id);
            self.pages.push_back(Page { number, rows: rows.into_iter(), _place: place });
        }
        Ok(())
    }

    fn next_row(&mut self) -> Option<(PageRow, PageNumber)> {
        let page = self.pages.front_mut()?;
        let row = page.rows.next()?;
        let number = page.number;
        if page.rows.len() == 0 {
            self.pages.pop_front();
        }
        Some((row, number))
    }

    fn call(&self, row: PageRow, page: PageNumber, permit: Permit) -> impl Future<Output = Answer> + use<'a> {
        let partner = &self.events.partner;
        let key = self.key.clone();
        in_stage(Stage::Call, async move {
            let request = Request {
                listing_id: row.listing_id,
                zip_code: row.zip_code,
                list_price_cents: row.list_price_cents,
                bedrooms: Some(row.bedrooms),
                living_square_feet: Some(row.living_square_feet),
            };
            let verdict = partner.valuation(permit, &key, request).await;
            Answer { row, page, verdict }
        })
    }

    /// Takes an answer into the batch. `false`: it is none, because the call was not sent.
    fn collect(&mut self, answer: Answer) -> bool {
        let Answer { row, page, verdict } = answer;
        let (valuation, confidence, failure) = match verdict {
            Verdict::Valued { valuation_cents, confidence } => (Some(valuation_cents), Some(confidence), None),
            Verdict::Failed { reason } => (None, None, Some(reason)),
            Verdict::NotSent => return false,
        };
        if self.batch.listing_ids.capacity() == 0 {
            self.batch = Answers::with_capacity(self.events.refresh.page_size);
        }
        self.progress.row_done(page);
        self.batch.listing_ids.push(row.listing_id);
        self.batch.zip_codes.push(row.zip_code);
        self.batch.list_prices_cents.push(row.list_price_cents);
        self.batch.valuations_cents.push(valuation);
        self.batch.confidences.push(confidence);
        self.batch.failures.push(failure);
        true
    }

    /// Takes the batch as it is. The cursor goes with it: commits are one after another, so when this one is done, all
    /// rows noted so far are committed.
    fn commit(&mut self) -> BoxFuture<'a, Result<Option<runs::Progress>, DbError>> {
        let answers = std::mem::take(&mut self.batch);
        let cursor = self.progress.cursor();
        let (events, run) = (self.events, self.run);
        in_stage(Stage::Write, async move {
            fault::point("run.before_commit", &run.set.run_id);
            let done =
                events.database.commit_answers(&run.set.run_id, run.token, &answers, cursor, &used(&run.used)).await;
            fault::point("run.after_commit", &run.set.run_id);
            done
        })
        .boxed()
    }

    fn committed(&mut self, done: Result<Option<runs::Progress>, DbError>) -> Result<(), Ended> {
        match done {
            Ok(Some(progress)) => {
                self.events.metrics.batches.inc();
                self.rows_committed += progress.inserted as u64;
                // By the totals: they are right also when the answer to a commit was lost and the commit repeated.
                let (valued, failed) = std::mem::replace(&mut self.counted, (progress.valued, progress.failed));
                for (state, rows) in [("valued", progress.valued - valued), ("failed", progress.failed - failed)] {
                    self.events.metrics.rows.with_label_values(&[state]).inc_by(rows.max(0) as u64);
                }
                let terminal = progress.valued + progress.failed;
                if terminal > valued + failed {
                    *self.pass = None;
                }
                tracing::debug!(
                    event_id = self.run.set.run_id,
                    terminal,
                    selected = self.run.selected,
                    "batch committed"
                );
                Ok(())
            }
            Ok(None) => {
                self.events.metrics.fenced.inc();
                tracing::warn!(event_id = self.run.set.run_id, "a batch was refused: the run has another owner");
                Err(self.stopped(StopReason::Lost))
            }
            Err(error) => Err(Ended::Failed(error.into())),
        }
    }

    /// No new calls; answers awaited for as long as there is time, and committed.
    async fn wind_down(
        mut self,
        reason: StopReason,
        mut calls: FuturesUnordered<impl Future<Output = Answer>>,
        mut committing: Option<BoxFuture<'a, Result<Option<runs::Progress>, DbError>>>,
    ) -> (Ended, usize) {
        self.pages.clear();
        self.key.close();
        let drained = self.delivery.lease.drain_deadline();
        let deadline = match reason {
            StopReason::Shutdown => drained.unwrap_or_else(Instant::now),
            StopReason::Cancelled => {
                let answers = Instant::now() + CANCEL;
                drained.map_or(answers, |drained| drained.min(answers))
            }
            StopReason::ReceiveCap | StopReason::Lost => Instant::now() + HANDOVER,
        };
        let answers_until = deadline.checked_sub(LAST_COMMIT).unwrap_or(deadline);
        let (mut not_sent, mut dropped) = (0, 0);
        // A commit under way is awaited beside the calls: they hold turns that others wait for.
        while committing.is_some() || !calls.is_empty() {
            tokio::select! {
                biased;
                done = optional(&mut committing) => {
                    committing = None;
                    if let Err(ended) = self.committed(done) {
                        return (ended, calls.len() + not_sent + dropped);
                    }
                }
                answer = timeout_at(answers_until, calls.next()), if !calls.is_empty() => match answer {
                    Ok(Some(answer)) => not_sent += usize::from(!self.collect(answer)),
                    Ok(None) => {}
                    Err(_) => {
                        dropped = calls.len();
                        calls.clear();
                    }
                },
            }
        }
        let dropped = dropped + not_sent;
        if !self.batch.listing_ids.is_empty() {
            let done = self.commit().await;
            if let Err(ended) = self.committed(done) {
                return (ended, dropped);
            }
        }
        (self.stopped(reason), dropped)
    }

    fn stopped(&self, reason: StopReason) -> Ended {
        Ended::Stopped { reason, rows: self.rows_committed }
    }
}
