//! tokio's own dump of its tasks (`goroutine?dump=1`): the chain of futures from each task to where it waits. Of one runtime, so
//! without the tasks of the common lane.
//!
//! Only in programs built for it, because tokio takes the dump by stopping its workers and polling every idle task once more,
//! which may take as long as the slowest of those polls, and needs a second unwinder.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::Handle;
use tokio::time::timeout;

/// How long the runtime may take to stop for it; tokio's advice is a time of seconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// All tasks of the runtime with their traces. Blocks; not to be called on one of the runtime's own threads.
pub(super) fn text(runtime: &Handle) -> anyhow::Result<String> {
    let dump = runtime
        .block_on(async { timeout(PATIENCE, runtime.dump()).await })
        .with_context(|| format!("the runtime did not stop for a dump within {PATIENCE:?}; debug=2 needs no stop"))?;
    let mut text = String::new();
    for task in dump.tasks().iter() {
        let _ = writeln!(text, "task {}\n{}\n", task.id(), task.trace());
    }
    Ok(text)
}
