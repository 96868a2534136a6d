//! The files of a replay: plain or gzip, a line at a time, in bounded memory.

use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, ensure};
use flate2::bufread::MultiGzDecoder;

use crate::events::envelope::{self, Event, MAX_BODY_BYTES};
use crate::events::request::Request;
use crate::queue::Refusal;

/// The first bytes of every gzip stream.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Bytes read at once.
const BUFFER_BYTES: usize = 64 * 1024;

/// A file that can be read from its beginning as often as needed. It stays the same file when another takes its name.
pub(super) struct Input {
    /// As it is told.
    pub(super) name: String,
    file: File,
    begin: u64,
}

impl Input {
    pub(super) fn open(path: &Path) -> anyhow::Result<Input> {
        let stdin = path == Path::new("-");
        let name = if stdin { "stdin".to_owned() } else { path.display().to_string() };
        let open = || {
            let file = if stdin { io::stdin().as_fd().try_clone_to_owned()?.into() } else { File::open(path)? };
            Ok::<_, io::Error>((file.metadata()?.file_type(), file))
        };
        let (kind, mut file) = open().with_context(|| format!("{name} cannot be opened"))?;
        ensure!(!kind.is_dir(), "{name} is a directory, not a file of events");
        let begin = if kind.is_file() {
            file.stream_position()?
        } else {
            file = spool(file).with_context(|| format!("{name} cannot be kept in a temporary file"))?;
            0
        };
        Ok(Input { name, file, begin })
    }

    fn reader(&self) -> io::Result<Box<dyn BufRead>> {
        let mut file = self.file.try_clone()?;
        file.seek(SeekFrom::Start(self.begin))?;
        let mut plain = BufReader::with_capacity(BUFFER_BYTES, file);
        if plain.fill_buf()?.starts_with(&GZIP) {
            // Several streams in a row are one file, as `cat a.gz b.gz` makes it.
            return Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, MultiGzDecoder::new(plain))));
        }
        Ok(Box::new(plain))
    }
}

/// A pipe as a file without a name, which goes away with the process.
fn spool(mut pipe: File) -> io::Result<File> {
    let mut file = tempfile::tempfile()?;
    io::copy(&mut pipe, &mut file)?;
    Ok(file)
}

/// A line, good or bad.
pub(super) struct Line<'a> {
    /// What there is of it: of a line that is too long, the beginning.
    pub(super) bytes: &'a [u8],
    length: u64,
    /// The file ends in it.
    cut: bool,
    /// Why it could not be read.
    damage: Option<&'a str>,
}

impl<'a> Line<'a> {
    /// What the service would make of it; nothing, if the line is blank.
    pub(super) fn decode(&self) -> Result<Option<Decoded<'a>>, Refusal> {
        if let Some(damage) = self.damage {
            return Err(Refusal { code: "unreadable", reason: damage.to_owned() });
        }
        if self.length > MAX_BODY_BYTES as u64 {
            return Err(envelope::too_large(self.length));
        }
        let text = str::from_utf8(self.bytes)
            .map_err(|error| Refusal { code: "invalid_json", reason: format!("not UTF-8: {error}") })?
            .trim();
        if text.is_empty() {
            return Ok(None);
        }
        let decode = || {
            let event = Event::decode(text)?;
            let request = Request::decode(&event)?;
            Ok((event, request))
        };
        match decode() {
            Ok((event, request)) => Ok(Some(Decoded { text, event, request })),
            Err(Refusal { code, reason }) if self.cut && code == "invalid_json" => Err(Refusal {
                code,
                reason: format!("{reason}; the file ends in this line, perhaps while it was written"),
            }),
            Err(refusal) => Err(refusal),
        }
    }
}

/// A line that the service accepts.
pub(super) struct Decoded<'a> {
    pub(super) text: &'a str,
    pub(super) event: Event<'a>,
    pub(super) request: Request,
}

/// The lines of all files, one after the other.
pub(super) struct Walk<'a> {
    inputs: &'a [Input],
    /// Of each file, the lines to read; all that are there if there is no number.
    limits: &'a [u64],
    file: usize,
    reader: Option<Box<dyn BufRead>>,
    number: u64,
    bytes: Vec<u8>,
    length: u64,
    cut: bool,
    damage: Option<String>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(inputs: &'a [Input], limits: &'a [u64]) -> Self {
        Walk {
            inputs,
            limits,
            file: 0,
            reader: None,
            number: 0,
            bytes: Vec::new(),
            length: 0,
            cut: false,
            damage: None,
        }
    }

    /// Goes to the next line; false at the end of the last file.
    pub(super) fn advance(&mut self) -> anyhow::Result<bool> {
        while let Some(input) = self.inputs.get(self.file) {
            let within = self.limits.get(self.file).is_none_or(|limit| self.number < *limit);
            if self.damage.is_none()
                && within
                && self.read(input).with_context(|| format!("{} cannot be read", input.name))?
            {
                self.number += 1;
                return Ok(true);
            }
            (self.reader, self.damage, self.number) = (None, None, 0);
            self.file += 1;
        }
        Ok(false)
    }

    /// The line that [`advance`](Self::advance) went to.
    pub(super) fn line(&self) -> Line<'_> {
        Line { bytes: &self.bytes, length: self.length, cut: self.cut, damage: self.damage.as_deref() }
    }

    /// Index of the file and number of the line in it.
    pub(super) fn position(&self) -> (usize, u64) {
        (self.file, self.number)
    }

    /// The position for people: `FILE:LINE`.
    pub(super) fn place(&self) -> String {
        let name = self.inputs.get(self.file).map_or("", |input| &input.name);
        format!("{name}:{}", self.number)
    }

    /// Reads a line; false at the end of the file.
    fn read(&mut self, input: &Input) -> io::Result<bool> {
        let reader = match &mut self.reader {
            Some(reader) => reader,
            none => none.insert(input.reader()?),
        };
        (self.length, self.cut) = (0, false);
        self.bytes.clear();
        loop {
            let buffer = match reader.fill_buf() {
                Ok(buffer) => buffer,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // The data are wrong, not the disk: gzip that ends too early or is no gzip any more.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::UnexpectedEof | ErrorKind::InvalidInput | ErrorKind::InvalidData
                    ) =>
                {
                    self.damage =
                        Some(format!("the gzip data are damaged or cut off here, and the rest is lost: {error}"));
                    return Ok(true);
                }
                Err(error) => return Err(error),
            };
            if buffer.is_empty() {
                self.cut = true;
                return Ok(self.length > 0);
            }
            let end = buffer.iter().position(|byte| *byte == b'\n');
            let part = &buffer[..end.unwrap_or(buffer.len())];
            // One byte more than is accepted shows that there are too many; the others are only counted.
            let room = (MAX_BODY_BYTES + 1).saturating_sub(self.bytes.len());
            self.bytes.extend_from_slice(&part[..part.len().min(room)]);
            self.length += part.len() as u64;
            let used = part.len() + usize::from(end.is_some());
            reader.consume(used);
            if end.is_some() {
                return Ok(true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn input(bytes: &[u8]) -> Input {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(bytes).expect("writable");
        Input { name: "f".to_owned(), file, begin: 0 }
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).expect("memory");
        encoder.finish().expect("memory")
    }

    /// Place, bytes, and whether it is damaged, of each line.
    fn lines(inputs: &[Input], limits: &[u64]) -> Vec<(String, Vec<u8>, bool)> {
        let mut walk = Walk::new(inputs, limits);
        let mut found = Vec::new();
        while walk.advance().expect("readable") {
            found.push((walk.place(), walk.line().bytes.to_vec(), walk.line().damage.is_some()));
        }
        found
    }

    #[test]
    fn files_follow_each_other_packed_or_not_and_as_often_as_wanted() {
        let two_streams = [gzip(b"c\nd\n"), gzip(b"e")].concat();
        let inputs = [input(b"a\n\nb\n"), input(&two_streams), input(b"")];
        let expected = [("f:1", "a"), ("f:2", ""), ("f:3", "b"), ("f:1", "c"), ("f:2", "d"), ("f:3", "e")]
            .map(|(place, text)| (place.to_owned(), text.as_bytes().to_vec(), false));
        for _ in 0..2 {
            assert_eq!(lines(&inputs, &[]), expected);
        }
        let limited: Vec<String> = lines(&inputs, &[1, 2, 0]).into_iter().map(|(place, ..)| place).collect();
        assert_eq!(limited, ["f:1", "f:1", "f:2"]);
    }

    #[test]
    fn a_line_that_is_too_long_is_counted_and_not_kept() {
        let inputs = [input(&[&vec![b'x'; 3 * MAX_BODY_BYTES][..], b"\nnext\n"].concat())];
        let mut walk = Walk::new(&inputs, &[]);
        assert!(walk.advance().expect("readable"));
        let line = walk.line();
        assert_eq!(line.bytes.len(), MAX_BODY_BYTES + 1);
        let refusal = line.decode().map(drop).expect_err("too long");
        assert_eq!(refusal, envelope::too_large(3 * MAX_BODY_BYTES as u64));
        assert!(walk.advance().expect("readable"));
        assert_eq!(walk.line().bytes, b"next");
    }

    #[test]
    fn gzip_that_was_cut_off_gives_what_is_there_and_one_damaged_line() {
        let text: String = (0..20_000).map(|number| format!("line {number} {}\n", number * 7919 % 10_007)).collect();
        let whole = gzip(text.as_bytes());
        let inputs = [input(&whole[..whole.len() / 2]), input(b"after\n")];
        let found = lines(&inputs, &[]);
        let (last, good) = found.split_last().expect("lines");
        assert_eq!(last.1, b"after");
        let (damaged, good) = good.split_last().expect("lines");
        assert!(damaged.2 && good.len() > 1_000, "{damaged:?} after {}", good.len());
        assert!(good.iter().all(|line| !line.2));
    }
}
