//! Postgres: the server, the schema, the rights.

use super::report::Finding;
use crate::config;
use crate::db::inspection::{self, Inspection, OLDEST_SERVER, Schema};

const MIGRATE: &str = "run `write-api migrate` as the owner of the schema";

pub(super) async fn check(config: &config::Database) -> Vec<Finding> {
    match inspection::inspect(config).await {
        Ok(found) => judge(&config.address(), &found),
        Err(error) => {
            vec![Finding::fail("database", format!("{}: {}", config.address(), error.problem), error.remedy)]
        }
    }
}

fn judge(address: &str, found: &Inspection) -> Vec<Finding> {
    let mut findings = vec![server(address, found)];
    match &found.schema {
        Some(schema) => findings.extend(migrations(schema)),
        None => findings.push(Finding::warn(
            "database schema",
            format!("{} may not read which migrations were applied", found.user),
            format!("GRANT SELECT ON _sqlx_migrations TO {}, or check as the owner", quoted(&found.user)),
        )),
    }
    findings.extend(rights(found));
    findings
}

fn server(address: &str, found: &Inspection) -> Finding {
    let what = format!("{address}, PostgreSQL {}", found.version);
    if found.version_number < OLDEST_SERVER {
        let remedy = format!("use PostgreSQL {} or newer", OLDEST_SERVER / 10_000);
        return Finding::fail("database", format!("{what}, is too old"), remedy);
    }
    if found.read_only {
        let remedy = "name the primary in database.url, or end the server's read-only mode";
        return Finding::fail("database", format!("{what}, takes no writes"), remedy);
    }
    Finding::ok("database", what)
}

fn migrations(schema: &Schema) -> Vec<Finding> {
    const NAME: &str = "database schema";
    let mut findings = Vec::new();
    if let Some(version) = schema.unfinished {
        let remedy = "see what it left behind, mend that, and delete its row from _sqlx_migrations";
        findings.push(Finding::fail(NAME, format!("migration {version:04} failed half-way"), remedy));
    }
    if !schema.missing.is_empty() {
        findings.push(Finding::fail(NAME, format!("not applied: {}", schema.missing.join(", ")), MIGRATE));
    }
    if !schema.different.is_empty() {
        let found = format!("applied with another text than this program's: {}", schema.different.join(", "));
        findings.push(Finding::fail(NAME, found, "use the program that this database was migrated with"));
    }
    if !schema.unknown.is_empty() {
        let versions: Vec<String> = schema.unknown.iter().map(|version| format!("{version:04}")).collect();
        // A deployment rolled back keeps its newer schema, and must start.
        let remedy = "fine while a newer version is being rolled out or back; else use that version";
        let found = format!("applied by a newer version of the program: {}", versions.join(", "));
        findings.push(Finding::warn(NAME, found, remedy));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(NAME, format!("all {} migrations are applied", schema.good.len())));
    }
    findings
}

fn rights(found: &Inspection) -> Vec<Finding> {
    const NAME: &str = "database rights";
    let user = &found.user;
    let mut findings = Vec::new();
    if !found.missing_tables.is_empty() {
        let problem = format!("{} missing, or in a schema where {user} does not look", found.missing_tables.join(", "));
        findings.push(Finding::fail(NAME, problem, format!("{MIGRATE}, or GRANT USAGE on its schema")));
    }
    for (table, rights) in &found.missing_rights {
        let rights = rights.join(", ");
        let remedy = format!("GRANT {rights} ON {table} TO {}", quoted(user));
        findings.push(Finding::fail(NAME, format!("{user} has no {rights} on {table}"), remedy));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(NAME, format!("{user} may do all that the service does")));
    }
    findings
}

/// A name as SQL takes it, whatever is in it.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::report::{failures, lines};

    fn good() -> Inspection {
        Inspection {
            version: "15.18".to_owned(),
            version_number: 150_018,
            read_only: false,
            user: "app".to_owned(),
            schema: Some(Schema { good: vec!["0001_listings".to_owned()], ..Schema::default() }),
            missing_tables: Vec::new(),
            missing_rights: Default::default(),
        }
    }

    #[test]
    fn what_no_test_server_can_be_is_judged_too() {
        assert_eq!(failures(&judge("app@db:5432/app", &good())), 0);
        let old = judge("app@db:5432/app", &Inspection { version_number: 140_020, ..good() });
        assert!(lines(&old).contains("is too old; use PostgreSQL 15 or newer"), "{}", lines(&old));
        let standby = judge("app@db:5432/app", &Inspection { read_only: true, ..good() });
        assert!(lines(&standby).contains("takes no writes; name the primary"), "{}", lines(&standby));
        assert_eq!(quoted("we\"ird"), "\"we\"\"ird\"");
    }
}
