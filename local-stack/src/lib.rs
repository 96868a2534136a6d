//! What the service needs around it, on one machine without Docker: PostgreSQL, SQS, Kafka and the partner.
//!
//! The demo and the integration tests are built on this crate; the service never links it. In reading order:
//!
//! - [`Stack`] starts the three servers, [`shared`] once for a whole test binary;
//! - [`Environment`] holds the `WRITE_API_*` variables that point a service at them, isolated from all others;
//! - [`PartnerStub`] answers the service's calls, well or badly, and counts them;
//! - [`KafkaTap`] reads what the service published;
//! - [`wire::Wire`] stands between the service and a neighbour and can be cut;
//! - [`S3`] keeps objects;
//! - [`SqsProxy`] and [`PostgresProxy`] speak their protocols and do one thing wrong when told to;
//! - [`kafka::Gateway`] demands TLS and passwords of Kafka clients, by certificates of an [`Authority`];
//! - [`Process`] starts a child that never outlives this process, [`Program`] the service as a user would;
//! - [`Sampler`] watches the memory and the processor time of a process, [`Exposition`] is what it says of itself;
//! - [`http_client`] asks a server one thing.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use local_stack::{Behaviour, PartnerStub};
//!
//! let stack = local_stack::shared().await?;
//! let partner = PartnerStub::start(Behaviour { latency_ms: 20, ..Behaviour::default() })?;
//! let mut environment = stack.environment(&partner).await?;
//! environment.set("queue.visibility_timeout", "5s");
//! let service = std::process::Command::new("write-api").arg("serve").envs(environment.variables());
//! # Ok(())
//! # }
//! ```

mod arithmetic;
mod background;
mod certificates;
mod environment;
mod exposition;
pub mod http_client;
pub mod kafka;
mod machine;
mod ministack;
mod orders;
pub mod partner;
mod postgres;
mod postgres_proxy;
mod process;
mod program;
mod python;
mod s3;
mod sampling;
mod scratch;
mod sqs;
mod sqs_proxy;
mod stack;
mod text;
pub mod wire;

pub use arithmetic::{Bound, Histogram, Ideal, ideal};
pub use certificates::{Authority, Certificate};
pub use environment::{Environment, Names};
pub use exposition::Exposition;
pub use kafka::{Kafka, KafkaTap, TapRecord};
pub use machine::{cache_directory, free_port, profile_directory, workspace_binary};
pub use orders::Hit;
pub use partner::{Behaviour, PartnerStub};
pub use postgres::{Postgres, PostgresOptions};
pub use postgres_proxy::{PgFault, PostgresProxy};
pub use process::{Ending, Process};
pub use program::{Program, allow_open_files};
pub use python::Virtualenv;
pub use s3::S3;
pub use sampling::{Memory, Sample, Sampler, forget_peak, peak, peak_rss_mib};
pub use sqs::Sqs;
pub use sqs_proxy::{Action, Done, Scope, SqsFault, SqsProxy, WatchedCall, WatchedMessage};
pub use stack::{Stack, StackOptions, shared};
pub use text::thousands;
