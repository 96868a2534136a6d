//! What the PostgreSQL proxy does wrong, as the real client sees it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use local_stack::{PgFault, PostgresProxy};
use sqlx::{Connection, PgConnection, Row};
use tokio::time::timeout;

const SHORT: Duration = Duration::from_millis(500);

/// A proxy to a database with the table `made (id int primary key)`.
struct Bench {
    proxy: PostgresProxy,
    /// Past the proxy.
    direct: PgConnection,
}

impl Bench {
    async fn new(name: &str) -> Result<Self> {
        let url = local_stack::shared().await?.postgres().create_database(name).await?;
        let mut direct = PgConnection::connect(&url).await?;
        sqlx::query("CREATE TABLE made (id int PRIMARY KEY)").execute(&mut direct).await?;
        Ok(Self { proxy: PostgresProxy::start(&url)?, direct })
    }

    async fn client(&self) -> Result<PgConnection> {
        Ok(PgConnection::connect(self.proxy.url()).await?)
    }

    async fn made(&mut self) -> Result<Vec<i32>> {
        let rows = sqlx::query("SELECT id FROM made ORDER BY id").fetch_all(&mut self.direct).await?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    fn hits(&self, name: &str) -> u64 {
        self.proxy.hits().get(name).copied().unwrap_or(0)
    }
}

async fn make(connection: &mut PgConnection, id: i32) -> sqlx::Result<()> {
    sqlx::query("INSERT INTO made (id) VALUES ($1)").bind(id).execute(connection).await.map(drop)
}

fn after_commit(matching: &str) -> PgFault {
    PgFault::CutAfterCommit { matching: matching.to_owned() }
}

#[tokio::test]
async fn without_an_order_everything_passes() -> Result<()> {
    let mut bench = Bench::new("proxy_passes").await?;
    let mut client = bench.client().await?;
    // Long values go through in many pieces.
    let long: String =
        sqlx::query("SELECT repeat($1, 300000)").bind("long").fetch_one(&mut client).await?.try_get(0)?;
    assert_eq!(long.len(), 1_200_000);
    let mut transaction = client.begin().await?;
    make(&mut transaction, 1).await?;
    transaction.commit().await?;
    drop(client.begin().await?);
    assert!(make(&mut client, 1).await.is_err(), "the key is there already");
    client.ping().await?;
    client.close().await?;
    assert_eq!(bench.made().await?, [1]);
    assert!(bench.proxy.hits().is_empty());
    Ok(())
}

#[tokio::test]
async fn a_statement_is_committed_and_its_client_does_not_hear_of_it() -> Result<()> {
    let mut bench = Bench::new("proxy_commits").await?;
    let mut client = bench.client().await?;
    // Prepared now, so that later only its name is sent.
    make(&mut client, 1).await?;
    bench.proxy.order(after_commit("INSERT INTO made"), 1);
    sqlx::query("SELECT 1").execute(&mut client).await.context("another statement")?;
    assert!(make(&mut client, 1).await.is_err_and(|error| error.as_database_error().is_some()), "no commit, no cut");
    assert_eq!(bench.hits("cut-after-commit"), 0);

    let lost = make(&mut client, 2).await.expect_err("the connection is cut");
    assert!(matches!(lost, sqlx::Error::Io(_)), "{lost:?}");
    assert_eq!((bench.made().await?, bench.hits("cut-after-commit")), (vec![1, 2], 1));
    make(&mut bench.client().await?, 3).await.context("one was ordered")?;
    Ok(())
}

#[tokio::test]
async fn a_transaction_is_cut_after_its_own_commit() -> Result<()> {
    let mut bench = Bench::new("proxy_transactions").await?;
    for (matching, id) in [("INSERT INTO made", 1), ("COMMIT", 2)] {
        bench.proxy.order(after_commit(matching), 1);
        let mut client = bench.client().await?;
        // Rolled back: not it.
        let mut transaction = client.begin().await?;
        make(&mut transaction, 99).await?;
        transaction.rollback().await?;

        let mut transaction = client.begin().await?;
        make(&mut transaction, id).await.context("before the commit")?;
        assert!(transaction.commit().await.is_err(), "{matching}");
    }
    assert_eq!((bench.made().await?, bench.hits("cut-after-commit")), (vec![1, 2], 2));
    Ok(())
}

#[tokio::test]
async fn a_statement_is_cut_before_it_is_executed() -> Result<()> {
    let mut bench = Bench::new("proxy_before").await?;
    for matching in ["INSERT INTO made", "COMMIT"] {
        bench.proxy.order(PgFault::CutBeforeExecute { matching: matching.to_owned() }, 1);
        let mut client = bench.client().await?;
        let result = async {
            let mut transaction = client.begin().await?;
            make(&mut transaction, 1).await?;
            transaction.commit().await
        };
        assert!(result.await.is_err(), "{matching}");
    }
    assert_eq!((bench.made().await?, bench.hits("cut-before-execute")), (vec![], 2));
    Ok(())
}

#[tokio::test]
async fn all_connections_are_cut_and_new_ones_while_it_is_held() -> Result<()> {
    let bench = Bench::new("proxy_cuts").await?;
    let (mut one, mut two) = (bench.client().await?, bench.client().await?);
    bench.proxy.cut();
    assert!(timeout(SHORT, one.ping()).await?.is_err());
    assert!(timeout(SHORT, two.ping()).await?.is_err());
    assert_eq!(bench.hits("cut"), 2);
    let mut client = bench.client().await?;
    client.ping().await?;

    bench.proxy.hold(PgFault::Cut, Duration::from_secs(60));
    assert!(timeout(SHORT, client.ping()).await?.is_err());
    assert!(timeout(SHORT, bench.client()).await?.is_err());
    bench.proxy.clear();
    bench.client().await?.ping().await?;
    Ok(())
}

#[tokio::test]
async fn a_half_open_connection_stays_dead_and_its_server_is_released_with_the_time() -> Result<()> {
    let mut bench = Bench::new("proxy_swallows").await?;
    let mut client = bench.client().await?;
    let backend: i32 = sqlx::query("SELECT pg_backend_pid()").fetch_one(&mut client).await?.try_get(0)?;
    sqlx::raw_sql("BEGIN; INSERT INTO made VALUES (1)").execute(&mut client).await?;
    let held = Duration::from_secs(2);
    let started = Instant::now();
    bench.proxy.hold(PgFault::Swallow, held);
    // No answer, and no end of the connection either.
    assert!(timeout(SHORT, client.ping()).await.is_err(), "it was told");
    assert!(timeout(SHORT, bench.client()).await.is_err(), "a new one got in");
    drop(client);

    let mut is_alive = async || -> Result<bool> {
        let alive = sqlx::query("SELECT count(*) FROM pg_stat_activity WHERE pid = $1").bind(backend);
        Ok(alive.fetch_one(&mut bench.direct).await?.try_get::<i64, _>(0)? > 0)
    };
    assert!(is_alive().await?, "the server was told that the client is gone");
    timeout(Duration::from_secs(10), async {
        while is_alive().await? {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::Ok(())
    })
    .await
    .context("the server still waits")??;
    assert!(started.elapsed() >= held, "{:?}", started.elapsed());
    bench.client().await?.ping().await?;
    assert_eq!(bench.hits("swallow"), 2, "one for each connection");
    Ok(())
}

#[tokio::test]
async fn bytes_are_late_and_slow() -> Result<()> {
    let bench = Bench::new("proxy_slow").await?;
    let mut client = bench.client().await?;
    client.ping().await?;
    bench.proxy.order(PgFault::Delay(300), 2);
    let started = Instant::now();
    client.ping().await?;
    assert!(started.elapsed() >= Duration::from_millis(600), "{:?}", started.elapsed());
    assert_eq!(bench.hits("delay"), 2);

    bench.proxy.hold(PgFault::Throttle(64_000), Duration::from_secs(60));
    let started = Instant::now();
    sqlx::query("SELECT repeat('x', 64000)").execute(&mut client).await?;
    let elapsed = started.elapsed();
    assert!((Duration::from_millis(900)..Duration::from_secs(5)).contains(&elapsed), "{elapsed:?}");
    bench.proxy.clear();
    let started = Instant::now();
    sqlx::query("SELECT repeat('x', 64000)").execute(&mut client).await?;
    assert!(started.elapsed() < Duration::from_millis(900));
    assert!(bench.hits("throttle") > 0);
    Ok(())
}
