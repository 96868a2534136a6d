//! The health and metrics pages, on `admin.listen`.
//!
//! | path       | method | answer                                                                                     |
//! |------------|--------|--------------------------------------------------------------------------------------------|
//! | `/`        | GET    | this list                                                                                  |
//! | `/livez`   | GET    | 200 while every loop turns, else 503; JSON with the last turn and the limit of each        |
//! | `/readyz`  | GET    | 200 while work can be done, else 503; JSON that names what is not ready, why and since when |
//! | `/metrics` | GET    | 200, the metrics in Prometheus' text format                                                |
//!
//! The pages read and never write: asking them changes nothing. Request bodies are not read.
//!
//! [`bind`] and [`serve`] are two calls, so that an address is known and logged before there is traffic.

mod pages;
mod server;

use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;

use crate::health::Health;
use crate::metrics::Metrics;

pub use server::{bind, serve};

/// The pages.
pub fn router(health: Health, metrics: Arc<Metrics>) -> Router {
    Router::new()
        .route("/", get(pages::index))
        .route("/livez", get(pages::livez))
        .route("/readyz", get(pages::readyz))
        .with_state(health)
        .merge(Router::new().route("/metrics", get(pages::metrics)).with_state(metrics))
        .fallback(async || (StatusCode::NOT_FOUND, "nothing here; / lists what there is\n"))
}
