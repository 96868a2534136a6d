//! WriteApi: an SQS event worker whose memory follows concurrency, never rows.

pub mod admin;
pub mod config;
pub mod health;
pub mod kafka;
pub mod metrics;
pub mod profiling;
pub mod telemetry;

// The tests measure what the service measures, so they run on its allocator as well.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
