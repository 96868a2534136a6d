//! A way in for the fuzz target of answers: the client's reader on bytes of any kind, without a socket.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::FutureExt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::http1::Exchange;
use super::wire::Valuation;

/// What the client made of an answer.
#[derive(Debug, PartialEq)]
pub struct Answer {
    /// Its final status, if its head could be read.
    pub status: Option<u16>,
    /// Its body, decompressed, or what was wrong with it.
    pub body: Result<Vec<u8>, String>,
    /// As a valuation in US cents with its confidence, if it is one.
    pub valuation: Option<(i64, f64)>,
}

/// Reads `bytes` as the answer about `listing_id`. They arrive in pieces of at most `piece` bytes and then end; the body
/// may have `max_body_bytes`.
pub fn read_answer(bytes: &[u8], piece: usize, max_body_bytes: usize, listing_id: i64) -> Answer {
    let mut io = Pieces { bytes: bytes.to_vec(), read: 0, piece: piece.max(1) };
    let mut exchange = Exchange::new(&mut io, max_body_bytes);
    let body = exchange.run(Vec::new()).now_or_never().expect("reading from memory never waits");
    let body = body.map_err(|error| error.to_string());
    let valuation = body.as_ref().ok().and_then(|body| Valuation::read(body, listing_id).ok());
    Answer {
        status: exchange.head().map(|head| head.status.as_u16()),
        valuation: valuation.map(|valuation| (valuation.valuation_cents, valuation.confidence)),
        body,
    }
}

struct Pieces {
    bytes: Vec<u8>,
    read: usize,
    piece: usize,
}

impl AsyncRead for Pieces {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let end = self.bytes.len().min(self.read + self.piece.min(buffer.remaining()));
        buffer.put_slice(&self.bytes[self.read..end]);
        self.read = end;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pieces {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
