//! What the SQS proxy does wrong, as the real client sees it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::retry::RetryConfig;
use aws_sdk_sqs::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_sqs::types::{
    ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry, Message, MessageAttributeValue,
    MessageSystemAttributeName, SendMessageBatchRequestEntry,
};
use local_stack::{Scope, SqsFault, SqsProxy};
use tokio::time::timeout;

/// A proxy to the shared emulator, a client of it that tries once, and a queue.
struct Bench {
    proxy: SqsProxy,
    client: Client,
    queue: String,
}

impl Bench {
    async fn new(queue: &str) -> Result<Self> {
        let proxy = SqsProxy::start(local_stack::shared().await?.sqs().endpoint())?;
        let once = proxy.client().await.config().to_builder().retry_config(RetryConfig::disabled()).build();
        let client = Client::from_conf(once);
        let created = client.create_queue().queue_name(queue).send().await?;
        Ok(Self { proxy, client, queue: created.queue_url().context("no queue URL")?.to_owned() })
    }

    async fn send(&self, body: &str) -> Result<()> {
        self.client.send_message().queue_url(&self.queue).message_body(body).send().await?;
        Ok(())
    }

    /// Waits up to 2 s for up to ten messages, which stay hidden for `visibility` seconds.
    async fn receive(&self, visibility: i32) -> Result<Vec<Message>> {
        let call = self.client.receive_message().queue_url(&self.queue).max_number_of_messages(10);
        let call = call.message_system_attribute_names(MessageSystemAttributeName::ApproximateReceiveCount);
        let received = call.visibility_timeout(visibility).wait_time_seconds(2).send().await?;
        Ok(received.messages.unwrap_or_default())
    }

    async fn one(&self, visibility: i32) -> Result<Message> {
        let mut messages = self.receive(visibility).await?;
        ensure!(messages.len() == 1, "{} messages came", messages.len());
        messages.pop().context("no message")
    }

    async fn delete(&self, messages: &[Message]) -> Result<(Vec<String>, Vec<(String, bool)>)> {
        let entries = messages.iter().enumerate().map(|(index, message)| {
            let entry = DeleteMessageBatchRequestEntry::builder().id(index.to_string());
            entry.set_receipt_handle(message.receipt_handle.clone()).build()
        });
        let call = self.client.delete_message_batch().queue_url(&self.queue);
        let output = call.set_entries(Some(entries.collect::<Result<_, _>>()?)).send().await?;
        let failed = output.failed.into_iter().map(|failed| (failed.id, failed.sender_fault)).collect();
        Ok((output.successful.into_iter().map(|done| done.id).collect(), failed))
    }

    /// Each entry is (code, whether it is the sender's fault), or `None` if it was carried out.
    async fn hide(&self, messages: &[(&Message, i32)]) -> Result<Vec<Option<(String, bool)>>> {
        let entries = messages.iter().enumerate().map(|(index, (message, seconds))| {
            let entry = ChangeMessageVisibilityBatchRequestEntry::builder().id(index.to_string());
            entry.set_receipt_handle(message.receipt_handle.clone()).visibility_timeout(*seconds).build()
        });
        let call = self.client.change_message_visibility_batch().queue_url(&self.queue);
        let output = call.set_entries(Some(entries.collect::<Result<_, _>>()?)).send().await?;
        let mut failed: BTreeMap<_, _> =
            output.failed.into_iter().map(|failed| (failed.id, (failed.code, failed.sender_fault))).collect();
        ensure!(failed.len() + output.successful.len() == messages.len(), "an entry is missing");
        Ok((0..messages.len()).map(|index| failed.remove(&index.to_string())).collect())
    }

    fn hits(&self, fault: SqsFault) -> u64 {
        self.proxy.hits().get(fault.name()).copied().unwrap_or(0)
    }
}

/// Status and code of an error that SQS answered.
fn answered<E: ProvideErrorMetadata>(error: &SdkError<E>) -> Option<(u16, &str)> {
    Some((error.raw_response()?.status().as_u16(), error.code()?))
}

fn text(message: &Message) -> &str {
    message.body().unwrap_or_default()
}

#[tokio::test]
async fn without_an_order_everything_passes() -> Result<()> {
    let bench = Bench::new("proxy-passes").await?;
    bench.send("hello").await?;
    let message = bench.one(30).await?;
    assert_eq!(text(&message), "hello");
    assert_eq!(bench.hide(&[(&message, 0)]).await?, [None]);
    let again = bench.one(30).await?;
    assert_eq!(bench.delete(&[again]).await?.0, ["0"]);
    assert!(bench.receive(30).await?.is_empty());
    assert!(bench.proxy.hits().is_empty());
    Ok(())
}

#[tokio::test]
async fn a_receive_hangs_and_takes_nothing() -> Result<()> {
    let bench = Bench::new("proxy-hangs").await?;
    bench.send("hello").await?;
    bench.proxy.order(SqsFault::HungReceive, 1);
    assert!(timeout(Duration::from_secs(4), bench.receive(30)).await.is_err(), "an answer came");
    assert_eq!(text(&bench.one(30).await?), "hello");
    assert_eq!(bench.hits(SqsFault::HungReceive), 1);
    Ok(())
}

#[tokio::test]
async fn a_receive_with_messages_is_late() -> Result<()> {
    let bench = Bench::new("proxy-late").await?;
    bench.proxy.order(SqsFault::LateReceiveAnswer(1_500), 1);
    assert!(bench.receive(30).await?.is_empty());
    assert_eq!(bench.proxy.hits(), BTreeMap::new(), "nothing to be late with");
    bench.send("hello").await?;
    let started = Instant::now();
    bench.one(30).await?;
    assert!(started.elapsed() >= Duration::from_millis(1_500), "{:?}", started.elapsed());
    assert_eq!(bench.hits(SqsFault::LateReceiveAnswer(0)), 1);
    Ok(())
}

#[tokio::test]
async fn extensions_fail_in_each_way() -> Result<()> {
    let bench = Bench::new("proxy-extensions").await?;
    bench.send("one").await?;
    bench.send("two").await?;
    let mut messages = bench.receive(60).await?;
    if messages.len() < 2 {
        messages.extend(bench.receive(60).await?);
    }
    let (extended, returned) = (&messages[0], &messages[1]);

    bench.proxy.order(SqsFault::ExtensionFails, 1);
    let call = bench.client.change_message_visibility().queue_url(&bench.queue).visibility_timeout(60);
    let failed = call.set_receipt_handle(extended.receipt_handle.clone()).send().await.expect_err("it fails");
    assert_eq!(answered(&failed), Some((500, "InternalError")), "{failed:?}");

    // What is given back is no extension, and is carried out.
    bench.proxy.order(SqsFault::ExtensionRefused, 1);
    assert_eq!(bench.hide(&[(returned, 0)]).await?, [None]);
    assert_eq!(bench.hits(SqsFault::ExtensionRefused), 0);
    let returned = &bench.one(60).await?;
    let refused = Some(("InvalidParameterValue".to_owned(), true));
    assert_eq!(bench.hide(&[(extended, 60), (returned, 0)]).await?, [refused.clone(), None]);
    let returned = &bench.one(60).await?;

    bench.proxy.order(SqsFault::TwelveHourRefusal, 2);
    assert_eq!(bench.hide(&[(extended, 60), (returned, 60)]).await?, [refused.clone(), refused]);
    let call = bench.client.change_message_visibility().queue_url(&bench.queue).visibility_timeout(60);
    let failed = call.set_receipt_handle(extended.receipt_handle.clone()).send().await.expect_err("it fails");
    assert_eq!(answered(&failed), Some((400, "InvalidParameterValue")), "{failed:?}");
    let message = failed.message().unwrap_or_default();
    assert!(message.starts_with("Value 60 for parameter VisibilityTimeout") && message.contains("beyond the limit"));

    bench.proxy.order(SqsFault::ExtensionSlow(700), 1);
    let started = Instant::now();
    assert_eq!(bench.hide(&[(extended, 60)]).await?, [None]);
    assert!(started.elapsed() >= Duration::from_millis(700));
    let expected =
        [("extension-fails", 1), ("extension-refused", 1), ("extension-slow", 1), ("twelve-hour-refusal", 2)];
    assert_eq!(bench.proxy.hits(), expected.map(|(name, count)| (name.to_owned(), count)).into());
    Ok(())
}

#[tokio::test]
async fn a_delete_is_carried_out_and_its_answer_lost_or_not_carried_out() -> Result<()> {
    let bench = Bench::new("proxy-deletes").await?;
    bench.send("one").await?;
    let message = bench.one(1).await?;
    bench.proxy.order(SqsFault::DeleteFails, 1);
    assert!(bench.delete(&[message]).await.is_err());
    let message = bench.one(1).await.context("it was deleted by a delete that failed")?;

    bench.proxy.order(SqsFault::DeleteAnswerLost, 1);
    let error = bench.delete(&[message]).await.expect_err("the answer is lost");
    assert!(error.to_string().contains("dispatch failure"), "{error:#}");
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert!(bench.receive(1).await?.is_empty(), "the delete was not carried out");
    assert_eq!((bench.hits(SqsFault::DeleteFails), bench.hits(SqsFault::DeleteAnswerLost)), (1, 1));
    Ok(())
}

#[tokio::test]
async fn a_parked_poll_gets_a_message_that_another_got() -> Result<()> {
    let bench = Bench::new("proxy-duplicates").await?;
    let other = bench.proxy.client().await;
    bench.proxy.order(SqsFault::DuplicateDelivery, 1);
    let parked = async {
        // Parked in the queue before the message is there.
        let call = other.receive_message().queue_url(&bench.queue).wait_time_seconds(10);
        anyhow::Ok(call.send().await?.messages.unwrap_or_default())
    };
    let first = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let first = bench.client.receive_message().queue_url(&bench.queue).wait_time_seconds(10).send();
        let send = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            bench.send("hello").await
        };
        let (first, sent) = tokio::join!(first, send);
        sent?;
        anyhow::Ok(first?.messages.unwrap_or_default())
    };
    let started = Instant::now();
    let (one, two) = tokio::try_join!(parked, first)?;
    assert!(started.elapsed() < Duration::from_secs(5), "the parked poll was not woken: {:?}", started.elapsed());
    let both = [one, two].concat();
    assert_eq!(both.iter().map(text).collect::<Vec<_>>(), ["hello"; 2]);
    assert_eq!(both[0].message_id(), both[1].message_id());
    assert_ne!(both[0].receipt_handle(), both[1].receipt_handle());
    assert_eq!(bench.hits(SqsFault::DuplicateDelivery), 1);
    Ok(())
}

#[tokio::test]
async fn the_receipt_of_a_second_delivery_is_as_good_as_the_first() -> Result<()> {
    let bench = Bench::new("proxy-receipts").await?;
    bench.send("hello").await?;
    bench.proxy.order(SqsFault::DuplicateDelivery, 1);
    let first = bench.one(1).await?;
    let second = bench.one(1).await?;
    assert_eq!(first.message_id(), second.message_id());
    let received = |message: &Message| {
        message.attributes().and_then(|all| all.get(&MessageSystemAttributeName::ApproximateReceiveCount)).cloned()
    };
    assert_eq!((received(&first).as_deref(), received(&second).as_deref()), (Some("1"), Some("2")));
    assert_eq!(bench.hide(&[(&second, 30)]).await?, [None]);
    assert_eq!(bench.delete(&[second]).await?.0, ["0"]);
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert!(bench.receive(1).await?.is_empty(), "the second receipt did not delete");
    Ok(())
}

#[tokio::test]
async fn a_stale_receipt_deletes_nothing_and_extends_nothing() -> Result<()> {
    let bench = Bench::new("proxy-stale").await?;
    bench.send("hello").await?;
    let message = bench.one(1).await?;
    bench.proxy.order(SqsFault::StaleReceipt, 2);
    assert_eq!(bench.hide(&[(&message, 60)]).await?, [Some(("InvalidParameterValue".to_owned(), true))]);
    assert_eq!(bench.delete(&[message]).await?, (vec!["0".to_owned()], vec![]), "SQS says yes");
    assert_eq!(text(&bench.one(1).await?), "hello");
    assert_eq!(bench.hits(SqsFault::StaleReceipt), 2);
    Ok(())
}

#[tokio::test]
async fn one_entry_of_a_batch_fails_and_the_others_do_not() -> Result<()> {
    let bench = Bench::new("proxy-batches").await?;
    bench.proxy.order(SqsFault::PartialBatchFailure, 2);
    let entries = ["one", "two", "three"]
        .map(|body| SendMessageBatchRequestEntry::builder().id(body).message_body(body).build())
        .into_iter()
        .collect::<Result<_, _>>()?;
    let call = bench.client.send_message_batch().queue_url(&bench.queue).set_entries(Some(entries));
    let sent = call.send().await?;
    let failed: Vec<_> = sent.failed().iter().map(|entry| (entry.id(), entry.sender_fault())).collect();
    assert_eq!((failed, sent.successful().len()), (vec![("one", false)], 2));

    let mut messages = Vec::new();
    while messages.len() < 2 {
        let more = bench.receive(30).await?;
        ensure!(!more.is_empty(), "{} of 2 messages came", messages.len());
        messages.extend(more);
    }
    let mut bodies: Vec<_> = messages.iter().map(text).collect();
    bodies.sort_unstable();
    assert_eq!(bodies, ["three", "two"]);
    assert_eq!(bench.delete(&messages).await?, (vec!["1".to_owned()], vec![("0".to_owned(), false)]));
    assert_eq!(bench.delete(&messages[..1]).await?.0, ["0"]);
    assert_eq!(bench.hits(SqsFault::PartialBatchFailure), 2);
    Ok(())
}

#[tokio::test]
async fn calls_are_throttled_refused_and_cut() -> Result<()> {
    let bench = Bench::new("proxy-refusals").await?;
    let send = || bench.client.send_message().queue_url(&bench.queue).message_body("hello").send();
    for (fault, expected) in
        [(SqsFault::Throttle, (403, "RequestThrottled")), (SqsFault::ExpiredCredentials, (403, "ExpiredToken"))]
    {
        bench.proxy.order(fault, 1);
        let error = send().await.expect_err("it is refused");
        assert_eq!(answered(&error), Some(expected), "{error:?}");
    }
    bench.proxy.order(SqsFault::Down, u64::MAX);
    for _ in 0..3 {
        assert!(matches!(send().await, Err(SdkError::DispatchFailure(_))));
    }
    bench.proxy.clear();
    assert!(bench.receive(30).await?.is_empty(), "a refused send was carried out");

    bench.proxy.order(SqsFault::SendAnswerLost, 1);
    assert!(matches!(send().await, Err(SdkError::DispatchFailure(_))));
    assert_eq!(text(&bench.one(30).await?), "hello");
    let expected = [("down", 3), ("expired-credentials", 1), ("send-answer-lost", 1), ("throttle", 1)];
    assert_eq!(bench.proxy.hits(), expected.map(|(name, count)| (name.to_owned(), count)).into());
    assert_eq!(bench.proxy.log().first().map(|hit| hit.what.as_str()), Some("SendMessage on proxy-refusals"));
    Ok(())
}

#[tokio::test]
async fn messages_are_refused_by_their_size_with_attributes() -> Result<()> {
    let bench = Bench::new("proxy-sizes").await?;
    // The body, and name, type and value of the attribute: 10 + 1 + 6 + 3.
    bench.proxy.order(SqsFault::SizeLimit(20), u64::MAX);
    let send = |value: &str| {
        let attribute = MessageAttributeValue::builder().data_type("String").string_value(value).build();
        let call = bench.client.send_message().queue_url(&bench.queue).message_body("0123456789");
        call.message_attributes("a", attribute.expect("the type is set")).send()
    };
    send("123").await?;
    assert!(bench.proxy.hits().is_empty());
    let error = send("1234").await.expect_err("it is one byte too large");
    assert_eq!(answered(&error), Some((400, "InvalidParameterValue")), "{error:?}");
    let entries = ["small".to_owned(), "x".repeat(21)]
        .map(|body| SendMessageBatchRequestEntry::builder().id(&body[..1]).message_body(body).build())
        .into_iter()
        .collect::<Result<_, _>>()?;
    let sent = bench.client.send_message_batch().queue_url(&bench.queue).set_entries(Some(entries)).send().await?;
    let failed: Vec<_> = sent.failed().iter().map(|entry| (entry.id(), entry.sender_fault())).collect();
    assert_eq!((failed, sent.successful().len()), (vec![("x", true)], 1));
    assert_eq!(bench.hits(SqsFault::SizeLimit(0)), 2);
    Ok(())
}

#[tokio::test]
async fn a_call_hangs_before_or_after_it_is_carried_out() -> Result<()> {
    let bench = Bench::new("proxy-hanging").await?;
    for (fault, arrives) in [(SqsFault::Hang, false), (SqsFault::HangAnswer, true)] {
        bench.proxy.order(fault, 1);
        assert!(timeout(Duration::from_secs(2), bench.send("hello")).await.is_err(), "an answer came");
        assert_eq!((bench.hits(fault), bench.receive(30).await?.len()), (1, usize::from(arrives)), "{}", fault.name());
    }
    Ok(())
}

#[tokio::test]
async fn orders_keep_to_their_scope_and_ratio() -> Result<()> {
    let bench = Bench::new("proxy-scope").await?;
    let scope = Scope { action: Some("GetQueueAttributes".to_owned()), queue: Some("proxy-scope".to_owned()) };
    bench.proxy.order_in(scope, SqsFault::Throttle, u64::MAX);
    bench.send("passes").await?;
    let attributes = || bench.client.get_queue_attributes().queue_url(&bench.queue).send();
    assert!(attributes().await.is_err());
    assert!(bench.client.get_queue_url().queue_name("proxy-scope").send().await.is_ok());
    bench.proxy.clear();

    bench.proxy.set_ratio(SqsFault::Throttle, 0.5);
    let mut refused = 0;
    for _ in 0..100 {
        refused += u64::from(attributes().await.is_err());
    }
    assert!((25..75).contains(&refused), "{refused}");
    assert_eq!(bench.hits(SqsFault::Throttle), refused + 1);
    Ok(())
}
