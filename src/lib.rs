//! WriteApi: an SQS event worker whose memory follows concurrency, never rows.
//!
//! The modules in reading order:
//!
//! - [`events`]: what an event means. Start here: `events::Events` is where a message becomes work.
//! - [`queue`]: receiving messages, keeping them while they are worked on, ending them.
//! - [`db`]: Postgres; all SQL.
//! - [`partner`]: the other team's HTTP API, and the limits that all calls share.
//! - [`kafka`]: records and their delivery.
//! - [`profiling`]: profiles of the running service.
//! - [`admin`]: health and metrics over HTTP.
//! - [`app`]: builds all of these, starts them, stops them in order.
//! - [`cli`]: the command line, a file for each verb.
//! - [`aws`]: what AWS's services have in common.
//! - [`config`], [`metrics`], [`health`], [`lifecycle`], [`telemetry`]: what everything above stands on.
//! - [`task`]: what runs, whose work it is, and what it uses; every task is spawned there. [`stack`]: its stacks.
//! - [`fault`]: empty in releases; the faults that tests order.

pub mod admin;
pub mod app;
pub mod aws;
pub mod cli;
pub mod config;
pub mod db;
pub mod events;
pub mod fault;
pub mod health;
pub mod kafka;
pub mod lifecycle;
pub mod metrics;
pub mod partner;
pub mod profiling;
pub mod queue;
pub mod stack;
pub mod task;
pub mod telemetry;

// The tests measure what the service measures, so they run on its allocator as well.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
