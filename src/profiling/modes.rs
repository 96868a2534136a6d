//! The profiles that show a state, and so can be subtracted from a later one.

use anyhow::Context as _;

use super::contention::Which;
use super::heap::View;
use super::pprof::Profile;
use super::{contention, heap, heap_text, tasks, threads};
use crate::task::registry;

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Heap,
    Allocs,
    Goroutine,
    Threadcreate,
    Block,
    Mutex,
}

impl Mode {
    pub const ALL: [Mode; 6] =
        [Mode::Allocs, Mode::Block, Mode::Goroutine, Mode::Heap, Mode::Mutex, Mode::Threadcreate];

    /// The name in the URL, which is Go's.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Heap => "heap",
            Mode::Allocs => "allocs",
            Mode::Goroutine => "goroutine",
            Mode::Threadcreate => "threadcreate",
            Mode::Block => "block",
            Mode::Mutex => "mutex",
        }
    }

    /// One line for the index.
    pub fn about(self) -> &'static str {
        match self {
            Mode::Heap => "memory that is held, by stack and kind of event; sampled every 512 KiB",
            Mode::Allocs => "the same with what was allocated since the start; go tool pprof shows that first",
            Mode::Goroutine => "live tasks by where they wait and where they were spawned; debug=2 one by one",
            Mode::Threadcreate => "threads by who creates them",
            Mode::Block => "time spent waiting since the start: for permits, pace, neighbours",
            Mode::Mutex => "time spent waiting for locks since the start",
        }
    }

    /// How many there are of what it shows, where that costs nothing to know.
    pub fn count(self) -> Option<usize> {
        match self {
            Mode::Heap | Mode::Allocs => None,
            Mode::Goroutine => Some(registry::count()),
            Mode::Threadcreate => std::fs::read_dir("/proc/self/task").ok().map(Iterator::count),
            Mode::Block => Some(contention::count(Which::Block)),
            Mode::Mutex => Some(contention::count(Which::Mutex)),
        }
    }

    /// The profile of this moment. Blocks.
    pub fn take(self) -> anyhow::Result<Profile> {
        Ok(match self {
            Mode::Heap => heap::profile(View::Heap)?,
            Mode::Allocs => heap::profile(View::Allocs)?,
            Mode::Goroutine => tasks::profile(&registry::live()),
            Mode::Threadcreate => threads::profile(&threads::by_creator().context("listing threads")?),
            Mode::Block => contention::profile(Which::Block),
            Mode::Mutex => contention::profile(Which::Mutex),
        })
    }

    /// The same as text for people; `level` is Go's `debug`. Blocks.
    pub fn text(self, level: u32) -> anyhow::Result<String> {
        Ok(match self {
            Mode::Heap => heap_text::text(&heap::profile(View::Heap)?),
            Mode::Allocs => heap_text::text(&heap::profile(View::Allocs)?),
            Mode::Goroutine if level >= 2 => tasks::one_by_one(&registry::live()),
            Mode::Goroutine => tasks::grouped(&registry::live()),
            Mode::Threadcreate => threads::text(&threads::by_creator().context("listing threads")?),
            Mode::Block => contention::text(Which::Block),
            Mode::Mutex => contention::text(Which::Mutex),
        })
    }
}
