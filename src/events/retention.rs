//! Retention: what ended long ago is removed, in batches so small that nobody waits for them.
//!
//! One loop in each process. They do not agree on who removes what: rows that another one has locked are skipped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use crate::db::retention::{RunTable, TimedTable};
use crate::db::{Database, DbError};
use crate::fault;
use crate::health::Beat;
use crate::lifecycle::Stop;
use crate::metrics::Metrics;
use crate::task::park;

/// Rows a statement: a few milliseconds of work and of locks.
const BATCH: i64 = 1_000;

/// After each statement that removed something: the disk and the pool are there for events first.
const PAUSE: Duration = Duration::from_millis(50);

/// Runs that are marked at a time, so that a kill leaves few half removed.
const RUNS: i64 = 10;

/// Between two rounds. What is removed has been kept for weeks, so a few minutes more do not matter.
const INTERVAL: Duration = Duration::from_secs(600);

/// How long the loop may be silent: the wait between two rounds, a statement with all its tries at each end of it, and a minute.
pub fn silence_limit(database: &Database) -> Duration {
    INTERVAL + database.longest() * 2 + Duration::from_secs(60)
}

/// What a round works with.
pub struct Retention {
    /// Where the rows are.
    pub database: Database,
    /// How long they are kept.
    pub age: Duration,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Touched with each statement.
    pub beat: Beat,
    /// Ends the loop.
    pub stop: Stop,
}

impl Retention {
    /// Removes what is old, round after round, until the service stops. A stop in the middle of a round leaves the rest to
    /// the next one, of any process.
    pub async fn run(self) {
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.draining() => {}
            () = self.rounds() => {}
        }
        self.beat.retire();
    }

    async fn rounds(&self) {
        loop {
            let mut removed = BTreeMap::new();
            let ended = self.round(&mut removed).await;
            if !removed.is_empty() {
                let tables: Vec<String> = removed.iter().map(|(table, rows)| format!("{table} {rows}")).collect();
                tracing::info!(
                    rows = removed.values().sum::<u64>(),
                    tables = tables.join(", "),
                    "old rows were removed"
                );
            }
            if let Err(error) = ended {
                tracing::warn!(%error, "old rows could not be removed; trying again in the next round");
            }
            self.beat.touch();
            park(sleep(INTERVAL)).await;
        }
    }

    /// Removes all that is old now, and counts it by table.
    async fn round(&self, removed: &mut BTreeMap<&'static str, u64>) -> Result<(), DbError> {
        loop {
            let runs = self.database.mark_old_runs(self.age, RUNS).await?;
            let mut gone = 0;
            for run_id in &runs {
                for table in RunTable::ALL {
                    let name = table.name();
                    while self.step(name, removed, self.database.prune_run_rows(table, run_id, BATCH)).await? > 0 {}
                }
                let run = async { self.database.prune_run(run_id).await.map(u64::from) };
                gone += self.step("runs", removed, run).await?;
            }
            // Those that are left have rows that another process is removing.
            if gone == 0 {
                break;
            }
        }
        for table in TimedTable::ALL {
            let name = table.name();
            while self.step(name, removed, self.database.prune_rows(table, self.age, BATCH)).await? > 0 {}
        }
        Ok(())
    }

    /// One statement, counted, and the pause after it.
    async fn step(
        &self,
        table: &'static str,
        removed: &mut BTreeMap<&'static str, u64>,
        statement: impl Future<Output = Result<u64, DbError>>,
    ) -> Result<u64, DbError> {
        fault::point("retention.before_delete", table);
        let rows = statement.await?;
        fault::point("retention.after_delete", table);
        self.beat.touch();
        if rows > 0 {
            *removed.entry(table).or_default() += rows;
            self.metrics.pruned.with_label_values(&[table]).inc_by(rows);
            park(sleep(PAUSE)).await;
        }
        Ok(rows)
    }
}
