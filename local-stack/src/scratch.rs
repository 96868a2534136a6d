//! The temporary directory of one stack, and the sweeping of those that killed processes left behind.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Directories are called `local-stack-<process id>-<random>`; the id is for people who look at them.
const PREFIX: &str = "local-stack-";
/// Held locked by the owner of the directory for as long as it lives; the kernel lets go of it however that ends.
const LOCK: &str = "lock";

/// A directory under the machine's temporary directory. Removed when dropped, or by the next stack's start.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Sweeps what dead processes left, then makes a new directory.
    pub(crate) fn create() -> Result<Self> {
        Self::create_in(&std::env::temp_dir())
    }

    fn create_in(parent: &Path) -> Result<Self> {
        sweep(parent);
        let name = format!("{PREFIX}{}-{:08x}", std::process::id(), fastrand::u32(..));
        let path = parent.join(&name);
        // Under a name that is not swept until the lock is held.
        let hidden = parent.join(format!(".{name}"));
        let make = || -> io::Result<File> {
            DirBuilder::new().mode(0o700).create(&hidden)?;
            // The unprivileged user of the database must get through to its own directory below, whatever the umask.
            fs::set_permissions(&hidden, Permissions::from_mode(0o711))?;
            let lock = File::create_new(hidden.join(LOCK))?;
            lock.try_lock()?;
            fs::rename(&hidden, &path)?;
            Ok(lock)
        };
        let lock = make().with_context(|| format!("cannot make the temporary directory {}", path.display()))?;
        Ok(Self { path, _lock: lock })
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the directory now.
    pub(crate) fn remove(&self) {
        remove(&self.path);
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Removes the directories of this user whose owners are gone.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX)) && is_abandoned(&entry.path()) {
            remove(&entry.path());
        }
    }
}

fn is_abandoned(directory: &Path) -> bool {
    // SAFETY: geteuid cannot fail and touches no memory.
    let us = unsafe { libc::geteuid() };
    // Others may write to the temporary directory too: a link, or somebody else's directory, is none of our business.
    let is_ours = fs::symlink_metadata(directory).is_ok_and(|found| found.is_dir() && found.uid() == us);
    is_ours && File::open(directory.join(LOCK)).is_ok_and(|lock| lock.try_lock().is_ok())
}

fn remove(directory: &Path) {
    // A second try: a server that is just ending may write a last file in between.
    if fs::remove_dir_all(directory).is_err() && directory.exists() && fs::remove_dir_all(directory).is_err() {
        tracing::warn!(directory = %directory.display(), "cannot remove a temporary directory; the next start tries again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_swept_only_when_its_owner_is_gone() -> Result<()> {
        let parent = std::env::temp_dir().join(format!("scratch-test-{}", std::process::id()));
        fs::create_dir_all(&parent)?;

        let alive = Scratch::create_in(&parent)?;
        let foreign = parent.join("local-stack-of-somebody-without-a-lock");
        fs::create_dir_all(&foreign)?;
        let dead = parent.join("local-stack-1-dead");
        fs::create_dir_all(dead.join("data"))?;
        File::create(dead.join(LOCK))?;

        let next = Scratch::create_in(&parent)?;
        assert!(alive.path().exists() && next.path().exists() && foreign.exists());
        assert!(!dead.exists());

        let path = alive.path().to_owned();
        drop(alive);
        assert!(!path.exists());
        drop(next);
        fs::remove_dir_all(parent)?;
        Ok(())
    }
}
