//! A server inside this process that does not depend on its caller's runtime: tests have one each, and it ends with
//! the test.

use std::net::{SocketAddr, TcpListener as StdListener};
use std::os::fd::AsRawFd;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{fmt, io};

use anyhow::{Context, Result};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// Connections that may wait to be accepted: a thousand clients connect in the same millisecond.
const BACKLOG: libc::c_int = 4_096;

/// A listener served by a thread and a runtime of its own. Ends, closing its connections, when dropped.
pub(crate) struct Background {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Listens on `address` (port 0 chooses a free one) and runs `serve` on it.
    pub(crate) fn serve<F>(
        name: &str,
        address: SocketAddr,
        serve: impl FnOnce(TcpListener) -> F + Send + 'static,
    ) -> Result<Self>
    where
        F: Future<Output = ()>,
    {
        let listener = listen(address).with_context(|| format!("the {name} cannot listen on {address}"))?;
        let address = listener.local_addr()?;
        // One thread: at some thousands of requests a second more would cost switches and gain nothing.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let run = move || {
            raise_priority();
            runtime.block_on(async {
                let listener = match TcpListener::from_std(listener) {
                    Ok(listener) => listener,
                    Err(error) => return tracing::error!(%error, "the runtime refused a listener"),
                };
                tokio::select! {
                    () = serve(listener) => {}
                    _ = stopped => {}
                }
            });
        };
        let thread = thread::Builder::new().name(name.replace(' ', "-")).spawn(run)?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Puts the calling thread before the others. What is served here stands for another machine: it must not answer late,
/// nor count the calls of a while as those of a moment, because the service keeps this machine busy. Needs root; without
/// it nothing changes.
fn raise_priority() {
    // SAFETY: on Linux, who 0 is the calling thread, and no memory is touched.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -10) };
}

impl Drop for Background {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Background").field("address", &self.address).finish_non_exhaustive()
    }
}

/// The next connection, with small packets sent at once.
pub(crate) async fn accept(name: &str, listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => match stream.set_nodelay(true) {
                Ok(()) => return stream,
                Err(error) => tracing::debug!(%error, "a client left before it was served"),
            },
            Err(error) => {
                // Out of file descriptors, for example: connections that end give some back.
                tracing::warn!(%error, "the {name} cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<StdListener> {
    let listener = StdListener::bind(address)?;
    listener.set_nonblocking(true)?;
    // The standard library's backlog is 128; listening again changes only that.
    // SAFETY: the descriptor is that of an open socket.
    if unsafe { libc::listen(listener.as_raw_fd(), BACKLOG) } == 0 {
        Ok(listener)
    } else {
        Err(io::Error::last_os_error())
    }
}
