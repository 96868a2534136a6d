//! From the model to bytes.

use std::collections::HashMap;
use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message as _;

use super::wire;
use super::{Label, LabelValue, Profile, ValueType};

impl Profile {
    /// The profile as gzipped protocol buffers.
    pub fn encode(&self) -> Vec<u8> {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(&self.encode_plain()).expect("memory takes every byte");
        gzip.finish().expect("memory takes every byte")
    }

    /// The same before gzip.
    pub(super) fn encode_plain(&self) -> Vec<u8> {
        let mut texts = Texts::new();
        let message = wire::Profile {
            sample_type: self.sample_types.iter().map(|sample_type| texts.value_type(sample_type)).collect(),
            sample: self
                .samples
                .iter()
                .map(|sample| wire::Sample {
                    location_id: sample.locations.iter().map(|index| id(*index)).collect(),
                    value: sample.values.clone(),
                    label: sample.labels.iter().map(|label| texts.label(label)).collect(),
                })
                .collect(),
            mapping: (1..)
                .zip(&self.mappings)
                .map(|(id, mapping)| wire::Mapping {
                    id,
                    start: mapping.start,
                    limit: mapping.limit,
                    offset: mapping.offset,
                    file: texts.index(&mapping.file),
                    build_id: texts.index(&mapping.build_id),
                    has_functions: mapping.has_functions,
                    has_filenames: mapping.has_filenames,
                    has_line_numbers: mapping.has_line_numbers,
                    has_inline_frames: mapping.has_inline_frames,
                })
                .collect(),
            location: (1..)
                .zip(&self.locations)
                .map(|(number, location)| wire::Location {
                    id: number,
                    mapping_id: location.mapping.map_or(0, id),
                    address: location.address,
                    line: location
                        .lines
                        .iter()
                        .map(|line| wire::Line { function_id: id(line.function), line: line.line, column: line.column })
                        .collect(),
                    is_folded: location.is_folded,
                })
                .collect(),
            function: (1..)
                .zip(&self.functions)
                .map(|(id, function)| wire::Function {
                    id,
                    name: texts.index(&function.name),
                    system_name: texts.index(&function.system_name),
                    file: texts.index(&function.file),
                    start_line: function.start_line,
                })
                .collect(),
            drop_frames: texts.index(&self.drop_frames),
            keep_frames: texts.index(&self.keep_frames),
            time_nanos: self.time_nanos,
            duration_nanos: self.duration_nanos,
            period_type: (self.period_type != ValueType::default()).then(|| texts.value_type(&self.period_type)),
            period: self.period,
            comment: self.comments.iter().map(|comment| texts.index(comment)).collect(),
            default_sample_type: texts.index(&self.default_sample_type),
            // Last, when all are known.
            string_table: texts.table,
        };
        message.encode_to_vec()
    }
}

/// The id of what has this index.
fn id(index: usize) -> u64 {
    index as u64 + 1
}

/// The table of strings, each once, the empty one first.
struct Texts {
    table: Vec<String>,
    known: HashMap<String, i64>,
}

impl Texts {
    fn new() -> Self {
        Texts { table: vec![String::new()], known: HashMap::from([(String::new(), 0)]) }
    }

    fn index(&mut self, text: &str) -> i64 {
        if let Some(index) = self.known.get(text) {
            return *index;
        }
        let index = self.table.len() as i64;
        self.table.push(text.to_owned());
        self.known.insert(text.to_owned(), index);
        index
    }

    fn value_type(&mut self, value_type: &ValueType) -> wire::ValueType {
        wire::ValueType { kind: self.index(&value_type.kind), unit: self.index(&value_type.unit) }
    }

    fn label(&mut self, label: &Label) -> wire::Label {
        let key = self.index(&label.key);
        match &label.value {
            LabelValue::Text(text) => wire::Label { key, text: self.index(text), ..Default::default() },
            LabelValue::Number(number, unit) => {
                wire::Label { key, number: *number, unit: self.index(unit), ..Default::default() }
            }
        }
    }
}
