//! The stack of a thread by its frame pointers, for profiles.
//!
//! A chain of frame pointers is followed in a few nanoseconds a frame, without locks and without memory, so that it can be
//! done inside a signal handler and inside the allocator. It needs code that is built to keep them
//! (`-C force-frame-pointers=yes` in `.cargo/config.toml`, `-fno-omit-frame-pointer` for C); where a library is not, the walk ends
//! early and never badly: each step reads memory in a way that survives a fault (`load`).

mod load;
mod own;
mod walk;

pub use load::install;
pub use own::{learn, own};
pub use walk::{Registers, walk};
