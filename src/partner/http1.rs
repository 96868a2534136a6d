//! One HTTP/1.1 exchange: a message out, an answer in, nothing held while the answer is awaited.
//!
//! hyper's connection keeps about 29 KB on the heap for each call in flight (a read buffer, a write buffer and a channel
//! of 32 slots), of which 22 KB become resident: 22 MiB for a thousand calls, nearly all of what a refresh may use. The
//! partner gets small POSTs one at a time and sends small answers, so this module reads with hyper's parser
//! (`httparse`) into a buffer on the stack, and a call that waits owns its socket and no buffer: 1.4 KB in all, its task included. It
//! knows what such
//! answers need: lengths, chunks, interim answers, keep-alive; it refuses what it does not know.

use std::future::poll_fn;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::{Duration, SystemTime};

use http::StatusCode;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::retry;

/// A socket, with TLS on it or without.
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// The most of an answer's status line and headers, in bytes.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// The most headers of one answer.
const MAX_HEADERS: usize = 100;
/// Read at once, in bytes; the answers of the partner are smaller.
const READ_BYTES: usize = 4096;

/// Why an exchange ended without a whole answer.
#[derive(Debug, Error)]
pub(super) enum ExchangeError {
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The partner closed the connection in the middle.
    #[error("the connection was closed before the end of the answer")]
    Closed,
    /// This is not HTTP/1.1 as a client may expect it.
    #[error("the answer is not valid HTTP: {0}")]
    Malformed(&'static str),
    /// The body passes the bound.
    #[error("the answer is larger than partner.max_response_bytes = {0}")]
    TooLarge(usize),
}

/// What the head of an answer says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    /// The final status; interim answers are passed over.
    pub status: StatusCode,
    /// The wait that was asked for, on any status.
    pub retry_after: Option<Duration>,
    framing: Framing,
    encoding: Encoding,
    keep_alive: bool,
}

/// How the end of a body is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(u64),
    Chunked,
    UntilClose,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Identity,
    Gzip,
    Unknown,
}

/// One message and its answer on one connection.
///
/// It outlives its own [`run`](Exchange::run), so that a caller who gave up still learns how far it came.
pub(super) struct Exchange<'a> {
    io: &'a mut dyn Io,
    max_body_bytes: usize,
    /// Received and not yet understood.
    received: Vec<u8>,
    answered: bool,
    head: Option<Head>,
    reusable: bool,
}

impl<'a> Exchange<'a> {
    /// An exchange whose answer may have a body of at most `max_body_bytes`, before and after decompression.
    pub(super) fn new(io: &'a mut dyn Io, max_body_bytes: usize) -> Self {
        Exchange { io, max_body_bytes, received: Vec::new(), answered: false, head: None, reusable: false }
    }

    /// Whether any byte of an answer has come.
    pub(super) fn answered(&self) -> bool {
        self.answered
    }

    /// The head of the answer, once it is there.
    pub(super) fn head(&self) -> Option<Head> {
        self.head
    }

    /// Whether the connection can carry another exchange: the answer was whole and nothing came after it.
    pub(super) fn reusable(&self) -> bool {
        self.reusable
    }

    /// Sends `message` and returns the body of the answer, decompressed. The first poll writes.
    pub(super) async fn run(&mut self, message: Vec<u8>) -> Result<Vec<u8>, ExchangeError> {
        self.io.write_all(&message).await?;
        self.io.flush().await?;
        // The message must not stay in memory while the answer is awaited.
        drop(message);
        let head = self.receive_head().await?;
        if head.status != StatusCode::OK && head.framing == Framing::UntilClose {
            // The status says it all, and the end of the body may never come.
            return Ok(Vec::new());
        }
        let body = self.receive_body(head.framing).await?;
        self.reusable = head.keep_alive && head.framing != Framing::UntilClose && self.received.is_empty();
        decompress(body, head.encoding, self.max_body_bytes)
    }

    async fn receive_head(&mut self) -> Result<Head, ExchangeError> {
        loop {
            if let Some((head, length)) = parse_head(&self.received)? {
                self.received.drain(..length);
                if head.status.is_informational() {
                    continue;
                }
                self.head = Some(head);
                return Ok(head);
            }
            if self.received.len() >= MAX_HEAD_BYTES {
                return Err(ExchangeError::Malformed("its headers are larger than 16 KiB"));
            }
            if self.receive().await? == 0 {
                return Err(ExchangeError::Closed);
            }
        }
    }

    async fn receive_body(&mut self, framing: Framing) -> Result<Vec<u8>, ExchangeError> {
        match framing {
            Framing::Length(length) => {
                let length = usize::try_from(length)
                    .ok()
                    .filter(|length| *length <= self.max_body_bytes)
                    .ok_or(ExchangeError::TooLarge(self.max_body_bytes))?;
                while self.received.len() < length {
                    if self.receive().await? == 0 {
                        return Err(ExchangeError::Closed);
                    }
                }
                let rest = self.received.split_off(length);
                Ok(std::mem::replace(&mut self.received, rest))
            }
            Framing::Chunked => {
                let mut chunks = Chunks::default();
                while !chunks.decode(&mut self.received, self.max_body_bytes)? {
                    if self.receive().await? == 0 {
                        return Err(ExchangeError::Closed);
                    }
                }
                Ok(chunks.body)
            }
            Framing::UntilClose => {
                while self.receive().await? > 0 {
                    if self.received.len() > self.max_body_bytes {
                        return Err(ExchangeError::TooLarge(self.max_body_bytes));
                    }
                }
                Ok(std::mem::take(&mut self.received))
            }
        }
    }

    /// Waits for more bytes and returns their number, 0 at the end. The buffer lives for one poll.
    async fn receive(&mut self) -> io::Result<usize> {
        let count = poll_fn(|cx| {
            let mut space = [MaybeUninit::uninit(); READ_BYTES];
            let mut buffer = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut *self.io).poll_read(cx, &mut buffer))?;
            self.received.extend_from_slice(buffer.filled());
            Poll::Ready(io::Result::Ok(buffer.filled().len()))
        })
        .await?;
        self.answered |= count > 0;
        Ok(count)
    }
}

/// The head at the start of `bytes` and its length, or `None` if it is not all there.
fn parse_head(bytes: &[u8]) -> Result<Option<(Head, usize)>, ExchangeError> {
    use ExchangeError::Malformed;
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Malformed("it has more than 100 headers")),
        Err(_) => return Err(Malformed("its head cannot be read")),
    };
    let status = response.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or(Malformed("its status is not one"))?;
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Malformed("it switches protocols, unasked"));
    }

    let mut content_length = None;
    let mut chunked = false;
    // Before 1.1 a connection ended with its answer unless both sides said otherwise, and this side does not.
    let mut keep_alive = response.version == Some(1);
    let mut encoding = Encoding::Identity;
    let mut retry_after = None;
    for header in response.headers.iter() {
        let value = header.value.trim_ascii();
        let name_is = |name: &str| header.name.eq_ignore_ascii_case(name);
        if name_is("content-length") {
            let parsed = parse_length(value).ok_or(Malformed("its Content-Length is not a number"))?;
            if content_length.replace(parsed).is_some_and(|before| before != parsed) {
                return Err(Malformed("it has two lengths"));
            }
        } else if name_is("transfer-encoding") {
            if chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Malformed("its Transfer-Encoding is not chunked"));
            }
            chunked = true;
        } else if name_is("connection") {
            let mut options = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
            keep_alive &= !options.any(|option| option.eq_ignore_ascii_case(b"close"));
        } else if name_is("content-encoding") && !value.eq_ignore_ascii_case(b"identity") {
            let gzip = value.eq_ignore_ascii_case(b"gzip") || value.eq_ignore_ascii_case(b"x-gzip");
            encoding = if gzip && encoding == Encoding::Identity { Encoding::Gzip } else { Encoding::Unknown };
        } else if name_is("retry-after") {
            retry_after = retry::parse_retry_after(value, SystemTime::now());
        }
    }
    let bodiless = status.is_informational() || matches!(status.as_u16(), 204 | 304);
    let framing = match (chunked, content_length) {
        _ if bodiless => Framing::Length(0),
        (true, Some(_)) => return Err(Malformed("it has a length and chunks")),
        (true, None) => Framing::Chunked,
        (false, Some(length)) => Framing::Length(length),
        (false, None) => Framing::UntilClose,
    };
    Ok(Some((Head { status, retry_after, framing, encoding, keep_alive }, length)))
}

/// A decimal number; one that is too large for 64 bits is larger than any bound.
fn parse_length(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(digits.iter().fold(0u64, |value, digit| value.saturating_mul(10).saturating_add(u64::from(digit - b'0'))))
}

/// A chunked body on its way.
#[derive(Default)]
struct Chunks {
    body: Vec<u8>,
    next: Part,
}

/// What comes next in a chunked body.
#[derive(Default)]
enum Part {
    #[default]
    Size,
    Data(usize),
    LineEnd,
    Trailers,
}

impl Chunks {
    /// Takes what it understands from the front of `received`; `true` once the body is whole.
    fn decode(&mut self, received: &mut Vec<u8>, max_body_bytes: usize) -> Result<bool, ExchangeError> {
        use ExchangeError::{Malformed, TooLarge};
        let mut rest = &received[..];
        let whole = loop {
            match self.next {
                Part::Size => match httparse::parse_chunk_size(rest) {
                    Ok(httparse::Status::Partial) => break false,
                    Ok(httparse::Status::Complete((length, 0))) => {
                        rest = &rest[length..];
                        self.next = Part::Trailers;
                    }
                    Ok(httparse::Status::Complete((length, size))) => {
                        rest = &rest[length..];
                        let size = usize::try_from(size).unwrap_or(usize::MAX);
                        if size > max_body_bytes - self.body.len() {
                            return Err(TooLarge(max_body_bytes));
                        }
                        self.next = Part::Data(size);
                    }
                    Err(_) => return Err(Malformed("the size of a chunk is not a number")),
                },
                Part::Data(0) => self.next = Part::LineEnd,
                Part::Data(_) if rest.is_empty() => break false,
                Part::Data(size) => {
                    let (data, after) = rest.split_at(size.min(rest.len()));
                    self.body.extend_from_slice(data);
                    rest = after;
                    self.next = Part::Data(size - data.len());
                }
                Part::LineEnd if rest.len() < 2 => break false,
                Part::LineEnd => {
                    rest = rest.strip_prefix(b"\r\n").ok_or(Malformed("a chunk is longer than its size"))?;
                    self.next = Part::Size;
                }
                Part::Trailers => {
                    let mut trailers = [httparse::EMPTY_HEADER; MAX_HEADERS];
                    match httparse::parse_headers(rest, &mut trailers) {
                        Ok(httparse::Status::Partial) => break false,
                        Ok(httparse::Status::Complete((length, _))) => {
                            rest = &rest[length..];
                            break true;
                        }
                        Err(_) => return Err(Malformed("its trailers cannot be read")),
                    }
                }
            }
        };
        let understood = received.len() - rest.len();
        received.drain(..understood);
        // What is left is part of a size line or of the trailers; neither needs to be long.
        if received.len() >= MAX_HEAD_BYTES {
            return Err(Malformed("the frame of a chunk is larger than 16 KiB"));
        }
        Ok(whole)
    }
}

fn decompress(body: Vec<u8>, encoding: Encoding, max_body_bytes: usize) -> Result<Vec<u8>, ExchangeError> {
    match encoding {
        Encoding::Identity => Ok(body),
        Encoding::Unknown => Err(ExchangeError::Malformed("its Content-Encoding was not asked for")),
        Encoding::Gzip => {
            let mut plain = Vec::new();
            // One byte more than allowed tells too much from just enough.
            let mut decoder = flate2::read::MultiGzDecoder::new(&body[..]).take(max_body_bytes as u64 + 1);
            decoder.read_to_end(&mut plain).map_err(|_| ExchangeError::Malformed("its gzip data is corrupt"))?;
            if plain.len() > max_body_bytes {
                return Err(ExchangeError::TooLarge(max_body_bytes));
            }
            Ok(plain)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_gzip_bomb_is_not_unpacked() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(&vec![b' '; 64 << 20]).expect("memory");
        let bomb = encoder.finish().expect("memory");
        let allocated = tikv_jemalloc_ctl::thread::allocatedp::read().expect("jemalloc");
        let before = allocated.get();
        let unpacked = decompress(bomb, Encoding::Gzip, 16 * 1024);
        assert!(matches!(unpacked, Err(ExchangeError::TooLarge(16_384))), "{unpacked:?}");
        let bytes = allocated.get() - before;
        assert!(bytes < 1 << 20, "{bytes} bytes were allocated");
    }

    #[test]
    fn a_head_is_read_only_when_it_is_whole() {
        let head = b"HTTP/1.1 429 Slow down\r\nRetry-After: 2\r\nContent-Length: 3\r\n\r\n";
        for length in 0..head.len() {
            assert!(matches!(parse_head(&head[..length]), Ok(None)), "{length}");
        }
        let (parsed, length) = parse_head(&[&head[..], b"abc"].concat()).expect("valid").expect("whole");
        assert_eq!(length, head.len());
        assert_eq!(parsed.status, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(parsed.retry_after, Some(Duration::from_secs(2)));
        assert_eq!(parsed.framing, Framing::Length(3));
    }
}
