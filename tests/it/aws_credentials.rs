//! Where the program gets its AWS credentials: each link of the standard chain, seen at the other end, where SQS reads
//! the access key id in the signature.

use std::collections::VecDeque;
use std::fs;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::harness::{SOON, text, until};

const ROLE: &str = "arn:aws:iam::123456789012:role/write-api";
/// The SDK asks for fresh credentials ten seconds before the old ones end.
const SHORT: Duration = Duration::from_secs(12);

/// SQS, STS, the metadata service of EC2 and that of containers, all at one address.
struct Aws {
    url: String,
    seen: Arc<Seen>,
}

struct Seen {
    lifetime: Duration,
    log: Mutex<Log>,
}

#[derive(Default)]
struct Log {
    /// Access key ids, in the order in which SQS saw them.
    signed_by: Vec<String>,
    /// What a workload showed to get credentials: a web identity token, a container's token.
    shown: VecDeque<String>,
    issued: u32,
}

impl Seen {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fresh credentials; each have a key id of their own.
    fn issue(&self, to: &str) -> (String, String) {
        let mut log = self.log();
        log.issued += 1;
        let expires = OffsetDateTime::now_utc() + self.lifetime;
        (format!("ASIA{to}{}", log.issued), expires.format(&Rfc3339).expect("a time"))
    }
}

impl Aws {
    async fn start(lifetime: Duration) -> Result<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let seen = Arc::new(Seen { lifetime, log: Mutex::default() });
        let router = Router::new().fallback(answer).with_state(seen.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self { url, seen })
    }

    fn signed_by(&self) -> Vec<String> {
        self.seen.log().signed_by.clone()
    }

    /// The program with nothing in its environment but this.
    fn program(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_write-api"));
        command.args(arguments).env_clear().env("WRITE_API_AWS_ENDPOINT_URL", &self.url);
        command.envs(environment.iter().copied());
        command
    }

    async fn run(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Result<Output> {
        let mut command = self.program(arguments, environment);
        Ok(tokio::task::spawn_blocking(move || command.output()).await??)
    }
}

async fn answer(State(seen): State<Arc<Seen>>, method: Method, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let body = text(&body);
    match (method, uri.path()) {
        (Method::PUT, "/latest/api/token") => {
            ([("x-aws-ec2-metadata-token-ttl-seconds", "21600")], "session").into_response()
        }
        (Method::GET, "/latest/meta-data/iam/security-credentials/") => "the-role".into_response(),
        (Method::GET, "/latest/meta-data/iam/security-credentials/the-role") => {
            // Version 2 of the metadata service: no answer without a session.
            if header("x-aws-ec2-metadata-token") != "session" {
                return StatusCode::UNAUTHORIZED.into_response();
            }
            let (key, expires) = seen.issue("IMDS");
            let now = OffsetDateTime::now_utc().format(&Rfc3339).expect("a time");
            json_answer(&json!({
                "Code": "Success", "LastUpdated": now, "Type": "AWS-HMAC", "AccessKeyId": key,
                "SecretAccessKey": "s", "Token": "t", "Expiration": expires,
            }))
        }
        (Method::GET, "/container") => {
            let shown = header("authorization").to_owned();
            seen.log().shown.push_back(shown);
            let (key, expires) = seen.issue("ECS");
            json_answer(&json!({"AccessKeyId": key, "SecretAccessKey": "s", "Token": "t", "Expiration": expires}))
        }
        (Method::POST, _) if body.contains("Action=AssumeRole") => {
            let field = |name: &str| body.split('&').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
            if let Some(token) = field("WebIdentityToken") {
                seen.log().shown.push_back(token.to_owned());
            }
            let (action, (key, expires)) = (field("Action").unwrap_or_default(), seen.issue("STS"));
            let xml = format!(
                "<{action}Response xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><{action}Result><Credentials>\
                 <AccessKeyId>{key}</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>\
                 <Expiration>{expires}</Expiration></Credentials></{action}Result></{action}Response>"
            );
            ([(header::CONTENT_TYPE, "text/xml")], xml).into_response()
        }
        (Method::POST, _) if !header("x-amz-target").is_empty() => {
            let key = header("authorization").split_once("Credential=").and_then(|(_, rest)| rest.split_once('/'));
            let key = key.map_or("nobody", |(key, _)| key).to_owned();
            seen.log().signed_by.push(key);
            let asked: Value = serde_json::from_str(&body).unwrap_or_default();
            let entries = asked["Entries"].as_array().into_iter().flatten();
            let sent: Vec<Value> =
                entries.map(|entry| json!({"Id": entry["Id"], "MessageId": "m", "MD5OfMessageBody": "0"})).collect();
            json_answer(&match header("x-amz-target") {
                "AmazonSQS.GetQueueUrl" => json!({"QueueUrl": "http://127.0.0.1/123456789012/writeapi-events"}),
                "AmazonSQS.SendMessageBatch" => json!({"Successful": sent, "Failed": []}),
                _ => json!({"MessageId": "m", "MD5OfMessageBody": "0"}),
            })
        }
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

fn json_answer(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

#[tokio::test]
async fn each_link_of_the_chain_signs_what_is_sent() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (profiles, identity, container) = (path("credentials"), path("identity"), path("container"));
    let profile = |name: &str, key: &str| format!("[{name}]\naws_access_key_id = {key}\naws_secret_access_key = s\n");
    let assuming = format!("[assuming]\nrole_arn = {ROLE}\nsource_profile = night\n");
    fs::write(&profiles, profile("other", "AKIAOTHER") + &profile("night", "AKIAPROFILE") + &assuming)?;
    fs::write(&identity, "the-identity-of-the-pod")?;
    fs::write(&container, "the-token-of-the-container")?;
    let aws = Aws::start(Duration::from_secs(3600)).await?;
    let container_url = format!("{}/container", aws.url);
    for (link, environment, key) in [
        (
            "environment",
            vec![("AWS_ACCESS_KEY_ID", "AKIAENVIRONMENT"), ("AWS_SECRET_ACCESS_KEY", "s")],
            "AKIAENVIRONMENT",
        ),
        ("profile", vec![("AWS_SHARED_CREDENTIALS_FILE", &profiles), ("AWS_PROFILE", "night")], "AKIAPROFILE"),
        (
            "profile that assumes a role",
            vec![
                ("AWS_SHARED_CREDENTIALS_FILE", &*profiles),
                ("AWS_PROFILE", "assuming"),
                ("AWS_ENDPOINT_URL_STS", &aws.url),
            ],
            "ASIASTS1",
        ),
        (
            "web identity",
            vec![
                ("AWS_WEB_IDENTITY_TOKEN_FILE", &*identity),
                ("AWS_ROLE_ARN", ROLE),
                ("AWS_ENDPOINT_URL_STS", &aws.url),
            ],
            "ASIASTS2",
        ),
        (
            "ECS and EKS Pod Identity",
            vec![
                ("AWS_CONTAINER_CREDENTIALS_FULL_URI", &*container_url),
                ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", &container),
            ],
            "ASIAECS3",
        ),
        ("IMDS", vec![("AWS_EC2_METADATA_SERVICE_ENDPOINT", &*aws.url)], "ASIAIMDS4"),
    ] {
        let before = aws.signed_by().len();
        let output = aws.run(&["send", "refresh"], &environment).await?;
        ensure!(output.status.success(), "{link}: {}", text(&output.stderr));
        let signed_by = aws.signed_by().split_off(before);
        // The queue was looked up, and the event sent.
        ensure!(signed_by == [key, key], "{link}: {signed_by:?}");
    }
    let shown: Vec<String> = aws.seen.log().shown.drain(..).collect();
    ensure!(shown == ["the-identity-of-the-pod", "the-token-of-the-container"], "{shown:?}");
    Ok(())
}

/// Credentials that end are replaced before they do, by what the token says then: Kubernetes writes it anew each hour.
#[tokio::test]
async fn credentials_that_end_are_asked_for_again_with_the_token_of_that_time() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let identity = directory.path().join("identity");
    fs::write(&identity, "first")?;
    let aws = Aws::start(SHORT).await?;
    let path = identity.display().to_string();
    let environment =
        [("AWS_WEB_IDENTITY_TOKEN_FILE", &*path), ("AWS_ROLE_ARN", ROLE), ("AWS_ENDPOINT_URL_STS", &aws.url)];
    // Ten events a second, so about as long as ten calls take.
    let mut program = aws.program(&["send", "upsert", "--sample", "100", "--rate", "10"], &environment);
    let running = tokio::task::spawn_blocking(move || program.output());
    until("the first token", SOON, async || Ok((!aws.seen.log().shown.is_empty()).then_some(()))).await?;
    fs::write(&identity, "second")?;
    let output = running.await??;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    let shown: Vec<String> = aws.seen.log().shown.drain(..).collect();
    ensure!(shown.len() >= 2 && shown[0] == "first" && shown[1..].iter().all(|token| token == "second"), "{shown:?}");
    let signed_by = aws.signed_by();
    let numbers: Option<Vec<u32>> =
        signed_by.iter().map(|key| key.strip_prefix("ASIASTS").and_then(|number| number.parse().ok())).collect();
    let numbers = numbers.with_context(|| format!("keys that were not issued: {signed_by:?}"))?;
    ensure!(numbers.is_sorted() && numbers.last() > Some(&1), "no newer key was used: {signed_by:?}");
    Ok(())
}

#[tokio::test]
async fn nobody_at_all_is_told_by_the_chain_and_within_the_bound() -> Result<()> {
    let aws = Aws::start(SHORT).await?;
    let settings = [("AWS_EC2_METADATA_DISABLED", "true"), ("WRITE_API_QUEUE_REQUEST_TIMEOUT", "2s")];
    let output = aws.run(&["send", "refresh"], &settings).await?;
    let said = text(&output.stderr);
    ensure!(output.status.code() == Some(1) && said.contains("credentials"), "{output:?}");
    ensure!(aws.signed_by().is_empty(), "{:?}", aws.signed_by());
    Ok(())
}
