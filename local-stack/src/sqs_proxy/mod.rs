//! An SQS that fails: a proxy between a service and the emulator that speaks SQS's JSON protocol.
//!
//! Clients keep to the endpoint that they were given; the queue URLs in answers name the emulator and are no address
//! for the SDK for Rust. What is not ordered passes unchanged.

mod fault;
mod protocol;
mod repeats;
mod server;
mod witness;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

pub use fault::{Scope, SqsFault};
pub use witness::{Action, Done, WatchedCall, WatchedMessage};

use crate::background::Background;
use crate::orders::Hit;
use crate::wire::host_and_port;

/// A running proxy, on a thread and a runtime of its own. Ends, closing its connections, when dropped.
#[derive(Debug)]
pub struct SqsProxy {
    state: Arc<server::State>,
    server: Background,
}

impl SqsProxy {
    /// Starts a proxy to the emulator at `endpoint` (http://host:port) that lets everything through.
    pub fn start(endpoint: &str) -> Result<Self> {
        let state = Arc::new(server::State::new(host_and_port(endpoint)?.parse()?));
        let shared = state.clone();
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = Background::serve("SQS proxy", address, move |listener| server::serve(listener, shared))?;
        Ok(Self { state, server })
    }

    /// The endpoint URL for clients: http://host:port.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.server.address())
    }

    /// A client of the proxy, with connections of its own.
    pub async fn client(&self) -> aws_sdk_sqs::Client {
        crate::sqs::client(&self.endpoint()).await
    }

    /// The fault happens to the next `times` calls that it fits, on any queue; `u64::MAX` for all until
    /// [cleared](Self::clear).
    pub fn order(&self, fault: SqsFault, times: u64) {
        self.order_in(Scope::default(), fault, times);
    }

    /// The fault happens to the next `times` calls that it fits within `scope`.
    pub fn order_in(&self, scope: Scope, fault: SqsFault, times: u64) {
        self.state.orders.order(fault::Scoped { fault, scope }, times);
    }

    /// The fault happens to this ratio, 0 to 1, of the calls that it fits, instead of the ratio set before.
    ///
    /// # Panics
    ///
    /// If the ratio is none.
    pub fn set_ratio(&self, fault: SqsFault, ratio: f64) {
        self.state.orders.set_ratio(fault::Scoped { fault, scope: Scope::default() }, ratio);
    }

    /// Ends all orders. Counts stay, and a call that hangs goes on hanging.
    pub fn clear(&self) {
        self.state.orders.clear();
    }

    /// The calls that have come in, by action (`ReceiveMessage`).
    #[must_use]
    pub fn calls_by_action(&self) -> BTreeMap<String, u64> {
        self.state.witness.calls_by_action()
    }

    /// How many messages the emulator has deleted, as it said.
    #[must_use]
    pub fn deleted(&self) -> u64 {
        self.state.witness.deleted()
    }

    /// How often each fault has really happened, by [name](SqsFault::name).
    #[must_use]
    pub fn hits(&self) -> BTreeMap<String, u64> {
        self.state.orders.hits()
    }

    /// Every call so far that was about messages, oldest first, and what became of it.
    #[must_use]
    pub fn calls(&self) -> Vec<WatchedCall> {
        self.state.witness.calls()
    }

    /// How many of the emulator's own answers took longer than `limit`, the time of a long poll not counted, and how long
    /// the longest took.
    #[must_use]
    pub fn later_than(&self, limit: Duration) -> (usize, Duration) {
        self.state.witness.later_than(limit)
    }

    /// Every fault that has really happened, with its time, oldest first.
    #[must_use]
    pub fn log(&self) -> Vec<Hit> {
        self.state.orders.log()
    }
}
