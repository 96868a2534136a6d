//! Sums and differences of profiles.

use std::collections::HashMap;
use std::hash::Hash;

use super::{Function, Label, Line, Location, Mapping, Profile, Sample, ValueType};

/// Why profiles do not go together.
#[derive(Debug, thiserror::Error)]
pub enum CombineError {
    /// There is none.
    #[error("no profile to combine")]
    Nothing,
    /// They measure different things.
    #[error("profiles of different kinds: {0} and {1}")]
    Different(String, String),
}

/// The sum of profiles, each multiplied by a factor: `[(&second, 1), (&first, -1)]` is what the second has more than the
/// first. Stacks whose values are all 0 are left out.
///
/// Places are the same if they are at the same distance from the beginning of the same file (by build id, else by path),
/// wherever it was mapped. The first profile gives the time, the period and the default sample type.
pub fn combine(profiles: &[(&Profile, i64)]) -> Result<Profile, CombineError> {
    let [(first, _), rest @ ..] = profiles else { return Err(CombineError::Nothing) };
    for (other, _) in rest {
        if other.sample_types != first.sample_types || other.period_type != first.period_type {
            return Err(CombineError::Different(kinds(first), kinds(other)));
        }
    }
    let mut sum = Sum::default();
    for (profile, factor) in profiles {
        sum.add(profile, *factor);
    }
    let mut samples: Vec<Sample> = sum.samples.items;
    for (sample, values) in samples.iter_mut().zip(&sum.values) {
        sample.values = values.iter().map(|value| (*value).clamp(i64::MIN.into(), i64::MAX.into()) as i64).collect();
    }
    samples.retain(|sample| sample.values.iter().any(|value| *value != 0));
    Ok(Profile {
        mappings: sum.mappings.items,
        functions: sum.functions.items,
        locations: sum.locations.items,
        samples,
        sample_types: first.sample_types.clone(),
        default_sample_type: first.default_sample_type.clone(),
        period_type: first.period_type.clone(),
        period: first.period,
        time_nanos: first.time_nanos,
        duration_nanos: first.duration_nanos,
        drop_frames: first.drop_frames.clone(),
        keep_frames: first.keep_frames.clone(),
        comments: first.comments.clone(),
    })
}

fn kinds(profile: &Profile) -> String {
    let name = |ValueType { kind, unit }: &ValueType| format!("{kind} in {unit}");
    profile.sample_types.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// What something is known by, and what stands for it in the sum.
struct Known<K, T> {
    indices: HashMap<K, usize>,
    items: Vec<T>,
}

impl<K, T> Default for Known<K, T> {
    fn default() -> Self {
        Known { indices: HashMap::new(), items: Vec::new() }
    }
}

impl<K: Hash + Eq, T> Known<K, T> {
    fn index(&mut self, key: K, make: impl FnOnce() -> T) -> usize {
        *self.indices.entry(key).or_insert_with(|| {
            self.items.push(make());
            self.items.len() - 1
        })
    }
}

/// A file by build id or path, the place of the mapping in it, and its size.
type MappingKey = (String, u64, u64);

#[derive(Default)]
struct Sum {
    mappings: Known<MappingKey, Mapping>,
    functions: Known<Function, Function>,
    locations: Known<(Option<usize>, u64, Vec<Line>), Location>,
    samples: Known<(Vec<usize>, Vec<Label>), Sample>,
    /// The values of the samples; wider, so that the order of additions does not matter.
    values: Vec<Vec<i128>>,
}

impl Sum {
    /// Adds the samples of a profile, and of its places and functions those that samples refer to.
    fn add(&mut self, profile: &Profile, factor: i64) {
        let mappings: Vec<usize> = profile.mappings.iter().map(|mapping| self.mapping(mapping)).collect();
        let mut locations: Vec<Option<usize>> = vec![None; profile.locations.len()];
        for sample in &profile.samples {
            let stack: Vec<usize> = sample
                .locations
                .iter()
                .map(|index| *locations[*index].get_or_insert_with(|| self.location(profile, *index, &mappings)))
                .collect();
            let mut labels = sample.labels.clone();
            labels.sort();
            let index = self.samples.index((stack.clone(), labels.clone()), || Sample {
                locations: stack,
                values: Vec::new(),
                labels,
            });
            if index == self.values.len() {
                self.values.push(vec![0; sample.values.len()]);
            }
            for (sum, value) in self.values[index].iter_mut().zip(&sample.values) {
                *sum += i128::from(*value) * i128::from(factor);
            }
        }
    }

    fn mapping(&mut self, mapping: &Mapping) -> usize {
        let file = if mapping.build_id.is_empty() { &mapping.file } else { &mapping.build_id };
        let key = (file.clone(), mapping.offset, mapping.limit.wrapping_sub(mapping.start));
        self.mappings.index(key, || mapping.clone())
    }

    fn location(&mut self, profile: &Profile, index: usize, mappings: &[usize]) -> usize {
        let location = &profile.locations[index];
        let mapping = location.mapping.map(|index| mappings[index]);
        let former_start = location.mapping.map_or(0, |index| profile.mappings[index].start);
        let start = mapping.map_or(0, |index| self.mappings.items[index].start);
        let distance = location.address.wrapping_sub(former_start);
        let lines: Vec<Line> = location
            .lines
            .iter()
            .map(|line| {
                let function = &profile.functions[line.function];
                let function = self.functions.index(function.clone(), || function.clone());
                Line { function, ..line.clone() }
            })
            .collect();
        self.locations.index((mapping, distance, lines.clone()), || Location {
            mapping,
            address: start.wrapping_add(distance),
            lines,
            is_folded: location.is_folded,
        })
    }
}
