//! What both programs of this package need: `before-after` compares WriteApi with the ways before it, `bench` with the
//! figures that it holds itself to.

pub mod event;
pub mod machine;
pub mod text;
