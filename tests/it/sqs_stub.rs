//! An SQS that takes messages and does with them what the emulator never does: takes part of a batch, takes its time,
//! tells when each came.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::Result;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// How the stub behaves.
#[derive(Clone, Debug, Default)]
pub struct Manner {
    /// Before each answer.
    pub latency: Duration,
    /// Each message whose body has this is not taken the first time.
    pub at_the_second_try: Option<&'static str>,
    /// A message whose body has this is never taken.
    pub never: Option<&'static str>,
    /// So many batches are answered with 500 first.
    pub failures: usize,
}

/// A message that was taken.
#[derive(Clone, Debug)]
pub struct Taken {
    pub at: Instant,
    pub body: Value,
}

#[derive(Default)]
struct Shop {
    manner: Manner,
    taken: Vec<Taken>,
    /// Messages and bytes of each batch.
    batches: Vec<(usize, usize)>,
    tried: HashSet<String>,
    address: String,
}

fn open(shop: &Mutex<Shop>) -> MutexGuard<'_, Shop> {
    shop.lock().expect("nothing panics in the shop")
}

/// The stub; it ends with the test.
pub struct SqsStub {
    shop: Arc<Mutex<Shop>>,
    server: JoinHandle<()>,
}

impl SqsStub {
    pub async fn start(manner: Manner) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = format!("http://{}", listener.local_addr()?);
        let shop = Arc::new(Mutex::new(Shop { manner, address, ..Shop::default() }));
        let router = Router::new().fallback(answer).with_state(shop.clone());
        let server = tokio::spawn(async move { drop(axum::serve(listener, router).await) });
        Ok(Self { shop, server })
    }

    /// The settings that lead the program here.
    pub fn settings(&self) -> BTreeMap<&'static str, String> {
        let address = open(&self.shop).address.clone();
        [
            ("WRITE_API_AWS_ENDPOINT_URL", address.as_str()),
            ("AWS_ACCESS_KEY_ID", "stub"),
            ("AWS_SECRET_ACCESS_KEY", "stub"),
        ]
        .map(|(name, value)| (name, value.to_owned()))
        .into()
    }

    pub fn taken(&self) -> Vec<Taken> {
        open(&self.shop).taken.clone()
    }

    /// How often each event was taken, by its id.
    pub fn ids(&self) -> BTreeMap<String, usize> {
        let mut ids = BTreeMap::new();
        for taken in self.taken() {
            *ids.entry(taken.body["id"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
        }
        ids
    }

    /// Messages and bytes of each batch.
    pub fn batches(&self) -> Vec<(usize, usize)> {
        open(&self.shop).batches.clone()
    }

    pub fn change(&self, change: impl FnOnce(&mut Manner)) {
        change(&mut open(&self.shop).manner);
    }
}

impl Drop for SqsStub {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn answer(State(shop): State<Arc<Mutex<Shop>>>, headers: HeaderMap, request: String) -> (StatusCode, String) {
    let request: Value = serde_json::from_str(&request).unwrap_or_default();
    let action = headers.get("x-amz-target").and_then(|target| target.to_str().ok()).unwrap_or_default();
    let latency = open(&shop).manner.latency;
    tokio::time::sleep(latency).await;
    let mut shop = open(&shop);
    let (status, answer) = match action {
        "AmazonSQS.GetQueueUrl" => {
            let url = format!("{}/{}", shop.address, request["QueueName"].as_str().unwrap_or_default());
            (StatusCode::OK, json!({"QueueUrl": url}))
        }
        "AmazonSQS.SendMessageBatch" => shop.take(&request),
        _ => (StatusCode::BAD_REQUEST, json!({"__type": "UnknownOperation", "message": action})),
    };
    (status, answer.to_string())
}

impl Shop {
    fn take(&mut self, request: &Value) -> (StatusCode, Value) {
        if self.manner.failures > 0 {
            self.manner.failures -= 1;
            return (StatusCode::INTERNAL_SERVER_ERROR, json!({"__type": "InternalFailure"}));
        }
        let entries = request["Entries"].as_array().cloned().unwrap_or_default();
        let text = |entry: &Value| entry["MessageBody"].as_str().unwrap_or_default().to_owned();
        self.batches.push((entries.len(), entries.iter().map(|entry| text(entry).len()).sum()));
        let (mut successful, mut failed) = (Vec::new(), Vec::new());
        for entry in &entries {
            let (id, body) = (&entry["Id"], text(entry));
            let has = |mark: Option<&str>| mark.is_some_and(|mark| body.contains(mark));
            if has(self.manner.never) {
                failed.push(json!({"Id": id, "Code": "InvalidMessageContents", "SenderFault": true, "Message": "no"}));
            } else if has(self.manner.at_the_second_try) && self.tried.insert(body.clone()) {
                failed.push(json!({"Id": id, "Code": "InternalError", "SenderFault": false, "Message": "later"}));
            } else {
                let body = serde_json::from_str(&body).unwrap_or_default();
                self.taken.push(Taken { at: Instant::now(), body });
                successful.push(json!({"Id": id, "MessageId": "m", "MD5OfMessageBody": "0"}));
            }
        }
        (StatusCode::OK, json!({"Successful": successful, "Failed": failed}))
    }
}
