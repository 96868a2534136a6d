//! An S3 emulator on 127.0.0.1.

use anyhow::Result;

use crate::process::Process;
use crate::scratch::Scratch;
use crate::{http_client, ministack};

/// A running emulator of its own. Its buckets are in memory and end with it. Stopped when dropped.
#[derive(Debug)]
pub struct S3 {
    _process: Process,
    endpoint: String,
    // Last: it is removed after the process has stopped.
    _scratch: Scratch,
}

impl S3 {
    /// Starts one with an empty bucket.
    pub async fn with_bucket(bucket: &str) -> Result<Self> {
        let scratch = Scratch::create()?;
        let (process, endpoint) = ministack::start(scratch.path(), "s3").await?;
        http_client::put(&format!("{endpoint}/{bucket}")).await?;
        Ok(Self { _process: process, endpoint, _scratch: scratch })
    }

    /// The endpoint URL.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }
}
