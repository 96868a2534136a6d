//! What protects a partner that is called too much: the retry budget and the window of calls in flight.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::SystemTime;

use time::OffsetDateTime;
use time::macros::format_description;

use super::*;

/// At no moment there were more repeats than a fifth of the fresh calls, the floor, and what was kept. `free` of them are
/// others' than the budget's: probes, and the repeats that a test spends itself.
fn assert_within_budget(calls: &[Call], start: Instant, free: usize) {
    let (mut fresh, mut repeats) = (0, 0);
    for call in calls {
        if call.attempt == 1 {
            fresh += 1
        } else {
            repeats += 1
        }
        let seconds = (call.at - start).as_secs_f64();
        let most = 100.0 + 10.0 * seconds + 0.2 * f64::from(fresh) + free as f64;
        assert!(f64::from(repeats) <= most + 1.0, "{repeats} repeats of {fresh} fresh calls after {seconds} s");
    }
}

fn repeats(calls: &[Call]) -> usize {
    calls.iter().filter(|call| call.attempt > 1).count()
}

#[tokio::test]
async fn repeats_are_a_fifth_of_the_fresh_calls_and_the_floor() {
    // Of a hundred calls this many fail; 37 and 100 have no common divisor, so they are spread out.
    for failures in [40, 50] {
        let number = AtomicUsize::new(0);
        let stub = Stub::start(move |call| {
            let fails = number.fetch_add(1, Ordering::SeqCst) * 37 % 100 < failures;
            let answer = if fails { status(500) } else { valued(call.listing_id) };
            // All as late: were failures the first to come back, the breaker would open on them alone.
            [vec![Step::Wait(MS * 5)], answer].concat()
        })
        .await;
        let settings = config::Partner { max_attempts: 100, ..settings(stub.address) };
        let (partner, metrics) = partner(&settings);
        let start = Instant::now();
        let is_empty = async {
            // Where half of them fail the breaker opens too, so that fewer wait.
            let waiting = if failures == 40 { 50 } else { 0 };
            while metrics.partner_repeats.get() <= 120 || metrics.partner_repeats_waiting.get() <= waiting {
                tokio::time::sleep(MS * 10).await;
            }
        };
        tokio::select! {
            _ = value_all(&partner, 0..5000) => panic!("nearly all of them are to wait, and none fails"),
            reached = timeout(SECOND * 30, is_empty) => reached.expect("the budget was never empty"),
        }
        let calls = stub.calls();
        // One a half second, at most.
        let probes = (start.elapsed().as_secs_f64() * 2.0) as usize + 1;
        assert_within_budget(&calls, start, probes);
        let repeats = repeats(&calls);
        let counted = metrics.partner_repeats.get() as usize;
        assert!(counted <= repeats && counted + probes + 100 >= repeats, "{counted} of {repeats} are counted");
        if failures == 40 {
            assert_eq!(partner.breaker_state(), BreakerState::Closed);
        }
    }
}

#[tokio::test]
async fn fresh_calls_do_not_wait_for_the_retry_budget() {
    let stub = Stub::start(|call| [vec![Step::Wait(MS * 20)], valued(call.listing_id)].concat()).await;
    let (partner, metrics) = partner(&settings(stub.address));
    for _ in 0..100 {
        partner.shared.retry_budget.spend().await;
    }
    let repeats = (0..200).map(|_| async {
        partner.shared.retry_budget.spend().await;
        partner.shared.retry_budget.made();
    });
    let start = Instant::now();
    let fresh = async {
        assert_eq!(value_all(&partner, 0..500).await, []);
        start.elapsed()
    };
    let waiting = futures::future::join_all(repeats);
    tokio::select! {
        biased;
        _ = waiting => panic!("ten seconds' worth and more were waiting"),
        took = fresh => assert!(took < SECOND, "{took:?}"),
    }
    // They paid for a fifth, beside the floor.
    let made = metrics.partner_repeats.get() as f64;
    assert!((95.0..=101.0 + 10.0 * start.elapsed().as_secs_f64()).contains(&made), "{made}");
}

#[tokio::test]
async fn waits_for_the_retry_budget_are_not_charged_to_the_listing() {
    let stub = Stub::start(|call| if call.attempt <= 3 { status(500) } else { valued(call.listing_id) }).await;
    let limits = config::Partner { total_timeout: MS * 100, max_attempts: 4, ..settings(stub.address) };
    let (partner, _) = partner(&limits);
    for _ in 0..100 {
        partner.shared.retry_budget.spend().await;
    }
    let start = Instant::now();
    assert_eq!(value(&partner, 7).await, worth(7));
    // Three repeats by the floor.
    assert!(start.elapsed() >= MS * 280, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_closed_run_does_not_wait_for_the_retry_budget_or_the_window() {
    let stub = Stub::start(|call| match call.listing_id {
        0 => [vec![Step::Wait(MS * 300)], valued(0)].concat(),
        _ => status(500),
    })
    .await;
    let (partner, metrics) = partner(&config::Partner { in_flight: 50, ..settings(stub.address) });
    for _ in 0..100 {
        partner.shared.retry_budget.spend().await;
    }
    let mut others: Vec<_> = (0..20).map(|_| Box::pin(partner.shared.retry_budget.spend())).collect();
    for other in &mut others {
        assert!(futures::poll!(other.as_mut()).is_pending());
    }
    let run = RunKey::new("run");
    let call = async |listing_id| partner.valuation(partner.permit().await, &run, request(listing_id)).await;
    let closing = async {
        // One of its calls is out, the second waits for its repeat, the third for a place in the window.
        while metrics.partner_repeats_waiting.get() < 21 {
            tokio::time::sleep(MS).await;
        }
        let mut places = Vec::new();
        while let Ok(place) = timeout(MS, partner.shared.budget.window.enter()).await {
            places.push(place);
        }
        let third = async { call(2).await };
        let close = async {
            tokio::time::sleep(MS * 20).await;
            run.close();
        };
        let (third, ()) = tokio::join!(third, close);
        (third, Instant::now())
    };
    let (out, second, (third, closed)) =
        timeout(SECOND * 2, async { tokio::join!(call(0), call(1), closing) }).await.expect("nobody is held up");
    assert_eq!((out, second, third), (worth(0), Verdict::NotSent, Verdict::NotSent));
    assert!(closed.elapsed() < SECOND);
    assert_eq!(stub.calls().len(), 2);
}

#[tokio::test]
async fn the_retry_budget_and_the_window_do_not_hold_up_a_probe() {
    let stub = Stub::start(|call| if call.attempt == 1 { status(403) } else { valued(call.listing_id) }).await;
    let (partner, metrics) = partner(&settings(stub.address));
    let start = Instant::now();
    let window = &partner.shared.budget.window;
    let mut places = Vec::new();
    for _ in 0..99 {
        places.push(window.enter().await);
    }
    let call = value(&partner, 7);
    let taking = async {
        for _ in 0..100 {
            partner.shared.retry_budget.spend().await;
        }
        while partner.breaker_state() == BreakerState::Closed {
            tokio::time::sleep(MS).await;
        }
        let last = window.enter().await;
        // Ten seconds' worth are before it in the queue.
        let queue = futures::future::join_all((0..100).map(|_| partner.shared.retry_budget.spend()));
        let _ = timeout(SECOND * 3, queue).await;
        drop(last);
    };
    tokio::select! {
        verdict = call => assert_eq!(verdict, worth(7)),
        () = taking => panic!("the probe is held up"),
    }
    assert!(start.elapsed() >= MS * 500 && start.elapsed() < MS * 1500, "{:?}", start.elapsed());
    assert_eq!(metrics.partner_repeats.get(), 0, "a probe is free");
    drop(places);
}

#[tokio::test]
async fn an_outage_costs_few_repeats_and_no_listing() {
    let away = Arc::new(AtomicBool::new(false));
    let stub = Stub::start({
        let away = Arc::clone(&away);
        move |call| {
            let answer = if away.load(Ordering::SeqCst) { status(503) } else { valued(call.listing_id) };
            [vec![Step::Wait(MS * 50)], answer].concat()
        }
    })
    .await;
    let (partner, metrics) = partner(&config::Partner { in_flight: 300, ..settings(stub.address) });
    let start = Instant::now();
    assert_eq!(value_all(&partner, 0..300).await, []);
    away.store(true, Ordering::SeqCst);
    let all = tokio::spawn({
        let partner = partner.clone();
        async move { value_all(&partner, 300..2000).await }
    });
    tokio::time::sleep(MS * 1500).await;
    assert_ne!(partner.breaker_state(), BreakerState::Closed);
    assert!(metrics.partner_in_flight_limit.get() <= 210, "{}", metrics.partner_in_flight_limit.get());
    away.store(false, Ordering::SeqCst);
    // All 300 that were out are repeats, three times what the budget keeps.
    assert_eq!(timeout(SECOND * 20, all).await.expect("it recovers").expect("no panic"), []);
    let calls = stub.calls();
    assert_within_budget(&calls, start, 10);
    assert!(repeats(&calls) >= 300, "{}", repeats(&calls));
    let keys: std::collections::HashSet<_> = calls.iter().map(|call| call.header("idempotency-key")).collect();
    assert_eq!(keys.len(), 2000, "a repeat has the key of the first try");
}

#[tokio::test]
async fn a_429_to_everyone_cuts_the_window_once_and_pauses_everyone() {
    let stub = Stub::start(|call| {
        if call.attempt > 1 {
            return valued(call.listing_id);
        }
        // Not all at once: the others' answers come after the first cut.
        vec![Step::Wait(MS * (call.listing_id as u32 % 50))]
            .into_iter()
            .chain(answer(429, "retry-after: 1\r\n", b""))
            .collect()
    })
    .await;
    let (partner, metrics) = partner(&settings(stub.address));
    let all = async { value_all(&partner, 0..100).await };
    let watching = async {
        tokio::time::sleep(MS * 500).await;
        (stub.calls().len(), metrics.partner_in_flight_limit.get())
    };
    let (verdicts, (calls, limit)) = tokio::join!(all, watching);
    assert_eq!(verdicts, []);
    assert_eq!((calls, limit), (100, 70));
    let calls = stub.calls();
    let (first, repeats) = calls.split_at(100);
    let refused = first.iter().map(|call| call.at).max().expect("calls");
    assert!(repeats.iter().all(|call| call.attempt == 2 && call.at - refused >= MS * 990), "somebody did not pause");
    assert_eq!(repeats.len(), 100);
}

/// A partner that slows down with the number of calls that are out, until they pass the timeout; then it is well again.
#[tokio::test]
async fn the_window_falls_to_what_a_slow_partner_bears_and_recovers() {
    let milliseconds_a_call = Arc::new(AtomicU64::new(0));
    let out = Arc::new(AtomicU64::new(0));
    let stub = Stub::start({
        let (milliseconds_a_call, out) = (Arc::clone(&milliseconds_a_call), Arc::clone(&out));
        move |call| {
            // The stub asks when a call comes.
            let latency = 20 + milliseconds_a_call.load(Ordering::SeqCst) * out.load(Ordering::SeqCst);
            [vec![Step::Wait(MS * latency as u32)], valued(call.listing_id)].concat()
        }
    })
    .await;
    let limits = config::Partner { request_timeout: MS * 200, max_attempts: 100, ..settings(stub.address) };
    let (partner, metrics) = partner(&limits);
    let limit = || metrics.partner_in_flight_limit.get();
    let stop = AtomicBool::new(false);
    let next = std::sync::atomic::AtomicI64::new(0);
    // A hundred callers, each with one listing after another.
    let callers = futures::future::join_all((0..100).map(|_| async {
        while !stop.load(Ordering::SeqCst) {
            let listing_id = next.fetch_add(1, Ordering::SeqCst);
            assert_eq!(value(&partner, listing_id).await, worth(listing_id));
        }
    }));
    let story = async {
        let counting = async {
            loop {
                out.store(metrics.partner_in_flight.get() as u64, Ordering::SeqCst);
                tokio::time::sleep(MS).await;
            }
        };
        let acts = async {
            tokio::time::sleep(MS * 300).await;
            assert_eq!(limit(), 100, "it is well");
            // With 100 out the latency is 420 ms, with 45 it is 200.
            milliseconds_a_call.store(4, Ordering::SeqCst);
            let start = Instant::now();
            while limit() > 60 {
                assert!(start.elapsed() < SECOND * 10, "it stays at {}", limit());
                tokio::time::sleep(MS).await;
            }
            milliseconds_a_call.store(0, Ordering::SeqCst);
            let (start, low) = (Instant::now(), limit());
            while limit() < 100 {
                assert!(start.elapsed() < SECOND * 25, "it stays at {}", limit());
                tokio::time::sleep(MS).await;
            }
            let ideal = SECOND.mul_f64(0.25 * (100 - low) as f64);
            assert!(start.elapsed() >= ideal / 2, "{:?} from {low} to 100", start.elapsed());
        };
        tokio::select! {
            () = counting => {}
            () = acts => {}
        }
        stop.store(true, Ordering::SeqCst);
    };
    tokio::join!(callers, story);
}

#[tokio::test]
async fn no_more_calls_are_out_than_the_window_says() {
    let refuse = Arc::new(AtomicBool::new(true));
    let stub = Stub::start({
        let refuse = Arc::clone(&refuse);
        move |call| {
            if refuse.load(Ordering::SeqCst) {
                return answer(429, "retry-after: 0\r\n", b"");
            }
            [vec![Step::Wait(MS * 20)], valued(call.listing_id)].concat()
        }
    })
    .await;
    let (partner, metrics) = partner(&config::Partner { max_attempts: 100, in_flight: 200, ..settings(stub.address) });
    // One after another: each is a round trip.
    let first = async { value(&partner, 0).await };
    let watching = async {
        while metrics.partner_in_flight_limit.get() > 70 {
            tokio::time::sleep(MS / 10).await;
        }
        refuse.store(false, Ordering::SeqCst);
    };
    let (first, ()) = tokio::join!(first, watching);
    assert_eq!(first, worth(0));
    let low = metrics.partner_in_flight_limit.get();
    assert!((20..=70).contains(&low), "{low}");
    assert_eq!(value_all(&partner, 1..600).await, []);
    let most = stub.most_in_flight() as i64;
    let limit = metrics.partner_in_flight_limit.get();
    assert!(limit < 100, "{limit}");
    assert!(most <= limit && most >= low, "{most} were out, {low} to {limit} may be");
}

#[tokio::test]
async fn a_healthy_partner_sees_all_calls_that_it_may() {
    // Refused listings, broken answers, closed connections and a 503 in fifty are no overload.
    let number = AtomicUsize::new(0);
    let stub = Stub::start(move |call| {
        let steps = match number.fetch_add(1, Ordering::SeqCst) % 100 {
            17 | 67 => status(503),
            23 => status(500),
            42 => ok("<html>"),
            77 => vec![Step::Close],
            _ => valued(call.listing_id),
        };
        [vec![Step::Wait(MS * 50)], steps].concat()
    })
    .await;
    let (partner, metrics) = partner(&config::Partner { in_flight: 200, ..settings(stub.address) });
    let start = Instant::now();
    let watching = async {
        loop {
            assert_eq!(metrics.partner_in_flight_limit.get(), 200);
            assert_eq!(metrics.partner_repeats_waiting.get(), 0);
            tokio::time::sleep(MS).await;
        }
    };
    tokio::select! {
        verdicts = value_all(&partner, 0..3000) => assert_eq!(verdicts, []),
        () = watching => {}
    }
    assert_eq!(stub.most_in_flight(), 200);
    // 16 rounds of 50 ms would be ideal.
    assert!(start.elapsed() < SECOND * 2, "{:?}", start.elapsed());
}

#[tokio::test]
async fn every_form_of_retry_after_is_honoured_or_ignored() {
    let date = |seconds: i64| {
        let format =
            format_description!("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT");
        let at = OffsetDateTime::from(SystemTime::now()) + time::Duration::seconds(seconds);
        format!("retry-after: {}\r\n", at.format(&format).expect("a date"))
    };
    // What is asked for and the least and the most of the pause, in seconds.
    for (code, header, least, most) in [
        (429, "retry-after: 7\r\n".to_owned(), 6.5, 7.0),
        (503, "Retry-After:   7  \r\n".to_owned(), 6.5, 7.0),
        (429, "retry-after: 0\r\n".to_owned(), 0.0, 0.0),
        (503, "retry-after: 86400\r\n".to_owned(), 299.0, 300.0),
        (429, "retry-after: 999999999999999999999999\r\n".to_owned(), 299.0, 300.0),
        (429, date(60), 58.0, 60.0),
        (503, date(-60), 0.0, 0.0),
        (429, date(86_400), 299.0, 300.0),
        (503, "retry-after: soon\r\n".to_owned(), 0.0, 0.0),
        (503, "retry-after: -5\r\n".to_owned(), 0.0, 0.0),
        (503, String::new(), 0.0, 0.0),
        // Asked of everyone by these two statuses alone.
        (500, "retry-after: 7\r\n".to_owned(), 0.0, 0.0),
    ] {
        let stub = Stub::start({
            let header = header.clone();
            move |call| match call.attempt {
                1 => answer(code, &header, b""),
                _ => valued(call.listing_id),
            }
        })
        .await;
        let (partner, metrics) = partner(&settings(stub.address));
        let call = value(&partner, 7);
        let pause = async {
            let status = code.to_string();
            while metrics.partner_calls.with_label_values(&[&status]).get() == 0 {
                tokio::time::sleep(MS).await;
            }
            // Whoever reads the count reads it before the pause begins.
            tokio::time::sleep(MS * 20).await;
            let end = partner.shared.budget.pause_end();
            end.map_or(0.0, |end| (end - Instant::now()).as_secs_f64())
        };
        let pause = async {
            if most == 0.0 {
                let (verdict, pause) = tokio::join!(call, pause);
                assert_eq!(verdict, worth(7));
                return pause;
            }
            tokio::select! {
                biased;
                pause = pause => pause,
                verdict = call => panic!("{verdict:?} in spite of {header}"),
            }
        };
        let pause = timeout(SECOND, pause).await.expect("nobody waits without a pause");
        assert!((least..=most).contains(&pause), "{code} {header:?}: {pause} s");
    }
}
