//! What a snapshot says of its moment, beside the profile.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tikv_jemalloc_ctl::{epoch, stats};

use super::name::Name;

/// The record of a snapshot: JSON beside its profile.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Record {
    /// When, in milliseconds since 1970.
    pub time_ms: u64,
    /// Why: start, interval, memory, growth, event-start, event-end, stop.
    pub reason: String,
    /// Which program.
    pub service: String,
    /// The program's version.
    pub version: String,
    /// Of the program's file; empty where it has none.
    pub build_id: String,
    /// The machine's or container's name.
    pub host: String,
    /// When the process began to take snapshots, in milliseconds since 1970.
    pub start_ms: u64,
    /// Counted from 1 in the process.
    pub sequence: u64,
    /// Events being worked on, by kind.
    pub events_in_flight: BTreeMap<String, u64>,
    /// Those of them that are slow, by kind and id, with the resident bytes when each began.
    #[serde(default)]
    pub slow_events: BTreeMap<String, u64>,
    /// Slow events that began since the snapshot before, by kind and id.
    #[serde(default)]
    pub began: Vec<String>,
    /// Slow events that ended since then.
    #[serde(default)]
    pub ended: Vec<String>,
    /// Resident bytes of the process.
    pub rss_bytes: u64,
    /// The most they may be; none without a limit.
    pub memory_limit_bytes: Option<u64>,
    /// The allocator's own figures.
    pub jemalloc: Allocator,
}

impl Record {
    /// What the snapshot is known by.
    pub fn name(&self) -> Name {
        Name {
            start_ms: self.start_ms,
            host: self.host.clone(),
            sequence: self.sequence,
            reason: self.reason.clone(),
            service: self.service.clone(),
            version: self.version.clone(),
            build: self.build_id.chars().take(12).collect(),
        }
    }
}

/// The allocator's own figures, in bytes, as its manual defines them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Allocator {
    /// In live allocations.
    pub allocated: u64,
    /// In pages with live allocations.
    pub active: u64,
    /// In physical memory, at most.
    pub resident: u64,
    /// Address space without memory behind it.
    pub retained: u64,
    /// For the allocator itself.
    pub metadata: u64,
}

impl Allocator {
    /// Zeros where it does not tell.
    pub(super) fn read() -> Self {
        let _ = epoch::advance();
        let bytes = |value: tikv_jemalloc_ctl::Result<usize>| value.map_or(0, |bytes| bytes as u64);
        Allocator {
            allocated: bytes(stats::allocated::read()),
            active: bytes(stats::active::read()),
            resident: bytes(stats::resident::read()),
            retained: bytes(stats::retained::read()),
            metadata: bytes(stats::metadata::read()),
        }
    }
}

/// Resident bytes of this process; 0 without `/proc`.
pub(super) fn rss_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = text.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    // SAFETY: sysconf reads a constant of the system.
    pages * u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(0)
}

/// The least limit of this process's control group and those above it (version 2, then version 1); none without one.
pub(super) fn memory_limit_bytes() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    least_limit(Path::new("/sys/fs/cgroup"), &groups)
}

fn least_limit(root: &Path, groups: &str) -> Option<u64> {
    let unified = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let limit = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let own = root.join(unified.trim_start_matches('/'));
    let above = own.ancestors().take_while(|path| path.starts_with(root));
    let unified = above.filter_map(|path| limit(&path.join("memory.max")));
    // Version 1 writes a number near 2^63 for no limit.
    let former = limit(&root.join("memory/memory.limit_in_bytes")).filter(|bytes| *bytes < 1 << 62);
    unified.chain(former).min()
}

/// The machine's or container's name, with nothing in it that a file name cannot have.
pub(super) fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let plain = |character: char| if character.is_ascii_alphanumeric() || character == '.' { character } else { '-' };
    name.trim().chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_on_the_way_up_counts() {
        let root = tempfile::tempdir().expect("a directory");
        let group = root.path().join("pod/container");
        fs::create_dir_all(&group).expect("made");
        assert_eq!(least_limit(root.path(), "0::/pod/container\n"), None);
        fs::write(group.join("memory.max"), "max\n").expect("written");
        fs::write(root.path().join("pod/memory.max"), "1000\n").expect("written");
        assert_eq!(least_limit(root.path(), "0::/pod/container\n"), Some(1000));
        fs::write(group.join("memory.max"), "700\n").expect("written");
        assert_eq!(least_limit(root.path(), "0::/pod/container\n"), Some(700));
    }

    #[test]
    fn the_process_has_memory_and_a_host() {
        assert!(rss_bytes() > 1 << 20);
        assert!(!host().is_empty());
    }
}
