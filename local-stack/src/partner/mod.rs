//! The partner: the other team's valuation API, as a stub.
//!
//! `POST /v1/valuations` with `Idempotency-Key: <run_id>:<listing_id>` answers with [`valuation`], in the way that the
//! [`Behaviour`] says. Beside it, `GET /stats` gives [`Stats`], `POST /control` changes the named fields of the
//! behaviour and answers with the whole of it, and `POST /reset` forgets keys and counts.

mod behaviour;
mod ledger;
mod server;
mod wire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::oneshot;

pub use behaviour::{Behaviour, RequiredHeader, RetryAfter};
pub use ledger::Stats;
pub use wire::{Valuation, valuation};

/// A thousand clients may connect in the same millisecond.
const BACKLOG: u32 = 4_096;

/// A running stub, on a thread and a runtime of its own. Stopped when dropped.
#[derive(Debug)]
pub struct PartnerStub {
    address: SocketAddr,
    state: Arc<server::State>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl PartnerStub {
    /// Starts a stub on a free port of 127.0.0.1.
    pub fn start(behaviour: Behaviour) -> Result<Self> {
        Self::start_on(SocketAddr::from(([127, 0, 0, 1], 0)), behaviour)
    }

    /// Starts a stub on an address; port 0 chooses a free one.
    pub fn start_on(address: SocketAddr, behaviour: Behaviour) -> Result<Self> {
        behaviour.check()?;
        // One thread: at some thousands of requests a second more would cost switches and gain nothing.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = {
            let _guard = runtime.enter();
            listen(address).with_context(|| format!("the partner stub cannot listen on {address}"))?
        };
        let address = listener.local_addr()?;
        let state = Arc::new(server::State::new(behaviour));
        let (stop, stopped) = oneshot::channel();
        let serve = server::serve(listener, state.clone());
        let thread = thread::Builder::new().name("partner-stub".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = serve => {}
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self { address, state, stop: Some(stop), thread: Some(thread) })
    }

    /// The base URL: http://host:port.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
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

impl Drop for PartnerStub {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A port that was given stays usable right after an earlier stub's end.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}
