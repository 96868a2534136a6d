//! One profile at a time, off the async threads.
//!
//! What takes a while looks at its [`Interrupt`]: it is told when whoever asked has gone away, and when another request with
//! `force=1` wants its place.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::sync::{Notify, oneshot};

use super::heap::Unsampled;
use crate::task::cost::{Part, ThreadClock};

/// How long a request that pre-empts waits for the place. What runs looks at its interrupt ten times a second and more;
/// what does not, such as writing the allocator's dump, is done within a second.
const TO_MAKE_ROOM: Duration = Duration::from_secs(5);

/// The place in which a profile is taken.
#[derive(Default)]
pub(super) struct OneAtATime {
    running: Mutex<Option<Running>>,
    free: Notify,
}

#[derive(Clone)]
struct Running {
    what: &'static str,
    peer: SocketAddr,
    since: Instant,
    interrupt: Arc<Interrupt>,
}

/// Who wants the place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub what: &'static str,
    pub peer: SocketAddr,
    /// Takes the place from whoever has it.
    pub force: bool,
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
            "one profile at a time: {what} for {peer} has been running for {seconds:.1} s; ask again when it is done, or with force=1 to take its place"
        )
    }
}

/// A profile ended early because it was told to.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Interrupted(String);

/// Tells a profile under way to end early.
#[derive(Debug, Default)]
pub(super) struct Interrupt {
    why: Mutex<Option<String>>,
    told: Condvar,
}

impl Interrupt {
    fn tell(&self, why: String) {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.told.notify_all();
    }

    /// Waits for `duration`, or until told to end; then the reason is the error.
    pub fn wait(&self, duration: Duration) -> anyhow::Result<()> {
        let why = self.why.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.told.wait_timeout_while(why, duration, |why| why.is_none());
        match &*waited.unwrap_or_else(PoisonError::into_inner).0 {
            Some(why) => Err(Interrupted(why.clone()).into()),
            None => Ok(()),
        }
    }
}

impl OneAtATime {
    /// Runs `work` if nothing else is running. It holds the place until it is done, also when nobody waits for it any more,
    /// of which its interrupt tells. Its thread is its own and ends with it, so that what the allocator keeps for a thread
    /// goes too; what is sampled of a thread it would keep for ever, so nothing is.
    pub async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        asked: Asked,
        work: impl FnOnce(&Interrupt) -> anyhow::Result<T> + Send + 'static,
    ) -> Result<anyhow::Result<T>, Busy> {
        let place = self.take(asked).await?;
        let what = asked.what;
        let interrupt = Arc::clone(&place.interrupt);
        let _gone = Gone(Arc::clone(&interrupt));
        let (sender, result) = oneshot::channel();
        let thread = std::thread::Builder::new().name(format!("profile {what}")).spawn(move || {
            let (clock, unsampled) = (ThreadClock::begin(Part::Requests), Unsampled::this_thread());
            let result = work(&interrupt);
            drop((clock, unsampled));
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

    async fn take(self: &Arc<Self>, asked: Asked) -> Result<Place, Busy> {
        let deadline = tokio::time::Instant::now() + TO_MAKE_ROOM;
        loop {
            // Before the look, so that the place cannot become free in between unheard.
            let mut free = std::pin::pin!(self.free.notified());
            free.as_mut().enable();
            let busy = match self.try_take(asked) {
                Ok(place) => return Ok(place),
                Err(busy) => busy,
            };
            if !asked.force || tokio::time::timeout_at(deadline, free).await.is_err() {
                return Err(busy);
            }
        }
    }

    fn try_take(self: &Arc<Self>, asked: Asked) -> Result<Place, Busy> {
        let Asked { what, peer, force } = asked;
        let mut running = self.lock();
        if let Some(Running { what, peer, since, interrupt }) = &*running {
            if force {
                interrupt.tell(format!("its place was taken by {} for {}", asked.what, asked.peer));
            }
            return Err(Busy { what, peer: *peer, running_for: since.elapsed() });
        }
        let interrupt = Arc::new(Interrupt::default());
        *running = Some(Running { what, peer, since: Instant::now(), interrupt: Arc::clone(&interrupt) });
        Ok(Place { of: Arc::clone(self), interrupt })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Held while a profile is taken.
struct Place {
    of: Arc<OneAtATime>,
    interrupt: Arc<Interrupt>,
}

impl Drop for Place {
    fn drop(&mut self) {
        *self.of.lock() = None;
        self.of.free.notify_waiters();
    }
}

/// Held by the request; dropped with it when its client goes away.
struct Gone(Arc<Interrupt>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.tell("whoever asked has gone away".to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(what: &'static str, force: bool) -> Asked {
        Asked { what, peer: ([127, 0, 0, 1], 5000).into(), force }
    }

    async fn until(mut condition: impl FnMut() -> bool) {
        while !condition() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn the_second_is_told_what_runs() {
        let place = Arc::new(OneAtATime::default());
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let first = tokio::spawn({
            let place = Arc::clone(&place);
            async move { place.run(asked("heap", false), move |_| Ok(wait.recv()?)).await }
        });
        until(|| place.lock().is_some()).await;
        let busy = place.run(asked("allocs", false), |_| Ok(())).await.unwrap_err().to_string();
        assert!(busy.contains("heap for 127.0.0.1:5000 has been running for 0."), "{busy}");
        assert!(busy.contains("force=1"), "{busy}");

        // Whoever asked is gone; the work is not, and keeps the place.
        first.abort();
        let _ = first.await;
        assert!(place.run(asked("heap", false), |_| Ok(())).await.is_err());

        go.send(()).unwrap();
        until(|| place.lock().is_none()).await;
        assert!(place.run(asked("heap", false), |_| Ok(())).await.is_ok());
    }

    #[tokio::test]
    async fn force_takes_the_place_and_tells_who_had_it() {
        let place = Arc::new(OneAtATime::default());
        let first = tokio::spawn({
            let place = Arc::clone(&place);
            async move { place.run(asked("profile", false), |interrupt| interrupt.wait(Duration::from_secs(60))).await }
        });
        until(|| place.lock().is_some()).await;
        let begin = Instant::now();
        place.run(asked("heap", true), |_| Ok(())).await.unwrap().unwrap();
        assert!(begin.elapsed() < TO_MAKE_ROOM, "{:?}", begin.elapsed());
        let interrupted = first.await.unwrap().unwrap().unwrap_err().to_string();
        assert_eq!(interrupted, "its place was taken by heap for 127.0.0.1:5000");
    }

    #[tokio::test(start_paused = true)]
    async fn force_does_not_wait_for_ever() {
        let place = Arc::new(OneAtATime::default());
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let first = tokio::spawn({
            let place = Arc::clone(&place);
            async move { place.run(asked("heap", false), move |_| Ok(wait.recv()?)).await }
        });
        until(|| place.lock().is_some()).await;
        assert!(place.run(asked("allocs", true), |_| Ok(())).await.is_err());
        go.send(()).unwrap();
        first.await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_client_that_goes_away_ends_what_it_asked_for() {
        let place = Arc::new(OneAtATime::default());
        let first = tokio::spawn({
            let place = Arc::clone(&place);
            async move { place.run(asked("profile", false), |interrupt| interrupt.wait(Duration::from_secs(60))).await }
        });
        until(|| place.lock().is_some()).await;
        first.abort();
        let begin = Instant::now();
        until(|| place.lock().is_none()).await;
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    }

    #[tokio::test]
    async fn a_panic_frees_the_place() {
        let place = Arc::new(OneAtATime::default());
        let result = place.run::<()>(asked("heap", false), |_| panic!("as a profile might")).await;
        assert!(result.unwrap().unwrap_err().to_string().contains("heap profile panicked"));
        until(|| place.lock().is_none()).await;
        assert!(place.run(asked("heap", false), |_| Ok(())).await.is_ok());
    }
}
