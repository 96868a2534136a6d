//! A look at the database from outside, for `write-api check`: the server, the schema, the rights. Nothing is changed,
//! and nothing is retried.

use std::collections::BTreeMap;

use sqlx::migrate::{AppliedMigration, Migrate, MigrateError, Migration};
use sqlx::postgres::PgConnection;
use sqlx::{ConnectOptions, Connection};
use tokio::time::timeout;

use super::{CLIENT_MARGIN, Database, DbError, MIGRATIONS, connect_options};
use crate::config;

/// The oldest server that the service was run with, as `server_version_num` writes it.
pub const OLDEST_SERVER: i32 = 150_000;

/// What the service does with each table. It alters nothing.
const RIGHTS: [(&str, &[&str]); 9] = [
    ("listings", &["SELECT", "INSERT", "UPDATE"]),
    ("runs", &["SELECT", "INSERT", "UPDATE"]),
    ("run_listings", &["SELECT", "INSERT"]),
    ("valuations", &["SELECT", "INSERT"]),
    ("listing_valuations", &["SELECT", "INSERT", "UPDATE"]),
    ("publications", &["SELECT", "INSERT", "UPDATE"]),
    ("outbox", &["SELECT", "INSERT", "UPDATE"]),
    ("deliveries", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("listing_events", &["SELECT", "INSERT"]),
];

/// What a look found.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// The server's version as it writes it, such as `15.18 (Debian 15.18-1)`.
    pub version: String,
    /// The same as a number: 150018.
    pub version_number: i32,
    /// Whether the server takes no writes: a standby, or one switched to read-only.
    pub read_only: bool,
    /// The user that the rights are those of.
    pub user: String,
    /// The migrations; `None` if the user may not read which were applied.
    pub schema: Option<Schema>,
    /// Tables that are not there, or not where the user looks.
    pub missing_tables: Vec<&'static str>,
    /// By table, rights that the service needs and the user does not have.
    pub missing_rights: BTreeMap<&'static str, Vec<&'static str>>,
}

/// The migrations compiled in against those that were applied. Names are those of the files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Schema {
    /// Applied and as compiled in.
    pub good: Vec<String>,
    /// Compiled in, not applied.
    pub missing: Vec<String>,
    /// Applied with another text than the one compiled in.
    pub different: Vec<String>,
    /// Applied, not compiled in: they come from another version of the program.
    pub unknown: Vec<i64>,
    /// Begun and failed half-way.
    pub unfinished: Option<i64>,
}

/// The look was not possible.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{problem}; {remedy}")]
pub struct InspectionError {
    /// What happened.
    pub problem: String,
    /// What to do about it.
    pub remedy: &'static str,
}

const CHECK_ADDRESS: &str =
    "see that Postgres runs and that database.url (WRITE_API_DATABASE_URL) names its host and port";
const CHECK_CREDENTIALS: &str = "correct the user or the password in database.url, or let the server accept them";
const CHECK_NAME: &str = "create the database, or correct its name in database.url";
const ASK_AGAIN: &str = "ask again; if it stays so, see the server's log";

impl Database {
    /// The first of the migrations compiled in that the schema lacks; `None` if it has them all, and where the user may
    /// not read which were applied. Not retried, for health checks.
    pub async fn missing_migration(&self) -> Result<Option<String>, DbError> {
        let applied = async {
            let mut connection = self.connection().await?;
            connection.list_applied_migrations(&MIGRATIONS.table_name).await.map_err(unwrapped)
        };
        let applied = match self.bounded(applied).await {
            Ok(applied) => applied,
            Err(source) => match source.as_database_error().and_then(|error| error.code()).as_deref() {
                // SQLSTATE, undefined_table: nothing was ever applied.
                Some("42P01") => Vec::new(),
                // SQLSTATE, insufficient_privilege: `serve` needs no rights on that table.
                Some("42501") => return Ok(None),
                _ => return Err(DbError::Unavailable { what: "a look at the migrations", source }),
            },
        };
        Ok(compare(&MIGRATIONS.migrations, &applied, None).missing.into_iter().next())
    }
}

/// Connects on its own, since a pool hides the reason of a failure behind a timeout, and looks. Connecting is bounded by
/// `database.acquire_timeout`, each statement as always.
pub async fn inspect(config: &config::Database) -> Result<Inspection, InspectionError> {
    let options = connect_options(config)
        .map_err(|error| InspectionError { problem: error.to_string(), remedy: CHECK_ADDRESS })?
        .disable_statement_logging();
    let connected = timeout(config.acquire_timeout, PgConnection::connect_with(&options)).await;
    let no_answer = |bound| InspectionError { problem: format!("no answer within {bound:?}"), remedy: CHECK_ADDRESS };
    let mut connection = connected.map_err(|_| no_answer(config.acquire_timeout))?.map_err(failure)?;
    let bound = config.statement_timeout + CLIENT_MARGIN;
    let found = timeout(bound, look(&mut connection)).await.map_err(|_| no_answer(bound))?.map_err(failure);
    // Whether the server hears of the end does not matter.
    let _ = timeout(bound, connection.close()).await;
    found
}

async fn look(connection: &mut PgConnection) -> sqlx::Result<Inspection> {
    let server = sqlx::query!(
        r#"
        SELECT current_setting('server_version') AS "version!",
               current_setting('server_version_num')::integer AS "version_number!",
               pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean AS "read_only!",
               current_user::text AS "user!",
               to_regclass($1) IS NOT NULL AS "migrated!",
               coalesce(has_table_privilege(to_regclass($1), 'SELECT'), false) AS "migrations_readable!"
        "#,
        &*MIGRATIONS.table_name,
    )
    .fetch_one(&mut *connection)
    .await?;
    let schema = match (server.migrated, server.migrations_readable) {
        (false, _) => Some(compare(&MIGRATIONS.migrations, &[], None)),
        (true, false) => None,
        (true, true) => {
            let applied = connection.list_applied_migrations(&MIGRATIONS.table_name).await.map_err(unwrapped)?;
            let unfinished = connection.dirty_version(&MIGRATIONS.table_name).await.map_err(unwrapped)?;
            Some(compare(&MIGRATIONS.migrations, &applied, unfinished))
        }
    };

    let needed: Vec<(&str, &str)> =
        RIGHTS.iter().flat_map(|(table, rights)| rights.iter().map(|right| (*table, *right))).collect();
    let (tables, rights): (Vec<String>, Vec<String>) =
        needed.iter().map(|(table, right)| ((*table).to_owned(), (*right).to_owned())).unzip();
    let held = sqlx::query!(
        r#"
        SELECT to_regclass(needed.name) IS NOT NULL AS "there!",
               coalesce(has_table_privilege(to_regclass(needed.name), needed.privilege), false) AS "granted!"
        FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS needed (name, privilege, position)
        ORDER BY needed.position
        "#,
        &tables,
        &rights,
    )
    .fetch_all(connection)
    .await?;
    let mut missing_tables = Vec::new();
    let mut missing_rights: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for ((table, right), held) in needed.into_iter().zip(held) {
        if !held.there && missing_tables.last() != Some(&table) {
            missing_tables.push(table);
        } else if held.there && !held.granted {
            missing_rights.entry(table).or_default().push(right);
        }
    }
    Ok(Inspection {
        version: server.version,
        version_number: server.version_number,
        read_only: server.read_only,
        user: server.user,
        schema,
        missing_tables,
        missing_rights,
    })
}

fn compare(compiled_in: &[Migration], applied: &[AppliedMigration], unfinished: Option<i64>) -> Schema {
    let mut schema = Schema { unfinished, ..Schema::default() };
    for migration in compiled_in {
        // As the file is called: 0002_runs.
        let name = format!("{:04}_{}", migration.version, migration.description.replace(' ', "_"));
        let list = match applied.iter().find(|applied| applied.version == migration.version) {
            None => &mut schema.missing,
            Some(applied) if applied.checksum != migration.checksum => &mut schema.different,
            Some(_) => &mut schema.good,
        };
        list.push(name);
    }
    let known = |version: i64| compiled_in.iter().any(|migration| migration.version == version);
    schema.unknown = applied.iter().map(|applied| applied.version).filter(|version| !known(*version)).collect();
    schema
}

/// The failure itself, without the words of the migrator around it.
fn unwrapped(error: MigrateError) -> sqlx::Error {
    match error {
        MigrateError::Execute(error) => error,
        other => sqlx::Error::Migrate(Box::new(other)),
    }
}

fn failure(error: sqlx::Error) -> InspectionError {
    let code = error.as_database_error().and_then(|error| error.code());
    // SQLSTATE: PostgreSQL manual, appendix A.
    let remedy = match code.as_deref() {
        Some(code) if code.starts_with("28") => CHECK_CREDENTIALS,
        Some("3D000") => CHECK_NAME,
        Some(_) => ASK_AGAIN,
        None => CHECK_ADDRESS,
    };
    let problem = match error.as_database_error() {
        Some(answer) => answer.message().to_owned(),
        None => error.to_string(),
    };
    InspectionError { problem, remedy }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(migration: &Migration) -> AppliedMigration {
        AppliedMigration { version: migration.version, checksum: migration.checksum.clone() }
    }

    #[test]
    fn migrations_are_compared_by_version_and_text() {
        let compiled_in = &MIGRATIONS.migrations;
        let mut there: Vec<AppliedMigration> = compiled_in.iter().map(applied).collect();
        let all = compare(compiled_in, &there, None);
        assert_eq!(all.good.len(), compiled_in.len());
        assert_eq!(all.good[1], "0002_runs");
        assert_eq!(Schema { good: Vec::new(), ..all }, Schema::default());

        there[0].checksum = b"another text".to_vec().into();
        there[1].version = 9_999;
        let mixed = compare(compiled_in, &there, Some(3));
        assert_eq!(mixed.different, ["0001_listings"]);
        assert_eq!(mixed.missing, ["0002_runs"]);
        assert_eq!((mixed.unknown, mixed.unfinished), (vec![9_999], Some(3)));
        assert_eq!(compare(compiled_in, &[], None).missing.len(), compiled_in.len());
    }

    #[test]
    fn every_table_of_the_migrations_has_its_rights() {
        let mut created: Vec<&str> = MIGRATIONS
            .migrations
            .iter()
            .flat_map(|migration| migration.sql.as_str().lines())
            .filter_map(|line| line.strip_prefix("CREATE TABLE ")?.split(' ').next())
            .collect();
        let mut listed: Vec<&str> = RIGHTS.iter().map(|(table, _)| *table).collect();
        created.sort_unstable();
        listed.sort_unstable();
        assert_eq!(created, listed, "RIGHTS must name each table, with what the statements on it need");
    }
}
