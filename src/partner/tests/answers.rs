//! What an answer means for its listing.

use super::*;

#[tokio::test]
async fn a_final_status_fails_the_listing_at_once() {
    for code in [400, 404, 410, 422] {
        let (verdict, calls) = first_try(move |_| status(code)).await;
        assert_eq!(verdict, failed(&format!("partner answered {code}")));
        assert_eq!(calls.len(), 1);
    }
}

#[tokio::test]
async fn a_retryable_status_is_tried_again_with_the_same_key() {
    for code in [408, 409, 425, 429, 500, 502, 503, 504, 599] {
        let (verdict, calls) = first_try(move |_| status(code)).await;
        assert_eq!(verdict, worth(7), "{code}");
        assert_eq!(calls.len(), 2, "{code}");
        assert_eq!(calls[0].header("idempotency-key"), Some("run:7"));
        assert_eq!(calls[1].header("idempotency-key"), Some("run:7"));
        assert_eq!(calls[1].connection, 0, "{code}: the connection is still good");
    }
}

#[tokio::test]
async fn answers_that_make_no_sense_are_tried_again() {
    let nonsense = [
        ok(""),
        ok("<html>"),
        ok(r#"{"listing_id":8,"valuation_cents":100,"confidence":0.5}"#),
        ok(r#"{"listing_id":7,"valuation_cents":100,"confidence":1.5}"#),
        status(201),
        status(204),
        answer(200, "content-encoding: br\r\n", b"x"),
        answer(200, "content-encoding: gzip\r\n", b"not gzip"),
        answer(200, "", &[b' '; 20_000]),
        raw("SSH-2.0-OpenSSH_9.2\r\n"),
        raw("HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx"),
        raw("HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"),
        raw("HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n"),
        raw("HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\n"),
        raw("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        raw("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n"),
        raw("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nxx\r\n0\r\n\r\n"),
        raw("HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n"),
        raw(&format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(10_000))),
        raw(&format!("HTTP/1.1 200 OK\r\na: {}\r\n\r\n", "b".repeat(100_000))),
        vec![Step::Reset],
        vec![Step::Close],
        vec![Step::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{".to_vec()), Step::Reset],
        vec![Step::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{".to_vec()), Step::Close],
        vec![Step::Send(b"HTTP/1.1 2".to_vec()), Step::Close],
    ];
    for steps in nonsense {
        let shown: String = format!("{steps:?}").chars().take(300).collect();
        let (verdict, calls) = first_try(move |_| steps.clone()).await;
        assert_eq!(verdict, worth(7), "{shown}");
        assert_eq!(calls.len(), 2, "{shown}");
    }
}

#[tokio::test]
async fn a_hang_at_each_stage_ends_with_the_request_timeout() {
    let head = b"HTTP/1.1 200 OK\r\ncontent-length: 60\r\n\r\n".to_vec();
    let hang = Step::Wait(SECOND * 60);
    let drip: Vec<Step> = head.iter().flat_map(|byte| [Step::Send(vec![*byte]), Step::Wait(MS * 10)]).collect();
    let stages = [
        vec![hang.clone()],
        vec![Step::Send(head[..20].to_vec()), hang.clone()],
        vec![Step::Send(head.clone()), hang.clone()],
        vec![Step::Send([&head[..], b"{\"listing_id\""].concat()), hang.clone()],
        drip,
    ];
    for steps in stages {
        let start = Instant::now();
        let (verdict, calls) = first_try_within(MS * 100, move |_| steps.clone()).await;
        assert_eq!(verdict, worth(7));
        assert_eq!(calls.len(), 2);
        assert!(start.elapsed() >= MS * 100 && start.elapsed() < SECOND, "{:?}", start.elapsed());
    }
}

#[tokio::test]
async fn good_answers_come_in_many_forms() {
    let body = r#"{"listing_id":7,"valuation_cents":700,"confidence":0.5}"#;
    let (front, back) = body.split_at(20);
    let bytes: Vec<Step> = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .bytes()
        .map(|byte| Step::Send(vec![byte]))
        .collect();
    let chunks = format!(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n{:x};name=value\r\n{front}\r\n{:X}\r\n{back}\r\n0\r\na: b\r\n\r\n",
        front.len(),
        back.len()
    );
    let forms = [
        bytes,
        raw(&chunks),
        chunks.bytes().map(|byte| Step::Send(vec![byte])).collect(),
        raw(&format!("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200\r\ncontent-length: {}\r\n\r\n{body}", body.len())),
        vec![Step::Send(format!("HTTP/1.0 200 OK\r\n\r\n{body}").into_bytes()), Step::Close],
        answer(200, "content-encoding: gzip\r\n", &gzip(body.as_bytes())),
        answer(200, "connection: keep-alive, Close\r\n", body.as_bytes()),
    ];
    for steps in forms {
        let (verdict, calls) = first_try(move |_| steps.clone()).await;
        assert_eq!(verdict, worth(7));
        assert_eq!(calls.len(), 1);
    }
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(plain).expect("memory");
    encoder.finish().expect("memory")
}

#[tokio::test]
async fn an_answer_that_unpacks_to_too_much_is_broken() {
    let bomb = gzip(&vec![b' '; 1 << 20]);
    assert!(bomb.len() < 16 * 1024, "it must pass as it is");
    let stub = Stub::start(move |_| answer(200, "content-encoding: gzip\r\n", &bomb)).await;
    let (partner, metrics) = partner(&config::Partner { max_attempts: 2, ..settings(stub.address) });
    let Verdict::Failed { reason } = value(&partner, 7).await else { panic!("valued") };
    assert!(reason.contains("partner.max_response_bytes = 16384") && reason.ends_with("tries: 2"), "{reason}");
    assert_eq!(metrics.partner_calls.with_label_values(&["broken"]).get(), 2);
}

#[tokio::test]
async fn a_status_counts_though_its_body_is_useless() {
    for steps in [
        vec![
            Step::Send(b"HTTP/1.1 404 Not Found\r\ncontent-length: 1000000000\r\n\r\n".to_vec()),
            Step::Wait(SECOND * 60),
        ],
        vec![Step::Send(b"HTTP/1.1 404 Not Found\r\ncontent-length: 10\r\n\r\n".to_vec()), Step::Wait(SECOND * 60)],
        vec![Step::Send(b"HTTP/1.1 404 Not Found\r\ncontent-length: 10\r\n\r\n".to_vec()), Step::Close],
    ] {
        let (verdict, calls) = first_try_within(MS * 100, move |_| steps.clone()).await;
        assert_eq!(verdict, failed("partner answered 404"));
        assert_eq!(calls.len(), 1);
    }
}

#[tokio::test]
async fn a_status_is_enough_where_the_body_ends_with_the_connection() {
    let start = Instant::now();
    let (verdict, calls) =
        first_try(|_| [raw("HTTP/1.1 404 Not Found\r\n\r\nno such"), vec![Step::Wait(SECOND * 60)]].concat()).await;
    assert_eq!(verdict, failed("partner answered 404"));
    assert_eq!(calls.len(), 1);
    assert!(start.elapsed() < SECOND, "{:?}", start.elapsed());
    // The connection is not used again.
    let (verdict, calls) =
        first_try(|_| [raw("HTTP/1.1 503 Busy\r\n\r\nlater"), vec![Step::Wait(SECOND * 60)]].concat()).await;
    assert_eq!(verdict, worth(7));
    assert_eq!((calls.len(), calls[1].connection), (2, 1));
}

#[tokio::test]
async fn a_listing_fails_after_its_last_try() {
    let stub = Stub::start(|_| status(500)).await;
    let (partner, metrics) = partner(&settings(stub.address));
    assert_eq!(value(&partner, 7).await, failed("partner answered 500, tries: 8"));
    assert_eq!(stub.calls().len(), 8);
    assert_eq!(metrics.partner_calls.with_label_values(&["500"]).get(), 8);
}

#[tokio::test]
async fn all_tries_together_end_with_the_total_timeout() {
    let stub = Stub::start(|_| vec![Step::Wait(SECOND * 60)]).await;
    let (partner, metrics) =
        partner(&config::Partner { request_timeout: MS * 100, total_timeout: MS * 250, ..settings(stub.address) });
    let start = Instant::now();
    let Verdict::Failed { reason } = value(&partner, 7).await else { panic!("valued") };
    assert!(reason.starts_with("no whole answer from the partner within"), "{reason}");
    assert!(start.elapsed() >= MS * 200 && start.elapsed() < SECOND, "{:?}", start.elapsed());
    assert_eq!(metrics.partner_calls.with_label_values(&["timeout"]).get(), 3);
}
