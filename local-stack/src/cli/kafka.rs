//! `local-stack kafka`

use anyhow::Result;

/// Hosts a broker until the process ends.
pub(super) async fn run() -> Result<()> {
    local_stack::kafka::host(std::io::stdout()).await
}
