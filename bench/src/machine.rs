//! What figures were taken on.

use anyhow::{Context, Result};
use local_stack::{Postgres, Program};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

/// The packages that everything is built from, as cargo locks them.
pub const LOCK: &str = include_str!("../../Cargo.lock");

/// Where the sources lay when this was built.
pub const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The machine, and what ran on it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Machine {
    /// The version of everything here.
    pub version: String,
    /// Whether the programs were compiled without optimising everything.
    pub development_build: bool,
    /// The sources that lie there, by git; they may be younger than the programs.
    #[serde(default)]
    pub sources: String,
    /// Versions of libraries that do the work.
    #[serde(default)]
    pub libraries: Vec<(String, String)>,
    /// As Linux names it.
    #[serde(default)]
    pub processor: String,
    /// How many there are.
    pub processors: usize,
    /// What Linux has of it.
    pub memory_gib: f64,
    /// Linux, with its version.
    pub kernel: String,
    /// Settings of Postgres that matter, its version first.
    pub postgres: Vec<(String, String)>,
}

impl Machine {
    /// This one, with that Postgres and that program.
    pub async fn of(postgres: &Postgres, program: &Program) -> Result<Self> {
        let read = |path: &str| std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
        let total = read("/proc/meminfo")?
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok())
            .context("/proc/meminfo has no MemTotal")?;
        let cpuinfo = read("/proc/cpuinfo")?;
        let processor = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let described = Command::new("git")
            .args(["describe", "--always", "--dirty"])
            .current_dir(SOURCES)
            .output()
            .await
            .ok()
            .filter(|output| output.status.success());
        Ok(Machine {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            development_build: program.is_development_build(),
            sources: described.map_or_else(
                || "no git repository".to_owned(),
                |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
            ),
            libraries: ["tokio", "sqlx", "rdkafka-sys", "aws-sdk-sqs", "tikv-jemalloc-sys"]
                .map(|name| (name.to_owned(), locked_version(name).unwrap_or_default().to_owned()))
                .to_vec(),
            processor: processor.map_or_else(String::new, |(_, name)| name.to_owned()),
            processors: std::thread::available_parallelism().map_or(0, usize::from),
            memory_gib: total / 1024.0 / 1024.0,
            kernel: format!("Linux {}", read("/proc/sys/kernel/osrelease")?.trim()),
            postgres: postgres.settings().await?,
        })
    }

    /// In one line.
    pub fn text(&self) -> String {
        let postgres = self.postgres.iter().find(|(name, _)| name == "server_version");
        let libraries: Vec<String> = self.libraries.iter().map(|(name, version)| format!("{name} {version}")).collect();
        format!(
            "WriteApi {} at {}{}, {} x {}, {:.0} GiB, {}, PostgreSQL {}, {}",
            self.version,
            self.sources,
            if self.development_build { " (development build)" } else { "" },
            self.processors,
            self.processor,
            self.memory_gib,
            self.kernel,
            postgres.map_or("?", |(_, version)| version),
            libraries.join(", ")
        )
    }
}

/// The version of a package that everything is built with.
fn locked_version(name: &str) -> Option<&'static str> {
    let package = format!("name = \"{name}\"\nversion = \"");
    LOCK.split_once(&package)?.1.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_those_that_cargo_has_locked() {
        let version = locked_version("bench").expect("a member of the workspace");
        assert_eq!(version, env!("CARGO_PKG_VERSION"));
        assert_eq!(locked_version("no such package"), None);
    }
}
