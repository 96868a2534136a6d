//! Dead letters: seen without being taken, sent again without being lost, deleted only by saying so.

mod discard;
mod interruptions;
mod list;
mod redrive;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aws_sdk_sqs::types::{MessageAttributeValue, QueueAttributeName, SendMessageBatchRequestEntry};
use local_stack::{SqsFault, SqsProxy};
use serde_json::{Value, json};

use crate::harness::{Lane, SOON, World, text, until};

/// A good upsert of listing `id`, by event `upsert-<id>`.
fn upsert(id: i64) -> String {
    json!({
        "specversion": "1.0", "id": format!("upsert-{id}"), "source": "/test", "type": "writeapi.listing.upsert.v1",
        "time": "2026-01-31T02:00:00Z",
        "data": {"listing_id": id, "zip_code": 98001, "list_price_cents": 1, "bedrooms": 1, "living_square_feet": 1},
    })
    .to_string()
}

fn reason(code: &str, message_id: &str) -> String {
    json!({"code": code, "reason": "because", "message_id": message_id, "queue": "q", "receive_count": 1}).to_string()
}

async fn url(world: &World, lane: Lane, suffix: &str) -> Result<String> {
    let name = format!("{}{suffix}", world.queue_name(lane));
    let found = world.sqs.get_queue_url().queue_name(name).send().await?;
    found.queue_url.context("a URL")
}

/// Puts a message into a lane's dead-letter queue.
async fn put_dead(world: &World, lane: Lane, body: &str, attributes: &[(&str, &str)]) -> Result<()> {
    let mut request = world.sqs.send_message().queue_url(url(world, lane, "-dlq").await?).message_body(body);
    for (name, value) in attributes {
        let kind = if *name == "redrives" { "Number" } else { "String" };
        let value = MessageAttributeValue::builder().data_type(kind).string_value(*value).build()?;
        request = request.message_attributes(*name, value);
    }
    request.send().await?;
    Ok(())
}

/// Takes everything that can be received of a queue: bodies with their count of redrives.
async fn take_all(world: &World, lane: Lane, suffix: &str) -> Result<Vec<(String, String)>> {
    let url = url(world, lane, suffix).await?;
    let mut taken = Vec::new();
    loop {
        let request = world.sqs.receive_message().queue_url(&url).max_number_of_messages(10);
        let messages = request.message_attribute_names("All").send().await?.messages.unwrap_or_default();
        if messages.is_empty() {
            return Ok(taken);
        }
        for message in messages {
            let receipt = message.receipt_handle.unwrap_or_default();
            world.sqs.delete_message().queue_url(&url).receipt_handle(receipt).send().await?;
            let attributes = message.message_attributes.unwrap_or_default();
            let redrives = attributes.get("redrives").and_then(|value| value.string_value.clone());
            taken.push((message.body.unwrap_or_default(), redrives.unwrap_or_default()));
        }
    }
}

/// Messages of a lane's dead-letter queue that can be received, and those that are hidden.
async fn dead_depth(world: &World, lane: Lane) -> Result<(u64, u64)> {
    let names =
        [QueueAttributeName::ApproximateNumberOfMessages, QueueAttributeName::ApproximateNumberOfMessagesNotVisible];
    let url = url(world, lane, "-dlq").await?;
    let request = world.sqs.get_queue_attributes().queue_url(url).set_attribute_names(Some(names.to_vec()));
    let attributes = request.send().await?.attributes.unwrap_or_default();
    let number = |name| attributes.get(name).and_then(|text| text.parse().ok()).unwrap_or(0);
    Ok((number(&names[0]), number(&names[1])))
}

async fn wait_for_dead(world: &World, lane: Lane, count: u64) -> Result<()> {
    until("dead letters", SOON, async || Ok((dead_depth(world, lane).await? == (count, 0)).then_some(()))).await
}

/// The letters of a list as a program reads them.
fn listed(world: &World, filters: &[&str]) -> Result<Vec<Value>> {
    let shown = world.done(&[&["dlq", "list", "--json"], filters].concat())?;
    shown.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

/// What of a list tells letters apart here.
fn codes(letters: &[Value]) -> BTreeMap<String, usize> {
    let mut codes = BTreeMap::new();
    for letter in letters {
        *codes.entry(letter["code"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
    }
    codes
}

/// A redrive that tells each letter on a pipe.
fn start_redrive(world: &World, options: &[&str]) -> Result<(Child, impl Iterator<Item = std::io::Result<String>>)> {
    let mut child = world.command().args(["dlq", "redrive"]).args(options).stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(child.stdout.take().context("a pipe")?).lines();
    Ok((child, lines))
}

/// Takes the one message of a lane, as soon as it is visible.
async fn take_when_visible(world: &World, lane: Lane) -> Result<()> {
    until("a message", SOON, async || Ok((!take_all(world, lane, "").await?.is_empty()).then_some(()))).await
}

/// A proxy before SQS, which the program uses from now on. The world's own client goes past it.
async fn proxy(world: &mut World) -> Result<SqsProxy> {
    let proxy = SqsProxy::start(local_stack::shared().await?.sqs().endpoint())?;
    world.set("aws.endpoint_url", proxy.endpoint());
    Ok(proxy)
}

/// Puts many letters into a lane's dead-letter queue, in batches.
async fn put_many(world: &World, lane: Lane, letters: i64) -> Result<()> {
    let url = url(world, lane, "-dlq").await?;
    for first in (1..=letters).step_by(10) {
        let mut request = world.sqs.send_message_batch().queue_url(&url);
        for id in first..(first + 10).min(letters + 1) {
            let entry = SendMessageBatchRequestEntry::builder().id(id.to_string()).message_body(upsert(id)).build()?;
            request = request.entries(entry);
        }
        let output = request.send().await?;
        ensure!(output.failed.is_empty(), "{:?}", output.failed);
    }
    Ok(())
}

/// Sends a signal to a child that was not waited for.
fn signal(child: &Child, signal: libc::c_int) {
    // SAFETY: the child is ours and was not waited for.
    unsafe { libc::kill(child.id() as libc::pid_t, signal) };
}

/// Waits for a child, and gives how long that took.
fn ended(child: Child) -> Result<(std::process::Output, Duration)> {
    let begun = Instant::now();
    let output = child.wait_with_output()?;
    Ok((output, begun.elapsed()))
}

fn hits(proxy: &SqsProxy, fault: SqsFault) -> u64 {
    proxy.hits().get(fault.name()).copied().unwrap_or(0)
}

/// What a verb says at its end that cannot do its work: one line.
fn complaint(world: &World, arguments: &[&str]) -> Result<String> {
    let output = world.cli(arguments)?;
    let told = text(&output.stderr);
    let lines: Vec<&str> = told.lines().filter(|line| !line.starts_with('{')).collect();
    ensure!(output.status.code() == Some(1) && lines.len() == 1, "{arguments:?}: {output:?}");
    ensure!(lines[0].starts_with("write-api: "), "{told}");
    Ok(lines[0].to_owned())
}
