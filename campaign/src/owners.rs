//! A witness in the database: which replica took a run, and which one wrote to it.
//!
//! The books cannot show a late owner's writes, because its answers are the same as those of the new one. So each replica
//! logs in under a name of its own, and a trigger notes every write to a run by another than the replica that had taken it.

use anyhow::{Context, Result};
use sqlx::{AssertSqlSafe, PgPool};

const WITNESS: &str = "
    CREATE SCHEMA campaign;
    CREATE TABLE campaign.owners (token uuid PRIMARY KEY, replica name NOT NULL);
    CREATE TABLE campaign.strangers (run_id text NOT NULL, replica name NOT NULL, owner name NOT NULL);
    CREATE FUNCTION campaign.watch() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        taken_by name;
    BEGIN
        IF NEW.owner IS NOT NULL AND NEW.owner IS DISTINCT FROM OLD.owner THEN
            INSERT INTO campaign.owners VALUES (NEW.owner, session_user) ON CONFLICT DO NOTHING;
        ELSIF (NEW.valued, NEW.failed, NEW.cursor) IS DISTINCT FROM (OLD.valued, OLD.failed, OLD.cursor) THEN
            SELECT replica INTO taken_by FROM campaign.owners WHERE token = OLD.owner;
            IF taken_by IS DISTINCT FROM session_user THEN
                INSERT INTO campaign.strangers VALUES (NEW.run_id, session_user, coalesce(taken_by, 'nobody'));
            END IF;
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER campaign_watch AFTER UPDATE ON runs FOR EACH ROW EXECUTE FUNCTION campaign.watch()";

/// Sets the witness up.
pub async fn watch(database: &PgPool) -> Result<()> {
    sqlx::raw_sql(WITNESS).execute(database).await.context("cannot watch the owners of runs")?;
    Ok(())
}

/// `url` with the name under which `replica` logs in, which is made if it is not there.
pub async fn log_in_as(database: &PgPool, url: &str, replica: &str) -> Result<String> {
    let name = replica.replace('-', "_");
    let role = format!(
        "DO $$ BEGIN CREATE ROLE {name} LOGIN SUPERUSER; EXCEPTION WHEN duplicate_object OR unique_violation THEN END $$"
    );
    sqlx::raw_sql(AssertSqlSafe(role))
        .execute(database)
        .await
        .with_context(|| format!("cannot make the role {name}"))?;
    let (_, rest) = url.split_once("://").with_context(|| format!("{url} is no URL"))?;
    let host = rest.split_once('@').map_or(rest, |(_, host)| host);
    Ok(format!("postgres://{name}@{host}"))
}

/// Writes by others than the owner, in words.
pub async fn strangers(database: &PgPool) -> Result<Vec<String>> {
    let found =
        "SELECT format('%s wrote to the run %s, which %s had taken, %s times', replica, run_id, owner, count(*))
                 FROM campaign.strangers GROUP BY replica, run_id, owner";
    Ok(sqlx::query_scalar(found).fetch_all(database).await?)
}
