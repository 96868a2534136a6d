//! `local-stack with-postgres`

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus};

use anyhow::{Context, Result, bail};
use clap::Args;
use local_stack::{Postgres, PostgresOptions};
use sqlx::migrate::Migrator;
use sqlx::{Connection, PgConnection};
use tokio::process::Command;

/// The database that the command finds.
const DATABASE: &str = "write_api";

/// The command finds the database's URL in DATABASE_URL and WRITE_API_DATABASE_URL.
#[derive(Debug, Args)]
pub(super) struct WithPostgres {
    /// Apply the migrations in this directory first; without it the database is empty
    #[arg(long, value_name = "DIRECTORY")]
    migrations: Option<PathBuf>,
    /// What to run, with its arguments; its exit status becomes that of this program
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl WithPostgres {
    /// Runs the command to its end, or stops it when `ended` completes.
    pub(super) async fn run(self, ended: impl Future<Output = ()>) -> Result<ExitCode> {
        let work = async {
            let options = PostgresOptions { durable: false, ..PostgresOptions::default() };
            let postgres = Postgres::separate(options).await?;
            let url = postgres.create_database(DATABASE).await?;
            if let Some(migrations) = &self.migrations {
                migrate(&url, migrations).await?;
            }
            let Some((program, arguments)) = self.command.split_first() else { bail!("no command was given") };
            let mut command = Command::new(program);
            command.args(arguments).env("DATABASE_URL", &url).env("WRITE_API_DATABASE_URL", &url).kill_on_drop(true);
            let mut child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
            anyhow::Ok(exit_code(child.wait().await.with_context(|| format!("cannot wait for {}", program.display()))?))
        };
        tokio::select! {
            code = work => Ok(ExitCode::from(code?)),
            // A success that was none would let a script go on.
            () = ended => bail!("stopped before the command had ended"),
        }
    }
}

/// Reads the migrations now: a program that has them compiled in may be older than they are.
async fn migrate(url: &str, directory: &Path) -> Result<()> {
    let failed = || format!("cannot apply the migrations in {}", directory.display());
    let migrations = Migrator::new(directory).await.with_context(failed)?;
    let mut connection = PgConnection::connect(url).await.with_context(failed)?;
    migrations.run(&mut connection).await.with_context(failed)?;
    connection.close().await.with_context(failed)
}

/// As a shell tells it: a child that a signal ended has 128 and the signal's number.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_not_taken_for_a_success() {
        assert_eq!(exit_code(ExitStatus::from_raw(0)), 0);
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(libc::SIGKILL)), 137);
    }
}
