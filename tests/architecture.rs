//! The rooms of the service and what each may import: ARCHITECTURE.md as a test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each room with the rooms that it may import. Imports point down only: a room stands above all that it names.
const ROOMS: &[(&str, &[&str])] = &[
    ("config", &[]),
    ("aws", &[]),
    ("fault", &[]),
    ("lifecycle", &[]),
    ("health", &[]),
    ("stack", &[]),
    ("task", &["stack"]),
    ("metrics", &["task"]),
    ("telemetry", &["config"]),
    ("db", &["config", "fault", "task"]),
    ("partner", &["config", "fault", "metrics", "task"]),
    ("kafka", &["config", "fault", "metrics", "task"]),
    ("queue", &["aws", "config", "fault", "health", "lifecycle", "metrics", "task"]),
    ("profiling", &["aws", "config", "stack", "task"]),
    ("admin", &["config", "health", "metrics", "profiling", "task"]),
    ("events", &["config", "db", "fault", "health", "kafka", "lifecycle", "metrics", "partner", "queue", "task"]),
    (
        "app",
        &[
            "admin",
            "config",
            "db",
            "events",
            "fault",
            "health",
            "kafka",
            "lifecycle",
            "metrics",
            "partner",
            "profiling",
            "queue",
            "task",
        ],
    ),
    (
        "cli",
        &[
            "app",
            "config",
            "db",
            "events",
            "fault",
            "kafka",
            "metrics",
            "partner",
            "profiling",
            "queue",
            "task",
            "telemetry",
        ],
    ),
];

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("readable") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The room of a file: the folder or file right below src.
fn room(path: &Path) -> String {
    let below = path.strip_prefix(source()).expect("a file of src");
    let first = below.components().next().expect("not empty").as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// The text without comments, so that documentation may name what it likes.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("readable");
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The rooms named after `crate::`, braces included: `crate::{admin, profiling}` names two.
fn imports(code: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (index, _) in code.match_indices("crate::") {
        // `$crate::` of a macro and `crate::` alike; not the end of another word such as `other_crate::`.
        if code[..index].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &code[index + "crate::".len()..];
        let group = match rest.strip_prefix('{') {
            Some(group) => top_level(group),
            None => vec![rest.to_owned()],
        };
        for item in group {
            let name: String = item.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if !name.is_empty() {
                names.insert(name);
            }
        }
    }
    names
}

/// The items of a brace group, up to its closing brace, inner groups left whole.
fn top_level(group: &str) -> Vec<String> {
    let (mut items, mut depth, mut item) = (Vec::new(), 0, String::new());
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                items.push(std::mem::take(&mut item));
                continue;
            }
            _ => {}
        }
        item.push(c);
    }
    items.push(item);
    items
}

#[test]
fn imports_point_down_only() {
    let allowed: BTreeMap<&str, &[&str]> = ROOMS.iter().copied().collect();
    let mut wrong = Vec::new();
    for path in files(&source()) {
        let room = room(&path);
        if room == "lib" || room == "main" {
            continue;
        }
        let may = *allowed.get(room.as_str()).unwrap_or_else(|| panic!("{} is in no known room", path.display()));
        for name in imports(&code(&path)) {
            if name != room && allowed.contains_key(name.as_str()) && !may.contains(&name.as_str()) {
                wrong.push(format!("{}: {room} must not import {name}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_table_itself_points_down() {
    for (index, (room, may)) in ROOMS.iter().enumerate() {
        for name in *may {
            let position = ROOMS.iter().position(|(other, _)| other == name).expect("a known room");
            assert!(position < index, "{room} stands below {name}");
        }
    }
}

/// Words that belong to one room, or to one file.
#[test]
fn each_vendor_has_its_place() {
    let mut wrong = Vec::new();
    for path in files(&source()) {
        let (room, code) = (room(&path), code(&path));
        let below = path.strip_prefix(source()).expect("a file of src").to_string_lossy().into_owned();
        for (word, place, allowed) in [
            ("aws_sdk", "queue/sqs.rs", below == "queue/sqs.rs"),
            ("aws_config", "aws.rs", below == "aws.rs" || below == "queue/sqs.rs"),
            ("aws_sigv4", "profiling/snapshots/bucket.rs", below == "profiling/snapshots/bucket.rs"),
            ("query!(", "db", room == "db"),
            ("query_as!(", "db", room == "db"),
            ("query_scalar!(", "db", room == "db"),
            ("sqlx::query", "db", room == "db"),
            ("rdkafka", "kafka", room == "kafka"),
            ("jemalloc_pprof", "profiling", room == "profiling"),
            ("local_stack", "no room of the service", false),
        ] {
            if code.contains(word) && !allowed {
                wrong.push(format!("{below} names {word}, whose place is {place}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A task that is spawned elsewhere is in no list of tasks, and what it uses is charged to nobody.
#[test]
fn tasks_are_spawned_in_one_place() {
    let mut wrong = Vec::new();
    for path in files(&source()) {
        let below = path.strip_prefix(source()).expect("a file of src").to_string_lossy().into_owned();
        let all = code(&path);
        // Tests may spawn what they like; they are at the end of a file, or in files of their own.
        let code = all.split("#[cfg(test)]").next().unwrap_or_default();
        if room(&path) == "task" || below.contains("tests") {
            continue;
        }
        let spawns = ["tokio::spawn(", "tokio::task::spawn", "set.spawn(", "runtime.spawn(", "Handle::spawn"];
        for word in spawns.into_iter().filter(|word| code.contains(word)) {
            wrong.push(format!("{below}: {word}…) is for `task` alone; call task::spawn or its like"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_local_stack_is_never_linked_into_the_service() {
    let manifest: toml::Table = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .expect("readable")
        .parse()
        .expect("TOML");
    assert!(!manifest["dependencies"].as_table().expect("a table").contains_key("local-stack"));
}

#[test]
fn imports_are_found() {
    let code = "use crate::config::{self, X};\nuse crate::{admin, db::{a, b}, kafka};\nfn f() { crate::queue::x() }";
    let names: Vec<String> = imports(code).into_iter().collect();
    assert_eq!(names, ["admin", "config", "db", "kafka", "queue"]);
}
