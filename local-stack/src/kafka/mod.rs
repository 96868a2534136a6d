//! A Kafka broker on 127.0.0.1: librdkafka's mock cluster, hosted by this program in a process of its own, so that it
//! neither shares a fate nor a CPU account with those who use it.
//!
//! It speaks the real protocol and keeps everything in memory. What it lacks: topics can't be created by Kafka's own
//! admin calls (hence [`Kafka::create_topic`]), aborted transactions are readable, and **each partition keeps its
//! newest 5 MiB only**, dropping older records silently. A consumer that checks results must read while they are
//! written: see [`KafkaTap`].

mod gateway;
mod host;
mod sasl;
mod tap;

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub use gateway::{Gateway, Security};
pub use host::host;
pub use sasl::User;
pub use tap::{KafkaTap, TapRecord};

use crate::process::{Ending, Process};
use crate::scratch::Scratch;
use crate::{http_client, machine};

/// From the start of the process to its addresses.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Where a broker process is found; it prints this as one line of JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Addresses {
    /// host:port for Kafka clients.
    pub bootstrap: String,
    /// http://host:port, which takes an [`Order`] as JSON by POST.
    pub control: String,
}

/// What a broker process can be told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case", deny_unknown_fields)]
pub enum Order {
    /// Make a topic. Making one that exists already does nothing.
    CreateTopic {
        /// Its name.
        name: String,
        /// How many partitions it has.
        partitions: i32,
    },
    /// Close all connections and accept no new ones.
    GoDown,
    /// Accept connections again.
    ComeUp,
    /// Delay every answer.
    Delay {
        /// The round trip, in milliseconds.
        milliseconds: u64,
    },
    /// Refuse the next produce requests, one error each.
    FailProduce {
        /// The errors, first to last.
        errors: Vec<ProduceError>,
    },
    /// Answer the next requests of one kind with error codes of Kafka's protocol, one each.
    Fail {
        /// The kind.
        request: Request,
        /// The codes, first to last: 6 for "not leader", for example. 0 lets one pass.
        codes: Vec<i32>,
    },
    /// Forget the errors still to come for requests of one kind.
    Forgive {
        /// The kind.
        request: Request,
    },
    /// Answer whatever is asked of a topic with an error code of Kafka's protocol from now on: 3 for "unknown topic", 29
    /// for "not authorized", for example; 0 ends it.
    FailTopic {
        /// Its name.
        name: String,
        /// The code.
        code: i32,
    },
}

/// A kind of request. The mock cluster has no errors for requests for metadata: [`Order::FailTopic`] is theirs.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Records.
    Produce,
    /// The id of an idempotent producer.
    InitProducerId,
}

/// How a produce request fails.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProduceError {
    /// The partition moved to another broker. Clients retry.
    NotLeader,
    /// Too few replicas answered in time. Clients retry.
    TimedOut,
    /// The record is larger than the broker takes. Final.
    TooLarge,
    /// This client may not write to the topic. Final, until it is given the right.
    NotAuthorized,
    /// No answer: the connection is closed. Clients retry.
    Disconnect,
}

/// A running broker process. Stopped when dropped.
#[derive(Debug)]
pub struct Kafka {
    process: Process,
    addresses: Addresses,
    // Last: it is removed after the process has stopped.
    _own_scratch: Option<Scratch>,
}

impl Kafka {
    /// Starts a broker that belongs to no stack: for a test that takes it down.
    pub async fn separate() -> Result<Self> {
        let scratch = Scratch::create()?;
        let kafka = Self::start(scratch.path()).await?;
        Ok(Self { _own_scratch: Some(scratch), ..kafka })
    }

    pub(crate) async fn start(scratch: &Path) -> Result<Self> {
        let mut command = Command::new(machine::workspace_binary("local-stack")?);
        command.arg("kafka");
        let printed = scratch.join("kafka.addresses");
        let output = File::create(&printed).with_context(|| format!("cannot make {}", printed.display()))?;
        let log = scratch.join("kafka.log");
        let process = Process::spawn("the Kafka broker", command, &log, Some(output), Ending::AT_ONCE)?;
        let probe = async || serde_json::from_slice(&fs::read(&printed).ok()?).ok();
        let addresses = process.ready(START_LIMIT, probe).await?;
        Ok(Self { process, addresses, _own_scratch: None })
    }

    /// host:port for Kafka clients.
    #[must_use]
    pub fn bootstrap(&self) -> &str {
        &self.addresses.bootstrap
    }

    /// Makes a topic, unless it exists.
    pub async fn create_topic(&self, name: &str, partitions: i32) -> Result<()> {
        self.order(&Order::CreateTopic { name: name.to_owned(), partitions }).await
    }

    /// Gives the broker an order. A stack's broker serves all its users: take down a [separate](Kafka::separate) one.
    pub async fn order(&self, order: &Order) -> Result<()> {
        http_client::post_json(&self.addresses.control, order).await.map(drop)
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }
}
