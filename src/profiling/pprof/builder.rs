//! From stacks of addresses to a profile.

use std::collections::HashMap;

use super::{Function, Label, Line, Location, Mapping, Profile, Sample};

/// Makes a profile from stacks as they are met. Equal places become one location, equal stacks with equal labels one
/// sample, whose values are added up.
///
/// ```
/// use write_api::profiling::pprof::{Builder, Label, Profile, ValueType};
///
/// let mut builder = Builder::new(Profile {
///     sample_types: vec![ValueType::new("samples", "count")],
///     ..Profile::default()
/// });
/// let place = builder.location(None, 0x1000);
/// builder.add(&[place], &[1], &[Label::text("event_kind", "service")]);
/// builder.add(&[place], &[2], &[Label::text("event_kind", "service")]);
/// assert_eq!(builder.finish().samples[0].values, [3]);
/// ```
#[derive(Debug)]
pub struct Builder {
    profile: Profile,
    locations: HashMap<(Option<usize>, u64), usize>,
    places: HashMap<(String, String, i64), usize>,
    samples: HashMap<(Vec<usize>, Vec<Label>), usize>,
}

impl Builder {
    /// Begins with a profile that has its sample types and no samples yet.
    pub fn new(profile: Profile) -> Self {
        Builder { profile, locations: HashMap::new(), places: HashMap::new(), samples: HashMap::new() }
    }

    /// The index of a mapping, which is added if it is new.
    pub fn mapping(&mut self, mapping: &Mapping) -> usize {
        // There are some dozens at most, told apart by their first numbers: quicker than the hash of their texts, and asked for
        // with each address.
        let known = self.profile.mappings.iter().position(|known| known == mapping);
        known.unwrap_or_else(|| {
            self.profile.mappings.push(mapping.clone());
            self.profile.mappings.len() - 1
        })
    }

    /// The index of the location at an address of a mapping (or of none), which is added if it is new.
    pub fn location(&mut self, mapping: Option<usize>, address: u64) -> usize {
        *self.locations.entry((mapping, address)).or_insert_with(|| {
            self.profile.locations.push(Location { mapping, address, ..Location::default() });
            self.profile.locations.len() - 1
        })
    }

    /// The index of a location that is known by its name and its place in the sources instead of an address. It is added if
    /// it is new.
    pub fn place(&mut self, name: &str, file: &str, line: i64) -> usize {
        let key = (name.to_owned(), file.to_owned(), line);
        if let Some(index) = self.places.get(&key) {
            return *index;
        }
        let function = self.profile.functions.len();
        let (name, file) = (name.to_owned(), file.to_owned());
        self.profile.functions.push(Function { system_name: name.clone(), name, file, start_line: 0 });
        let index = self.profile.locations.len();
        let lines = vec![Line { function, line, column: 0 }];
        self.profile.locations.push(Location { lines, ..Location::default() });
        self.places.insert(key, index);
        index
    }

    /// Adds a stack of locations, the innermost first, with a value for each sample type. Labels count as the same in any
    /// order.
    pub fn add(&mut self, locations: &[usize], values: &[i64], labels: &[Label]) {
        assert_eq!(values.len(), self.profile.sample_types.len(), "a value for each sample type");
        let mut labels = labels.to_vec();
        labels.sort();
        match self.samples.entry((locations.to_vec(), labels)) {
            std::collections::hash_map::Entry::Occupied(known) => {
                let sum = &mut self.profile.samples[*known.get()].values;
                for (sum, value) in sum.iter_mut().zip(values) {
                    *sum = sum.saturating_add(*value);
                }
            }
            std::collections::hash_map::Entry::Vacant(new) => {
                let (locations, labels) = new.key().clone();
                new.insert(self.profile.samples.len());
                self.profile.samples.push(Sample { locations, values: values.to_vec(), labels });
            }
        }
    }

    /// The profile.
    pub fn finish(self) -> Profile {
        self.profile
    }
}
