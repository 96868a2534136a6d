//! The proxy's two sides.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{future, io};

use bytes::Bytes;
use http::uri::Authority;
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::fault::{self, Refusal, Scope, Scoped, SqsFault};
use super::protocol::{self, Answer, Call};
use super::repeats::Repeats;
use super::witness::{Done, Watched, WatchedMessage, Witness};
use crate::background::accept;
use crate::orders::{Orders, Taken};

/// What the connections of one proxy share.
#[derive(Debug)]
pub(super) struct State {
    pub(super) orders: Orders<Scoped>,
    pub(super) witness: Witness,
    emulator: Authority,
    client: Client<HttpConnector, Full<Bytes>>,
    repeats: Mutex<Repeats>,
    /// Counts the messages that came to wait, for parked polls.
    arrivals: watch::Sender<u64>,
}

/// What becomes of one message of a call.
enum Fate {
    Forward,
    Refuse(Refusal),
    /// SQS says that it did it, and does nothing.
    Pretend,
}

impl State {
    pub(super) fn new(emulator: Authority) -> Self {
        Self {
            orders: Orders::new(),
            witness: Witness::default(),
            emulator,
            client: Client::builder(TokioExecutor::new()).build(HttpConnector::new()),
            repeats: Mutex::default(),
            arrivals: watch::Sender::new(0),
        }
    }

    fn repeats(&self) -> MutexGuard<'_, Repeats> {
        self.repeats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hit(&self, taken: &Taken<Scoped>, call: &Call) {
        self.orders.hit(&taken.fault, format!("{} on {}", call.action, call.queue));
    }
}

/// Serves connections until dropped.
pub(super) async fn serve(listener: TcpListener, state: Arc<State>) {
    loop {
        let stream = accept("SQS proxy", &listener).await;
        let state = state.clone();
        let service = service_fn(move |request| handle(state.clone(), request));
        tokio::spawn(async move {
            // A client that goes away, and a connection closed on purpose, end here too.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// An error closes the connection without an answer.
async fn handle(state: Arc<State>, request: Request<Incoming>) -> io::Result<Answer> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let mut call = match Call::read(parts.headers, &body) {
        Ok(call) => call,
        Err(error) => return Ok(protocol::error(StatusCode::BAD_REQUEST, "InvalidRequest", &format!("{error:#}"))),
    };
    let taken = state.orders.take(|scoped| !scoped.fault.needs_messages() && scoped.fits(&call));
    call.replace_receipts(|made| state.repeats().receipt(made));
    let watched = state.witness.begin(&call);
    let answer = answer(&state, call, taken, &watched).await?;
    watched.answered();
    Ok(answer)
}

async fn answer(
    state: &Arc<State>,
    call: Call,
    taken: Option<Taken<Scoped>>,
    watched: &Watched<'_>,
) -> io::Result<Answer> {
    let Some(taken) = taken else {
        return match call.is_receive() {
            true => receive(state, &Arc::new(call), watched).await,
            false => forward(state, &call, watched).await,
        };
    };

    match taken.fault.fault {
        SqsFault::Down => {
            state.hit(&taken, &call);
            Err(closed_on_purpose())
        }
        SqsFault::HungReceive | SqsFault::Hang => {
            state.hit(&taken, &call);
            future::pending().await
        }
        SqsFault::HangAnswer => {
            let answer = forward(state, &call, watched).await?;
            if answer.status().is_success() {
                state.hit(&taken, &call);
                future::pending().await
            } else {
                state.orders.restore(&taken);
                Ok(answer)
            }
        }
        SqsFault::SizeLimit(limit) => {
            state.hit(&taken, &call);
            let fate = |_, message: &Value| match fault::size(message) > limit {
                true => Fate::Refuse(Refusal::TooLarge(limit)),
                false => Fate::Forward,
            };
            one_by_one(state, call, watched, fate).await
        }
        SqsFault::Throttle => {
            state.hit(&taken, &call);
            Ok(protocol::error(StatusCode::FORBIDDEN, "RequestThrottled", "The request was denied due to throttling."))
        }
        SqsFault::ExpiredCredentials => {
            state.hit(&taken, &call);
            let message = "The security token included in the request is expired";
            Ok(protocol::error(StatusCode::FORBIDDEN, "ExpiredToken", message))
        }
        SqsFault::ExtensionFails | SqsFault::DeleteFails => {
            state.hit(&taken, &call);
            Ok(refused(Refusal::Internal, &call.body))
        }
        SqsFault::ExtensionSlow(milliseconds) => {
            state.hit(&taken, &call);
            tokio::time::sleep(Duration::from_millis(milliseconds)).await;
            forward(state, &call, watched).await
        }
        SqsFault::DeleteAnswerLost | SqsFault::SendAnswerLost => {
            let answer = forward(state, &call, watched).await?;
            if answer.status().is_success() {
                state.hit(&taken, &call);
                Err(closed_on_purpose())
            } else {
                state.orders.restore(&taken);
                Ok(answer)
            }
        }
        // Taken by `receive`, when there is a message.
        SqsFault::LateReceiveAnswer(_) | SqsFault::DuplicateDelivery => receive(state, &Arc::new(call), watched).await,
        SqsFault::ExtensionRefused | SqsFault::TwelveHourRefusal => {
            state.hit(&taken, &call);
            let refusal = match taken.fault.fault {
                SqsFault::TwelveHourRefusal => Refusal::TwelveHours,
                _ => Refusal::Stale,
            };
            let fate = |_, entry: &Value| {
                if protocol::extends(entry) { Fate::Refuse(refusal) } else { Fate::Forward }
            };
            one_by_one(state, call, watched, fate).await
        }
        SqsFault::StaleReceipt => {
            state.hit(&taken, &call);
            let is_delete = call.is_delete();
            let fate = |_, _: &Value| if is_delete { Fate::Pretend } else { Fate::Refuse(Refusal::Stale) };
            one_by_one(state, call, watched, fate).await
        }
        SqsFault::PartialBatchFailure => {
            state.hit(&taken, &call);
            let fate = |index, _: &Value| if index == 0 { Fate::Refuse(Refusal::Internal) } else { Fate::Forward };
            one_by_one(state, call, watched, fate).await
        }
    }
}

fn closed_on_purpose() -> io::Error {
    io::Error::other("closed on purpose")
}

/// Carries out a call for those of its messages that are to be forwarded, and answers for all.
async fn one_by_one(
    state: &State,
    mut call: Call,
    watched: &Watched<'_>,
    fate: impl Fn(usize, &Value) -> Fate,
) -> io::Result<Answer> {
    let Some(entries) = call.body.get("Entries").and_then(Value::as_array) else {
        return match fate(0, &call.body) {
            Fate::Forward => forward(state, &call, watched).await,
            Fate::Refuse(refusal) => Ok(refused(refusal, &call.body)),
            Fate::Pretend => Ok(protocol::success(&json!({}))),
        };
    };
    let (mut forwarded, mut failed, mut pretended) = (Vec::new(), Vec::new(), Vec::new());
    for (index, entry) in entries.iter().enumerate() {
        match fate(index, entry) {
            Fate::Forward => forwarded.push(entry.clone()),
            Fate::Refuse(refusal) => {
                let (code, sender_fault, message) = refusal.words(entry);
                failed.push(json!({"Id": entry["Id"], "Code": code, "SenderFault": sender_fault, "Message": message}));
            }
            Fate::Pretend => pretended.push(json!({"Id": entry["Id"]})),
        }
    }
    if forwarded.is_empty() {
        return Ok(protocol::success(&json!({"Successful": pretended, "Failed": failed})));
    }
    call.body["Entries"] = forwarded.into();
    let answer = forward(state, &call, watched).await?;
    if !answer.status().is_success() {
        return Ok(answer);
    }
    let (answer, mut body) = read(answer).await?;
    for (name, more) in [("Successful", pretended), ("Failed", failed)] {
        let mut list = body[name].as_array().cloned().unwrap_or_default();
        list.extend(more);
        body[name] = list.into();
    }
    Ok(protocol::with_body(answer, &body))
}

fn refused(refusal: Refusal, entry: &Value) -> Answer {
    let (code, sender_fault, message) = refusal.words(entry);
    let status = if sender_fault { StatusCode::BAD_REQUEST } else { StatusCode::INTERNAL_SERVER_ERROR };
    protocol::error(status, code, &message)
}

/// The answer to a receive.
struct Received {
    answer: Answer,
    messages: Vec<Value>,
    /// Whether the queue gave the messages, not the proxy.
    from_queue: bool,
}

/// Receives, and does with the messages what was ordered.
async fn receive(state: &Arc<State>, call: &Arc<Call>, watched: &Watched<'_>) -> io::Result<Answer> {
    let Received { answer, messages, from_queue } = poll(state, call).await?;
    watched.received(messages.iter().map(|message| {
        let text = |name: &str| message[name].as_str().unwrap_or_default();
        let own = state.repeats().receipt(text("ReceiptHandle"));
        let receipt = own.as_deref().unwrap_or(text("ReceiptHandle"));
        WatchedMessage::new(receipt, text("MessageId"), text("Body"), Done::Yes)
    }));
    let Some(message) = messages.first() else { return Ok(answer) };
    // What is a repeat already is not repeated again.
    let may_be = |fault| fault != SqsFault::DuplicateDelivery || from_queue;
    let fits = |scoped: &Scoped| scoped.fault.needs_messages() && may_be(scoped.fault) && scoped.fits(call);
    if let Some(taken) = state.orders.take(fits) {
        match taken.fault.fault {
            SqsFault::LateReceiveAnswer(milliseconds) => {
                state.hit(&taken, call);
                tokio::time::sleep(Duration::from_millis(milliseconds)).await;
            }
            // It has happened when the repeat is delivered.
            _ => {
                state.repeats().add(&call.queue, message);
                state.arrivals.send_modify(|count| *count += 1);
            }
        }
    }
    Ok(answer)
}

/// Answers a receive with what waits in the proxy, also when it comes while the queue is being polled; otherwise with
/// what the queue gives.
async fn poll(state: &Arc<State>, call: &Arc<Call>) -> io::Result<Received> {
    let mut arrivals = state.arrivals.subscribe();
    let mut poll = Box::pin({
        let (state, call) = (state.clone(), call.clone());
        async move { received(carry(&state, &call).await?).await }
    });
    let mut begun = false;
    loop {
        let waiting = state.repeats().take(&call.queue, call.most_messages());
        if !waiting.is_empty() {
            let repeated = Scoped { fault: SqsFault::DuplicateDelivery, scope: Scope::default() };
            let what = || format!("{} on {}", call.action, call.queue);
            waiting.iter().filter(|one| one.is_repeat).for_each(|_| state.orders.hit(&repeated, what()));
            if begun {
                // The queue may be giving messages at this moment: the next receive gets them.
                let (state, queue) = (state.clone(), call.queue.clone());
                tokio::spawn(async move {
                    if let Ok(late) = poll.await {
                        state.repeats().keep(&queue, &late.messages);
                        state.arrivals.send_modify(|count| *count += 1);
                    }
                });
            }
            let messages: Vec<_> = waiting.into_iter().map(|one| one.message).collect();
            let answer = protocol::success(&json!({ "Messages": messages }));
            return Ok(Received { answer, messages, from_queue: false });
        }
        begun = true;
        tokio::select! {
            received = &mut poll => return received,
            // The sender is in the state that this function has: it does not end.
            _ = arrivals.changed() => {}
        }
    }
}

async fn received(answer: Answer) -> io::Result<Received> {
    if !answer.status().is_success() {
        return Ok(Received { answer, messages: Vec::new(), from_queue: true });
    }
    let (answer, body) = read(answer).await?;
    let messages = body["Messages"].as_array().cloned().unwrap_or_default();
    Ok(Received { answer: protocol::with_body(answer, &body), messages, from_queue: true })
}

/// Takes the body out of an answer.
async fn read(answer: Answer) -> io::Result<(Answer, Value)> {
    let (parts, body) = answer.into_parts();
    // A whole body in memory cannot fail.
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let body = if body.is_empty() { json!({}) } else { serde_json::from_slice(&body)? };
    Ok((Answer::from_parts(parts, Full::default()), body))
}

/// Has the emulator do what is asked, and notes what it did.
async fn forward(state: &State, call: &Call, watched: &Watched<'_>) -> io::Result<Answer> {
    watched.forwarded(&call.body);
    let answer = carry(state, call).await?;
    let (parts, body) = answer.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let said = serde_json::from_slice(&body).unwrap_or_default();
    watched.carried_out(&call.body, parts.status.is_success().then_some(&said));
    Ok(Answer::from_parts(parts, Full::from(body)))
}

async fn carry(state: &State, call: &Call) -> io::Result<Answer> {
    let begun = Instant::now();
    let uri = Uri::builder().scheme("http").authority(state.emulator.clone()).path_and_query("/").build();
    let mut request = Request::post(uri.map_err(io::Error::other)?)
        .body(Full::from(call.body.to_string()))
        .map_err(io::Error::other)?;
    *request.headers_mut() = call.headers.clone();
    protocol::end_to_end(request.headers_mut());
    let answer = state.client.request(request).await.map_err(io::Error::other)?;
    let (mut parts, body) = answer.into_parts();
    protocol::end_to_end(&mut parts.headers);
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let parked = call.body["WaitTimeSeconds"].as_u64().unwrap_or(0);
    state.witness.took(begun.elapsed().saturating_sub(Duration::from_secs(parked)));
    Ok(Answer::from_parts(parts, Full::from(body)))
}
