//! Profiles in pprof's format: a model of one, and what can be done with it whatever it measures.
//!
//! The format is `profile.proto` of github.com/google/pprof, gzipped: what `go tool pprof` and the viewers built upon it
//! read. [`Profile`] is the same without its tables of strings and its numbers for everything: texts are texts, and what
//! refers to a mapping, a function or a location is an index into the profile's own list.
//!
//! - [`Builder`] makes one from stacks of addresses.
//! - [`Profile::encode`] and [`Profile::decode`] are the way to bytes and back.
//! - [`combine()`] adds and subtracts profiles, also those of different processes of one program.
//! - [`collapsed`] and [`flame_graph`] are for readers without Go; [`difference_graph`] shows what changed.

mod builder;
mod combine;
mod decode;
mod encode;
mod flame;
mod profile;
mod stacks;
mod wire;

pub use builder::Builder;
pub use combine::{CombineError, combine};
pub use decode::{DecodeError, MOST_BYTES};
pub use flame::FlameGraph;
pub use profile::{Function, Label, LabelValue, Line, Location, Mapping, Profile, Sample, ValueType};
pub use stacks::{collapsed, difference_graph, flame_graph, frames};

#[cfg(test)]
mod tests;
