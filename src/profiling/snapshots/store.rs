//! Where snapshots lie, for those who read them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use futures::stream::{self, StreamExt as _};

use super::bucket::Bucket;
use super::name::Name;
use super::record::Record;
use crate::config;

/// Files that are read at once: from a network each takes a while.
const AT_ONCE: usize = 16;

/// A place with snapshots.
#[derive(Debug)]
pub enum Store {
    /// A directory.
    Directory(PathBuf),
    /// S3.
    Bucket(Box<Bucket>),
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
    /// The one at an `s3://` URL, or at the path of a directory.
    pub fn open(place: &str, settings: &config::S3) -> anyhow::Result<Self> {
        match place.starts_with("s3://") {
            true => Bucket::open(place, settings).map(|bucket| Store::Bucket(bucket.into())),
            false if Path::new(place).is_dir() => Ok(Store::Directory(place.into())),
            false => bail!("{place}: there is no such file or directory"),
        }
    }

    /// All snapshots, by process and in the order in which they were taken. What else lies there is left out.
    pub async fn list(&self) -> anyhow::Result<Vec<Stored>> {
        let mut stored = match self {
            Store::Directory(path) => in_directory(path)?,
            Store::Bucket(bucket) => {
                let named = |(file, bytes): (String, u64)| Some(Stored { name: Name::of_profile(&file)?, bytes });
                bucket.list().await?.into_iter().filter_map(named).collect()
            }
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
    pub async fn records(&self, stored: &[Stored]) -> Vec<anyhow::Result<Record>> {
        stream::iter(stored).map(|one| self.record(&one.name)).buffered(AT_ONCE).collect().await
    }

    /// The profiles of several, in their order.
    pub async fn profiles(&self, stored: &[Stored]) -> Vec<anyhow::Result<Vec<u8>>> {
        stream::iter(stored).map(|one| self.profile(&one.name)).buffered(AT_ONCE).collect().await
    }

    /// Where a file is, for people.
    pub fn place(&self, file: &str) -> String {
        match self {
            Store::Directory(path) => path.join(file).display().to_string(),
            Store::Bucket(bucket) => bucket.place(file),
        }
    }

    async fn read(&self, file: &str) -> anyhow::Result<Vec<u8>> {
        match self {
            Store::Directory(path) => {
                fs::read(path.join(file)).with_context(|| format!("cannot read {}", self.place(file)))
            }
            Store::Bucket(bucket) => bucket.get(file).await,
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
