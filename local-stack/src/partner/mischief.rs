//! Answers that are right in themselves and come in a way that no client should have to bear.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use hyper::body::{Body, Frame, SizeHint};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

/// Between two bytes of a drip.
const DRIP: Duration = Duration::from_secs(1);
/// Sent of an answer that hangs in its header.
const SOME_OF_HEADER: usize = 20;
/// The size of a huge answer and of an unpacked bomb: 1 GiB.
const HUGE: u64 = 1 << 30;
/// What a huge answer and a bomb are made of: white space, which JSON allows.
const PIECE_BYTES: usize = 64 * 1024;

/// A way to deliver an answer badly. The valuation is made in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mischief {
    /// Nothing comes after the first bytes of the header; the connection stays open.
    HangInHeader,
    /// Nothing comes after the header and half of the body; the connection stays open.
    HangInBody,
    /// One byte a second.
    Drip,
    /// The stub closes its side of the connection after half of the body and goes on reading.
    HalfClose,
    /// 10,000 headers.
    ManyHeaders,
    /// A body of 1 GiB, announced.
    HugeBody,
    /// A body of 1 GiB, in chunks, announced by nothing.
    EndlessBody,
    /// A body of 1 MB that says it is gzip and unpacks to 1 GiB.
    GzipBomb,
}

/// A body: the whole of it at hand, or one piece over and over.
#[derive(Debug)]
pub(super) struct Payload {
    piece: Bytes,
    repeats: u64,
    /// Whether its length is announced.
    is_sized: bool,
}

impl From<Bytes> for Payload {
    fn from(whole: Bytes) -> Self {
        Self { repeats: u64::from(!whole.is_empty()), piece: whole, is_sized: true }
    }
}

impl Payload {
    pub(super) fn huge(is_sized: bool) -> Self {
        Self { piece: Bytes::from(vec![b' '; PIECE_BYTES]), repeats: HUGE / PIECE_BYTES as u64, is_sized }
    }

    /// Gzip files one after the other are one gzip file.
    pub(super) fn bomb() -> io::Result<Self> {
        static PIECE: LazyLock<io::Result<(Bytes, u64)>> = LazyLock::new(|| {
            let unpacked = vec![b' '; 256 * PIECE_BYTES];
            let mut packed = GzEncoder::new(Vec::new(), Compression::best());
            io::Write::write_all(&mut packed, &unpacked)?;
            Ok((packed.finish()?.into(), HUGE / unpacked.len() as u64))
        });
        let (piece, repeats) = PIECE.as_ref().map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Self { piece: piece.clone(), repeats: *repeats, is_sized: true })
    }
}

impl Body for Payload {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        if self.repeats == 0 {
            return Poll::Ready(None);
        }
        self.repeats -= 1;
        Poll::Ready(Some(Ok(Frame::data(self.piece.clone()))))
    }

    fn is_end_stream(&self) -> bool {
        self.repeats == 0
    }

    fn size_hint(&self) -> SizeHint {
        if self.is_sized { SizeHint::with_exact(self.piece.len() as u64 * self.repeats) } else { SizeHint::default() }
    }
}

/// What becomes of the bytes of an answer after the first ones.
#[derive(Clone, Copy, Debug)]
enum Then {
    Hang,
    Drip,
    Close,
}

/// How much of an answer passes before it is spoiled.
#[derive(Clone, Copy, Debug)]
enum First {
    Bytes(usize),
    /// The header and half of the body. The answers that are spoiled so are written in one piece.
    HalfOfBody,
}

/// What is to be done to the answer that is written next.
#[derive(Clone, Copy, Debug)]
struct Plan {
    first: First,
    then: Then,
}

/// Orders for one connection, given by who makes the answers. They end with the connection.
#[derive(Clone, Debug, Default)]
pub(super) struct Spoiler(Arc<Mutex<Option<Plan>>>);

impl Spoiler {
    /// Spoils the answer that comes next; the connection is of no use after it.
    pub(super) fn spoil(&self, mischief: Mischief) {
        let (first, then) = match mischief {
            Mischief::HangInHeader => (First::Bytes(SOME_OF_HEADER), Then::Hang),
            Mischief::HangInBody => (First::HalfOfBody, Then::Hang),
            Mischief::Drip => (First::Bytes(0), Then::Drip),
            Mischief::HalfClose => (First::HalfOfBody, Then::Close),
            // These are in the answer itself.
            Mischief::ManyHeaders | Mischief::HugeBody | Mischief::EndlessBody | Mischief::GzipBomb => return,
        };
        *self.plan() = Some(Plan { first, then });
    }

    fn plan(&self) -> MutexGuard<'_, Option<Plan>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection whose answers can be spoiled.
#[derive(Debug)]
pub(super) struct Spoiled {
    stream: TcpStream,
    spoiler: Spoiler,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Spoiled {
    pub(super) fn new(stream: TcpStream, spoiler: Spoiler) -> Self {
        Self { stream, spoiler, pause: None }
    }
}

impl AsyncRead for Spoiled {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Spoiled {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let plan = *this.spoiler.plan();
        let Some(Plan { first, then }) = plan else { return Pin::new(&mut this.stream).poll_write(cx, bytes) };
        let pass = match first {
            First::Bytes(pass) => pass,
            First::HalfOfBody => {
                let header = bytes.windows(4).position(|four| four == b"\r\n\r\n").map_or(0, |at| at + 4);
                header + (bytes.len() - header) / 2
            }
        };
        if pass > 0 {
            let written = ready!(Pin::new(&mut this.stream).poll_write(cx, &bytes[..pass.min(bytes.len())]))?;
            *this.spoiler.plan() = Some(Plan { first: First::Bytes(pass - written), then });
            return Poll::Ready(Ok(written));
        }
        match then {
            // The sender believes that it was written.
            Then::Hang => Poll::Ready(Ok(bytes.len())),
            Then::Close => {
                ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
                Poll::Ready(Ok(bytes.len()))
            }
            Then::Drip => {
                let pause = this.pause.get_or_insert_with(|| Box::pin(tokio::time::sleep(DRIP)));
                ready!(pause.as_mut().poll(cx));
                let written = ready!(Pin::new(&mut this.stream).poll_write(cx, &bytes[..bytes.len().min(1)]))?;
                this.pause = None;
                Poll::Ready(Ok(written))
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
