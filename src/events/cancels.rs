//! Cancels: from an operator's request in the database to the work on the run.
//!
//! A loop of its own, because nothing that the work does anyway would tell it in time: a run commits nothing while the
//! partner is slow or its breaker is open, and leases are renewed only at half of the visibility timeout. One statement
//! asks for all runs of the process, by primary key, and is made only while there is one.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use crate::db::Database;
use crate::health::Beat;
use crate::lifecycle::Stop;
use crate::queue::keeper::Keeper;
use crate::task::park;

/// Between two looks: a cancel reaches the work within this.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long the loop may be silent: as long as one look at Postgres may take with all its tries, and a minute.
pub fn silence_limit(database: &Database) -> Duration {
    database.longest() + Duration::from_secs(60)
}

/// Looks for requests until the service stops, which ends all work by itself.
pub async fn watch(database: Database, keeper: Arc<Keeper>, beat: Beat, stop: Stop) {
    loop {
        tokio::select! {
            () = stop.draining() => break,
            () = async {
                park(sleep(INTERVAL)).await;
                look(&database, &keeper).await;
            } => beat.touch(),
        }
    }
    beat.retire();
}

async fn look(database: &Database, keeper: &Keeper) {
    let (run_ids, tokens) = keeper.owned_runs();
    if tokens.is_empty() {
        return;
    }
    match database.cancel_requests(&run_ids, &tokens).await {
        Ok(cancelled) => keeper.cancel_runs(&cancelled),
        // The runs themselves meet the same Postgres, and say so.
        Err(error) => tracing::debug!(%error, "no look for cancelled runs; trying again"),
    }
}
