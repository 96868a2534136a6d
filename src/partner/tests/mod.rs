//! The partner's promises, each against a real server.

mod answers;
mod connections;
mod limits;
mod overload;
mod requests;
mod stub;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::*;
use crate::config::Backoff;
use stub::{Call, Step, Stub, answer, ok, raw, status, valued};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// Quick settings, without a limit of sends a second.
fn settings(address: SocketAddr) -> config::Partner {
    config::Partner {
        base_url: format!("http://{address}").parse().expect("a URL"),
        in_flight: 100,
        rate_per_second: None,
        connect_timeout: SECOND,
        request_timeout: SECOND,
        total_timeout: SECOND * 60,
        max_attempts: 8,
        retry: Backoff { base: MS, cap: MS * 10 },
        max_response_bytes: 16 * 1024,
        credential: None,
    }
}

fn partner(settings: &config::Partner) -> (Partner, Arc<Metrics>) {
    let metrics = Arc::new(Metrics::new());
    (Partner::new(settings, Arc::clone(&metrics)).expect("good settings"), metrics)
}

fn request(listing_id: i64) -> Request {
    Request { listing_id, zip_code: 98002, list_price_cents: 22_190_000, bedrooms: Some(3), living_square_feet: None }
}

async fn value(partner: &Partner, listing_id: i64) -> Verdict {
    let permit = partner.permit().await;
    partner.valuation(permit, &RunKey::new("run"), request(listing_id)).await
}

fn worth(listing_id: i64) -> Verdict {
    Verdict::Valued { valuation_cents: listing_id * 100, confidence: 0.5 }
}

fn failed(reason: &str) -> Verdict {
    Verdict::Failed { reason: reason.to_owned() }
}

/// Values these listings, all at once as far as there are permits, and returns those that did not get their worth.
async fn value_all(partner: &Partner, listings: std::ops::Range<i64>) -> Vec<(i64, Verdict)> {
    let tasks = listings.clone().map(|listing_id| {
        let partner = partner.clone();
        tokio::spawn(async move { value(&partner, listing_id).await })
    });
    let verdicts = futures::future::join_all(tasks).await.into_iter().map(|verdict| verdict.expect("no panic"));
    listings.zip(verdicts).filter(|(listing_id, verdict)| *verdict != worth(*listing_id)).collect()
}

/// One listing against a script for its first try; later tries are answered well. Returns the verdict and the tries.
async fn first_try(script: impl Fn(&Call) -> Vec<Step> + Send + Sync + 'static) -> (Verdict, Vec<Call>) {
    first_try_within(SECOND * 5, script).await
}

/// The same with a request timeout.
async fn first_try_within(
    request_timeout: Duration,
    script: impl Fn(&Call) -> Vec<Step> + Send + Sync + 'static,
) -> (Verdict, Vec<Call>) {
    let stub = Stub::start(move |call| if call.attempt == 1 { script(call) } else { valued(call.listing_id) }).await;
    let (partner, _) = partner(&config::Partner { request_timeout, ..settings(stub.address) });
    let verdict = timeout(SECOND * 5, value(&partner, 7)).await.expect("a verdict");
    (verdict, stub.calls())
}
