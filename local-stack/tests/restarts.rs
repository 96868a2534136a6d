//! Servers that go away and come back, on stacks of their own.

use std::time::{Duration, Instant};

use anyhow::Result;
use local_stack::{Postgres, PostgresOptions, Sqs};
use sqlx::{Connection, PgConnection, Row};
use tokio::time::timeout;

fn fast() -> PostgresOptions {
    PostgresOptions { durable: false, ..PostgresOptions::default() }
}

#[tokio::test]
async fn a_database_is_away_for_a_time_and_has_lost_no_commit() -> Result<()> {
    let postgres = Postgres::separate(fast()).await?;
    let url = postgres.create_database("restarted").await?;
    let mut before = PgConnection::connect(&url).await?;
    sqlx::query("CREATE TABLE made (id int)").execute(&mut before).await?;
    for round in 1..=3_i64 {
        // The last commit is the one that a crash would lose.
        for _ in 0..100 {
            sqlx::query("INSERT INTO made VALUES (1)").execute(&mut before).await?;
        }
        let down = Duration::from_millis(400);
        let started = Instant::now();
        let restart = postgres.restart_immediately(down);
        let refused = async {
            tokio::time::sleep(down / 2).await;
            (before.ping().await.is_err(), PgConnection::connect(&url).await.is_err())
        };
        let (restarted, refused) = tokio::join!(restart, refused);
        restarted?;
        assert_eq!(refused, (true, true));
        assert!(started.elapsed() >= down);
        before = PgConnection::connect(&url).await?;
        let count: i64 = sqlx::query("SELECT count(*) FROM made").fetch_one(&mut before).await?.try_get(0)?;
        assert_eq!(count, round * 100);
    }
    Ok(())
}

#[tokio::test]
async fn one_backend_is_terminated_at_a_time() -> Result<()> {
    let postgres = Postgres::separate(fast()).await?;
    assert!(!postgres.terminate_one_backend().await?, "there is no client");
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(PgConnection::connect(&postgres.admin_url()).await?);
    }
    for left in (0..3).rev() {
        assert!(postgres.terminate_one_backend().await?);
        let mut alive = Vec::new();
        for mut client in clients {
            if client.ping().await.is_ok() {
                alive.push(client);
            }
        }
        clients = alive;
        assert_eq!(clients.len(), left);
    }
    Ok(())
}

#[tokio::test]
async fn a_suspended_emulator_answers_nothing_and_goes_on() -> Result<()> {
    let sqs = Sqs::separate().await?;
    let client = sqs.client().await;
    client.list_queues().send().await?;
    sqs.suspend();
    assert!(timeout(Duration::from_secs(1), client.list_queues().send()).await.is_err(), "an answer came");
    sqs.resume();
    timeout(Duration::from_secs(10), client.list_queues().send()).await??;
    Ok(())
}
