//! `write-api migrate`: the schema.

use anyhow::Context;

use crate::config::Config;
use crate::db::Database;

/// Applies the migrations that are missing; does nothing if there are none.
pub(super) async fn run(config: &Config) -> anyhow::Result<()> {
    let database = Database::new(&config.database)?;
    database.migrate().await.context("the database's schema could not be brought up to date")?;
    println!("the database's schema is up to date");
    Ok(())
}
