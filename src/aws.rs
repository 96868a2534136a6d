//! What AWS's services have in common: HTTP over rustls, the region, credentials.

use anyhow::Context as _;
use aws_config::{BehaviorVersion, ConfigLoader, Region};
use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials as _, SharedCredentialsProvider};
use aws_smithy_http_client::tls;
use std::time::{Duration, SystemTime};
use tokio::sync::Mutex;

/// Credentials that expire sooner are asked for anew.
const LEFT: Duration = Duration::from_secs(300);

/// The configuration of a client, to which its service adds what is its own.
pub fn loader(region: &str) -> ConfigLoader {
    let http = aws_smithy_http_client::Builder::new()
        .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring))
        .build_https();
    aws_config::defaults(BehaviorVersion::latest()).http_client(http).region(Region::new(region.to_owned()))
}

/// Credentials of the standard chain, for calls that no client of AWS's SDK makes.
pub struct StandardChain {
    provider: SharedCredentialsProvider,
    known: Mutex<Option<Credentials>>,
}

impl StandardChain {
    /// Nobody is asked yet.
    pub async fn new(region: &str) -> anyhow::Result<Self> {
        let config = loader(region).load().await;
        let provider = config.credentials_provider().context("AWS's SDK was built without the standard chain")?;
        Ok(StandardChain { provider, known: Mutex::default() })
    }

    /// Credentials that are good for some minutes at least.
    pub async fn credentials(&self) -> anyhow::Result<Credentials> {
        let mut known = self.known.lock().await;
        if let Some(credentials) = &*known
            && credentials.expiry().is_none_or(|expiry| expiry > SystemTime::now() + LEFT)
        {
            return Ok(credentials.clone());
        }
        let provided = self.provider.provide_credentials().await;
        let credentials =
            provided.context("no AWS credentials: neither environment, profile, web identity, ECS nor IMDS")?;
        Ok(known.insert(credentials).clone())
    }
}
