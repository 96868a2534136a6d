//! Where snapshots lie, for those who read them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};

use super::name::Name;
use super::record::Record;

/// Files that are read at once: from a network each takes a while.
const AT_ONCE: usize = 16;

/// A place with snapshots.
#[derive(Debug)]
pub enum Store {
    /// A directory.
    Directory(PathBuf),
}

/// A snapshot in a store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stored {
    /// What it is known by.
    pub name: Name,
    /// The size of its profile.
    pub bytes: u64,
}

impl Store {
    /// The one at the path of a directory.
    pub fn open(place: &str) -> anyhow::Result<Self> {
        match Path::new(place).is_dir() {
            true => Ok(Store::Directory(place.into())),
            false => bail!("{place}: there is no such file or directory"),
        }
    }

    /// All snapshots, by process and in the order in which they were taken. What else lies there is left out.
    pub async fn list(&self) -> anyhow::Result<Vec<Stored>> {
        let mut stored = match self {
            Store::Directory(path) => in_directory(path)?,
        };
        stored.sort();
        Ok(stored)
    }

    /// The profile of one.
    pub async fn profile(&self, name: &Name) -> anyhow::Result<Vec<u8>> {
        self.read(&name.profile()).await
    }

    /// The record of one.
    pub async fn record(&self, name: &Name) -> anyhow::Result<Record> {
        let text = self.read(&name.record()).await?;
        serde_json::from_slice(&text)
            .with_context(|| format!("{} is no record of a snapshot", self.place(&name.record())))
    }

    /// The records of several, in their order.
    pub async fn records(&self, stored: &[Stored]) -> anyhow::Result<Vec<Record>> {
        stream::iter(stored).map(|one| self.record(&one.name)).buffered(AT_ONCE).try_collect().await
    }

    /// The profiles of several, in their order.
    pub async fn profiles(&self, stored: &[Stored]) -> anyhow::Result<Vec<Vec<u8>>> {
        stream::iter(stored).map(|one| self.profile(&one.name)).buffered(AT_ONCE).try_collect().await
    }

    /// Where a file is, for people.
    pub fn place(&self, file: &str) -> String {
        match self {
            Store::Directory(path) => path.join(file).display().to_string(),
        }
    }

    async fn read(&self, file: &str) -> anyhow::Result<Vec<u8>> {
        match self {
            Store::Directory(path) => {
                fs::read(path.join(file)).with_context(|| format!("cannot read {}", self.place(file)))
            }
        }
    }
}

fn in_directory(path: &Path) -> anyhow::Result<Vec<Stored>> {
    let context = || format!("cannot read {}", path.display());
    let mut stored = Vec::new();
    for entry in fs::read_dir(path).with_context(context)? {
        let entry = entry.with_context(context)?;
        let Some(name) = Name::of_profile(&entry.file_name().to_string_lossy()) else { continue };
        // Whoever keeps the directory may remove it meanwhile.
        let Ok(data) = entry.metadata() else { continue };
        stored.push(Stored { name, bytes: data.len() });
    }
    Ok(stored)
}
