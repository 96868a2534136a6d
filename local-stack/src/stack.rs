//! All servers together.

use anyhow::Result;
use tokio::sync::OnceCell;

use crate::environment::{Environment, Names};
use crate::kafka::Kafka;
use crate::partner::PartnerStub;
use crate::postgres::{Postgres, PostgresOptions};
use crate::scratch::Scratch;
use crate::sqs::Sqs;

/// How a stack is set up.
#[derive(Clone, Copy, Debug, Default)]
pub struct StackOptions {
    /// How the database server is set up.
    pub postgres: PostgresOptions,
}

impl StackOptions {
    /// Fast and not durable.
    #[must_use]
    pub fn for_tests() -> Self {
        Self { postgres: PostgresOptions { durable: false, ..PostgresOptions::default() } }
    }
}

/// PostgreSQL, SQS and Kafka, each a process on a free port of 127.0.0.1. Everything stops when this is dropped, and
/// when the process ends without that.
#[derive(Debug)]
pub struct Stack {
    postgres: Postgres,
    sqs: Sqs,
    kafka: Kafka,
    // Last: it is removed after the servers have stopped.
    scratch: Scratch,
}

impl Stack {
    /// Starts all servers and waits until they answer. The first start on a machine installs Python packages.
    pub async fn start(options: StackOptions) -> Result<Self> {
        let scratch = Scratch::create()?;
        let (postgres, sqs, kafka) = tokio::try_join!(
            Postgres::start(scratch.path(), options.postgres),
            Sqs::start(scratch.path()),
            Kafka::start(scratch.path()),
        )?;
        Ok(Self { postgres, sqs, kafka, scratch })
    }

    /// The database server.
    #[must_use]
    pub fn postgres(&self) -> &Postgres {
        &self.postgres
    }

    /// The queues.
    #[must_use]
    pub fn sqs(&self) -> &Sqs {
        &self.sqs
    }

    /// The broker.
    #[must_use]
    pub fn kafka(&self) -> &Kafka {
        &self.kafka
    }

    /// What one isolated service needs: a database and a topic, made here, and names and ports that nobody else uses.
    pub async fn environment(&self, partner: &PartnerStub) -> Result<Environment> {
        Environment::create(self, Names::unique(), &partner.url()).await
    }

    /// The files, logs among them, of this stack.
    #[must_use]
    pub fn directory(&self) -> &std::path::Path {
        self.scratch.path()
    }

    /// Ends the servers and removes their files. Doing it twice does no harm.
    fn stop(&self) {
        for process in [&*self.postgres.process(), self.sqs.process(), self.kafka.process()] {
            process.stop();
        }
        self.scratch.remove();
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        self.stop();
    }
}

static SHARED: OnceCell<Stack> = OnceCell::const_new();

/// The stack of this process, [fast and not durable](StackOptions::for_tests), started by the first caller. All tests
/// of a test binary share it.
pub async fn shared() -> Result<&'static Stack> {
    SHARED
        .get_or_try_init(async || {
            let stack = Stack::start(StackOptions::for_tests()).await?;
            // The test harness drops no static. The servers would end with the process anyway, but leave their files.
            // SAFETY: the handler is a function, so it stays valid.
            let _ = unsafe { libc::atexit(stop_shared) };
            Ok(stack)
        })
        .await
}

extern "C" fn stop_shared() {
    // A panic must not leave a C callback.
    let _ = std::panic::catch_unwind(|| {
        if let Some(stack) = SHARED.get() {
            stack.stop();
        }
    });
}
