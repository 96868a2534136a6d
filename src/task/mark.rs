//! What a thread is working on at this moment: the kind of event, and the stage of its work.
//!
//! The mark is a thread-local word that anyone may read at any time, inside the allocator and inside a signal handler too.
//! It is set around each poll of a future that belongs to an event, and put back afterwards.

use std::cell::Cell;
use std::pin::Pin;
use std::task::{Context, Poll};

use pin_project_lite::pin_project;

use super::trace::Open;
use super::usage;

/// Whose work it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// None of an event: the service itself.
    Service,
    /// `listing.upsert`.
    ListingUpsert,
    /// `valuations.refresh`.
    ValuationsRefresh,
    /// `valuations.publish`.
    ValuationsPublish,
    /// What tests plant; a release does not have it.
    #[cfg(any(test, feature = "fault-injection"))]
    Planted,
}

/// How many there are.
pub const KINDS: usize = if cfg!(any(test, feature = "fault-injection")) { 5 } else { 4 };

impl Kind {
    /// All of them, in the order of their numbers.
    pub const ALL: [Kind; KINDS] = [
        Kind::Service,
        Kind::ListingUpsert,
        Kind::ValuationsRefresh,
        Kind::ValuationsPublish,
        #[cfg(any(test, feature = "fault-injection"))]
        Kind::Planted,
    ];

    /// The label `event_kind` in profiles, `kind` in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Service => "service",
            Kind::ListingUpsert => "listing.upsert",
            Kind::ValuationsRefresh => "valuations.refresh",
            Kind::ValuationsPublish => "valuations.publish",
            #[cfg(any(test, feature = "fault-injection"))]
            Kind::Planted => "planted",
        }
    }

    /// Whether its work takes seconds to hours, so that it is worth to look at the process when it begins and ends.
    pub fn is_slow(self) -> bool {
        // What tests plant is slow.
        !matches!(self, Kind::Service | Kind::ListingUpsert)
    }

    /// The kind of that name; what has none is the service's.
    pub fn named(name: &str) -> Kind {
        Kind::ALL.into_iter().find(|kind| kind.name() == name).unwrap_or(Kind::Service)
    }
}

/// A part of an event's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Stage {
    /// None of those below.
    Other,
    /// Reading from Postgres.
    Read,
    /// A partner call.
    Call,
    /// Writing to Postgres.
    Write,
    /// Sending to Kafka.
    Publish,
}

/// How many there are.
pub const STAGES: usize = 5;

impl Stage {
    /// All of them, in the order of their numbers.
    pub const ALL: [Stage; STAGES] = [Stage::Other, Stage::Read, Stage::Call, Stage::Write, Stage::Publish];

    /// The label `stage` in profiles.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Other => "other",
            Stage::Read => "read",
            Stage::Call => "call",
            Stage::Write => "write",
            Stage::Publish => "publish",
        }
    }
}

/// Kind and stage in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mark {
    /// Whose work it is.
    pub kind: Kind,
    /// Which part of it.
    pub stage: Stage,
}

impl Mark {
    /// What a thread has that was never marked.
    pub const NONE: Mark = Mark { kind: Kind::Service, stage: Stage::Other };

    /// As a number below [`Mark::COUNT`].
    pub const fn index(self) -> usize {
        self.kind as usize * STAGES + self.stage as usize
    }

    /// How many marks there are.
    pub const COUNT: usize = KINDS * STAGES;

    /// The mark of that number; [`Mark::NONE`] for those that are none.
    pub const fn from_index(index: usize) -> Mark {
        if index >= Mark::COUNT {
            return Mark::NONE;
        }
        Mark { kind: Kind::ALL[index / STAGES], stage: Stage::ALL[index % STAGES] }
    }
}

thread_local! {
    // Constant and without a destructor, so that reading it never allocates and is allowed at any time.
    static MARK: Cell<Mark> = const { Cell::new(Mark::NONE) };
}

/// What this thread works on. May be called inside the allocator and in signal handlers.
#[inline]
pub fn current() -> Mark {
    MARK.get()
}

/// Marks the thread until it is dropped, also by a panic.
#[must_use]
pub(super) struct Entered {
    former: Mark,
}

impl Entered {
    pub fn new(mark: Mark) -> Self {
        let former = MARK.get();
        if former != mark {
            usage::change(former, mark);
            usage::stage(mark);
            MARK.set(mark);
        }
        Entered { former }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mark = MARK.get();
        if mark != self.former {
            usage::change(mark, self.former);
            MARK.set(self.former);
        }
    }
}

pin_project! {
    /// A future in whose polls the thread is marked with a stage.
    #[must_use = "futures do nothing unless polled"]
    pub struct InStage<F> {
        stage: Stage,
        // None before the first poll; then the span, where it is one that is kept.
        span: Option<Option<Open>>,
        #[pin]
        future: F,
    }
}

impl<F: Future> Future for InStage<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let _entered = Entered::new(Mark { stage: *this.stage, ..current() });
        this.span.get_or_insert_with(Open::begin);
        let polled = this.future.poll(context);
        if polled.is_ready() {
            *this.span = Some(None);
        }
        polled
    }
}

/// Marks `future` as a stage of whatever event it is polled for.
pub fn in_stage<F: Future>(stage: Stage, future: F) -> InStage<F> {
    InStage { stage, span: None, future }
}

/// Runs `work` as a stage of whatever event this thread works for.
pub fn stage<T>(stage: Stage, work: impl FnOnce() -> T) -> T {
    under(Mark { stage, ..current() }, work)
}

/// Puts `mark` in the place of the thread's, which is returned. What was used before is the caller's to charge.
pub(super) fn replace(mark: Mark) -> Mark {
    MARK.replace(mark)
}

/// Changes the kind until whoever marked the thread takes the mark away.
pub(super) fn set_kind(kind: Kind) {
    let former = MARK.get();
    let mark = Mark { kind, ..former };
    if mark != former {
        usage::change(former, mark);
        MARK.set(mark);
    }
}

/// Runs `work` under `mark`, which is what a thread that works for an event does.
pub fn under<T>(mark: Mark, work: impl FnOnce() -> T) -> T {
    let _entered = Entered::new(mark);
    work()
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use futures::FutureExt;

    use super::*;

    fn seen() -> (&'static str, &'static str) {
        (current().kind.name(), current().stage.name())
    }

    #[test]
    fn indices_and_marks_are_the_same() {
        for index in 0..Mark::COUNT {
            assert_eq!(Mark::from_index(index).index(), index);
        }
        assert_eq!(Mark::from_index(Mark::COUNT), Mark::NONE);
        for kind in Kind::ALL {
            assert_eq!(Kind::named(kind.name()), kind);
        }
    }

    #[test]
    fn a_mark_holds_inside_polls_only_and_stages_keep_the_kind() {
        let mut work = Box::pin(async {
            assert_eq!(seen(), ("valuations.refresh", "other"));
            in_stage(Stage::Call, async {
                assert_eq!(seen(), ("valuations.refresh", "call"));
                futures::pending!();
                assert_eq!(seen(), ("valuations.refresh", "call"));
            })
            .await;
            assert_eq!(seen(), ("valuations.refresh", "other"));
        });
        let mark = Mark { kind: Kind::ValuationsRefresh, stage: Stage::Other };
        let mut context = Context::from_waker(Waker::noop());
        assert!(under(mark, || work.poll_unpin(&mut context).is_pending()));
        assert_eq!(seen(), ("service", "other"));
        assert!(under(mark, || work.poll_unpin(&mut context).is_ready()));
        assert_eq!(seen(), ("service", "other"));
    }

    #[test]
    fn a_panic_takes_the_mark_away() {
        let work = in_stage(Stage::Read, async { panic!("as a handler might") });
        let caught = std::panic::AssertUnwindSafe(work).catch_unwind().now_or_never();
        assert!(matches!(caught, Some(Err(_))));
        assert_eq!(current(), Mark::NONE);
    }
}
