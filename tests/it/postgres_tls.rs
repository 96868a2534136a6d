//! Postgres as it is reached over a network: encrypted, its certificate and name verified, a password proven.

use std::path::Path;

use anyhow::{Result, ensure};
use local_stack::{Authority, Behaviour, Postgres};
use sqlx::{Connection, PgConnection, Row};

use crate::harness::{LONG, SOON, World, text, until};
use crate::neighbours::missing;

const PASSWORD: &str = "the-password-of-the-database";

fn url(host: &str, port: u16, password: &str, parameters: &str) -> String {
    format!("postgres://postgres:{password}@{host}:{port}/app?{parameters}")
}

fn verified_by(authority: &Path) -> String {
    format!("sslmode=verify-full&sslrootcert={}", authority.display())
}

#[tokio::test]
async fn only_the_right_server_is_talked_to_and_only_encrypted() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let (authority, other) = (Authority::create().await?, Authority::create().await?);
    let certificate = authority.issue("DNS:localhost").await?;
    let Some(postgres) = Postgres::guarded(&certificate, PASSWORD).await? else {
        eprintln!("skipped: this machine's PostgreSQL was built without TLS; install Debian's package postgresql");
        return Ok(());
    };
    postgres.create_database("app").await?;
    let port = postgres.port();
    let verified = verified_by(&authority.certificate());
    let file = world.path("database-url");
    world.set("database.url", "").set("database.url_file", file.display()).set("database.acquire_timeout", "3s");

    for (case, url, reason) in [
        ("another name", url("127.0.0.1", port, PASSWORD, &verified), "certificate"),
        ("another authority", url("localhost", port, PASSWORD, &verified_by(&other.certificate())), "certificate"),
        ("the system's authorities", url("localhost", port, PASSWORD, "sslmode=verify-full"), "certificate"),
        ("no encryption", url("localhost", port, PASSWORD, "sslmode=disable"), "no encryption"),
        ("another password", url("localhost", port, "a-guess-at-it", &verified), "password authentication failed"),
    ] {
        std::fs::write(&file, url)?;
        let output = world.cli(&["migrate"])?;
        let said = text(&output.stderr);
        ensure!(output.status.code() == Some(1) && said.contains(reason), "{case}: {reason:?} is not in\n{output:?}");
        ensure!(!said.contains(PASSWORD) && !said.contains("a-guess-at-it"), "{case}: the password is told:\n{said}");
    }

    std::fs::write(&file, url("localhost", port, PASSWORD, &verified))?;
    for arguments in [&["migrate"][..], &["seed", "--count", "50"]] {
        world.done(arguments)?;
    }
    let service = world.serve().await?;
    let id = world.refresh(&["--limit", "50"])?;
    let mut admin = PgConnection::connect(&postgres.database_url("app")).await?;
    until("a published run", LONG, async || {
        let published = "SELECT count(*) FROM publications WHERE run_id = $1 AND state = 'complete'";
        let published: i64 = sqlx::query_scalar(published).bind(&id).fetch_one(&mut admin).await?;
        Ok((published == 1).then_some(()))
    })
    .await?;
    ensure!(missing(&service).await?.is_empty());
    // The pool's connections and the keeper's.
    let connections = "SELECT count(*), count(*) FILTER (WHERE s.ssl) FROM pg_stat_activity AS a
                       JOIN pg_stat_ssl AS s USING (pid) WHERE a.application_name = 'write-api'";
    let counts = until("connections", SOON, async || {
        let row = sqlx::query(connections).fetch_one(&mut admin).await?;
        let (all, encrypted): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        Ok((all > 0).then_some((all, encrypted)))
    })
    .await?;
    ensure!(counts.0 == counts.1, "(all, encrypted) connections: {counts:?}");
    world.finish(service).await
}
