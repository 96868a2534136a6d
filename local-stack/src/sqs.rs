//! An SQS emulator (PyPI `ministack`) on 127.0.0.1.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use aws_config::{BehaviorVersion, Region};
use aws_credential_types::Credentials;
use aws_sdk_sqs::Client;

use crate::process::{Ending, Process};
use crate::python::Virtualenv;
use crate::scratch::Scratch;
use crate::{http_client, machine};

/// The emulator is young: another version is another behaviour.
const PACKAGE: &str = "ministack==1.5.33";
/// From the start of the emulator to its first answer.
const START_LIMIT: Duration = Duration::from_secs(60);
/// The region that the emulator's queues are in.
pub const REGION: &str = "us-east-1";
/// Access key id and secret key: the emulator takes any.
pub const ACCESS_KEY: &str = "local";

/// A running emulator. Its queues are in memory and end with it. Stopped when dropped.
#[derive(Debug)]
pub struct Sqs {
    process: Process,
    endpoint: String,
    // Last: it is removed after the process has stopped.
    _own_scratch: Option<Scratch>,
}

impl Sqs {
    /// Starts an emulator that belongs to no stack: for a test that suspends it.
    pub async fn separate() -> Result<Self> {
        let scratch = Scratch::create()?;
        let sqs = Self::start(scratch.path()).await?;
        Ok(Self { _own_scratch: Some(scratch), ..sqs })
    }

    pub(crate) async fn start(scratch: &Path) -> Result<Self> {
        let environment = Virtualenv::with(PACKAGE).await?;
        let home = scratch.join("sqs");
        fs::create_dir(&home).with_context(|| format!("cannot make {}", home.display()))?;
        let port = machine::free_port()?;
        let endpoint = format!("http://127.0.0.1:{port}");

        let mut command = Command::new(environment.python());
        command.args(["-m", "ministack"]).current_dir(&home);
        // Only what is named here: variables meant for other emulators would change what this one does.
        command.env_clear().env("HOME", &home).env("TMPDIR", &home).env("PYTHONUNBUFFERED", "1");
        command.env("GATEWAY_PORT", port.to_string()).env("BIND_HOST", "127.0.0.1").env("MINISTACK_HOST", "127.0.0.1");
        command.env("SERVICES", "sqs").env("LOG_LEVEL", "WARNING");
        // It emulates much else. Two of those would listen on ports of their own, and one removes containers from the
        // machine's Docker when it starts.
        command.env("SFTP_ENABLED", "0").env("IOT_MTLS_ENABLED", "0").env("DOCKER_HOST", "unix:///nonexistent");
        let process = Process::spawn("the SQS emulator", command, &scratch.join("sqs.log"), None, Ending::AT_ONCE)?;

        let health = format!("{endpoint}/_ministack/health");
        let probe = async || http_client::get(&health).await.ok().filter(|(status, _)| status.is_success());
        process.ready(START_LIMIT, probe).await?;
        Ok(Self { process, endpoint, _own_scratch: None })
    }

    /// The endpoint URL.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A client with connections of its own.
    pub async fn client(&self) -> Client {
        client(&self.endpoint).await
    }

    /// Stops the emulator where it is: it accepts connections and answers nothing, until it is [resumed](Self::resume).
    /// A stack's emulator serves all its users.
    pub fn suspend(&self) {
        self.process.signal(libc::SIGSTOP);
    }

    /// Lets a suspended emulator go on.
    pub fn resume(&self) {
        self.process.signal(libc::SIGCONT);
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }
}

/// A client of the emulator at `endpoint`, or of a proxy to it, with connections of its own.
pub(crate) async fn client(endpoint: &str) -> Client {
    let config = aws_config::defaults(BehaviorVersion::latest())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .endpoint_url(endpoint)
        .region(Region::from_static(REGION))
        .credentials_provider(Credentials::from_keys(ACCESS_KEY, ACCESS_KEY, None))
        .load()
        .await;
    Client::new(&config)
}
