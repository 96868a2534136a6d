//! No secret is written anywhere, whatever happens and however much is logged.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Output;

use anyhow::{Context, Result, ensure};
use flate2::read::GzDecoder;
use local_stack::kafka::{Gateway, Security, User};
use local_stack::partner::RequiredHeader;
use local_stack::wire::{Flow, Wire};
use local_stack::{Authority, Behaviour};

use crate::harness::{LONG, SOON, Service, World, text, until};
use crate::neighbours::missing;

const DATABASE_PASSWORD: &str = "canary-of-the-database";
const TOKEN: &str = "canary-of-the-profiler";
const CREDENTIAL: &str = "canary-of-the-partner";
const KAFKA_PASSWORD: &str = "canary-of-kafka";
/// Wrong, as a misspelt right one would be.
const KAFKA_GUESS: &str = "canary-of-kafka-misspelt";
const AWS_SECRET: &str = "canary-of-aws";
const AWS_TOKEN: &str = "canary-of-the-aws-session";
const SECRETS: [&str; 6] = [DATABASE_PASSWORD, TOKEN, CREDENTIAL, KAFKA_PASSWORD, AWS_SECRET, AWS_TOKEN];

/// Looks for the secrets, and for the forms in which they travel.
fn keeps_secrets(place: &str, output: impl AsRef<[u8]>) -> Result<()> {
    use base64::Engine as _;
    let output = output.as_ref();
    for secret in SECRETS {
        let encoded = base64::engine::general_purpose::STANDARD_NO_PAD.encode(secret);
        for form in [secret, &encoded] {
            let found = output.windows(form.len()).position(|window| window == form.as_bytes());
            if let Some(at) = found {
                let around = &output[at.saturating_sub(600)..output.len().min(at + 200)];
                anyhow::bail!("{secret:?} is in {place}: {}", text(around));
            }
        }
    }
    Ok(())
}

fn ended(world: &World, arguments: &[&str]) -> Result<Output> {
    let output = world.cli(arguments)?;
    keeps_secrets(&format!("the output of {arguments:?}"), [&output.stdout[..], &output.stderr].concat())?;
    Ok(output)
}

/// GETs from the profiling listener with a token; status line, headers and body.
fn profile(service: &Service, token: &str) -> Result<Vec<u8>> {
    let address = service.profiling_url().trim_start_matches("http://");
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(SOON * 3))?;
    write!(stream, "GET /debug/pprof/heap HTTP/1.1\r\nHost: {address}\r\n")?;
    write!(stream, "Authorization: Bearer {token}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

async fn pages(service: &Service) -> Result<()> {
    for path in ["/readyz", "/livez", "/metrics"] {
        keeps_secrets(path, service.page(path).await?.1)?;
    }
    let answer = profile(service, TOKEN)?;
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "{}", text(&answer[..answer.len().min(200)]));
    let body = answer.windows(4).position(|window| window == b"\r\n\r\n").context("no body")? + 4;
    let mut unpacked = Vec::new();
    GzDecoder::new(&answer[body..]).read_to_end(&mut unpacked)?;
    ensure!(unpacked.len() > 1_000, "a profile of {} bytes", unpacked.len());
    keeps_secrets("the heap profile", unpacked)?;
    keeps_secrets("the refusal of a wrong token", profile(service, "a-guess-of-a-token")?)
}

#[tokio::test]
async fn no_secret_is_ever_written() -> Result<()> {
    let mut world = World::for_services(2, Behaviour::default()).await?;
    let authority = Authority::create().await?;
    let user = User { mechanism: "PLAIN", name: "write-api".to_owned(), password: KAFKA_PASSWORD.to_owned() };
    let certificate = Some(authority.issue("IP:127.0.0.1").await?);
    let bootstrap = local_stack::shared().await?.kafka().bootstrap();
    let kafka = Gateway::to(bootstrap, &Security { certificate, user: Some(user), ..Security::default() })?;
    let url = world.environment().database_url().replace("postgres@", &format!("postgres:{DATABASE_PASSWORD}@"));
    let postgres = Wire::to(&url)?;
    let sqs = Wire::to(local_stack::shared().await?.sqs().endpoint())?;
    let credential_file = world.path("credential");
    fs::write(&credential_file, "an-outdated-one")?;
    // Everything, libraries included, says all that it has to say.
    world.set("log.level", "trace").set("database.url", postgres.url()).set("profiling.token", TOKEN);
    world.set("aws.endpoint_url", sqs.url()).set("queue.request_timeout", "1s").set("queue.wait_time", "1s");
    world.set_variable("AWS_SECRET_ACCESS_KEY", AWS_SECRET).set_variable("AWS_SESSION_TOKEN", AWS_TOKEN);
    world.set("partner.credential_header", "X-Key").set("partner.credential_file", credential_file.display());
    world.set("kafka.brokers", kafka.bootstrap()).set("kafka.security_protocol", "sasl_ssl");
    world.set("kafka.ca_file", authority.certificate().display()).set("kafka.sasl_mechanism", "PLAIN");
    world.set("kafka.username", "write-api").set("kafka.password", KAFKA_PASSWORD);
    world.listings(20).await?;
    for arguments in [&["setup"][..], &["seed", "--count", "5"], &["send", "upsert", "--sample", "1"]] {
        let output = ended(&world, arguments)?;
        ensure!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    }
    for arguments in [&["--help"][..], &["serve", "--help"], &["send", "refresh", "--help"], &["no-such-verb"]] {
        ended(&world, arguments)?;
    }

    // Success, and each neighbour once refusing or away.
    let required = RequiredHeader { name: "X-Key".to_owned(), value: CREDENTIAL.to_owned() };
    world.partner.control(|behaviour| behaviour.required_header = Some(required))?;
    let service = world.serve().await?;
    service.expect_errors();
    let id = world.refresh(&[])?;
    until("a refused call", SOON, async || Ok((world.partner.stats().requests > 0).then_some(()))).await?;
    fs::write(&credential_file, CREDENTIAL)?;
    world.published(&id, LONG).await?;
    for (name, wire) in [("database", &postgres), ("queue", &sqs)] {
        wire.set(Flow::Cut);
        until("a failed look", SOON, async || {
            Ok(missing(&service).await?.iter().any(|missing| missing.starts_with(name)).then_some(()))
        })
        .await?;
        pages(&service).await?;
        wire.set(Flow::Open);
        service.ready().await?;
    }
    world.set("kafka.password", KAFKA_GUESS);
    let refused = world.start()?;
    refused.expect_errors();
    until("a refused password", SOON, async || {
        let Ok((_, page)) = refused.page("/readyz").await else { return Ok(None) };
        Ok(page.contains("uthentication").then_some(()))
    })
    .await?;
    pages(&refused).await?;
    for service in [service, refused] {
        let log = service.log()?;
        ensure!(log.contains(r#""level":"TRACE""#), "the log tells too little to tell anything");
        keeps_secrets("the log", &log)?;
        world.quiet(LONG).await?;
        world.finish(service).await?;
    }

    // Wrong settings are where values are quoted.
    world.set("kafka.password", KAFKA_PASSWORD).set("database.acquire_timeout", "200ms");
    let right = postgres.url().to_owned();
    for (key, wrong, back) in [
        ("kafka.password", format!("{KAFKA_PASSWORD}\nand more"), KAFKA_PASSWORD),
        ("kafka.password_file", "/nowhere/file".to_owned(), ""),
        ("kafka.sasl_mechanism", "NONE".to_owned(), "PLAIN"),
        ("kafka.security_protocol", "plaintext".to_owned(), "sasl_ssl"),
        ("profiling.token_file", "/nowhere/file".to_owned(), ""),
        ("partner.credential_header", "no header".to_owned(), "X-Key"),
        ("database.url", format!("mysql://app:{DATABASE_PASSWORD}@localhost/app"), &right),
        ("database.url", format!("postgres://app:{DATABASE_PASSWORD}@localhost:port/app"), &right),
        ("database.url", format!("postgres://app:{DATABASE_PASSWORD}@127.0.0.1:1/app"), &right),
    ] {
        world.set(key, &wrong);
        let output = ended(&world, &["setup"])?;
        ensure!(!output.status.success(), "{key} = {wrong:?}: {output:?}");
        world.set(key, back);
    }
    Ok(())
}
