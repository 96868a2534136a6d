//! The documents say what the code does: nothing that an operator can meet is missing, nothing is described that is gone.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The service's sources, without their tests.
fn sources() -> String {
    fn collect(directory: &Path, text: &mut String) {
        for entry in fs::read_dir(directory).expect("readable") {
            let path = entry.expect("readable").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() && name != "tests" {
                collect(&path, text);
            } else if name.ends_with(".rs") && name != "tests.rs" {
                let file = fs::read_to_string(&path).expect("UTF-8");
                text.push_str(file.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default());
            }
        }
    }
    let mut text = String::new();
    collect(&root().join("src"), &mut text);
    text
}

/// The messages of the log lines in `code`: the last text of each call of a log macro.
fn messages(code: &str) -> BTreeSet<String> {
    let starts =
        ["tracing::error!(", "tracing::warn!(", "tracing::info!(", "line!(info,", "line!(warn,", "line!(error,"];
    let mut found = BTreeSet::new();
    for start in starts {
        for (at, _) in code.match_indices(start) {
            let texts = texts_of_call(&code[at + start.len()..]);
            found.extend(texts.last().cloned());
        }
    }
    found
}

/// The text literals up to the bracket that closes a call.
fn texts_of_call(code: &str) -> Vec<String> {
    let (mut depth, mut texts, mut text) = (1, Vec::new(), None::<String>);
    let mut characters = code.chars().peekable();
    while let Some(character) = characters.next() {
        match (&mut text, character) {
            (Some(open), '\\') => match characters.next() {
                // A text that goes on in the next line, without that line's indentation.
                Some('\n') => while characters.next_if(|character| character.is_whitespace()).is_some() {},
                escaped => open.extend(escaped),
            },
            (Some(_), '"') => texts.extend(text.take()),
            (Some(open), other) => open.push(other),
            (None, '"') => text = Some(String::new()),
            (None, '(' | '[' | '{') => depth += 1,
            (None, ')' | ']' | '}') => depth -= 1,
            (None, _) => {}
        }
        if depth == 0 {
            break;
        }
    }
    texts
}

/// The parts of a message between the values that are put into it.
fn fixed_parts(message: &str) -> Vec<&str> {
    let parts = message.split(['{', '}']).enumerate().filter(|(number, _)| number % 2 == 0).map(|(_, part)| part);
    parts.map(|part| part.trim_matches([' ', ':', ';'])).filter(|part| part.len() > 3).collect()
}

#[test]
fn messages_are_found() {
    let code =
        r#"tracing::warn!(%error, left = f("x"), "two (words) of \"it\""); line!(info, "done", rows); debug!("no")"#;
    assert_eq!(messages(code), BTreeSet::from(["done".to_owned(), "two (words) of \"it\"".to_owned()]));
    assert_eq!(fixed_parts("kept: {a} until {b}, the end"), ["kept", "until", ", the end"]);
}

#[test]
fn every_log_line_is_explained() {
    let operations = read("docs/operations.md");
    let found = messages(&sources());
    assert!(found.len() > 30, "only {found:?}");
    let unexplained: Vec<_> =
        found.iter().filter(|message| !fixed_parts(message).iter().all(|part| operations.contains(part))).collect();
    assert!(unexplained.is_empty(), "log lines that docs/operations.md does not explain: {unexplained:#?}");
}

#[test]
fn every_explained_log_line_exists() {
    let operations = read("docs/operations.md");
    let table = operations.split("## Log lines").nth(1).and_then(|rest| rest.split("\n## ").next()).expect("a section");
    let known = messages(&sources());
    let rows = table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| level"));
    let gone: Vec<_> = rows
        .filter_map(|row| row.split('`').nth(1))
        .filter(|message| !message.split('…').all(|part| known.iter().any(|text| text.contains(part.trim()))))
        .collect();
    assert!(gone.is_empty(), "docs/operations.md explains log lines that do not exist: {gone:#?}");
}

#[test]
fn every_metric_is_explained_and_every_explained_one_exists() {
    let operations = read("docs/operations.md");
    let metrics = read("src/metrics.rs");
    let is_name = |word: &&str| word.starts_with("write_api_") || word.starts_with("process_");
    let in_code: BTreeSet<&str> =
        metrics.split('"').skip(1).step_by(2).filter(is_name).filter(|name| !name.contains('{')).collect();
    assert!(in_code.len() > 20, "only {in_code:?}");
    let table = operations.split("## Metrics").nth(1).and_then(|rest| rest.split("\n## ").next()).expect("a section");
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    let in_table: BTreeSet<&str> = rows.filter_map(|row| row.split('`').nth(1)).collect();
    assert_eq!(in_code, in_table);
}
