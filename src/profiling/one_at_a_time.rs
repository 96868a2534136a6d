//! One profile at a time, off the async threads.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::sync::oneshot;

/// The place in which a profile is taken.
#[derive(Default)]
pub(super) struct OneAtATime {
    running: Mutex<Option<Running>>,
}

#[derive(Clone, Copy)]
struct Running {
    what: &'static str,
    peer: SocketAddr,
    since: Instant,
}

/// The place is taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Busy {
    what: &'static str,
    peer: SocketAddr,
    running_for: Duration,
}

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Busy { what, peer, running_for } = self;
        let seconds = running_for.as_secs_f64();
        write!(
            f,
            "one profile at a time: {what} for {peer} has been running for {seconds:.1} s; ask again when it is done"
        )
    }
}

impl OneAtATime {
    /// Runs `work` if nothing else is running. Once begun it holds the place until it is done, also when nobody waits
    /// for it any more. Its thread is its own and ends with it, so that what the allocator keeps for a thread goes too.
    pub async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        what: &'static str,
        peer: SocketAddr,
        work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> Result<anyhow::Result<T>, Busy> {
        let place = self.take(what, peer)?;
        let (sender, result) = oneshot::channel();
        let thread = std::thread::Builder::new().name(format!("profile {what}")).spawn(move || {
            let result = work();
            // Before the answer, after which the next request may come at once.
            drop(place);
            // Without a receiver nobody wants it.
            let _ = sender.send(result);
        });
        if let Err(error) = thread {
            return Ok(Err(error).with_context(|| format!("no thread for the {what} profile")));
        }
        // The sender is lost only by a panic.
        Ok(result.await.unwrap_or_else(|_| bail!("taking the {what} profile panicked")))
    }

    fn take(self: &Arc<Self>, what: &'static str, peer: SocketAddr) -> Result<Place, Busy> {
        let mut running = self.lock();
        if let Some(Running { what, peer, since }) = *running {
            return Err(Busy { what, peer, running_for: since.elapsed() });
        }
        *running = Some(Running { what, peer, since: Instant::now() });
        Ok(Place(Arc::clone(self)))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Held while a profile is taken.
struct Place(Arc<OneAtATime>);

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> SocketAddr {
        ([127, 0, 0, 1], 5000).into()
    }

    #[tokio::test]
    async fn the_second_is_told_what_runs() {
        let place = Arc::new(OneAtATime::default());
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let first = tokio::spawn({
            let place = Arc::clone(&place);
            async move { place.run("heap", peer(), move || Ok(wait.recv()?)).await }
        });
        while place.lock().is_none() {
            tokio::task::yield_now().await;
        }
        let busy = place.run("allocs", peer(), || Ok(())).await.unwrap_err().to_string();
        assert!(busy.contains("heap for 127.0.0.1:5000 has been running for 0."), "{busy}");

        // Whoever asked is gone; the work is not, and keeps the place.
        first.abort();
        let _ = first.await;
        assert!(place.run("heap", peer(), || Ok(())).await.is_err());

        go.send(()).unwrap();
        while place.lock().is_some() {
            tokio::task::yield_now().await;
        }
        assert!(place.run("heap", peer(), || Ok(())).await.is_ok());
    }

    #[tokio::test]
    async fn a_panic_frees_the_place() {
        let place = Arc::new(OneAtATime::default());
        let result = place.run::<()>("heap", peer(), || panic!("as a profile might")).await;
        assert!(result.unwrap().unwrap_err().to_string().contains("heap profile panicked"));
        while place.lock().is_some() {
            tokio::task::yield_now().await;
        }
        assert!(place.run("heap", peer(), || Ok(())).await.is_ok());
    }
}
