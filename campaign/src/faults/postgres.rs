//! The database at its worst.

use std::time::Duration;

use anyhow::Result;

use super::{Injection, Scene};

/// Until there is work to be met.
const BUSY_LIMIT: Duration = Duration::from_secs(60);

/// What happens to the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Trouble {
    /// One connection is ended by an operator, if there is one in the middle of a statement.
    Backend,
}

pub(super) async fn inject(scene: &mut Scene<'_>, trouble: Trouble) -> Result<Injection> {
    scene.world.busy(BUSY_LIMIT).await?;
    scene.pause(0..300).await;
    match trouble {
        Trouble::Backend => backend(scene).await,
    }
}

async fn backend(scene: &mut Scene<'_>) -> Result<Injection> {
    let ended: Vec<(bool, String, i32)> = sqlx::query_as(
        "SELECT pg_terminate_backend(pid), state, pid FROM (
             SELECT pid, state FROM pg_stat_activity
             WHERE datname = current_database() AND application_name <> 'campaign' AND pid <> pg_backend_pid()
             ORDER BY state = 'active' DESC, random() LIMIT 1) AS one",
    )
    .fetch_all(&scene.world.database)
    .await?;
    let at_work = scene.world.at_work().await?;
    let injection = Injection::new("a backend");
    Ok(match ended.first() {
        Some((true, state, pid)) => {
            let injection = Injection { interruptions: 1, ..injection };
            injection.hit(at_work.runs > 0, format!("backend {pid}, {state}, was ended in the middle of {at_work:?}"))
        }
        _ => injection,
    })
}
