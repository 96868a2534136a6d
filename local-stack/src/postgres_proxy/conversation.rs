//! Who has said what on one connection: which statement is executed, and which answers belong to it.

use std::collections::{HashMap, VecDeque};

use bytes::{Bytes, BytesMut};

/// The longest message that PostgreSQL sends is 1 GiB; one that claims more is none.
const LONGEST: usize = 1 << 30;

/// One message: a type byte, its length as four bytes that count themselves, its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame(Bytes);

impl Frame {
    /// Takes a whole message from the front of `buffer`, if one is there.
    pub(super) fn take(buffer: &mut BytesMut) -> std::io::Result<Option<Self>> {
        let Some(length) = buffer.get(1..5).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()) else { return Ok(None) };
        let length = u32::from_be_bytes(length) as usize;
        if !(4..=LONGEST).contains(&length) {
            return Err(std::io::Error::other(format!("a message of {length} bytes is none of PostgreSQL's")));
        }
        Ok((buffer.len() > length).then(|| Self(buffer.split_to(length + 1).freeze())))
    }

    pub(super) fn bytes(&self) -> &Bytes {
        &self.0
    }

    pub(super) fn kind(&self) -> u8 {
        self.0[0]
    }

    fn content(&self) -> &[u8] {
        &self.0[5..]
    }

    /// The zero-terminated texts at the start of the content.
    fn texts<const N: usize>(&self) -> Option<[String; N]> {
        let mut texts = self.content().split(|byte| *byte == 0);
        let mut found = [const { String::new() }; N];
        for text in &mut found {
            *text = String::from_utf8_lossy(texts.next()?).into_owned();
        }
        Some(found)
    }
}

/// What the client asked for up to one Sync, or by one simple query: the server answers it as a whole, ending with
/// ReadyForQuery.
#[derive(Debug)]
struct Request<T> {
    is_whole: bool,
    /// What is to happen when it is committed.
    armed: Option<T>,
    /// Whether an error or a ROLLBACK is among its answers.
    undone: bool,
}

/// What a message of the server means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Meaning<T> {
    /// It may go to the client.
    Pass,
    /// It waits: whether its statement is committed is not known yet.
    Hold,
    /// Those that wait may go to the client, and then this one.
    Release,
    /// What was armed is committed, and the client does not know yet.
    Committed(T),
    /// What was armed came to nothing. Those that wait may go to the client, and then this one.
    Undone(T),
}

/// The state of one connection, after its start-up. `T` is what an executed statement can be armed with.
#[derive(Debug)]
pub(super) struct Conversation<T> {
    /// Prepared statements by name; the client may execute one long after.
    statements: HashMap<String, String>,
    portals: HashMap<String, String>,
    requests: VecDeque<Request<T>>,
    /// Armed by an earlier request of the transaction that is open.
    in_transaction: Option<T>,
}

impl<T> Conversation<T> {
    pub(super) fn new() -> Self {
        Self { statements: HashMap::new(), portals: HashMap::new(), requests: VecDeque::new(), in_transaction: None }
    }

    /// Takes note of a message of the client. Gives the text of the statement that it executes, if it does.
    pub(super) fn client(&mut self, frame: &Frame) -> Option<String> {
        let kind = frame.kind();
        // Others (passwords, data of a COPY, Terminate) are no requests.
        if !matches!(kind, b'Q' | b'P' | b'B' | b'D' | b'E' | b'C' | b'S' | b'H' | b'F') {
            return None;
        }
        if self.requests.back().is_none_or(|request| request.is_whole) {
            self.requests.push_back(Request { is_whole: false, armed: None, undone: false });
        }
        let ends = matches!(kind, b'Q' | b'S' | b'F');
        if let Some(request) = self.requests.back_mut() {
            request.is_whole = ends;
        }
        match kind {
            b'Q' => frame.texts().map(|[sql]| sql),
            b'P' => {
                let [name, sql] = frame.texts()?;
                self.statements.insert(name, sql);
                None
            }
            b'B' => {
                let [portal, statement] = frame.texts()?;
                let sql = self.statements.get(&statement).cloned().unwrap_or_default();
                self.portals.insert(portal, sql);
                None
            }
            b'E' => {
                let [portal] = frame.texts()?;
                self.portals.get(&portal).cloned()
            }
            _ => None,
        }
    }

    /// Arms the request that the client is making. Gives back what cannot be armed: one is armed already.
    pub(super) fn arm(&mut self, with: T) -> Option<T> {
        let Some(request) = self.requests.back_mut() else { return Some(with) };
        if self.in_transaction.is_some() || request.armed.is_some() {
            return Some(with);
        }
        request.armed = Some(with);
        None
    }

    /// What is armed and will not be told about: the connection has ended.
    pub(super) fn abandon(&mut self) -> impl Iterator<Item = T> {
        let of_requests = std::mem::take(&mut self.requests).into_iter().filter_map(|request| request.armed);
        self.in_transaction.take().into_iter().chain(of_requests)
    }

    /// What a message of the server means.
    pub(super) fn server(&mut self, frame: &Frame) -> Meaning<T> {
        // The end of the start-up belongs to no request.
        let Some(request) = self.requests.front_mut() else { return Meaning::Pass };
        let is_armed = self.in_transaction.is_some() || request.armed.is_some();
        match frame.kind() {
            b'E' => request.undone = true,
            b'C' if frame.content().starts_with(b"ROLLBACK") => request.undone = true,
            _ => {}
        }
        if frame.kind() != b'Z' {
            return if is_armed { Meaning::Hold } else { Meaning::Pass };
        }
        let undone = request.undone;
        let armed = self.requests.pop_front().and_then(|request| request.armed).or(self.in_transaction.take());
        let Some(armed) = armed else { return Meaning::Pass };
        match frame.content().first() {
            Some(b'I') if undone => Meaning::Undone(armed),
            Some(b'I') => Meaning::Committed(armed),
            // A transaction is open, or failed: its end decides.
            _ => {
                self.in_transaction = Some(armed);
                Meaning::Release
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::BufMut;

    use super::*;

    fn frame(kind: u8, content: &[u8]) -> Frame {
        let mut bytes = BytesMut::new();
        bytes.put_u8(kind);
        bytes.put_u32(u32::try_from(content.len()).expect("short") + 4);
        bytes.put_slice(content);
        Frame(bytes.freeze())
    }

    #[test]
    fn messages_are_taken_whole() -> std::io::Result<()> {
        let whole = frame(b'Q', b"SELECT 1\0");
        let mut buffer = BytesMut::from(&whole.bytes()[..]);
        buffer.extend_from_slice(b"S\0\0");
        assert_eq!(Frame::take(&mut buffer)?, Some(whole));
        assert_eq!(Frame::take(&mut buffer)?, None);
        buffer.extend_from_slice(&[0, 4]);
        assert_eq!(Frame::take(&mut buffer)?, Some(frame(b'S', b"")));
        assert!(Frame::take(&mut BytesMut::from(&b"S\0\0\0\x03"[..])).is_err());
        Ok(())
    }

    #[test]
    fn a_statement_is_known_by_its_name_for_ever() {
        let mut talk = Conversation::<()>::new();
        assert_eq!(talk.client(&frame(b'P', b"one\0INSERT 1\0\0\0")), None);
        talk.client(&frame(b'S', b""));
        for _ in 0..2 {
            assert_eq!(talk.client(&frame(b'B', b"\0one\0\0\0\0\0\0\0")), None);
            assert_eq!(talk.client(&frame(b'E', b"\0\0\0\0\0")).as_deref(), Some("INSERT 1"));
            talk.client(&frame(b'S', b""));
        }
        assert_eq!(talk.client(&frame(b'Q', b"COMMIT\0")).as_deref(), Some("COMMIT"));
    }

    #[test]
    fn a_single_statement_is_committed_when_the_server_is_ready() {
        let mut talk = Conversation::new();
        talk.client(&frame(b'Q', b"SELECT 1\0"));
        talk.client(&frame(b'Q', b"INSERT\0"));
        assert_eq!(talk.arm("it"), None);
        assert_eq!(talk.arm("more"), Some("more"));
        // The answer to the first, which was not armed.
        assert_eq!(talk.server(&frame(b'C', b"SELECT 1\0")), Meaning::Pass);
        assert_eq!(talk.server(&frame(b'Z', b"I")), Meaning::Pass);
        assert_eq!(talk.server(&frame(b'C', b"INSERT 0 1\0")), Meaning::Hold);
        assert_eq!(talk.server(&frame(b'Z', b"I")), Meaning::Committed("it"));
    }

    #[test]
    fn in_a_transaction_its_end_decides() {
        for (end, meaning) in [(&b"COMMIT\0"[..], Meaning::Committed("it")), (b"ROLLBACK\0", Meaning::Undone("it"))] {
            let mut talk = Conversation::new();
            talk.client(&frame(b'Q', b"INSERT\0"));
            talk.arm("it");
            assert_eq!(talk.server(&frame(b'C', b"INSERT 0 1\0")), Meaning::Hold);
            assert_eq!(talk.server(&frame(b'Z', b"T")), Meaning::Release);
            talk.client(&frame(b'Q', end));
            assert_eq!(talk.server(&frame(b'C', end)), Meaning::Hold);
            assert_eq!(talk.server(&frame(b'Z', b"I")), meaning);
        }
    }

    #[test]
    fn an_error_is_no_commit() {
        let mut talk = Conversation::new();
        talk.client(&frame(b'Q', b"INSERT\0"));
        talk.arm("it");
        assert_eq!(talk.server(&frame(b'E', b"SERROR\0\0")), Meaning::Hold);
        assert_eq!(talk.server(&frame(b'Z', b"I")), Meaning::Undone("it"));
    }
}
