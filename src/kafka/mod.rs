//! Kafka: what post-processing sends, how, and where to.
//!
//! - [`record`](Records) turns a valuation into the bytes of one message,
//! - [`Publisher`] sends a page of them and waits for every delivery report,
//! - [`TopicReader`] reads the topic back, for checks; it shares nothing with the two above,
//! - [`ensure_topic`], [`inspect_topic`] and [`Publisher::check`] look at the topic.
//!
//! Sending a page again gives the same bytes and the same `ce_id`s, so whoever is unsure whether a page went out sends
//! it again. Within one life of a producer idempotence keeps the broker from storing a record twice; across lives
//! consumers tell by `ce_id`.

mod client;
mod delivery;
mod publisher;
mod reader;
mod record;
#[cfg(test)]
mod tests;
mod topic;

pub use delivery::{PublishError, Published, RefusedRecord, Verdict};
pub use publisher::Publisher;
pub use reader::{Extent, ReadError, StoredRecord, TopicReader};
pub use record::{Record, Records, Valuation};
pub use topic::{TopicError, TopicInfo, ensure_topic, inspect_topic};
