//! A virtualenv below the target directory, for the servers that come as Python packages.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::machine;
use crate::process::run;

/// The interpreter of a virtualenv that has the packages asked for.
#[derive(Debug)]
pub struct Virtualenv {
    directory: PathBuf,
}

impl Virtualenv {
    /// Makes sure that `package`, pinned as `name==version`, is installed; at once when it is already.
    pub async fn with(package: &str) -> Result<Self> {
        let cache = machine::cache_directory()?;
        let environment = Self { directory: cache.join("venv") };
        // The marks are written last, so an installation that was interrupted has none.
        let mark = environment.directory.join(".installed").join(package);
        if mark.exists() {
            return Ok(environment);
        }

        // Two test binaries may get here together.
        let lock_path = cache.join("venv.lock");
        let lock = File::create(&lock_path).with_context(|| format!("cannot make {}", lock_path.display()))?;
        let _lock = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock)).await??;
        if !mark.exists() {
            environment.install(package, &mark).await?;
        }
        Ok(environment)
    }

    async fn install(&self, package: &str, mark: &Path) -> Result<()> {
        tracing::info!(package, "installing a Python package (once)");
        if !self.directory.join(".installed").exists() {
            let mut make = Command::new("python3");
            make.args(["-m", "venv", "--clear"]).arg(&self.directory);
            run("python3 -m venv", make).await.context(
                "cannot make a virtualenv: install python3 and python3-venv (Debian: apt-get install python3-venv)",
            )?;
        }
        let mut install = Command::new(self.python());
        install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", package]);
        run("pip install", install)
            .await
            .with_context(|| format!("cannot install {package} with pip: is the package index reachable?"))?;
        fs::create_dir_all(self.directory.join(".installed"))?;
        File::create(mark).with_context(|| format!("cannot write {}", mark.display()))?;
        Ok(())
    }

    /// The Python interpreter. Scripts are run as its modules, because their first lines carry the path of a directory
    /// that may have moved since.
    #[must_use]
    pub fn python(&self) -> PathBuf {
        self.directory.join("bin/python3")
    }

    /// Where the module's files lie. Nothing of the module is run.
    pub(crate) async fn module_directory(&self, module: &str) -> Result<PathBuf> {
        let mut find = Command::new(self.python());
        find.args([
            "-c",
            "import sys, importlib.util as u; print(u.find_spec(sys.argv[1]).submodule_search_locations[0])",
        ]);
        find.arg(module);
        Ok(run("python3", find).await.with_context(|| format!("cannot find the Python module {module}"))?.into())
    }
}
