//! WriteApi: an SQS event worker whose memory follows concurrency, never rows.

pub mod config;
pub mod metrics;
pub mod partner;

// The tests measure what the service measures, so they run on its allocator as well.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
