//! From bytes to the model. What is read may come from anywhere, so nothing in it is trusted.

use std::collections::HashMap;
use std::io::Read as _;

use flate2::read::MultiGzDecoder;
use prost::Message as _;

use super::wire;
use super::{Function, Label, LabelValue, Line, Location, Mapping, Profile, Sample, ValueType};

/// More than any profile of ours has by far; what unpacks to more is a mistake or meant to do harm. In memory it takes up to
/// twenty times as much: an id is one byte there and a word here.
pub const MOST_BYTES: usize = 32 * 1024 * 1024;

/// Why bytes are no profile.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The compression is broken.
    #[error("not gzip, although it begins like it: {0}")]
    Gzip(std::io::Error),
    /// Larger than is read.
    #[error("larger than {} MiB when unpacked", MOST_BYTES / (1024 * 1024))]
    TooLarge,
    /// Not protocol buffers.
    #[error("not a pprof profile: {0}")]
    Protobuf(#[from] prost::DecodeError),
    /// A reference leads nowhere.
    #[error("not a pprof profile: {what} {id} is referred to and is not there")]
    Missing {
        /// What was looked for.
        what: &'static str,
        /// Its id or index.
        id: i128,
    },
    /// Two things with one id, or one with the id 0.
    #[error("not a pprof profile: {what} id {id} is there twice, or is 0")]
    Id {
        /// What has it.
        what: &'static str,
        /// The id.
        id: u64,
    },
    /// A sample does not fit the sample types.
    #[error("not a pprof profile: a sample has {values} values and there are {types} sample types")]
    Values {
        /// How many it has.
        values: usize,
        /// How many it should have.
        types: usize,
    },
}

impl Profile {
    /// Reads a profile, gzipped or not.
    pub fn decode(bytes: &[u8]) -> Result<Profile, DecodeError> {
        if !bytes.starts_with(&[0x1f, 0x8b]) {
            if bytes.len() > MOST_BYTES {
                return Err(DecodeError::TooLarge);
            }
            return from_message(wire::Profile::decode(bytes)?);
        }
        let mut plain = Vec::new();
        MultiGzDecoder::new(bytes).take(MOST_BYTES as u64 + 1).read_to_end(&mut plain).map_err(DecodeError::Gzip)?;
        if plain.len() > MOST_BYTES {
            return Err(DecodeError::TooLarge);
        }
        from_message(wire::Profile::decode(plain.as_slice())?)
    }
}

fn from_message(message: wire::Profile) -> Result<Profile, DecodeError> {
    let texts = Texts(&message.string_table);
    let mappings = Ids::new("mapping", message.mapping.iter().map(|mapping| mapping.id))?;
    let functions = Ids::new("function", message.function.iter().map(|function| function.id))?;
    let locations = Ids::new("location", message.location.iter().map(|location| location.id))?;
    let types = message.sample_type.len();
    Ok(Profile {
        sample_types: message.sample_type.iter().map(|value| texts.value_type(value)).collect::<Result<_, _>>()?,
        default_sample_type: texts.get(message.default_sample_type)?,
        period_type: message.period_type.as_ref().map_or(Ok(ValueType::default()), |value| texts.value_type(value))?,
        period: message.period,
        time_nanos: message.time_nanos,
        duration_nanos: message.duration_nanos,
        drop_frames: texts.get(message.drop_frames)?,
        keep_frames: texts.get(message.keep_frames)?,
        comments: message.comment.iter().map(|index| texts.get(*index)).collect::<Result<_, _>>()?,
        mappings: message.mapping.iter().map(|mapping| texts.mapping(mapping)).collect::<Result<_, _>>()?,
        locations: message
            .location
            .iter()
            .map(|location| {
                Ok(Location {
                    mapping: (location.mapping_id != 0).then(|| mappings.index(location.mapping_id)).transpose()?,
                    address: location.address,
                    lines: location
                        .line
                        .iter()
                        .map(|line| {
                            let function = functions.index(line.function_id)?;
                            Ok(Line { function, line: line.line, column: line.column })
                        })
                        .collect::<Result<_, DecodeError>>()?,
                    is_folded: location.is_folded,
                })
            })
            .collect::<Result<_, DecodeError>>()?,
        functions: message
            .function
            .iter()
            .map(|function| {
                Ok(Function {
                    name: texts.get(function.name)?,
                    system_name: texts.get(function.system_name)?,
                    file: texts.get(function.file)?,
                    start_line: function.start_line,
                })
            })
            .collect::<Result<_, DecodeError>>()?,
        samples: message
            .sample
            .iter()
            .map(|sample| {
                if sample.value.len() != types {
                    return Err(DecodeError::Values { values: sample.value.len(), types });
                }
                Ok(Sample {
                    locations: sample.location_id.iter().map(|id| locations.index(*id)).collect::<Result<_, _>>()?,
                    values: sample.value.clone(),
                    labels: sample.label.iter().map(|label| texts.label(label)).collect::<Result<_, _>>()?,
                })
            })
            .collect::<Result<_, DecodeError>>()?,
    })
}

struct Texts<'a>(&'a [String]);

impl Texts<'_> {
    fn get(&self, index: i64) -> Result<String, DecodeError> {
        // A profile without any text may have no table at all.
        if index == 0 {
            return Ok(String::new());
        }
        let text = usize::try_from(index).ok().and_then(|index| self.0.get(index));
        text.cloned().ok_or(DecodeError::Missing { what: "string", id: index.into() })
    }

    fn value_type(&self, value: &wire::ValueType) -> Result<ValueType, DecodeError> {
        Ok(ValueType { kind: self.get(value.kind)?, unit: self.get(value.unit)? })
    }

    fn label(&self, label: &wire::Label) -> Result<Label, DecodeError> {
        // By the text and not by its index: an empty one stands for a number wherever it is in the table.
        let text = self.get(label.text)?;
        let value = match text.is_empty() {
            true => LabelValue::Number(label.number, self.get(label.unit)?),
            false => LabelValue::Text(text),
        };
        Ok(Label { key: self.get(label.key)?, value })
    }

    fn mapping(&self, mapping: &wire::Mapping) -> Result<Mapping, DecodeError> {
        Ok(Mapping {
            start: mapping.start,
            limit: mapping.limit,
            offset: mapping.offset,
            file: self.get(mapping.file)?,
            build_id: self.get(mapping.build_id)?,
            has_functions: mapping.has_functions,
            has_filenames: mapping.has_filenames,
            has_line_numbers: mapping.has_line_numbers,
            has_inline_frames: mapping.has_inline_frames,
        })
    }
}

/// Which index an id stands for. Ids may be any numbers but 0.
struct Ids {
    what: &'static str,
    indices: HashMap<u64, usize>,
}

impl Ids {
    fn new(what: &'static str, ids: impl Iterator<Item = u64>) -> Result<Self, DecodeError> {
        let mut indices = HashMap::new();
        for (index, id) in ids.enumerate() {
            if id == 0 || indices.insert(id, index).is_some() {
                return Err(DecodeError::Id { what, id });
            }
        }
        Ok(Ids { what, indices })
    }

    fn index(&self, id: u64) -> Result<usize, DecodeError> {
        self.indices.get(&id).copied().ok_or(DecodeError::Missing { what: self.what, id: id.into() })
    }
}
