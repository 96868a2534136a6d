//! Postgres: all SQL of the service lives in this room.
//!
//! Every statement may be repeated: what it writes is keyed by event, run or listing, so a repeat after a lost answer
//! changes nothing. That is why `run!` can retry whatever failed for a reason that passes.
//!
//! Every wait for Postgres has a bound of this side, since a connection whose other end vanished would otherwise be waited
//! for until the kernel gives up:
//!
//! | wait | bound |
//! |---|---|
//! | for a connection of the pool, opening one included | `database.acquire_timeout` |
//! | for the answer to what runs on it, a transaction of several statements included | `database.statement_timeout` by the server, `CLIENT_MARGIN` more by us |
//! | for a connection to go back to the pool, or to be closed | `pooled::GIVE_BACK` |
//! | for all tries of `run!` | `RETRY_FOR`, and one more try |
//! | for a turn to commit answers | the longest that one before it may take with all its tries, `longest` |
//! | health: the ping, and the reason for none | 5 s, and `CLIENT_MARGIN` |
//! | health: the migrations | as a statement |
//! | the keeper's renewals, connecting included | a quarter of the visibility timeout, at most 15 s (`queue/keeper.rs`) |
//! | `migrate` | `database.acquire_timeout` to connect, `MIGRATE` for all migrations; `database.statement_timeout` for each lock |
//! | `check` | as the pool and a statement (`db/inspection.rs`) |
//! | `seed`, `status`, `cancel`, `retry` | those of `run!` |
//! | the end of the process | `CLOSE` |
//!
//! With the defaults a half-open connection is noticed after 22 s and its slot is free after 27.

pub mod audit;
pub mod deliveries;
pub mod inspection;
pub mod ledger;
pub mod listings;
pub mod operations;
pub mod outbox;
#[cfg(feature = "fault-injection")]
mod planted;
mod pooled;
pub mod publications;
pub mod retention;
pub mod runs;
pub mod upserts;
pub mod valuations;

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPoolOptions};
use sqlx::{ConnectOptions, Connection};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};

use self::pooled::{Connections, Pooled};
use crate::config::{self, Backoff};
use crate::task::{For, wait};

/// The migrations, compiled in.
static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!();

/// How much longer than the server the client waits for a statement: the server's own error says more.
const CLIENT_MARGIN: Duration = Duration::from_secs(2);

/// How long all migrations together may take. An index over many rows takes minutes, which no statement of the service may.
const MIGRATE: Duration = Duration::from_secs(3600);

/// How long closing the pool may take.
const CLOSE: Duration = Duration::from_secs(1);

/// Waits between the tries of one statement.
const RETRY: Backoff = Backoff { base: Duration::from_millis(50), cap: Duration::from_secs(2) };

/// How long a statement is retried before the event as a whole is given back to its queue.
const RETRY_FOR: Duration = Duration::from_secs(20);

/// Why Postgres did not do what was asked. Two kinds, because callers do two different things.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// Postgres could not be reached or asked to be tried again, and went on so: the event is retried later.
    #[error("Postgres is unavailable for {what}: {source}")]
    Unavailable {
        /// The statement, in words.
        what: &'static str,
        /// The last failure.
        source: sqlx::Error,
    },
    /// Postgres will never accept this: retrying is no use.
    #[error("Postgres refused {what}: {source}")]
    Refused {
        /// The statement, in words.
        what: &'static str,
        /// Its answer.
        source: sqlx::Error,
    },
}

/// A pool of connections; cloning shares it.
#[derive(Clone)]
pub struct Database {
    connections: Arc<Connections>,
    acquire_timeout: Duration,
    lock_timeout: Duration,
    bound: Duration,
    /// Turns to commit answers, for half of the connections. The calls of all runs may be answered at the same moment, and then as
    /// many runs commit as may; those over the same listings also wait for each other's rows. Without connections left, fast events
    /// would wait for all of it.
    commit_turns: Arc<Semaphore>,
}

impl Database {
    /// A pool that connects when first used, so that the service starts without Postgres and says so in `/readyz`.
    pub fn new(config: &config::Database) -> anyhow::Result<Self> {
        let pool = PgPoolOptions::new()
            .max_connections(config.max_connections)
            .acquire_timeout(config.acquire_timeout)
            .idle_timeout(Duration::from_secs(60))
            // A ping before each use would double the statements; a broken connection shows at its use and is retried.
            .test_before_acquire(false)
            .connect_lazy_with(connect_options(config)?);
        let connections = Connections::new(pool, config.max_connections, config.acquire_timeout);
        Ok(Database {
            connections,
            acquire_timeout: config.acquire_timeout,
            lock_timeout: config.statement_timeout,
            bound: config.statement_timeout + CLIENT_MARGIN,
            commit_turns: Arc::new(Semaphore::new((config.max_connections / 2).max(1) as usize)),
        })
    }

    /// Applies the migrations that are missing, on a connection of its own.
    pub async fn migrate(&self) -> anyhow::Result<()> {
        let options = self.connections.pool().connect_options().as_ref().clone().options([("statement_timeout", "0")]);
        let connected = timeout(self.acquire_timeout, options.connect()).await;
        let mut connection =
            connected.map_err(|_| anyhow::anyhow!("no connection within {:?}", self.acquire_timeout))??;
        let migrated = timeout(MIGRATE, MIGRATIONS.run(&mut connection)).await;
        migrated
            .map_err(|_| anyhow::anyhow!("the migrations did not end within {MIGRATE:?}; see what they wait for"))??;
        // Whether the server hears of the end does not matter.
        let _ = timeout(CLOSE, connection.close()).await;
        Ok(())
    }

    /// One round trip, not retried, for health checks. A server that takes no writes is as good as away.
    pub async fn ping(&self) -> Result<(), DbError> {
        let what = "a ping";
        self.connections.sweep();
        let asked = async {
            let mut connection = self.connection().await?;
            let is_read_only = sqlx::query_scalar!(
                r#"SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean AS "read_only!""#
            )
            .fetch_one(&mut *connection)
            .await;
            match is_read_only {
                Ok(false) => Ok(()),
                Ok(true) => {
                    // Another one may find the server that took over, or the same one with its setting undone.
                    connection.spoil();
                    Err(sqlx::Error::Protocol("the server takes no writes: it is a standby, or read-only".into()))
                }
                Err(error) => {
                    if spoils_connection(&error) {
                        connection.spoil();
                    }
                    Err(error)
                }
            }
        };
        let result = timeout(self.bound.min(Duration::from_secs(5)), asked).await;
        match result.unwrap_or(Err(sqlx::Error::PoolTimedOut)) {
            Ok(()) => Ok(()),
            Err(sqlx::Error::PoolTimedOut) => Err(DbError::Unavailable { what, source: self.why_timed_out().await }),
            Err(source) => Err(DbError::Unavailable { what, source }),
        }
    }

    /// The pool keeps why it cannot connect to itself and times out, as it does when all its connections are in use. A
    /// connection of one's own tells the two apart.
    async fn why_timed_out(&self) -> sqlx::Error {
        match timeout(CLIENT_MARGIN, PgConnection::connect_with(&self.connections.pool().connect_options())).await {
            Ok(Err(error)) => error,
            // Dropped, and closed by that: Postgres is there, and the pool was full or the answer slow.
            Ok(Ok(_)) | Err(_) => sqlx::Error::PoolTimedOut,
        }
    }

    /// Closes all connections, waiting a moment for those in use. One whose peer does not answer would be waited for
    /// until the kernel gives it up.
    pub async fn close(&self) {
        self.connections.close();
        if timeout(CLOSE, self.connections.pool().close()).await.is_err() {
            tracing::debug!("connections to Postgres did not close in time; they end with the process");
        }
    }

    /// A connection of the pool, within `database.acquire_timeout`.
    // Not async: the wait belongs to the place of the call.
    #[track_caller]
    fn connection(&self) -> impl Future<Output = sqlx::Result<Pooled>> {
        wait(For::Database, Arc::clone(&self.connections).acquire())
    }

    /// A turn to commit answers, held until they are committed. Whoever has one has bounds, so it comes.
    #[track_caller]
    fn commit_turn(&self) -> impl Future<Output = Result<SemaphorePermit<'_>, DbError>> {
        let bound = self.longest();
        wait(For::Database, timeout(bound, self.commit_turns.acquire())).map(move |turn| match turn {
            Ok(turn) => Ok(turn.expect("the semaphore is never closed")),
            Err(_) => {
                let source = timed_out(format!("the batches before it were not committed within {bound:?}"));
                Err(DbError::Unavailable { what: "a batch of valuations", source })
            }
        })
    }

    /// The longest that one piece of work takes, with all its tries; without the wait for a turn.
    pub fn longest(&self) -> Duration {
        RETRY_FOR + RETRY.cap + self.acquire_timeout + self.bound
    }

    /// The client-side bound on a statement.
    #[track_caller]
    fn bounded<T>(&self, work: impl Future<Output = sqlx::Result<T>>) -> impl Future<Output = sqlx::Result<T>> {
        let bound = self.bound;
        wait(For::Database, timeout(bound, work))
            .map(move |answered| answered.unwrap_or_else(|_| Err(timed_out(format!("no answer within {bound:?}")))))
    }
}

/// A bound of this side was passed.
fn timed_out(problem: String) -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, problem))
}

/// Runs statements on a connection, bounded, and again while they fail for a reason that passes: `run!(database, "what
/// it is, for errors", connection => { … })`. The block gives a `sqlx::Result` and must be repeatable. A macro, because a
/// function that takes an async closure would not be `Send` (rust-lang/rust#110338). In the place of what it is there may be
/// [`Tries`] of one's own.
macro_rules! run {
    ($database:expr, $what:literal, $connection:ident => $work:block) => {
        $crate::db::run!($database, $crate::db::Tries::new($what), $connection => $work)
    };
    ($database:expr, $tries:expr, $connection:ident => $work:block) => {{
        let mut tries: $crate::db::Tries = $tries;
        loop {
            let result = match $database.connection().await {
                Ok(mut pooled) => {
                    let $connection: &mut sqlx::postgres::PgConnection = &mut pooled;
                    let result = $database.bounded(async { $work }).await;
                    match &result {
                        Ok(_) => pooled.keep(),
                        Err(error) if $crate::db::spoils_connection(error) => pooled.spoil(),
                        Err(_) => {}
                    }
                    result
                }
                Err(error) => Err(error),
            };
            if let Some(end) = tries.judge(result).await {
                break end;
            }
        }
    }};
}
use run;

/// The tries of one piece of work.
struct Tries {
    what: &'static str,
    deadline: Instant,
    attempt: u32,
}

impl Tries {
    fn new(what: &'static str) -> Self {
        Tries { what, deadline: Instant::now() + RETRY_FOR, attempt: 1 }
    }

    /// One try.
    fn once(what: &'static str) -> Self {
        Tries { deadline: Instant::now(), ..Tries::new(what) }
    }

    /// The end of the matter, or `None`, after a wait, if it should be tried again.
    async fn judge<T>(&mut self, result: sqlx::Result<T>) -> Option<Result<T, DbError>> {
        let what = self.what;
        let source = match result {
            Ok(value) => return Some(Ok(value)),
            Err(source) => source,
        };
        match class(&source) {
            Class::Refused => Some(Err(DbError::Refused { what, source })),
            Class::Passing if Instant::now() < self.deadline => {
                tracing::debug!(what, attempt = self.attempt, error = %source, "statement failed, trying again");
                tokio::time::sleep(RETRY.wait(self.attempt)).await;
                self.attempt += 1;
                None
            }
            Class::Passing | Class::Other => Some(Err(DbError::Unavailable { what, source })),
        }
    }
}

/// Options of every connection to Postgres, the keeper's included.
pub fn connect_options(config: &config::Database) -> anyhow::Result<PgConnectOptions> {
    let options: PgConnectOptions =
        config.url.reveal().parse().map_err(|_| anyhow::anyhow!("database.url is not a Postgres URL"))?;
    let statement_timeout = config.statement_timeout.as_millis().to_string();
    Ok(options.application_name("write-api").options([
        ("statement_timeout", statement_timeout.as_str()),
        ("lock_timeout", statement_timeout.as_str()),
        ("idle_in_transaction_session_timeout", "60000"),
        // Every read of the service goes along an index and stops at its limit. In a table that has just grown, whose
        // statistics say nothing yet, the planner would collect the whole rest by bitmap and sort it, for each page.
        ("enable_bitmapscan", "off"),
    ]))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Worth trying again at once: lost connection, restart, deadlock, serialization failure, full pool.
    Passing,
    /// The data or a constraint is at fault.
    Refused,
    /// Anything else, such as a missing table: waiting for an operator.
    Other,
}

/// Sorts a failure.
fn class(error: &sqlx::Error) -> Class {
    match error {
        sqlx::Error::Database(error) => error.code().map_or(Class::Other, |code| class_of_state(&code)),
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => {
            Class::Passing
        }
        _ => Class::Other,
    }
}

/// Sorts a failure by SQLSTATE (PostgreSQL manual, appendix A).
fn class_of_state(code: &str) -> Class {
    match code {
        // A server that became read-only, a transaction that was idle or took for too long, a lock that was not to be had.
        "25006" | "25P03" | "25P04" | "55P03" => Class::Passing,
        // The database is gone, and does not come back by itself.
        "57P04" => Class::Other,
        _ => match code.get(..2).unwrap_or_default() {
            // Data exceptions, integrity constraint violations.
            "22" | "23" => Class::Refused,
            // Connection exceptions, rollbacks (deadlock, serialization), resources, operator intervention (shutdown,
            // cancelled statement).
            "08" | "40" | "53" | "57" => Class::Passing,
            _ => Class::Other,
        },
    }
}

/// Whether the connection must not be used again. A read-only server is one that lost its role: the next connection may
/// find the new primary.
fn spoils_connection(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => error.code().is_some_and(|code| {
            ["25006", "25P03", "25P04"].contains(&&*code) || code.starts_with("57P") || code.starts_with("08")
        }),
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn failures_are_retried_by_their_class_and_others_are_not() {
        for (class, codes) in [
            (
                Class::Passing,
                &[
                    "40001", "40P01", "40003", "55P03", "57014", // rolled back, locked, cancelled
                    "08000", "08001", "08003", "08006", "57P01", "57P02", "57P03", "57P05", // connections
                    "53000", "53100", "53200", "53300", "53400", // resources
                    "25006", "25P03", "25P04", // read-only, too slow in a transaction
                ][..],
            ),
            (Class::Refused, &["22001", "22003", "22P02", "22021", "23502", "23503", "23505", "23514"]),
            (
                Class::Other,
                &[
                    "42P01", "42703", "42501", "42601", "28P01", "28000", "3D000", "0A000", "25P02", "55000", "57P04",
                    "XX000", "XX001", "26000", "", "4",
                ],
            ),
        ] {
            for code in codes {
                assert_eq!(class_of_state(code), class, "{code}");
            }
        }
        let io = || sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        for passing in [io(), sqlx::Error::PoolTimedOut, sqlx::Error::WorkerCrashed] {
            assert_eq!(class(&passing), Class::Passing, "{passing}");
        }
        for other in [sqlx::Error::RowNotFound, sqlx::Error::PoolClosed] {
            assert_eq!(class(&other), Class::Other, "{other}");
        }
        assert!(spoils_connection(&io()) && !spoils_connection(&sqlx::Error::PoolTimedOut));
    }

    #[tokio::test]
    async fn a_ping_tells_that_nobody_listens() {
        // Bound and never listening: connections to it are refused, and nobody else gets the port.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
        let url = format!("postgres://app@{}/app", socket.local_addr().unwrap());
        let settings = [("URL", url), ("ACQUIRE_TIMEOUT", "200ms".to_owned())];
        let settings = settings.map(|(key, value)| (format!("WRITE_API_DATABASE_{key}"), value));
        let config = Config::load(None, settings.into_iter(), &[]).unwrap();
        let error = Database::new(&config.database).unwrap().ping().await.unwrap_err().to_string();
        assert!(error.contains("refused"), "{error}");
    }
}
