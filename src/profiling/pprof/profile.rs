//! What a profile consists of.

/// What is measured, and in what: `inuse_space` in `bytes`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct ValueType {
    /// The quantity.
    pub kind: String,
    /// Its unit: `count`, `bytes`, `nanoseconds`.
    pub unit: String,
}

impl ValueType {
    /// `kind` measured in `unit`.
    pub fn new(kind: &str, unit: &str) -> Self {
        ValueType { kind: kind.to_owned(), unit: unit.to_owned() }
    }
}

/// A profile.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Profile {
    /// What the values of each sample are, in their order.
    pub sample_types: Vec<ValueType>,
    /// The `kind` of the sample type that viewers begin with; empty leaves it to them (they take the last).
    pub default_sample_type: String,
    /// What the distance between two samples is measured in.
    pub period_type: ValueType,
    /// That distance.
    pub period: i64,
    /// When it was taken, in nanoseconds since 1970; 0 for unknown.
    pub time_nanos: i64,
    /// How long it took to collect; 0 for a state at one moment.
    pub duration_nanos: i64,
    /// A regular expression: viewers leave out functions whose whole name matches it, with all that they call.
    pub drop_frames: String,
    /// Functions that stay although `drop_frames` matches.
    pub keep_frames: String,
    /// Remarks for people.
    pub comments: Vec<String>,
    /// Parts of files that code came from; the program itself first.
    pub mappings: Vec<Mapping>,
    /// Places in the code.
    pub locations: Vec<Location>,
    /// Functions that locations are in.
    pub functions: Vec<Function>,
    /// What was seen.
    pub samples: Vec<Sample>,
}

impl Profile {
    /// The index of a sample type by its `kind`; that of the default one if the name is empty.
    pub fn sample_type(&self, kind: &str) -> Option<usize> {
        let kind = if kind.is_empty() { &self.default_sample_type } else { kind };
        if kind.is_empty() {
            return self.sample_types.len().checked_sub(1);
        }
        self.sample_types.iter().position(|sample_type| sample_type.kind == kind)
    }

    /// The places of a sample, the innermost first.
    pub fn stack<'a>(&'a self, sample: &'a Sample) -> impl DoubleEndedIterator<Item = &'a Location> {
        sample.locations.iter().map(|index| &self.locations[*index])
    }
}

/// A part of a file that is mapped into memory: the code of the program or of a library.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Mapping {
    /// The first address of the part.
    pub start: u64,
    /// The first address after it.
    pub limit: u64,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// The file's path.
    pub file: String,
    /// What the linker knows the file by, in hexadecimal digits; empty if it has none.
    pub build_id: String,
    /// Whether the locations in it have function names.
    pub has_functions: bool,
    /// Whether they have the names of source files.
    pub has_filenames: bool,
    /// Whether they have line numbers.
    pub has_line_numbers: bool,
    /// Whether they tell what was inlined.
    pub has_inline_frames: bool,
}

/// A place in the code.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Location {
    /// Index into [`Profile::mappings`].
    pub mapping: Option<usize>,
    /// The address of the instruction, in the terms of its mapping.
    pub address: u64,
    /// The functions it is in: the innermost inlined one first, the one that was really called last. Empty if unknown.
    pub lines: Vec<Line>,
    /// Whether several places share this entry because they were put together.
    pub is_folded: bool,
}

/// A line of a function.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Line {
    /// Index into [`Profile::functions`].
    pub function: usize,
    /// From 1; 0 for unknown.
    pub line: i64,
    /// From 1; 0 for unknown.
    pub column: i64,
}

/// A function.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Function {
    /// For people.
    pub name: String,
    /// For linkers.
    pub system_name: String,
    /// Its source file; empty for unknown.
    pub file: String,
    /// Its first line; 0 for unknown.
    pub start_line: i64,
}

/// A stack, and how much was seen there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sample {
    /// Indices into [`Profile::locations`], the innermost first.
    pub locations: Vec<usize>,
    /// One for each of [`Profile::sample_types`].
    pub values: Vec<i64>,
    /// What is known beside the stack.
    pub labels: Vec<Label>,
}

/// Something known of a sample beside its stack.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Label {
    /// Its name.
    pub key: String,
    /// Its value.
    pub value: LabelValue,
}

/// The value of a label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LabelValue {
    /// A text; the format has no empty ones.
    Text(String),
    /// A number with its unit, which may be empty.
    Number(i64, String),
}

impl Label {
    /// A label with a text.
    pub fn text(key: &str, value: &str) -> Self {
        Label { key: key.to_owned(), value: LabelValue::Text(value.to_owned()) }
    }

    /// A label with a number.
    pub fn number(key: &str, value: i64, unit: &str) -> Self {
        Label { key: key.to_owned(), value: LabelValue::Number(value, unit.to_owned()) }
    }
}

impl Sample {
    /// The text of a label.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.iter().find_map(|label| match &label.value {
            LabelValue::Text(text) if label.key == key => Some(text.as_str()),
            _ => None,
        })
    }
}
