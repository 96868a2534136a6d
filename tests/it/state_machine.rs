//! Runs, leases and the outbox against a model: random histories of workers, relays and operators, each step on the real
//! database and on twenty lines of state, which must agree after every one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use local_stack::Behaviour;
use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, TestCaseError, TestRunner};
use sqlx::Connection;
use sqlx::postgres::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;
use write_api::config::{Config, Section};
use write_api::db::Database;
use write_api::db::ledger::WorkLedger;
use write_api::db::operations::CancelClaim;
use write_api::db::runs::{self, Completion, OwnedRun, RunClaim, RunRequest};
use write_api::db::valuations::Answers;

use crate::harness::World;

const LISTINGS: i64 = 12;
const LEASE: Duration = Duration::from_secs(3600);
const LANE: &str = "post_processing";
const WORKERS: usize = 3;
const RELAYS: usize = 2;

/// What can happen next. Workers and relays are numbered.
#[derive(Clone, Debug)]
enum Step {
    /// A delivery of the event reaches a worker, which may be alone in its process.
    Claim {
        worker: usize,
        alone: bool,
    },
    /// A worker commits the listings from..from + count.
    Commit {
        worker: usize,
        from: i64,
        count: i64,
    },
    /// The answer to a worker's last commit was lost, so it is made again.
    CommitAgain(usize),
    Renew(usize),
    /// The owner's lease runs out; the owner lives on and knows nothing of it.
    Expire,
    Release(usize),
    Complete(usize),
    CloseCancelled(usize),
    Cancel,
    Retry,
    RelayClaim(usize),
    /// The rows that a relay claimed are sent and marked.
    RelaySend(usize),
    /// A relay gives back what it claimed.
    RelayReturn(usize),
    /// Every relay's claim runs out.
    RelayExpire,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let worker = 0..WORKERS;
    let relay = 0..RELAYS;
    let step = prop_oneof![
        5 => (worker.clone(), any::<bool>()).prop_map(|(worker, alone)| Step::Claim { worker, alone }),
        9 => (worker.clone(), 1..=LISTINGS, 1..=6i64).prop_map(|(worker, from, count)| Step::Commit { worker, from, count }),
        3 => worker.clone().prop_map(Step::CommitAgain),
        1 => worker.clone().prop_map(Step::Renew),
        3 => Just(Step::Expire),
        2 => worker.clone().prop_map(Step::Release),
        5 => worker.clone().prop_map(Step::Complete),
        1 => worker.prop_map(Step::CloseCancelled),
        1 => Just(Step::Cancel),
        2 => Just(Step::Retry),
        3 => relay.clone().prop_map(Step::RelayClaim),
        3 => relay.clone().prop_map(Step::RelaySend),
        1 => relay.prop_map(Step::RelayReturn),
        1 => Just(Step::RelayExpire),
    ];
    prop::collection::vec(step, 1..60)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Complete,
    Cancelled,
    Failed,
}

/// What must be true of the run.
#[derive(Debug)]
struct Model {
    state: State,
    /// The worker whose token is in the row.
    owner: Option<usize>,
    lease: bool,
    cancel_requested: bool,
    terminal: BTreeSet<i64>,
    cursor: i64,
    /// Attempts in a row that nobody ended and that committed nothing.
    deaths: i32,
    attempts: i32,
}

/// What must be true of an outbox row: who has it, and how often it went out.
#[derive(Debug, Default)]
struct Row {
    claimed_by: Option<usize>,
    claim_lives: bool,
    sent: bool,
    sends: u32,
}

struct Play {
    database: Database,
    connection: PgConnection,
    run_id: String,
    model: Option<Model>,
    outbox: BTreeMap<Uuid, Row>,
    /// What each worker believes to own, also when it is wrong.
    workers: [Option<OwnedRun>; WORKERS],
    last_commit: [Option<(Vec<i64>, i64)>; WORKERS],
    relays: [(Uuid, Vec<Uuid>); RELAYS],
}

fn answers(listings: &[i64]) -> Answers {
    let mut answers = Answers::default();
    for id in listings {
        let valued = id % 4 != 0;
        answers.listing_ids.push(*id);
        answers.zip_codes.push(98_000);
        answers.list_prices_cents.push(100);
        answers.valuations_cents.push(valued.then_some(id * 7));
        answers.confidences.push(valued.then_some(0.5));
        answers.failures.push((!valued).then(|| "partner answered 404".to_owned()));
    }
    answers
}

impl Play {
    async fn play(&mut self, step: &Step) -> Result<()> {
        match *step {
            Step::Claim { worker, alone } => self.claim(worker, alone).await,
            Step::Commit { worker, from, count } => {
                let listings: Vec<i64> = (from..=LISTINGS.min(from + count - 1)).collect();
                let mut terminal = self.model.as_ref().map(|model| model.terminal.clone()).unwrap_or_default();
                terminal.extend(&listings);
                let low_water = (1..=LISTINGS).take_while(|id| terminal.contains(id)).last().unwrap_or(i64::MIN);
                self.last_commit[worker] = Some((listings, low_water));
                self.commit(worker).await
            }
            // Only what a worker has really sent is sent again, and by the attempt that sent it.
            Step::CommitAgain(worker) => self.commit(worker).await,
            Step::Renew(worker) => self.renew(worker).await,
            Step::Expire => self.expire().await,
            Step::Release(worker) => self.release(worker).await,
            Step::Complete(worker) => self.complete(worker).await,
            Step::CloseCancelled(worker) => self.close_cancelled(worker).await,
            Step::Cancel => self.cancel().await,
            Step::Retry => self.retry().await,
            Step::RelayClaim(relay) => self.relay_claim(relay).await,
            Step::RelaySend(relay) => self.relay_send(relay).await,
            Step::RelayReturn(relay) => self.relay_return(relay).await,
            Step::RelayExpire => self.relay_expire().await,
        }
    }

    /// Whether the worker's token is the one in the row of a running run.
    fn owns(&self, worker: usize) -> bool {
        self.model.as_ref().is_some_and(|model| model.state == State::Running && model.owner == Some(worker))
    }

    async fn claim(&mut self, worker: usize, alone: bool) -> Result<()> {
        let request = RunRequest {
            run_id: &self.run_id,
            digest: [7; 32],
            source: "/test",
            event_time: OffsetDateTime::UNIX_EPOCH,
            traceparent: None,
            zip_codes: None,
            limit: None,
            data: "{}",
        };
        let claim = self.database.claim_run(&request, Uuid::new_v4(), LEASE, alone).await?;
        let model = self.model.get_or_insert_with(|| Model {
            state: State::Running,
            owner: None,
            lease: false,
            cancel_requested: false,
            terminal: BTreeSet::new(),
            cursor: i64::MIN,
            deaths: 0,
            attempts: 0,
        });
        // Whoever is still in the row, and not in time, has died.
        if model.state == State::Running && !model.lease && !model.cancel_requested && model.owner.take().is_some() {
            model.deaths += 1;
        }
        match (model.state, claim) {
            (State::Complete, RunClaim::Complete) => {}
            (State::Cancelled, RunClaim::Cancelled) | (State::Failed, RunClaim::Quarantined(_)) => {}
            (State::Running, RunClaim::Busy(_)) => ensure!(model.owner.is_some() && model.lease, "busy: {model:?}"),
            (State::Running, RunClaim::Suspect) => ensure!(model.deaths == 2 && !alone, "suspect: {model:?}"),
            (State::Running, RunClaim::Quarantined(deaths)) => {
                ensure!(model.deaths == 3 && deaths.count == 3, "{deaths:?}: {model:?}");
                model.state = State::Failed;
            }
            (State::Running, RunClaim::Cancelled) => {
                ensure!(model.cancel_requested && !model.lease, "cancelled: {model:?}");
                (model.state, model.owner) = (State::Cancelled, None);
            }
            (State::Running, RunClaim::Owned(run)) => {
                ensure!(!model.lease && !model.cancel_requested, "owned: {model:?}");
                ensure!(model.deaths < if alone { 3 } else { 2 }, "owned: {model:?}");
                model.attempts += 1;
                ensure!(run.attempts == model.attempts, "{run:?} {model:?}");
                ensure!(run.selected == LISTINGS && run.cursor == model.cursor, "{run:?} {model:?}");
                ensure!(run.valued + run.failed == model.terminal.len() as i64, "{run:?} {model:?}");
                // Who had it before knows nothing of this; its token is no longer in the row.
                (model.owner, model.lease) = (Some(worker), true);
                self.workers[worker] = Some(*run);
                self.last_commit[worker] = None;
            }
            (_, claim) => anyhow::bail!("{claim:?} of {model:?}"),
        }
        Ok(())
    }

    async fn commit(&mut self, worker: usize) -> Result<()> {
        let (Some(run), Some((listings, cursor))) = (&self.workers[worker], &self.last_commit[worker]) else {
            return Ok(());
        };
        let owns = self.owns(worker);
        let done = self
            .database
            .commit_answers(&self.run_id, run.token, &answers(listings), *cursor, &WorkLedger::default())
            .await?;
        let Some(progress) = done else {
            ensure!(!owns, "an owner's batch was refused");
            return Ok(());
        };
        ensure!(owns, "worker {worker} wrote without owning the run");
        let model = self.model.as_mut().expect("it is owned");
        let before = model.terminal.len();
        model.terminal.extend(listings);
        model.cursor = model.cursor.max(*cursor);
        ensure!(progress.inserted == (model.terminal.len() - before) as i64, "{progress:?}");
        if progress.inserted > 0 {
            model.deaths = 0;
        }
        ensure!(progress.valued + progress.failed == model.terminal.len() as i64, "{progress:?} {model:?}");
        Ok(())
    }

    async fn renew(&mut self, worker: usize) -> Result<()> {
        let Some(run) = &self.workers[worker] else { return Ok(()) };
        let ids = [self.run_id.clone()];
        let kept = runs::renew_owners(&mut self.connection, &ids, &[run.token], LEASE).await?;
        ensure!(kept.len() == usize::from(self.owns(worker)), "renewed {kept:?}");
        if self.owns(worker) {
            self.model.as_mut().expect("it is owned").lease = true;
        }
        Ok(())
    }

    async fn expire(&mut self) -> Result<()> {
        self.sql("UPDATE runs SET lease_until = clock_timestamp() - interval '1 s' WHERE lease_until IS NOT NULL")
            .await?;
        if let Some(model) = &mut self.model {
            model.lease = false;
        }
        Ok(())
    }

    async fn release(&mut self, worker: usize) -> Result<()> {
        let Some(run) = self.workers[worker].take() else { return Ok(()) };
        self.database.release_runs(std::slice::from_ref(&self.run_id), &[run.token], &[None], &[None]).await?;
        if self.model.as_ref().is_some_and(|model| model.owner == Some(worker)) {
            let model = self.model.as_mut().expect("just seen");
            (model.owner, model.lease) = (None, false);
        }
        Ok(())
    }

    async fn complete(&mut self, worker: usize) -> Result<()> {
        let Some(run) = &self.workers[worker] else { return Ok(()) };
        // A worker completes only what it has seen to be whole.
        if self.model.as_ref().is_none_or(|model| model.terminal.len() as i64 != LISTINGS) {
            return Ok(());
        }
        let event = Uuid::new_v5(&Uuid::NAMESPACE_URL, self.run_id.as_bytes());
        let was_complete = self.model.as_ref().is_some_and(|model| model.state == State::Complete);
        let owns = self.owns(worker);
        let done =
            self.database.complete_run(&self.run_id, run.token, LANE, event, "{}", &WorkLedger::default()).await?;
        let model = self.model.as_mut().expect("it is whole");
        match done {
            Completion::Complete if was_complete => {}
            Completion::Complete => {
                ensure!(owns && !model.cancel_requested, "worker {worker} completed {model:?}");
                (model.state, model.owner, model.lease, model.cursor) = (State::Complete, None, false, LISTINGS);
                ensure!(self.outbox.insert(event, Row::default()).is_none(), "completed twice");
            }
            Completion::CancelRequested => ensure!(owns && model.cancel_requested, "{model:?}"),
            Completion::Lost => ensure!(!owns, "lost to nobody: {model:?}"),
        }
        Ok(())
    }

    async fn close_cancelled(&mut self, worker: usize) -> Result<()> {
        let Some(run) = &self.workers[worker] else { return Ok(()) };
        let owns = self.owns(worker);
        let closed = self.database.cancel_owned_run(&self.run_id, run.token, &WorkLedger::default()).await?;
        let Some(model) = &mut self.model else { return Ok(()) };
        // A cancelled run may have been closed by anyone: the answer is about the run.
        ensure!(closed == (owns && model.cancel_requested || model.state == State::Cancelled), "{closed}: {model:?}");
        if owns && model.cancel_requested {
            (model.state, model.owner, model.lease) = (State::Cancelled, None, false);
        }
        Ok(())
    }

    async fn cancel(&mut self) -> Result<()> {
        let claim = self.database.cancel_run(&self.run_id).await?;
        let Some(model) = &mut self.model else {
            ensure!(claim == CancelClaim::Unknown, "{claim:?}");
            return Ok(());
        };
        match (model.state, claim) {
            (State::Running, CancelClaim::Requested(_)) => {
                ensure!(model.lease, "{model:?}");
                model.cancel_requested = true;
            }
            (State::Running, CancelClaim::Cancelled) => {
                ensure!(!model.lease, "{model:?}");
                (model.state, model.owner, model.cancel_requested) = (State::Cancelled, None, true);
            }
            (State::Cancelled, CancelClaim::Cancelled) => {}
            (State::Complete, CancelClaim::Ended(state)) => ensure!(state == "complete", "{state}"),
            (State::Failed, CancelClaim::Ended(state)) => ensure!(state == "failed", "{state}"),
            (_, claim) => anyhow::bail!("{claim:?} of {model:?}"),
        }
        Ok(())
    }

    async fn retry(&mut self) -> Result<()> {
        let before = self.waiting_ids().await?;
        let reopened = self.database.reopen_run(&self.run_id, LANE, "{}").await?;
        let model = self.model.as_mut();
        let stopped = model.as_ref().is_some_and(|model| [State::Cancelled, State::Failed].contains(&model.state));
        ensure!(reopened == stopped, "reopened: {reopened}, {model:?}");
        if let Some(model) = model.filter(|_| reopened) {
            (model.state, model.cancel_requested, model.deaths) = (State::Running, false, 0);
            let new: Vec<Uuid> = self.waiting_ids().await?.difference(&before).copied().collect();
            ensure!(new.len() == 1, "{new:?}");
            self.outbox.insert(new[0], Row::default());
        }
        Ok(())
    }

    async fn relay_claim(&mut self, relay: usize) -> Result<()> {
        let me = self.relays[relay].0;
        let rows = self.database.claim_outbox(me, 10, LEASE, &[]).await?;
        let ids: BTreeSet<Uuid> = rows.iter().map(|row| row.event_id).collect();
        let free = |row: &Row| !row.sent && !row.claim_lives;
        let expected: BTreeSet<Uuid> = self.outbox.iter().filter(|(_, row)| free(row)).map(|(id, _)| *id).collect();
        ensure!(ids == expected, "claimed {ids:?}, free were {expected:?}");
        for id in &ids {
            let row = self.outbox.get_mut(id).expect("just seen");
            (row.claimed_by, row.claim_lives) = (Some(relay), true);
        }
        self.relays[relay].1.extend(ids);
        Ok(())
    }

    async fn relay_send(&mut self, relay: usize) -> Result<()> {
        let ids = std::mem::take(&mut self.relays[relay].1);
        self.database.mark_sent(&ids).await?;
        for id in ids {
            let row = self.outbox.get_mut(&id).expect("it was claimed");
            row.sent = true;
            row.sends += 1;
        }
        Ok(())
    }

    async fn relay_return(&mut self, relay: usize) -> Result<()> {
        let (me, ids) = (self.relays[relay].0, std::mem::take(&mut self.relays[relay].1));
        self.database.return_outbox(me, &ids, Duration::ZERO).await?;
        for id in ids {
            let row = self.outbox.get_mut(&id).expect("it was claimed");
            if row.claimed_by == Some(relay) && !row.sent {
                (row.claimed_by, row.claim_lives) = (None, false);
            }
        }
        Ok(())
    }

    async fn relay_expire(&mut self) -> Result<()> {
        self.sql(
            "UPDATE outbox SET claimed_until = clock_timestamp() - interval '1 s' WHERE claimed_until IS NOT NULL",
        )
        .await?;
        for row in self.outbox.values_mut() {
            row.claim_lives = false;
        }
        Ok(())
    }

    async fn sql(&mut self, statement: &'static str) -> Result<()> {
        sqlx::query(statement).execute(&mut self.connection).await?;
        Ok(())
    }

    async fn waiting_ids(&mut self) -> Result<BTreeSet<Uuid>> {
        let ids: Vec<Uuid> = sqlx::query_scalar("SELECT event_id FROM outbox").fetch_all(&mut self.connection).await?;
        Ok(ids.into_iter().collect())
    }

    /// The database is as the model says.
    async fn agree(&mut self) -> Result<()> {
        type Found = (String, Option<Uuid>, bool, bool, i64, i64, i64, i32, i32);
        let found: Option<Found> = sqlx::query_as(
            "SELECT state, owner, coalesce(lease_until > clock_timestamp(), false), cancel_requested_at IS NOT NULL,
                    cursor, valued, failed, deaths, attempts
             FROM runs WHERE run_id = $1",
        )
        .bind(&self.run_id)
        .fetch_optional(&mut self.connection)
        .await?;
        let Some(model) = &self.model else {
            ensure!(found.is_none(), "a run out of nothing");
            return Ok(());
        };
        let (state, owner, lease, cancel_requested, cursor, valued, failed, deaths, attempts) =
            found.context("the run is gone")?;
        let names = [
            (State::Running, "running"),
            (State::Complete, "complete"),
            (State::Cancelled, "cancelled"),
            (State::Failed, "failed"),
        ];
        ensure!(names.contains(&(model.state, state.as_str())), "{state}, {model:?}");
        ensure!(
            lease == model.lease && cancel_requested == model.cancel_requested,
            "{lease} {cancel_requested} {model:?}"
        );
        let token = model.owner.and_then(|worker| self.workers[worker].as_ref()).map(|run| run.token);
        ensure!(owner == token, "owner {owner:?}, {model:?}");
        ensure!(
            deaths == model.deaths && attempts == model.attempts,
            "{deaths} deaths, {attempts} attempts, {model:?}"
        );
        ensure!(cursor == model.cursor, "cursor {cursor}, {model:?}");
        let failures = model.terminal.iter().filter(|id| *id % 4 == 0).count() as i64;
        ensure!((valued, failed) == (model.terminal.len() as i64 - failures, failures), "{valued} {failed} {model:?}");
        let rows: Vec<i64> = sqlx::query_scalar("SELECT listing_id FROM valuations ORDER BY listing_id")
            .fetch_all(&mut self.connection)
            .await?;
        ensure!(rows == model.terminal.iter().copied().collect::<Vec<_>>(), "{rows:?} {model:?}");
        ensure!(model.terminal.range(..=cursor).count() as i64 == cursor.max(0), "the cursor is ahead");
        let sent: Vec<(Uuid, bool)> =
            sqlx::query_as("SELECT event_id, sent_at IS NOT NULL FROM outbox").fetch_all(&mut self.connection).await?;
        let expected: BTreeMap<Uuid, bool> = self.outbox.iter().map(|(id, row)| (*id, row.sent)).collect();
        ensure!(sent.into_iter().collect::<BTreeMap<_, _>>() == expected, "the outbox is not {expected:?}");
        ensure!(self.outbox.values().all(|row| row.sent == (row.sends > 0)), "sent and not sent");
        Ok(())
    }
}

#[test]
fn every_history_of_a_run_agrees_with_the_model() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let (world, database) = runtime.block_on(async {
        let world = World::new(Behaviour::default()).await?;
        world.listings(LISTINGS).await?;
        let variables = world.environment().variables();
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let config =
            Config::load(None, variables, &[Section::Database]).map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
        anyhow::Ok((world, Database::new(&config.database)?))
    })?;
    let number = std::cell::Cell::new(0);
    let play = |steps: Vec<Step>| {
        number.set(number.get() + 1);
        runtime.block_on(async {
            let mut connection = PgConnection::connect(world.environment().database_url()).await?;
            sqlx::raw_sql("TRUNCATE runs, valuations, outbox, publications, listing_valuations CASCADE")
                .execute(&mut connection)
                .await?;
            let mut play = Play {
                database: database.clone(),
                connection,
                run_id: format!("run-{}", number.get()),
                model: None,
                outbox: BTreeMap::new(),
                workers: Default::default(),
                last_commit: Default::default(),
                relays: std::array::from_fn(|_| (Uuid::new_v4(), Vec::new())),
            };
            for (number, step) in steps.iter().enumerate() {
                play.play(step).await.with_context(|| format!("step {number}, {step:?}"))?;
                play.agree().await.with_context(|| format!("after step {number}, {step:?}"))?;
            }
            anyhow::Ok(())
        })
    };
    let mut runner = TestRunner::new(Cases { cases: 128, failure_persistence: None, ..Cases::default() });
    runner
        .run(&steps(), |steps| play(steps).map_err(|error| TestCaseError::fail(format!("{error:#}"))))
        .map_err(|error| anyhow::anyhow!("{error}"))
}
