//! The broker process itself.

use std::convert::Infallible;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use tokio::net::TcpListener;

use super::{Addresses, Order, ProduceError};

/// Every broker of the cluster, in the mock cluster's calls.
const ALL_BROKERS: i32 = -1;
const ORDER_BYTES: usize = 64 * 1024;
const ORDER_TIMEOUT: Duration = Duration::from_secs(5);

type Cluster = MockCluster<'static, DefaultProducerContext>;

/// Runs a broker until the future is dropped. Its [`Addresses`] go to `announce` once it can be used.
pub async fn host(mut announce: impl Write) -> Result<()> {
    let cluster = MockCluster::new(1).context("cannot start librdkafka's mock cluster")?;
    let listener = TcpListener::bind("127.0.0.1:0").await.context("cannot listen on 127.0.0.1")?;
    let control = format!("http://{}", listener.local_addr()?);
    let addresses = Addresses { bootstrap: cluster.bootstrap_servers(), control };
    writeln!(announce, "{}", serde_json::to_string(&addresses)?).and_then(|()| announce.flush())?;

    // One connection after the other: the cluster's handle belongs to one thread, and orders are rare.
    loop {
        let (stream, _) = listener.accept().await?;
        let answer = service_fn(async |request| Ok::<_, Infallible>(answer(&cluster, request).await));
        let connection = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), answer);
        match tokio::time::timeout(ORDER_TIMEOUT, connection).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "a control connection failed"),
            Err(_) => tracing::warn!(limit = ?ORDER_TIMEOUT, "a control connection took too long"),
        }
    }
}

async fn answer(cluster: &Cluster, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (status, text) = if request.method() != Method::POST {
        (StatusCode::METHOD_NOT_ALLOWED, "POST an order as JSON".to_owned())
    } else {
        match obey(cluster, request).await {
            Ok(()) => (StatusCode::NO_CONTENT, String::new()),
            Err(error) => (StatusCode::BAD_REQUEST, format!("{error:#}\n")),
        }
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}

async fn obey(cluster: &Cluster, request: Request<Incoming>) -> Result<()> {
    let body = Limited::new(request.into_body(), ORDER_BYTES).collect().await.map_err(anyhow::Error::from_boxed)?;
    match serde_json::from_slice(&body.to_bytes()).context("the body is no order")? {
        Order::CreateTopic { name, partitions } => match cluster.create_topic(&name, partitions, 1) {
            Ok(()) | Err(KafkaError::MockCluster(RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot make topic {name:?} with {partitions} partitions"));
            }
        },
        Order::GoDown => cluster.broker_down(ALL_BROKERS)?,
        Order::ComeUp => cluster.broker_up(ALL_BROKERS)?,
        Order::Delay { milliseconds } => {
            cluster.broker_round_trip_time(ALL_BROKERS, Duration::from_millis(milliseconds))?;
        }
        Order::FailProduce { errors } => {
            let errors: Vec<_> = errors.into_iter().map(code).collect();
            cluster.request_errors(RDKafkaApiKey::Produce, &errors);
        }
        Order::Fail { request, codes } => {
            let errors = codes.into_iter().map(protocol_code).collect::<Result<Vec<_>>>()?;
            cluster.request_errors(api_key(request), &errors);
        }
        Order::Forgive { request } => cluster.clear_request_errors(api_key(request)),
        Order::FailTopic { name, code } => cluster.topic_error(&name, protocol_code(code)?)?,
    }
    Ok(())
}

fn api_key(request: super::Request) -> RDKafkaApiKey {
    match request {
        super::Request::Produce => RDKafkaApiKey::Produce,
        super::Request::InitProducerId => RDKafkaApiKey::InitProducerId,
    }
}

/// Negative codes are librdkafka's own and never on the wire.
fn protocol_code(code: i32) -> Result<RDKafkaRespErr> {
    let known = (code >= 0).then(|| RDKafkaRespErr::try_from(code).ok()).flatten();
    known.with_context(|| format!("{code} is no error code of Kafka's protocol that librdkafka knows"))
}

fn code(error: ProduceError) -> RDKafkaRespErr {
    match error {
        ProduceError::NotLeader => RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
        ProduceError::TimedOut => RDKafkaRespErr::RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
        ProduceError::TooLarge => RDKafkaRespErr::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE,
        ProduceError::NotAuthorized => RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED,
        ProduceError::Disconnect => RDKafkaRespErr::RD_KAFKA_RESP_ERR__TRANSPORT,
    }
}
