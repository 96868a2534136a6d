//! The partner: the other team's valuation API, as a stub.
//!
//! `POST /v1/valuations` with `Idempotency-Key: <run_id>:<listing_id>` answers with [`valuation`], in the way that the
//! [`Behaviour`] says. Beside it, `GET /stats` gives [`Stats`], `POST /control` changes the named fields of the
//! behaviour and answers with the whole of it, and `POST /reset` forgets keys and counts.

mod behaviour;
mod ledger;
mod mischief;
mod server;
mod wire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;

pub use behaviour::{Behaviour, LatencyRamp, RequiredHeader, RetryAfter};
pub use ledger::Stats;
pub use mischief::Mischief;
pub use wire::{Valuation, valuation};

use crate::background::Background;

/// A running stub, on a thread and a runtime of its own. Stopped when dropped.
#[derive(Debug)]
pub struct PartnerStub {
    state: Arc<server::State>,
    server: Background,
}

impl PartnerStub {
    /// Starts a stub on a free port of 127.0.0.1.
    pub fn start(behaviour: Behaviour) -> Result<Self> {
        Self::start_on(SocketAddr::from(([127, 0, 0, 1], 0)), behaviour)
    }

    /// Starts a stub on an address; port 0 chooses a free one.
    pub fn start_on(address: SocketAddr, behaviour: Behaviour) -> Result<Self> {
        behaviour.check()?;
        let state = Arc::new(server::State::new(behaviour));
        let shared = state.clone();
        let server = Background::serve("partner stub", address, move |listener| server::serve(listener, shared))?;
        Ok(Self { state, server })
    }

    /// The base URL: http://host:port.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.server.address())
    }

    /// The counts up to now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.state.ledger().stats()
    }

    /// Changes how requests are answered from now on.
    pub fn control(&self, change: impl FnOnce(&mut Behaviour)) -> Result<()> {
        let mut behaviour = (*self.state.behaviour()).clone();
        change(&mut behaviour);
        self.state.set_behaviour(behaviour)
    }

    /// Forgets all keys and counts.
    pub fn reset(&self) {
        self.state.ledger().reset(Instant::now());
    }
}
