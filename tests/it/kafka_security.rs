//! Kafka that is reached by TLS and asks who we are: what a cluster outside of this machine demands.

use anyhow::{Context, Result, ensure};
use local_stack::kafka::{Gateway, Security, User};
use local_stack::{Authority, Behaviour, Certificate};

use crate::harness::{LONG, SOON, Service, World, text, until};

const PASSWORD: &str = "the-password-of-the-brokers";

fn user(mechanism: &'static str) -> Option<User> {
    Some(User { mechanism, name: "write-api".to_owned(), password: PASSWORD.to_owned() })
}

async fn gateway(security: &Security) -> Result<Gateway> {
    Gateway::to(local_stack::shared().await?.kafka().bootstrap(), security)
}

fn show(world: &mut World, client: &Certificate) {
    world.set("kafka.client_certificate_file", client.certificate.display());
    world.set("kafka.client_key_file", client.key.display());
}

/// Everything at once: the brokers' certificate verified, ours shown, a password proven, and all records through it.
#[tokio::test]
async fn records_are_published_over_tls_as_a_user_with_a_certificate() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let authority = Authority::create().await?;
    let own = authority.issue("IP:127.0.0.1").await?;
    let client = authority.issue("DNS:write-api").await?;
    let gateway = gateway(&Security {
        certificate: Some(own),
        clients_of: Some(authority.certificate()),
        user: user("SCRAM-SHA-512"),
    })
    .await?;
    let password_file = world.path("kafka-password");
    std::fs::write(&password_file, format!("{PASSWORD}\n"))?;
    show(&mut world, &client);
    world.set("kafka.brokers", gateway.bootstrap()).set("kafka.security_protocol", "sasl_ssl");
    world.set("kafka.ca_file", authority.certificate().display());
    world.set("kafka.username", "write-api").set("kafka.password_file", password_file.display());
    world.listings(300).await?;
    // The mock cluster's own address, which is plain and open, is where the records are looked for.
    let tap = world.environment().tap()?;

    let service = world.serve().await?;
    let before = gateway.admitted();
    ensure!(before > 0, "it is ready without having been let in");
    let id = world.refresh(&["--limit", "300"])?;
    world.published(&id, LONG).await?;
    world.check_records(&tap, &id, &world.homes(300).await?).await?;
    world.finish(service).await
}

#[tokio::test]
async fn setup_finds_the_topic_by_each_protocol_and_mechanism() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let authority = Authority::create().await?;
    let own = authority.issue("IP:127.0.0.1").await?;
    for (protocol, mechanism) in [
        ("ssl", None),
        ("sasl_ssl", Some("PLAIN")),
        ("sasl_ssl", Some("SCRAM-SHA-256")),
        ("sasl_ssl", Some("SCRAM-SHA-512")),
        ("sasl_plaintext", Some("SCRAM-SHA-256")),
    ] {
        let certificate = protocol.ends_with("ssl").then(|| own.clone());
        let ca_file = certificate.as_ref().map(|_| authority.certificate().display().to_string());
        let gateway = gateway(&Security { certificate, user: mechanism.and_then(user), clients_of: None }).await?;
        world.set("kafka.brokers", gateway.bootstrap()).set("kafka.security_protocol", protocol);
        world.set("kafka.ca_file", ca_file.unwrap_or_default());
        if let Some(mechanism) = mechanism {
            world.set("kafka.sasl_mechanism", mechanism);
            world.set("kafka.username", "write-api").set("kafka.password", PASSWORD);
        }
        let output = world.cli(&["setup"])?;
        ensure!(output.status.success(), "{protocol} {mechanism:?}: {}", text(&output.stderr));
        ensure!(text(&output.stdout).contains("with 12 partitions was there"), "{output:?}");
        ensure!(gateway.admitted() > 0, "{protocol} {mechanism:?}: not through the gateway");
    }
    Ok(())
}

/// The reason for which Kafka cannot be used, as `/readyz` gives it.
async fn kafka_is_away_because(service: &Service) -> Result<String> {
    until("a reason", SOON, async || {
        let Ok((_, page)) = service.page("/readyz").await else { return Ok(None) };
        let page: serde_json::Value = serde_json::from_str(&page)?;
        let entries = page["not_ready"].as_array().cloned().unwrap_or_default();
        let kafka = entries.into_iter().find(|entry| entry["name"] == "kafka").map(|entry| entry.to_string());
        // Before the first look there is no answer of the brokers to tell.
        Ok(kafka.filter(|told| told.contains("no answer within")))
    })
    .await
}

/// Nobody but the right broker, and no broker without the right credentials; and the operator is told which it was.
#[tokio::test]
async fn each_refusal_is_told_with_its_reason() -> Result<()> {
    let mut world = World::for_services(3, Behaviour::default()).await?;
    let (authority, other) = (Authority::create().await?, Authority::create().await?);
    let own = authority.issue("IP:127.0.0.1").await?;
    let misnamed = authority.issue("DNS:kafka.example").await?;
    let stranger = other.issue("DNS:write-api").await?;
    let of = |certificate: &Certificate| Security { certificate: Some(certificate.clone()), ..Security::default() };
    let right = gateway(&of(&own)).await?;
    let wrong_name = gateway(&of(&misnamed)).await?;
    let asking = gateway(&Security { clients_of: Some(authority.certificate()), ..of(&own) }).await?;
    let with_user = gateway(&Security { user: user("SCRAM-SHA-256"), ..of(&own) }).await?;
    let with_plain = gateway(&Security { user: user("PLAIN"), ..of(&own) }).await?;

    let mut started = Vec::new();
    let mut start = |world: &mut World, gateway: &Gateway, reason: &'static [&'static str]| {
        world.set("kafka.brokers", gateway.bootstrap());
        let service = world.start()?;
        service.expect_errors();
        started.push((service, reason));
        anyhow::Ok(())
    };
    world.set("kafka.security_protocol", "ssl").set("kafka.ca_file", other.certificate().display());
    start(&mut world, &right, &["certificate verify failed"])?;
    world.set("kafka.ca_file", "");
    start(&mut world, &right, &["certificate verify failed"])?;
    world.set("kafka.ca_file", authority.certificate().display());
    start(&mut world, &wrong_name, &["certificate verify failed"])?;
    show(&mut world, &stranger);
    start(&mut world, &asking, &["SSL", "alert"])?;
    world.set("kafka.client_certificate_file", "").set("kafka.client_key_file", "");
    world.set("kafka.security_protocol", "sasl_ssl").set("kafka.sasl_mechanism", "SCRAM-SHA-256");
    world.set("kafka.username", "write-api").set("kafka.password", "a-guess");
    start(&mut world, &with_user, &["uthentication"])?;
    start(&mut world, &with_plain, &["mechanism"])?;
    for (service, reasons) in started {
        let told = kafka_is_away_because(&service).await?;
        for reason in reasons {
            ensure!(told.contains(reason), "{reason:?} is not told: {told}");
        }
        ensure!(told.contains("security settings"), "no remedy: {told}");
        service.finish().await?;
    }
    for gateway in [right, wrong_name, asking, with_user, with_plain] {
        ensure!(gateway.admitted() == 0, "{} connections were admitted", gateway.admitted());
    }
    Ok(())
}

#[tokio::test]
async fn a_file_that_is_no_certificate_ends_the_start_by_name() -> Result<()> {
    let mut world = World::bare(1, Behaviour::default()).await?;
    let file = world.path("ca.pem");
    std::fs::write(&file, "not PEM")?;
    world.set("kafka.security_protocol", "ssl").set("kafka.ca_file", file.display());
    let output = world.cli(&["serve"])?;
    let said = text(&output.stderr);
    let last = said.lines().last().context("no word")?;
    ensure!(output.status.code() == Some(1) && last.contains("[kafka]") && last.contains("ca.location"), "{said}");
    Ok(())
}
