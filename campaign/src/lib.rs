//! The campaign of fault injection: the service at work among neighbours that fail, processes that die, and a checker that
//! recomputes what must have come of it.
//!
//! In reading order:
//!
//! - [`workload`] makes events from a seed and keeps all that was put in;
//! - [`world`] is one service with everything around it, [`replica`] one of its processes, [`owners`] a witness of who
//!   writes;
//! - [`faults`] break something and prove that it was broken;
//! - [`checker`] holds the world against the one that follows from the inputs;
//! - [`round`] is all of this once, [`schedule`] tells which round comes when;
//! - [`runner`] plays rounds until the time is over, [`report`] sums them up;
//! - [`planted`] are mistakes made on purpose, which must be found out; [`leak`] is one for the profiler.
//!
//! It shares no code with the service and starts it as a program, as everybody else does.

pub mod checker;
pub mod faults;
pub mod leak;
pub mod options;
pub mod owners;
pub mod planted;
pub mod replica;
pub mod report;
pub mod round;
pub mod runner;
pub mod schedule;
pub mod workload;
pub mod world;

pub use runner::run;
