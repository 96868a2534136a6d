//! WriteApi.
fn main() {}
