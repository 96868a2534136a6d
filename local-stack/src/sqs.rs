//! An SQS emulator on 127.0.0.1.

use std::path::Path;

use anyhow::Result;
use aws_config::{BehaviorVersion, Region};
use aws_credential_types::Credentials;
use aws_sdk_sqs::Client;

use crate::ministack;
use crate::process::Process;
use crate::scratch::Scratch;

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
        let (process, endpoint) = ministack::start(scratch, "sqs").await?;
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
