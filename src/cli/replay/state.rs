//! How far a replay has come, in a file that outlives it.
//!
//! The place is a number of lines and a hash of what they say. So it holds as long as what was sent is still the
//! beginning of what is there: a file may have grown, been packed or renamed meanwhile; one that is another in its sent
//! part is told, and nothing is sent.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::input::Line;

/// Of the file's format.
const VERSION: u32 = 1;

/// What is in the file.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    version: u32,
    /// Where the events went.
    queue_url: String,
    /// Lines behind us, over all files.
    lines: u64,
    /// Of those lines.
    sha256: String,
    /// Events sent.
    events: u64,
    /// What new ids are made from.
    replay_id: Uuid,
    new_ids: bool,
}

/// The state of a replay, whether it is kept or not.
pub(super) struct State {
    file: Option<PathBuf>,
    kept: Kept,
    resumed: bool,
    /// Lines behind us, over all files.
    pub(super) lines: u64,
    /// Events sent.
    pub(super) events: u64,
}

impl State {
    /// Reads the state if there is one, else begins.
    pub(super) fn open(file: Option<PathBuf>, queue_url: &str, new_ids: bool) -> anyhow::Result<State> {
        let fresh = Kept {
            version: VERSION,
            queue_url: queue_url.to_owned(),
            lines: 0,
            sha256: Trail::default().sha256(),
            events: 0,
            replay_id: Uuid::new_v4(),
            new_ids,
        };
        let found = match file.as_ref().map(fs::read) {
            None => None,
            Some(Ok(bytes)) => Some(bytes),
            Some(Err(error)) if error.kind() == ErrorKind::NotFound => None,
            Some(Err(error)) => return Err(error).with_context(|| format!("{} cannot be read", shown(&file))),
        };
        let resumed = found.is_some();
        let kept = match found {
            None => fresh,
            Some(bytes) => {
                let kept: Kept = serde_json::from_slice(&bytes).with_context(|| {
                    format!("{} is not the state of a replay; remove it to begin from the first line", shown(&file))
                })?;
                for (what, before, now) in [
                    ("format", kept.version.to_string(), VERSION.to_string()),
                    ("queue", kept.queue_url.clone(), fresh.queue_url),
                    ("--new-ids", kept.new_ids.to_string(), new_ids.to_string()),
                ] {
                    ensure!(
                        before == now,
                        "{} is of a replay with another {what}: {before}, and now it is {now}; give another state file, \
                         or remove this one to begin from the first line",
                        shown(&file)
                    );
                }
                kept
            }
        };
        let (lines, events) = (kept.lines, kept.events);
        Ok(State { file, kept, resumed, lines, events })
    }

    /// What was passed before, if anything was.
    pub(super) fn place(&self) -> Option<Place<'_>> {
        self.resumed.then_some(Place { lines: self.kept.lines, sha256: &self.kept.sha256, file: shown(&self.file) })
    }

    /// What new ids are made from, the same after an interruption.
    pub(super) fn replay_id(&self) -> Uuid {
        self.kept.replay_id
    }

    /// Notes that everything up to `trail` was sent, `events` more than before.
    pub(super) fn passed(&mut self, trail: &Trail, events: u64) -> anyhow::Result<()> {
        self.lines = trail.lines;
        self.events += events;
        if self.file.is_some() {
            (self.kept.lines, self.kept.sha256, self.kept.events) = (trail.lines, trail.sha256(), self.events);
            self.save()?;
        }
        Ok(())
    }

    /// Writes the file, so that there is a whole one at every moment.
    pub(super) fn save(&self) -> anyhow::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let mut beside = file.clone().into_os_string();
        beside.push(".new");
        let mut json = serde_json::to_vec(&self.kept)?;
        json.push(b'\n');
        fs::write(&beside, json)
            .and_then(|()| fs::rename(&beside, file))
            .with_context(|| format!("{} cannot be written", file.display()))
    }

    /// The file by its name, where there is one.
    pub(super) fn file(&self) -> Option<String> {
        self.file.as_ref().map(|_| shown(&self.file))
    }
}

fn shown(file: &Option<PathBuf>) -> String {
    file.as_ref().map_or_else(String::new, |file| file.display().to_string())
}

/// Where an earlier replay stopped.
pub(super) struct Place<'a> {
    /// Lines behind it, over all files.
    pub(super) lines: u64,
    sha256: &'a str,
    file: String,
}

impl Place<'_> {
    /// Fails unless `trail`, which has come as far, has seen the same lines.
    pub(super) fn check(&self, trail: &Trail) -> anyhow::Result<()> {
        let (lines, file) = (self.lines, &self.file);
        if trail.lines < lines {
            bail!(
                "the files have {} lines, and by {file} {lines} were sent already: they are not what was sent before; \
                 remove {file} to send them from the first line",
                trail.lines
            );
        }
        ensure!(
            trail.sha256() == self.sha256,
            "the first {lines} lines, which by {file} were sent already, have changed since; remove {file} to send the \
             files as they are now from the first line"
        );
        Ok(())
    }
}

/// The lines behind us, counted and hashed.
#[derive(Clone, Default)]
pub(super) struct Trail {
    pub(super) lines: u64,
    hash: Sha256,
}

impl Trail {
    pub(super) fn pass(&mut self, line: &Line<'_>) {
        self.lines += 1;
        self.hash.update((line.bytes.len() as u64).to_be_bytes());
        self.hash.update(line.bytes);
    }

    fn sha256(&self) -> String {
        self.hash.clone().finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
