//! A heap profile as text for people (`debug=1`), in the form of Go's.

use std::fmt::Write as _;

use super::pprof::{LabelValue, Profile};

/// A line with the sums, then for each stack its numbers, the most memory held first, its labels and its functions. Numbers
/// are `LIVE OBJECTS: LIVE BYTES [OBJECTS: BYTES]`, in brackets all since the start.
pub(super) fn text(profile: &Profile) -> String {
    let mut text = String::new();
    let mut write = |line: std::fmt::Arguments| text.write_fmt(line).expect("memory takes every text");
    // The order of the sample types: objects and bytes of all, then of what is live.
    let numbers = |values: &[i64]| format!("{}: {} [{}: {}]", values[2], values[3], values[0], values[1]);
    let sums: Vec<i64> = (0..4).map(|index| profile.samples.iter().map(|sample| sample.values[index]).sum()).collect();
    write(format_args!("heap profile: {} @ heap/{}\n", numbers(&sums), profile.period));
    let mut samples: Vec<_> = profile.samples.iter().collect();
    samples.sort_by_key(|sample| std::cmp::Reverse((sample.values[3], sample.values[1])));
    for sample in samples {
        write(format_args!("{} @", numbers(&sample.values)));
        for location in profile.stack(sample) {
            write(format_args!(" {:#x}", location.address));
        }
        let labels: Vec<String> = sample
            .labels
            .iter()
            .map(|label| match &label.value {
                LabelValue::Text(text) => format!("{:?}:{text:?}", label.key),
                LabelValue::Number(number, unit) => format!("{:?}:\"{number}{unit}\"", label.key),
            })
            .collect();
        write(format_args!("\n# labels: {{{}}}\n", labels.join(", ")));
        for location in profile.stack(sample) {
            if location.lines.is_empty() {
                let file = location.mapping.map_or("?", |mapping| profile.mappings[mapping].file.as_str());
                write(format_args!("#\t{:#x}\t{file}\n", location.address));
            }
            for line in &location.lines {
                let function = &profile.functions[line.function];
                write(format_args!("#\t{:#x}\t{}", location.address, function.name));
                if !function.file.is_empty() {
                    write(format_args!("\t{}:{}", function.file, line.line));
                }
                write(format_args!("\n"));
            }
        }
        write(format_args!("\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profiling::pprof::{Builder, Function, Label, Line, Mapping, ValueType};

    #[test]
    fn the_largest_stack_comes_first_with_its_names() {
        let kinds = ["alloc_objects", "alloc_space", "inuse_objects", "inuse_space"];
        let mut builder = Builder::new(Profile {
            sample_types: kinds.map(|kind| ValueType::new(kind, "count")).to_vec(),
            period: 512,
            ..Profile::default()
        });
        let mapping = builder.mapping(&Mapping { file: "/bin/program".to_owned(), ..Mapping::default() });
        let (named, nameless) = (builder.location(Some(mapping), 0x10), builder.location(Some(mapping), 0x20));
        builder.add(&[nameless], &[4, 40, 1, 10], &[Label::text("event_kind", "service")]);
        builder.add(&[named, nameless], &[2, 200, 1, 100], &[]);
        let mut profile = builder.finish();
        profile.functions.push(Function { name: "work".to_owned(), file: "a.rs".to_owned(), ..Function::default() });
        profile.locations[named].lines = vec![Line { function: 0, line: 7, column: 0 }];
        assert_eq!(
            text(&profile),
            "heap profile: 2: 110 [6: 240] @ heap/512\n\
             1: 100 [2: 200] @ 0x10 0x20\n# labels: {}\n#\t0x10\twork\ta.rs:7\n#\t0x20\t/bin/program\n\n\
             1: 10 [4: 40] @ 0x20\n# labels: {\"event_kind\":\"service\"}\n#\t0x20\t/bin/program\n\n"
        );
    }
}
