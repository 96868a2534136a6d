//! What holds for everyone: limits, pauses and the breaker.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures::stream::{FuturesUnordered, StreamExt};

use super::*;

#[tokio::test]
async fn retry_after_pauses_everyone() {
    for code in [429, 503] {
        let stub = Stub::start(move |call| match (call.listing_id, call.attempt) {
            (1, 1) => answer(code, "retry-after: 1\r\n", b""),
            (1, _) => valued(1),
            (listing_id, _) => valued(listing_id),
        })
        .await;
        let (partner, _) = partner(&settings(stub.address));
        let first = tokio::spawn({
            let partner = partner.clone();
            async move { value(&partner, 1).await }
        });
        tokio::time::sleep(MS * 100).await;
        assert_eq!(stub.calls().len(), 1);
        let verdicts = value_all(&partner, 2..12).await;
        assert_eq!(verdicts, []);
        assert_eq!(first.await.expect("no panic"), worth(1));
        let calls = stub.calls();
        let pause = calls[1].at - calls[0].at;
        assert!(pause >= MS * 990 && pause < MS * 1300, "{pause:?}");
    }
}

#[tokio::test]
async fn a_429_without_a_usable_retry_after_pauses_everyone_too() {
    let stub = Stub::start(|call| match call.attempt {
        1 if call.listing_id == 1 => answer(429, "retry-after: soon\r\n", b""),
        _ => valued(call.listing_id),
    })
    .await;
    // Wide enough that a full jitter of less than a few milliseconds is out of the question.
    let retry = Backoff { base: SECOND * 3600, cap: SECOND * 3600 };
    let (partner, _) = partner(&config::Partner { retry, total_timeout: retry.cap * 9, ..settings(stub.address) });
    let first = value(&partner, 1);
    assert!(timeout(MS * 100, first).await.is_err());
    assert!(timeout(MS * 100, value(&partner, 2)).await.is_err());
    assert_eq!(stub.calls().len(), 1);
}

#[tokio::test]
async fn a_fault_suspends_everyone_and_fails_nobody() {
    for code in [401, 403, 405, 301, 302, 307, 308, 418] {
        let away = Arc::new(AtomicBool::new(true));
        let elsewhere = Stub::start(|call| valued(call.listing_id)).await;
        let location = format!("location: http://{}/v1/valuations\r\n", elsewhere.address);
        let stub = Stub::start({
            let away = Arc::clone(&away);
            move |call| {
                if away.load(Ordering::SeqCst) { answer(code, &location, b"") } else { valued(call.listing_id) }
            }
        })
        .await;
        // A fault opens at once, whatever the number of tries.
        let (partner, metrics) = partner(&config::Partner { in_flight: 3, max_attempts: 1, ..settings(stub.address) });
        let all = tokio::spawn({
            let partner = partner.clone();
            async move { value_all(&partner, 0..10).await }
        });
        tokio::time::sleep(MS * 200).await;
        let BreakerState::Open { reason, .. } = partner.breaker_state() else { panic!("{code}: still closed") };
        assert!(reason.contains(&code.to_string()), "{reason}");
        assert_eq!(metrics.partner_breaker_open.get(), 1);
        assert!(stub.calls().len() <= 3, "{code}: {} calls", stub.calls().len());
        if code != 403 {
            continue;
        }
        away.store(false, Ordering::SeqCst);
        let verdicts = timeout(SECOND * 3, all).await.expect("it recovers").expect("no panic");
        assert_eq!(verdicts, []);
        assert_eq!(metrics.partner_breaker_open.get(), 0);
        assert_eq!(elsewhere.calls().len(), 0, "redirects are not followed");
    }
}

#[tokio::test]
async fn an_outage_suspends_everyone_and_fails_nobody() {
    let away = Arc::new(AtomicBool::new(false));
    let stub = Stub::start({
        let away = Arc::clone(&away);
        move |call| if away.load(Ordering::SeqCst) { status(500) } else { valued(call.listing_id) }
    })
    .await;
    let retry = Backoff { base: MS * 50, cap: MS * 50 };
    let (partner, _) = partner(&config::Partner { retry, ..settings(stub.address) });
    assert_eq!(value_all(&partner, 0..100).await, []);
    away.store(true, Ordering::SeqCst);
    let before = stub.calls().len();
    let all = tokio::spawn({
        let partner = partner.clone();
        async move { value_all(&partner, 100..300).await }
    });
    tokio::time::sleep(MS * 1200).await;
    let BreakerState::Open { reason, .. } = partner.breaker_state() else { panic!("still closed") };
    assert!(reason.contains("tries in a row failed") && reason.contains("500"), "{reason}");
    let during = stub.calls().len() - before;
    assert!(during <= 110, "{during} calls to a partner that is away");
    away.store(false, Ordering::SeqCst);
    let verdicts = timeout(SECOND * 4, all).await.expect("it recovers").expect("no panic");
    assert_eq!(verdicts, []);
}

#[tokio::test]
async fn a_small_run_fails_nothing_in_an_outage() {
    let away = Arc::new(AtomicBool::new(true));
    let stub = Stub::start({
        let away = Arc::clone(&away);
        move |call| if away.load(Ordering::SeqCst) { status(500) } else { valued(call.listing_id) }
    })
    .await;
    // All its tries together are fewer than those that are judged together.
    let (partner, _) = partner(&settings(stub.address));
    let all = tokio::spawn({
        let partner = partner.clone();
        async move { value_all(&partner, 0..6).await }
    });
    tokio::time::sleep(MS * 300).await;
    let BreakerState::Open { reason, .. } = partner.breaker_state() else { panic!("still closed") };
    assert!(reason.contains("tries in a row failed") && reason.contains("500"), "{reason}");
    away.store(false, Ordering::SeqCst);
    assert_eq!(timeout(SECOND * 4, all).await.expect("it recovers").expect("no panic"), []);
}

/// A healthy partner that fails some calls at once and answers the others late.
#[tokio::test]
async fn failures_that_come_before_good_answers_suspend_nobody() {
    let number = AtomicUsize::new(0);
    let stub = Stub::start(move |call| {
        if number.fetch_add(1, Ordering::SeqCst) * 37 % 100 < 20 {
            return status(503);
        }
        [vec![Step::Wait(SECOND)], valued(call.listing_id)].concat()
    })
    .await;
    let (partner, _) =
        partner(&config::Partner { in_flight: 500, request_timeout: SECOND * 5, ..settings(stub.address) });
    let watching = async {
        // An open breaker stays so for half a second at least.
        loop {
            assert_eq!(partner.breaker_state(), BreakerState::Closed);
            tokio::time::sleep(MS * 50).await;
        }
    };
    tokio::select! {
        verdicts = value_all(&partner, 0..800) => assert_eq!(verdicts, []),
        () = watching => {}
    }
}

#[tokio::test]
async fn a_partner_that_is_not_there_suspends_even_a_single_caller() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    drop(listener);
    let (partner, metrics) = partner(&config::Partner { in_flight: 1, ..settings(address) });
    let error = format!("{:#}", partner.check().await.expect_err("nobody is there"));
    assert!(error.contains(&address.to_string()) && error.contains("refused"), "{error}");
    assert!(timeout(MS * 300, value(&partner, 7)).await.is_err());
    let BreakerState::Open { reason, .. } = partner.breaker_state() else { panic!("still closed") };
    assert!(reason.contains(&address.to_string()), "{reason}");
    assert_eq!(metrics.partner_calls.with_label_values(&["connect"]).get(), 5);
}

/// As a load balancer does that has no server left: connections are accepted and closed before anything was sent.
#[tokio::test]
async fn a_partner_that_closes_every_connection_at_once_suspends_the_calls() {
    for rate_per_second in [None, Some(100)] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let accepted = Arc::new(AtomicUsize::new(0));
        let server = tokio::spawn({
            let accepted = Arc::clone(&accepted);
            async move {
                while let Ok((connection, _)) = listener.accept().await {
                    accepted.fetch_add(1, Ordering::SeqCst);
                    drop(connection);
                }
            }
        });
        let (partner, _) = partner(&config::Partner { rate_per_second, ..settings(address) });
        let all = tokio::spawn({
            let partner = partner.clone();
            async move { value_all(&partner, 0..60).await }
        });
        let is_open = async || {
            while partner.breaker_state() == BreakerState::Closed {
                tokio::time::sleep(MS).await
            }
        };
        timeout(SECOND * 5, is_open()).await.expect("the breaker opens");
        let BreakerState::Open { reason, .. } = partner.breaker_state() else { panic!("it closed again") };
        assert!(reason.contains("closed"), "{reason}");
        assert!(accepted.load(Ordering::SeqCst) < 200, "{accepted:?} connections");
        server.abort();
        all.abort();
    }
}

#[tokio::test]
async fn a_connection_that_is_never_accepted_ends_with_the_connect_timeout() {
    // TLS against a server that says nothing: TCP connects and the handshake hangs.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let mut settings = config::Partner { connect_timeout: MS * 100, max_attempts: 1, ..settings(address) };
    settings.base_url = format!("https://{address}").parse().expect("a URL");
    let (partner, _) = partner(&settings);
    let start = Instant::now();
    let Verdict::Failed { reason } = value(&partner, 7).await else { panic!("valued") };
    assert!(reason.contains(&address.to_string()) && reason.contains("timed out after 100 ms"), "{reason}");
    assert!(start.elapsed() < MS * 400, "{:?}", start.elapsed());
}

#[tokio::test]
async fn no_more_calls_are_in_flight_than_allowed() {
    for in_flight in [1, 3, 50] {
        let stub = Stub::start(|call| [vec![Step::Wait(MS * 5)], valued(call.listing_id)].concat()).await;
        let (partner, _) = partner(&config::Partner { in_flight, ..settings(stub.address) });
        let verdicts = value_all(&partner, 0..100).await;
        assert_eq!(verdicts, []);
        assert_eq!(stub.most_in_flight(), in_flight);
        let connections = stub.calls().iter().map(|call| call.connection).max().expect("calls") + 1;
        assert!(connections <= in_flight, "{connections} connections");
    }
}

#[tokio::test]
async fn no_second_sees_more_calls_than_allowed_retries_included() {
    let fifth = AtomicUsize::new(0);
    let stub = Stub::start(move |call| {
        if fifth.fetch_add(1, Ordering::SeqCst).is_multiple_of(5) { status(500) } else { valued(call.listing_id) }
    })
    .await;
    let (partner, _) = partner(&config::Partner { rate_per_second: Some(200), ..settings(stub.address) });
    let start = Instant::now();
    assert_eq!(value_all(&partner, 0..340).await, []);
    let sends: Vec<Instant> = stub.calls().iter().map(|call| call.at).collect();
    assert!(sends.len() > 400);
    let most = sends.iter().map(|first| sends.iter().filter(|at| **at >= *first && **at - *first < SECOND).count());
    assert!(most.max() <= Some(200));
    let connections = stub.calls().iter().map(|call| call.connection).max().expect("calls") + 1;
    assert!(connections <= 40, "{connections} connections though a tenth of them would do");
    let ideal = SECOND.mul_f64(sends.len() as f64 / 200.0);
    assert!(start.elapsed() < ideal.mul_f64(1.06), "{:?} for {} calls", start.elapsed(), sends.len());
}

#[tokio::test]
async fn a_closed_run_sends_nothing_more_and_keeps_what_is_out() {
    let stub = Stub::start(|call| match call.listing_id % 2 {
        // Out for a while.
        0 => [vec![Step::Wait(MS * 300)], valued(call.listing_id)].concat(),
        // In backoff for an hour.
        _ => status(503),
    })
    .await;
    let retry = Backoff { base: SECOND * 3600, cap: SECOND * 3600 };
    let settings = config::Partner { retry, total_timeout: retry.cap * 9, ..settings(stub.address) };
    let (partner, _) = partner(&config::Partner { rate_per_second: Some(50), ..settings });
    let run = RunKey::new("run");
    let calls: FuturesUnordered<_> = (0..20)
        .map(|listing_id| {
            let (partner, run) = (&partner, &run);
            async move { (listing_id, partner.valuation(partner.permit().await, run, request(listing_id)).await) }
        })
        .collect();
    let closing = async {
        // The others wait for the pace.
        while stub.calls().len() < 8 {
            tokio::time::sleep(MS).await;
        }
        run.close();
        Instant::now()
    };
    let (mut verdicts, closed) = tokio::join!(calls.collect::<Vec<_>>(), closing);
    assert!(closed.elapsed() < SECOND, "{:?}", closed.elapsed());

    let sent: Vec<i64> = stub.calls().iter().map(|call| call.listing_id).collect();
    assert!((8..15).contains(&sent.len()), "{sent:?}");
    verdicts.sort_by_key(|(listing_id, _)| *listing_id);
    for (listing_id, verdict) in verdicts {
        let answered = listing_id % 2 == 0 && sent.contains(&listing_id);
        assert_eq!(verdict, if answered { worth(listing_id) } else { Verdict::NotSent }, "{listing_id} of {sent:?}");
    }
    assert_eq!(partner.valuation(partner.permit().await, &run, request(30)).await, Verdict::NotSent);
}

#[tokio::test]
async fn a_closed_run_does_not_wait_for_the_end_of_a_pause() {
    for rate_per_second in [None, Some(100)] {
        let stub = Stub::start(|call| match call.listing_id {
            0 => answer(429, "retry-after: 60\r\n", b""),
            // Out when the pause begins.
            _ => [vec![Step::Wait(MS * 300)], valued(call.listing_id)].concat(),
        })
        .await;
        let (partner, _) = partner(&config::Partner { rate_per_second, ..settings(stub.address) });
        let run = RunKey::new("run");
        let call = async |listing_id| partner.valuation(partner.permit().await, &run, request(listing_id)).await;
        let later = async |wait, listing_id| {
            tokio::time::sleep(wait).await;
            call(listing_id).await
        };
        let closing = async {
            tokio::time::sleep(MS * 200).await;
            run.close();
        };
        let all = async { tokio::join!(call(1), later(MS * 50, 0), later(MS * 100, 2), later(MS * 100, 3), closing) };
        let (out, paused, second, third, ()) = timeout(SECOND * 2, all).await.expect("nobody waits for the pause");
        assert_eq!(out, worth(1), "what was out is awaited");
        assert_eq!([paused, second, third], [Verdict::NotSent, Verdict::NotSent, Verdict::NotSent]);
        assert_eq!(stub.calls().len(), 2);
    }
}

#[tokio::test]
async fn a_closed_run_does_not_wait_for_a_connection() {
    // TLS against a server that says nothing: TCP connects and the handshake hangs.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let mut settings = config::Partner { connect_timeout: SECOND * 60, ..settings(address) };
    settings.base_url = format!("https://{address}").parse().expect("a URL");
    let (partner, _) = partner(&settings);
    let run = RunKey::new("run");
    let closing = async {
        let accepted = listener.accept().await.expect("a connection");
        run.close();
        accepted
    };
    let call = async { tokio::join!(partner.valuation(partner.permit().await, &run, request(7)), closing) };
    let (verdict, _) = timeout(SECOND * 2, call).await.expect("nobody waits for the connection");
    assert_eq!(verdict, Verdict::NotSent);
}

/// A pause that is longer than the partner keeps an idle connection.
#[tokio::test]
async fn a_pause_costs_no_connections() {
    let paused = AtomicBool::new(false);
    let stub = Stub::start(move |call| {
        if !paused.swap(true, Ordering::SeqCst) {
            return answer(429, "retry-after: 1\r\n", b"");
        }
        valued(call.listing_id)
    })
    .await;
    let (proxy, opened) = impatient_proxy(stub.address).await;
    let (partner, metrics) = partner(&config::Partner { max_attempts: 2, ..settings(proxy) });
    let first = async { value(&partner, 1).await };
    let others = async {
        tokio::time::sleep(MS * 100).await;
        let before = opened.load(Ordering::SeqCst);
        let others = value_all(&partner, 2..12);
        let during = async {
            tokio::time::sleep(MS * 500).await;
            opened.load(Ordering::SeqCst) - before
        };
        tokio::join!(others, during)
    };
    let (first, (others, during)) = tokio::join!(first, others);
    assert_eq!((first, others), (worth(1), vec![]));
    assert_eq!(during, 0, "connections were opened for calls that must wait");
    assert_eq!(metrics.partner_calls.with_label_values(&["connect"]).get(), 0);
}

/// Closes each connection that carries nothing for a while. Returns its address and the number of connections so far.
async fn impatient_proxy(partner: std::net::SocketAddr) -> (std::net::SocketAddr, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let opened = Arc::new(AtomicUsize::new(0));
    tokio::spawn({
        let opened = Arc::clone(&opened);
        async move {
            while let Ok((mut near, _)) = listener.accept().await {
                opened.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    if timeout(MS * 200, near.readable()).await.is_ok() {
                        let mut far = tokio::net::TcpStream::connect(partner).await?;
                        tokio::io::copy_bidirectional(&mut near, &mut far).await?;
                    }
                    std::io::Result::Ok(())
                });
            }
        }
    });
    (address, opened)
}
