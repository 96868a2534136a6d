//! What this program takes from the machine it runs on: ports, users, and the directories of the build.

use std::collections::VecDeque;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

/// Ports are taken from below the range that Linux gives to outgoing connections (from 32768), so that none of those
/// can take the port between its choice and its use.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// The ports given last: whoever got one may not listen on it yet.
static GIVEN: Mutex<VecDeque<u16>> = Mutex::new(VecDeque::new());
/// How many of them are kept.
const MOST_GIVEN: usize = 1_000;

/// A TCP port of 127.0.0.1 that nobody listens on and that was not given lately.
pub fn free_port() -> Result<u16> {
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    (0..1_000)
        .map(|_| fastrand::u16(PORTS))
        .find(|port| !given.contains(port) && TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .inspect(|port| {
            given.push_back(*port);
            if given.len() > MOST_GIVEN {
                given.pop_front();
            }
        })
        .with_context(|| format!("no free port found in {PORTS:?} on 127.0.0.1"))
}

/// An account that servers are run as when this process belongs to root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) user: u32,
    pub(crate) group: u32,
}

impl Account {
    /// `None` when this process can be used as it is, because it does not belong to root.
    pub(crate) fn unprivileged() -> Result<Option<Self>> {
        // SAFETY: geteuid cannot fail and touches no memory.
        if unsafe { libc::geteuid() } != 0 {
            return Ok(None);
        }
        let accounts = fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
        let found = ["postgres", "nobody"].iter().find_map(|name| Self::find(&accounts, name));
        ensure!(
            found.is_some(),
            "PostgreSQL refuses to run as root, and /etc/passwd has no user `postgres` or `nobody`: add one, or run as another user"
        );
        Ok(found)
    }

    fn find(accounts: &str, name: &str) -> Option<Self> {
        accounts.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(name)).then_some(())?;
            let mut ids = fields.skip(1).map(str::parse);
            Some(Self { user: ids.next()?.ok()?, group: ids.next()?.ok()? })
        })
    }
}

/// The directory of this build's binaries, `target/<profile>`. Test binaries lie in `deps` below it.
pub fn profile_directory() -> Result<PathBuf> {
    let executable = std::env::current_exe().context("cannot tell where this program lies")?;
    let directory = executable.parent().context("this program lies in no directory")?;
    let is_below = matches!(directory.file_name().and_then(|name| name.to_str()), Some("deps" | "examples"));
    Ok(if is_below { directory.parent().unwrap_or(directory) } else { directory }.to_owned())
}

/// A directory below the build's target directory for what is kept between runs: `target/local-stack`.
pub fn cache_directory() -> Result<PathBuf> {
    let profile = profile_directory()?;
    let directory = profile.parent().unwrap_or(&profile).join("local-stack");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make the directory {}", directory.display()))?;
    Ok(directory)
}

/// A binary of this workspace, as built with the same profile as this program.
pub fn workspace_binary(name: &str) -> Result<PathBuf> {
    let path = profile_directory()?.join(name);
    let release = if path.parent().is_some_and(|parent| parent.ends_with("release")) { " --release" } else { "" };
    ensure!(path.is_file(), "{} is not there: run `cargo build{release} -p {name}` first", path.display());
    Ok(path)
}

/// Whether `path` is a file somebody may execute.
pub(crate) fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found_by_their_exact_name() {
        let accounts = "root:x:0:0:root:/root:/bin/bash\nnobody2:x:7:7::/:\nnobody:x:65534:65533:n:/none:/bin/false\n";
        assert_eq!(Account::find(accounts, "nobody"), Some(Account { user: 65_534, group: 65_533 }));
        assert_eq!(Account::find(accounts, "postgres"), None);
    }

    #[test]
    fn a_free_port_can_be_listened_on() -> Result<()> {
        let port = free_port()?;
        assert!(PORTS.contains(&port));
        TcpListener::bind(("127.0.0.1", port))?;
        Ok(())
    }

    #[test]
    fn a_missing_binary_is_named_with_the_command_that_makes_it() {
        let error = workspace_binary("no-such-binary").expect_err("must fail").to_string();
        assert!(error.contains("cargo build -p no-such-binary"), "{error}");
    }
}
