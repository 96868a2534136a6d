use proptest::prelude::*;

use super::*;

/// A text, often one that was used before.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![Just(String::new()), "[a-c]{1,2}", "\\PC{0,12}"]
}

fn label() -> impl Strategy<Value = Label> {
    let value = prop_oneof![
        "\\PC{1,8}".prop_map(LabelValue::Text),
        (any::<i64>(), text()).prop_map(|(number, unit)| LabelValue::Number(number, unit)),
    ];
    (text(), value).prop_map(|(key, value)| Label { key, value })
}

fn value_type() -> impl Strategy<Value = ValueType> {
    (text(), text()).prop_map(|(kind, unit)| ValueType { kind, unit })
}

fn mapping() -> impl Strategy<Value = Mapping> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (any::<[u64; 3]>(), text(), text(), flags).prop_map(|([start, limit, offset], file, build_id, flags)| Mapping {
        start,
        limit,
        offset,
        file,
        build_id,
        has_functions: flags.0,
        has_filenames: flags.1,
        has_line_numbers: flags.2,
        has_inline_frames: flags.3,
    })
}

fn function() -> impl Strategy<Value = Function> {
    (text(), text(), text(), any::<i64>()).prop_map(|(name, system_name, file, start_line)| Function {
        name,
        system_name,
        file,
        start_line,
    })
}

fn location(mappings: usize, functions: usize) -> impl Strategy<Value = Location> {
    let line =
        (0..functions, any::<i64>(), any::<i64>()).prop_map(|(function, line, column)| Line { function, line, column });
    let mapping = proptest::option::of(0..mappings);
    (mapping, any::<u64>(), prop::collection::vec(line, 0..3), any::<bool>())
        .prop_map(|(mapping, address, lines, is_folded)| Location { mapping, address, lines, is_folded })
}

fn profile() -> impl Strategy<Value = Profile> {
    let sizes = (1..4_usize, 1..4_usize, 1..8_usize, 0..4_usize);
    sizes.prop_flat_map(|(mappings, functions, locations, types)| {
        let sample = (
            prop::collection::vec(0..locations, 0..6),
            prop::collection::vec(any::<i64>(), types),
            prop::collection::vec(label(), 0..3),
        )
            .prop_map(|(locations, values, labels)| Sample { locations, values, labels });
        (
            (prop::collection::vec(value_type(), types), text(), value_type(), any::<[i64; 3]>()),
            (text(), text(), prop::collection::vec(text(), 0..3)),
            prop::collection::vec(mapping(), mappings),
            prop::collection::vec(function(), functions),
            prop::collection::vec(location(mappings, functions), locations),
            prop::collection::vec(sample, 0..10),
        )
            .prop_map(|(head, texts, mappings, functions, locations, samples)| Profile {
                sample_types: head.0,
                default_sample_type: head.1,
                period_type: head.2,
                period: head.3[0],
                time_nanos: head.3[1],
                duration_nanos: head.3[2],
                drop_frames: texts.0,
                keep_frames: texts.1,
                comments: texts.2,
                mappings,
                functions,
                locations,
                samples,
            })
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(profile in profile()) {
        prop_assert_eq!(Profile::decode(&profile.encode()).unwrap(), profile.clone());
        prop_assert_eq!(Profile::decode(&profile.encode_plain()).unwrap(), profile);
    }

    #[test]
    fn any_bytes_are_a_profile_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Profile::decode(&bytes);
    }

    #[test]
    fn a_damaged_profile_is_a_profile_or_an_error(profile in profile(), at in any::<prop::sample::Index>(), byte: u8) {
        let mut bytes = profile.encode_plain();
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(damaged) = Profile::decode(&bytes) {
            // Whatever was let in can be used without a panic.
            let again = Profile::decode(&damaged.encode()).unwrap();
            prop_assert_eq!(&again, &damaged);
            for index in 0..damaged.sample_types.len() {
                collapsed(&damaged, index, &["a"]);
            }
            combine(&[(&damaged, 1), (&damaged, -1)]).unwrap();
        }
    }

    #[test]
    fn a_profile_does_not_differ_from_itself(profile in profile()) {
        prop_assert_eq!(combine(&[(&profile, 1), (&profile, -1)]).unwrap().samples, []);
    }
}

/// Two objects with a place at the same address, two sample types.
fn small() -> Profile {
    let mut builder = Builder::new(Profile {
        sample_types: vec![ValueType::new("objects", "count"), ValueType::new("space", "bytes")],
        default_sample_type: "space".to_owned(),
        ..Profile::default()
    });
    let mut object = |file: &str, build_id: &str| {
        builder.mapping(&Mapping {
            start: 0x1000,
            limit: 0x9000,
            file: file.to_owned(),
            build_id: build_id.to_owned(),
            ..Mapping::default()
        })
    };
    let (program, library) = (object("/bin/program", "aa"), object("/lib/library.so", "bb"));
    assert_eq!(object("/bin/program", "aa"), program);
    let leaf = builder.location(Some(library), 0x1234);
    let root = builder.location(Some(program), 0x1234);
    assert_ne!(leaf, root, "the same address of two files");
    let labels = [Label::text("stage", "call"), Label::text("event_kind", "service")];
    builder.add(&[leaf, root], &[1, 100], &labels);
    builder.add(&[leaf, root], &[2, 200], &[labels[1].clone(), labels[0].clone()]);
    builder.add(&[root], &[5, 50], &[]);
    let mut profile = builder.finish();
    profile.functions.push(Function { name: "main;\n".to_owned(), ..Function::default() });
    profile.functions.push(Function { name: "inlined".to_owned(), ..Function::default() });
    profile.locations[root].lines =
        vec![Line { function: 1, ..Line::default() }, Line { function: 0, ..Line::default() }];
    profile
}

#[test]
fn equal_stacks_with_equal_labels_are_one_sample() {
    let profile = small();
    let values: Vec<&[i64]> = profile.samples.iter().map(|sample| sample.values.as_slice()).collect();
    assert_eq!(values, [&[3, 300][..], &[5, 50]]);
    assert_eq!(profile.samples[0].label("event_kind"), Some("service"));
}

#[test]
fn sample_types_go_by_name() {
    let mut profile = small();
    assert_eq!(
        ["objects", "space", "", "time"].map(|kind| profile.sample_type(kind)),
        [Some(0), Some(1), Some(1), None]
    );
    profile.default_sample_type.clear();
    assert_eq!(profile.sample_type(""), Some(1), "the last, as `go tool pprof` does");
    assert_eq!(Profile::default().sample_type(""), None);
}

#[test]
fn collapsed_lines_go_from_the_outermost_to_the_innermost() {
    let lines = collapsed(&small(), 1, &["event_kind", "stage"]);
    assert_eq!(lines, ["main: ;inlined 50", "service;call;main: ;inlined;library.so+0x1234 300"]);
    let svg = flame_graph(&small(), 1, &["event_kind"], "a title").svg();
    assert!(svg.contains("<svg") && svg.contains("a title") && svg.contains("library.so+0x1234 (300 bytes"), "{svg}");
    assert!(svg.contains("service (300 bytes, 85.71%)"), "{svg}");
}

#[test]
fn a_difference_is_drawn_over_the_later_profile() {
    let before = small();
    let mut after = small();
    after.samples[0].values[1] = 500;
    let svg = difference_graph(&before, &after, 1, &["event_kind"], "grew").svg();
    assert!(svg.contains("service (500 bytes, 90.91%, +200)"), "{svg}");
    assert!(svg.contains("all (550 bytes, 100.00%, +200)"), "{svg}");
}

#[test]
fn what_grew_is_found_wherever_the_files_were_mapped() {
    let early = small();
    let mut late = small();
    for mapping in &mut late.mappings {
        mapping.start += 0x70_0000;
        mapping.limit += 0x70_0000;
        mapping.file = format!("/other{}", mapping.file);
    }
    for location in &mut late.locations {
        location.address += 0x70_0000;
    }
    late.samples[0].values = vec![4, 450];
    let grown = combine(&[(&late, 1), (&early, -1)]).unwrap();
    let values: Vec<&[i64]> = grown.samples.iter().map(|sample| sample.values.as_slice()).collect();
    assert_eq!(values, [[1, 150]], "only what changed, and it is the same stack");
    assert_eq!(grown.samples[0].label("stage"), Some("call"));

    late.mappings[0].build_id = "another build".to_owned();
    assert_ne!(combine(&[(&late, 1), (&early, -1)]).unwrap().samples.len(), 1, "another program is another place");
    late.sample_types.pop();
    assert!(combine(&[(&late, 1), (&early, -1)]).unwrap_err().to_string().contains("space in bytes"));
    assert!(combine(&[]).is_err());
}

/// Found by fuzzing.
#[test]
fn an_empty_text_of_a_label_is_none_wherever_it_is_in_the_table() {
    use prost::Message as _;
    let mut message = wire::Profile::decode(small().encode_plain().as_slice()).unwrap();
    message.string_table.push(String::new());
    let empty = message.string_table.len() as i64 - 1;
    message.sample[0].label = vec![wire::Label { text: empty, number: 7, ..Default::default() }];
    let read = Profile::decode(&message.encode_to_vec()).unwrap();
    assert_eq!(read.samples[0].labels[0].value, LabelValue::Number(7, String::new()));
    assert_eq!(Profile::decode(&read.encode()).unwrap(), read);
}

#[test]
fn what_is_no_profile_is_refused_with_a_reason() {
    let refused = |change: fn(&mut wire::Profile)| {
        use prost::Message as _;
        let mut message = wire::Profile::decode(small().encode_plain().as_slice()).unwrap();
        change(&mut message);
        Profile::decode(&message.encode_to_vec()).unwrap_err().to_string()
    };
    let cases = [
        refused(|message| message.sample[0].location_id.push(99)),
        refused(|message| message.location[0].mapping_id = 99),
        refused(|message| message.location[1].line[0].function_id = 99),
        refused(|message| message.comment.push(99)),
        refused(|message| message.comment.push(-1)),
        refused(|message| message.function[1].id = 1),
        refused(|message| message.mapping[0].id = 0),
        refused(|message| message.sample[0].value.push(1)),
        Profile::decode(&[0x1f, 0x8b, 8, 0, 1, 2]).unwrap_err().to_string(),
        Profile::decode(b"heap_v2/524288\n").unwrap_err().to_string(),
    ];
    let reasons = [
        "location 99",
        "mapping 99",
        "function 99",
        "string 99",
        "string -1",
        "function id 1",
        "mapping id 0",
        "3 values and there are 2",
        "not gzip",
        "not a pprof profile",
    ];
    for (told, reason) in cases.iter().zip(reasons) {
        assert!(told.contains(reason), "{told:?} does not say {reason:?}");
    }
}

#[test]
fn a_bomb_is_not_unpacked() {
    use std::io::Write as _;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for _ in 0..33 {
        gzip.write_all(&vec![0; 1024 * 1024]).unwrap();
    }
    let told = Profile::decode(&gzip.finish().unwrap()).unwrap_err().to_string();
    assert!(told.contains("larger than 32 MiB"), "{told}");
}
