//! How connections are kept, and given up.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

#[tokio::test]
async fn a_connection_closed_while_idle_costs_no_try() {
    // After its first answer the stub closes each connection: with the answer, or only when the next call is there.
    for crossing in [false, true] {
        let stub = Stub::start(move |call| match (crossing, call.connection, call.listing_id) {
            (false, 0, _) => [valued(call.listing_id), vec![Step::Close]].concat(),
            (true, 0, 2) => vec![Step::Close],
            _ => valued(call.listing_id),
        })
        .await;
        let (partner, metrics) = partner(&config::Partner { max_attempts: 1, ..settings(stub.address) });
        assert_eq!(value(&partner, 1).await, worth(1));
        tokio::time::sleep(MS * 20).await;
        assert_eq!(value(&partner, 2).await, worth(2));
        let stale = metrics.partner_calls.with_label_values(&["stale"]).get();
        assert_eq!(stale, u64::from(crossing));
        assert_eq!(stub.calls().last().expect("calls").connection, 1);
    }
}

#[tokio::test]
async fn a_partner_that_closes_connections_without_a_word_gets_no_more_repeats_than_are_paid_for() {
    const LISTINGS: i64 = 4_000;
    // Each connection carries one call and ends when the second one is there.
    let seen = std::sync::Mutex::new(std::collections::HashSet::new());
    let stub = Stub::start(move |call| match seen.lock().unwrap().insert(call.connection) {
        true => valued(call.listing_id),
        false => vec![Step::Close],
    })
    .await;
    let (partner, metrics) = partner(&config::Partner { max_attempts: 1, ..settings(stub.address) });
    let begin = Instant::now();
    assert_eq!(value_all(&partner, 0..LISTINGS).await, []);
    let repeats = stub.calls().len() as f64 - LISTINGS as f64;
    let paid_for = LISTINGS as f64 * 0.2 + 100.0 + begin.elapsed().as_secs_f64() * 10.0;
    println!("{repeats} repeats of {paid_for} in {:?}", begin.elapsed());
    assert!((50.0..=paid_for).contains(&repeats), "{repeats} repeats, {paid_for} are paid for");
    assert_eq!(metrics.partner_repeats.get() as f64, repeats);
    assert_eq!(metrics.partner_calls.with_label_values(&["stale"]).get() as f64, repeats);
    // It is the partner's habit, and no reason to call it less.
    assert!(begin.elapsed() < SECOND * 20, "{:?}", begin.elapsed());
}

/// Failed calls cost the retry budget, and the trust in kept connections has an account of its own.
#[tokio::test]
async fn failures_of_another_kind_leave_connections_kept() {
    const LISTINGS: i64 = 600;
    // Of five calls the partner fails one, and keeps its connection.
    let stub = Stub::start(|call| match (call.listing_id % 5, call.attempt) {
        (0, 1) => status(503),
        _ => valued(call.listing_id),
    })
    .await;
    let (partner, metrics) = partner(&settings(stub.address));
    assert_eq!(value_all(&partner, 0..LISTINGS).await, []);
    assert_eq!(metrics.partner_calls.with_label_values(&["503"]).get() as i64, LISTINGS / 5);
    let used: std::collections::HashSet<usize> = stub.calls().iter().map(|call| call.connection).collect();
    assert!(used.len() <= 100, "{} connections for a hundred calls at once", used.len());
}

/// A probe that met a closed connection would say nothing of the partner.
#[tokio::test]
async fn a_probe_has_a_connection_of_its_own() {
    let away = Arc::new(AtomicBool::new(false));
    let stub = Stub::start({
        let away = Arc::clone(&away);
        move |call| if away.load(Ordering::SeqCst) { status(500) } else { valued(call.listing_id) }
    })
    .await;
    let (partner, _) = partner(&settings(stub.address));
    assert_eq!(value_all(&partner, 0..50).await, []);
    away.store(true, Ordering::SeqCst);
    let some = tokio::spawn({
        let partner = partner.clone();
        async move { value_all(&partner, 50..60).await }
    });
    let open = async {
        while !matches!(partner.breaker_state(), BreakerState::Open { .. }) {
            tokio::time::sleep(MS).await;
        }
    };
    timeout(SECOND * 2, open).await.expect("the breaker opens");
    away.store(false, Ordering::SeqCst);
    let before = stub.calls();
    assert_eq!(timeout(SECOND * 5, some).await.expect("it recovers").expect("no panic"), []);
    assert!(stub.open() > 10, "{} are open: none was there to be taken", stub.open());
    let probe = &stub.calls()[before.len()];
    assert!(before.iter().all(|call| call.connection != probe.connection), "the probe was made on a kept connection");
}

#[tokio::test]
async fn bytes_after_an_answer_are_not_the_next_answer() {
    let extra = br#"HTTP/1.1 200 OK
content-length: 2

{}"#;
    let stub = Stub::start(move |call| {
        let mut steps = valued(call.listing_id);
        let Step::Send(bytes) = &mut steps[0] else { unreachable!() };
        bytes.extend_from_slice(extra);
        steps
    })
    .await;
    let (partner, _) = partner(&settings(stub.address));
    assert_eq!(value(&partner, 1).await, worth(1));
    assert_eq!(value(&partner, 2).await, worth(2));
    assert_eq!(stub.calls().len(), 2);
    assert_eq!(stub.calls()[1].connection, 1);
}

#[tokio::test]
async fn idle_connections_are_closed_soon() {
    let stub = Stub::start(|call| [vec![Step::Wait(MS * 50)], valued(call.listing_id)].concat()).await;
    let (partner, _) = partner(&settings(stub.address));
    assert_eq!(value_all(&partner, 0..100).await, []);
    assert!(stub.open() > 50, "{} are open", stub.open());
    let start = Instant::now();
    while stub.open() > 0 {
        assert!(start.elapsed() < SECOND * 5, "{} are still open", stub.open());
        tokio::time::sleep(MS * 50).await;
    }
}

#[tokio::test]
async fn a_dropped_call_frees_its_permit_and_closes_its_connection() {
    let stub = Stub::start(|call| match call.listing_id {
        1 => vec![Step::Wait(MS * 200), Step::Send(b"late".to_vec())],
        _ => valued(call.listing_id),
    })
    .await;
    let (partner, metrics) = partner(&config::Partner { in_flight: 1, ..settings(stub.address) });
    assert!(timeout(MS * 50, value(&partner, 1)).await.is_err());
    assert_eq!(metrics.partner_in_flight.get(), 0);
    assert_eq!(timeout(SECOND, value(&partner, 2)).await.expect("the permit is free"), worth(2));
    assert_eq!(stub.calls()[1].connection, 1);
}
