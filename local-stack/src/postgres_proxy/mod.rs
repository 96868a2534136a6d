//! A PostgreSQL that fails: a proxy between a service and the server that follows the protocol (version 3), so that it
//! knows which statement runs and when the server has committed it.
//!
//! It offers no TLS: a client that insists on it (`sslmode=require`) does not get in.

mod connection;
mod conversation;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use crate::background::Background;
use crate::orders::{Fault, Hit, Orders};
use crate::wire::host_and_port;

/// What can go wrong with connections to the database.
///
/// A *statement* fits when its text contains `matching`, letter by letter. It is seen when it is executed, by the simple
/// or by the extended protocol, prepared long before or not. The others fit every piece of bytes that is read from
/// either side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PgFault {
    /// The connection is closed. While it is [held](PostgresProxy::hold), new ones are, too.
    Cut,
    /// The statement is carried out and committed (by its transaction's COMMIT if it is in one), and the connection is
    /// closed before the client hears of it. A statement that fails or is rolled back does not use it up.
    CutAfterCommit {
        /// In the statement's text.
        matching: String,
    },
    /// The connection is closed when the statement comes. The server does not execute it.
    CutBeforeExecute {
        /// In the statement's text.
        matching: String,
    },
    /// From now on what either side of the connection sends vanishes, and neither is told: a half-open connection. It is
    /// dead for good. The server is released when the time held is over, or else when the client closes.
    Swallow,
    /// Bytes pass so many milliseconds later.
    Delay(u64),
    /// Bytes pass at so many a second, each way.
    Throttle(u64),
}

impl PgFault {
    /// Its name in [hits](PostgresProxy::hits): `cut-after-commit`, for example.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Cut => "cut",
            Self::CutAfterCommit { .. } => "cut-after-commit",
            Self::CutBeforeExecute { .. } => "cut-before-execute",
            Self::Swallow => "swallow",
            Self::Delay(_) => "delay",
            Self::Throttle(_) => "throttle",
        }
    }
}

impl Fault for PgFault {
    fn name(&self) -> &'static str {
        self.name()
    }
}

/// A running proxy, on a thread and a runtime of its own. Ends, closing its connections, when dropped.
#[derive(Debug)]
pub struct PostgresProxy {
    url: String,
    shared: Arc<connection::Shared>,
    _server: Background,
}

impl PostgresProxy {
    /// Starts a proxy to the host and port of `url` that lets everything through.
    pub fn start(url: &str) -> Result<Self> {
        let target = host_and_port(url)?;
        let shared = Arc::new(connection::Shared::new(target.clone(), Orders::new()));
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let of_connections = shared.clone();
        let server = Background::serve("PostgreSQL proxy", address, move |listener| {
            connection::serve(listener, of_connections)
        })?;
        Ok(Self { url: url.replacen(&target, &server.address().to_string(), 1), shared, _server: server })
    }

    /// The URL given at the start, with this proxy's host and port.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The fault happens to the next `times` that it fits; `u64::MAX` for all until [cleared](Self::clear).
    pub fn order(&self, fault: PgFault, times: u64) {
        self.shared.orders.order(fault, times);
    }

    /// The fault happens to this ratio, 0 to 1, of all that it fits, instead of the ratio set before.
    ///
    /// # Panics
    ///
    /// If the ratio is none.
    pub fn set_ratio(&self, fault: PgFault, ratio: f64) {
        self.shared.orders.set_ratio(fault, ratio);
    }

    /// The fault happens to all that it fits for `time` from now.
    pub fn hold(&self, fault: PgFault, time: Duration) {
        self.shared.orders.hold(fault, time);
    }

    /// Closes all connections. Each counts as a hit.
    pub fn cut(&self) {
        self.shared.cut();
    }

    /// Ends all orders. Counts stay, and a dead connection stays dead.
    pub fn clear(&self) {
        self.shared.orders.clear();
    }

    /// How often each statement was executed, by its text.
    #[must_use]
    pub fn statements(&self) -> BTreeMap<String, u64> {
        self.shared.statements().clone()
    }

    /// How often each fault has really happened, by [name](PgFault::name).
    #[must_use]
    pub fn hits(&self) -> BTreeMap<String, u64> {
        self.shared.orders.hits()
    }

    /// Every fault that has really happened, with its time, oldest first.
    #[must_use]
    pub fn log(&self) -> Vec<Hit> {
        self.shared.orders.log()
    }
}
