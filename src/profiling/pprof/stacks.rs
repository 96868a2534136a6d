//! Stacks by name, for readers without Go: collapsed lines and flame graphs.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::{FlameGraph, Profile, Sample};

/// The functions of a sample from the outermost to the innermost, the inlined ones too. A place without a name goes by its
/// file and address.
pub fn frames<'a>(profile: &'a Profile, sample: &Sample) -> Vec<Cow<'a, str>> {
    let mut names = Vec::new();
    for location in profile.stack(sample).rev() {
        for line in location.lines.iter().rev() {
            names.push(Cow::Borrowed(profile.functions[line.function].name.as_str()));
        }
        if location.lines.is_empty() {
            let file = location.mapping.map_or("", |mapping| profile.mappings[mapping].file.as_str());
            let file = file.rsplit('/').next().unwrap_or_default();
            names.push(Cow::Owned(format!("{file}+{:#x}", location.address)));
        }
    }
    names
}

/// A line for each stack, sorted: functions from the outermost to the innermost, joined by `;`, and the value of the sample
/// type at that index, which may be negative in a difference. Stacks of which nothing was seen are left out. The texts of the
/// labels in `roots` stand before the functions.
pub fn collapsed(profile: &Profile, sample_type: usize, roots: &[&str]) -> Vec<String> {
    let mut stacks: BTreeMap<String, i128> = BTreeMap::new();
    for sample in &profile.samples {
        let names = rooted(profile, sample, roots);
        // The two characters that the format needs for itself.
        let stack = names.join("\u{0}").replace(';', ":").replace(['\n', '\r'], " ").replace('\u{0}', ";");
        *stacks.entry(stack).or_default() += i128::from(sample.values[sample_type]);
    }
    stacks.retain(|_, value| *value != 0);
    stacks.into_iter().map(|(stack, value)| format!("{stack} {value}")).collect()
}

/// The flame graph of the sample type at that index, with the texts of the labels in `roots` below the functions.
pub fn flame_graph(profile: &Profile, sample_type: usize, roots: &[&str], title: &str) -> FlameGraph {
    let mut graph = FlameGraph::new(title, &profile.sample_types[sample_type].unit);
    for sample in &profile.samples {
        let names = rooted(profile, sample, roots);
        graph.add(names.iter().map(AsRef::as_ref), sample.values[sample_type], 0);
    }
    graph
}

/// The flame graph of what changed from one profile to another: boxes are as wide as the later one, and coloured by what
/// they have more or less than the earlier one. The profiles must have the same sample types.
pub fn difference_graph(
    before: &Profile,
    after: &Profile,
    sample_type: usize,
    roots: &[&str],
    title: &str,
) -> FlameGraph {
    let mut graph = FlameGraph::new(title, &after.sample_types[sample_type].unit);
    for sample in &after.samples {
        let (names, value) = (rooted(after, sample, roots), sample.values[sample_type]);
        graph.add(names.iter().map(AsRef::as_ref), value, value);
    }
    for sample in &before.samples {
        let names = rooted(before, sample, roots);
        graph.add(names.iter().map(AsRef::as_ref), 0, sample.values[sample_type].saturating_neg());
    }
    graph
}

/// The texts of the labels in `roots`, then the functions.
fn rooted<'a>(profile: &'a Profile, sample: &'a Sample, roots: &[&str]) -> Vec<Cow<'a, str>> {
    let labels = roots.iter().filter_map(|key| sample.label(key)).map(Cow::Borrowed);
    labels.chain(frames(profile, sample)).collect()
}
