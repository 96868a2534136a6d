//! The credential: a header whose value lives in a file and may change there at any time.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use tokio::time::{Instant, timeout};

use crate::config::{self, Secret};
use crate::task;

/// How often the file is looked at, while calls are made.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// How long a call waits for that. Reading may block, on a network file system for long; it goes on beside the calls then.
const READ_WAIT: Duration = Duration::from_secs(1);

/// A header whose value follows its file.
pub(super) struct Credential {
    file: config::Credential,
    current: Mutex<Current>,
}

struct Current {
    value: Secret,
    version: Option<Version>,
    checked: Instant,
    /// Whether somebody looks at the file now.
    is_read: bool,
}

/// Enough of a file's metadata to notice a new content: a secret mounted by Kubernetes is replaced by a rename, one
/// written by hand may keep its inode.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version {
    inode: u64,
    modified: Option<SystemTime>,
    bytes: u64,
}

impl Version {
    fn of(metadata: &Metadata) -> Self {
        Version { inode: metadata.ino(), modified: metadata.modified().ok(), bytes: metadata.len() }
    }
}

impl Credential {
    /// Reads the file.
    pub(super) fn load(file: &config::Credential) -> anyhow::Result<Arc<Self>> {
        let (version, value) = read(file)?;
        let current = Current { value, version: Some(version), checked: Instant::now(), is_read: false };
        Ok(Arc::new(Credential { file: file.clone(), current: Mutex::new(current) }))
    }

    /// Appends the header line, with its line end.
    pub(super) fn write_header(&self, message: &mut Vec<u8>) {
        message.extend_from_slice(self.file.header.as_str().as_bytes());
        message.extend_from_slice(b": ");
        message.extend_from_slice(self.lock().value.reveal().as_bytes());
        message.extend_from_slice(b"\r\n");
    }

    /// Whether it is time to look at the file again. Says so to one caller, who is to call
    /// [`refresh`](Credential::refresh).
    pub(super) fn is_due(&self) -> bool {
        let mut current = self.lock();
        let due = !current.is_read && current.checked.elapsed() >= CHECK_EVERY;
        if due {
            current.checked = Instant::now();
            current.is_read = true;
        }
        due
    }

    /// Reads the file again if it changed. The value in use stays while the file cannot be used.
    pub(super) async fn refresh(self: Arc<Self>) {
        let credential = Arc::clone(&self);
        let reading = task::spawn_blocking(move || {
            let _reading = Reading(&credential);
            credential.reload();
        });
        match timeout(READ_WAIT, reading).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "reading the partner's credential panicked"),
            Err(_) => tracing::warn!(
                file = %self.file.file.display(),
                "reading the partner's credential takes long; calls go on with the old one"
            ),
        }
    }

    fn reload(&self) {
        let path = self.file.file.display();
        let version = std::fs::metadata(&self.file.file).ok().map(|metadata| Version::of(&metadata));
        if version == self.lock().version {
            return;
        }
        // Taken note of even if the content is of no use, so that a bad file is complained of once.
        match read(&self.file) {
            Ok((version, value)) => {
                let mut current = self.lock();
                current.version = Some(version);
                current.value = value;
                drop(current);
                tracing::info!("the partner's credential was read again, {path} had changed");
            }
            Err(error) => {
                self.lock().version = version;
                tracing::warn!("the partner's credential changed and the old one stays in use: {error:#}");
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody looks at the file until this is dropped.
struct Reading<'a>(&'a Credential);

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.0.lock().is_read = false;
    }
}

/// The version and the value in the file, without white space around it.
fn read(file: &config::Credential) -> anyhow::Result<(Version, Secret)> {
    let path = file.file.display();
    let metadata = std::fs::metadata(&file.file).with_context(|| format!("{path}: partner.credential_file"))?;
    let text = std::fs::read_to_string(&file.file).with_context(|| format!("{path}: partner.credential_file"))?;
    let value = text.trim();
    if value.is_empty() {
        bail!("{path} is empty; write the value of the header {} into it", file.header);
    }
    if http::HeaderValue::from_str(value).is_err() {
        bail!("{path} holds characters that a header cannot carry; write the value into it on one line");
    }
    Ok((Version::of(&metadata), Secret::new(value)))
}
