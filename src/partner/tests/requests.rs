//! What is sent, and what the future of a call takes.

use super::*;

#[tokio::test]
async fn a_call_is_what_the_contract_says() {
    let stub = Stub::start(|call| valued(call.listing_id)).await;
    let mut settings = settings(stub.address);
    settings.base_url = format!("http://user:secret@{}/api/", stub.address).parse().expect("a URL");
    let (partner, metrics) = partner(&settings);
    let permit = partner.permit().await;
    let verdict = partner.valuation(permit, &RunKey::new("rün/1"), request(7)).await;
    assert_eq!(verdict, worth(7));
    let calls = stub.calls();
    assert!(calls[0].head.starts_with("POST /api/v1/valuations HTTP/1.1\r\n"), "{}", calls[0].head);
    assert_eq!(calls[0].header("host"), Some(stub.address.to_string().as_str()));
    assert_eq!(calls[0].header("content-type"), Some("application/json"));
    assert_eq!(calls[0].header("idempotency-key"), Some("r%C3%BCn/1:7"));
    assert_eq!(
        calls[0].body,
        r#"{"listing_id":7,"zip_code":98002,"list_price_cents":22190000,"bedrooms":3,"living_square_feet":null}"#
    );
    assert_eq!(metrics.partner_calls.with_label_values(&["200"]).get(), 1);
    assert_eq!(metrics.partner_seconds.get_sample_count(), 1);
    assert_eq!(metrics.partner_in_flight.get(), 0);
}

#[tokio::test]
async fn the_largest_request_fits() {
    let stub = Stub::start(|call| valued(call.listing_id / i64::MAX)).await;
    let (partner, _) = partner(&config::Partner { max_attempts: 1, ..settings(stub.address) });
    let largest = Request {
        listing_id: i64::MIN,
        zip_code: i32::MIN,
        list_price_cents: i64::MIN,
        bedrooms: Some(i16::MIN),
        living_square_feet: Some(i32::MIN),
    };
    let permit = partner.permit().await;
    let _ = partner.valuation(permit, &RunKey::new(&"x".repeat(3000)), largest).await;
    assert_eq!(stub.calls().len(), 1);
}

#[tokio::test]
async fn the_credential_is_sent_and_follows_its_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("credential");
    std::fs::write(&file, "old\n").expect("written");
    // The old one is no longer accepted after the third call.
    let stub = Stub::start(|call| match (call.header("x-key"), call.listing_id) {
        (Some("old"), 1) | (Some("new"), _) => valued(call.listing_id),
        _ => status(403),
    })
    .await;
    let mut settings = settings(stub.address);
    let credential = config::Credential { header: http::HeaderName::from_static("x-key"), file: file.clone() };
    settings.credential = Some(credential);
    let (partner, _) = partner(&settings);
    assert_eq!(value(&partner, 1).await, worth(1));

    let waiting = tokio::spawn({
        let partner = partner.clone();
        async move { value(&partner, 2).await }
    });
    tokio::time::sleep(MS * 100).await;
    let BreakerState::Open { reason, .. } = partner.breaker_state() else { panic!("the breaker is closed") };
    assert!(reason.contains("403") && reason.contains("partner.credential_file"), "{reason}");
    std::fs::write(directory.path().join("new"), "new\n").expect("written");
    std::fs::rename(directory.path().join("new"), &file).expect("replaced");
    assert_eq!(timeout(SECOND * 4, waiting).await.expect("in time").expect("no panic"), worth(2));
    assert_eq!(partner.breaker_state(), BreakerState::Closed);
}

/// As on a network file system that is away: a pipe that is open for writing, and nobody writes.
#[tokio::test]
async fn a_credential_that_cannot_be_read_in_time_holds_up_no_call() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("credential");
    std::fs::write(&file, "old\n").expect("written");
    let stub = Stub::start(|call| valued(call.listing_id)).await;
    let mut settings = settings(stub.address);
    let credential = config::Credential { header: http::HeaderName::from_static("x-key"), file: file.clone() };
    settings.credential = Some(credential);
    let (partner, _) = partner(&settings);
    std::fs::remove_file(&file).expect("removed");
    let made = std::process::Command::new("mkfifo").arg(&file).status().expect("mkfifo runs");
    assert!(made.success());
    // Closed by a panic too: whoever reads it would keep the runtime.
    let mut pipe = std::fs::File::options().read(true).write(true).open(&file).expect("a pipe for both");
    let mut slowest = Duration::ZERO;
    let begin = Instant::now();
    for listing in 0.. {
        let called = Instant::now();
        assert_eq!(timeout(SECOND * 3, value(&partner, listing)).await.expect("in time"), worth(listing));
        slowest = slowest.max(called.elapsed());
        tokio::time::sleep(MS * 50).await;
        if begin.elapsed() > SECOND * 4 {
            break;
        }
    }
    assert!(slowest > MS * 900, "nobody has read the pipe");
    let calls = stub.calls();
    assert!(calls.len() > 30, "{} calls: more than one waited", calls.len());
    assert!(calls.iter().all(|call| call.header("x-key") == Some("old")));
    // What comes at last is used. It is a file by then, or the next look at it would hang again.
    std::io::Write::write_all(&mut pipe, b"new\n").expect("written");
    std::fs::write(directory.path().join("file"), "new\n").expect("written");
    std::fs::rename(directory.path().join("file"), &file).expect("replaced");
    drop(pipe);
    let renewed = async {
        for listing in 1_000.. {
            value(&partner, listing).await;
            if stub.calls().last().is_some_and(|call| call.header("x-key") == Some("new")) {
                break;
            }
            tokio::time::sleep(MS * 10).await;
        }
    };
    timeout(SECOND, renewed).await.expect("the new one is sent");
}

#[tokio::test]
async fn a_credential_that_cannot_be_used_is_refused_at_the_start() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("credential");
    let mut settings = settings(([127, 0, 0, 1], 1).into());
    settings.credential =
        Some(config::Credential { header: http::HeaderName::from_static("x-key"), file: file.clone() });
    let error = |settings: &config::Partner| {
        let error = Partner::new(settings, Arc::new(Metrics::new())).err().expect("refused");
        format!("{error:#}")
    };
    assert!(error(&settings).contains("credential"), "{}", error(&settings));
    for content in ["", " \n", "two\nlines"] {
        std::fs::write(&file, content).expect("written");
        let message = error(&settings);
        assert!(message.contains(&file.display().to_string()) && !message.contains("two"), "{message}");
    }
}

#[tokio::test]
async fn a_call_is_small() {
    let (partner, _) = partner(&settings(([127, 0, 0, 1], 1).into()));
    let run = RunKey::new("run");
    let future = partner.valuation(partner.permit().await, &run, request(0));
    let bytes = std::mem::size_of_val(&future);
    assert!(bytes <= 1024, "a thousand of these futures exist at once, and each takes {bytes} bytes");
}
