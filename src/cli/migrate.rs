//! `write-api migrate`: the schema.

use anyhow::Context;

use crate::config::Config;
use crate::db::Database;

pub(super) const HELP: &str = "\
Needs: database.url of a user that may create tables. `serve` gets by with less: SELECT, INSERT, UPDATE and DELETE on them.

Example:
  WRITE_API_DATABASE_URL=postgres://… write-api migrate

Exit codes: 0 the schema is up to date, 1 failed, 64 wrong usage, 78 wrong configuration.";

/// Applies the migrations that are missing; does nothing if there are none.
pub(super) async fn run(config: &Config) -> anyhow::Result<()> {
    let database = Database::new(&config.database)?;
    database.migrate().await.context("the database's schema could not be brought up to date")?;
    println!("the database's schema is up to date");
    Ok(())
}
