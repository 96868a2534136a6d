//! The file of `WRITE_API_*` variables for other shells.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use local_stack::Environment;

/// The variables point at servers that end with this process, and so does their file: it is removed when dropped.
#[derive(Debug)]
pub(crate) struct VariablesFile {
    path: PathBuf,
}

impl VariablesFile {
    /// Writes the file; `. FILE` in a shell reads it.
    pub(crate) fn write(path: PathBuf, environment: &Environment) -> Result<Self> {
        // Whoever waits for the file finds it whole.
        let draft = path.with_added_extension("new");
        fs::write(&draft, environment.shell_script())
            .and_then(|()| fs::rename(&draft, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path })
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for VariablesFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
