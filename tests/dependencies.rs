//! What is built in: licences, banned crates and the number of packages, by deny.toml and `cargo metadata`.
//!
//! cargo-deny checks the same and takes minutes to build; this takes a second and needs no network.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

/// Every package in Cargo.lock costs build time, review and trust.
const MOST_PACKAGES: usize = 420;

/// The packages that are built on this machine, with their licences; the local ones left out.
fn licences() -> Vec<(String, Option<String>)> {
    let cargo = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO"))
            .args(arguments)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "cargo {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    // Packages of other platforms are not downloaded, so their manifests cannot be read.
    let version = cargo(&["--version", "--verbose"]);
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).expect("cargo names its host");
    let metadata = cargo(&["metadata", "--format-version=1", "--locked", "--offline", "--filter-platform", host]);
    let metadata: Value = serde_json::from_str(&metadata).expect("cargo metadata prints JSON");
    metadata["packages"]
        .as_array()
        .expect("packages")
        .iter()
        .filter(|package| !package["source"].is_null())
        .map(|package| {
            let name = format!("{} {}", package["name"], package["version"]);
            (name, package["license"].as_str().map(str::to_owned))
        })
        .collect()
}

/// Name and version of every package in Cargo.lock, whatever the platform.
fn locked() -> Vec<(String, String)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock");
    let lock: toml::Table = std::fs::read_to_string(path).expect("Cargo.lock is there").parse().expect("TOML");
    let text = |package: &toml::Value, field: &str| package[field].as_str().expect("text").to_owned();
    let packages = lock["package"].as_array().expect("packages");
    packages.iter().map(|package| (text(package, "name"), text(package, "version"))).collect()
}

fn deny() -> toml::Table {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/deny.toml");
    std::fs::read_to_string(path).expect("deny.toml is there").parse().expect("deny.toml is TOML")
}

/// Whether an SPDX expression can be satisfied: OR needs one side, AND both.
fn satisfied(expression: &str, allowed: &[String]) -> bool {
    let expression = expression.trim();
    if let Some(inner) = expression.strip_prefix('(').and_then(|rest| rest.strip_suffix(')'))
        && balanced(inner)
    {
        return satisfied(inner, allowed);
    }
    // OR binds less than AND; the slash is an old way to write it.
    for (operator, any) in [(" OR ", true), ("/", true), (" AND ", false)] {
        let parts = split_outside_brackets(expression, operator);
        if parts.len() > 1 {
            let mut parts = parts.into_iter();
            return if any {
                parts.any(|part| satisfied(part, allowed))
            } else {
                parts.all(|part| satisfied(part, allowed))
            };
        }
    }
    allowed.iter().any(|licence| licence == expression)
}

fn balanced(text: &str) -> bool {
    let mut depth = 0;
    text.chars().all(|c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        depth >= 0
    })
}

fn split_outside_brackets<'a>(text: &'a str, operator: &str) -> Vec<&'a str> {
    let (mut parts, mut begin, mut depth) = (Vec::new(), 0, 0);
    for (index, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ if depth == 0 && index >= begin && text[index..].starts_with(operator) => {
                parts.push(&text[begin..index]);
                begin = index + operator.len();
            }
            _ => {}
        }
    }
    parts.push(&text[begin..]);
    parts
}

#[test]
fn every_licence_is_allowed() {
    let deny = deny();
    let allowed: Vec<String> = deny["licenses"]["allow"]
        .as_array()
        .expect("licenses.allow")
        .iter()
        .map(|licence| licence.as_str().expect("text").to_owned())
        .collect();
    let refused: Vec<_> = licences()
        .into_iter()
        .filter(|(_, licence)| !licence.as_deref().is_some_and(|licence| satisfied(licence, &allowed)))
        .collect();
    assert!(refused.is_empty(), "not allowed by deny.toml: {refused:#?}");
}

#[test]
fn the_licence_expressions_are_understood() {
    let allowed = ["MIT".to_owned(), "Apache-2.0".to_owned(), "Unicode-3.0".to_owned()];
    for good in ["MIT", "MIT OR GPL-3.0", "GPL-3.0/MIT", "(MIT OR GPL-3.0) AND Unicode-3.0", "(MIT) AND (Apache-2.0)"] {
        assert!(satisfied(good, &allowed), "{good}");
    }
    for bad in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR Apache-2.0) AND GPL-3.0", ""] {
        assert!(!satisfied(bad, &allowed), "{bad}");
    }
}

#[test]
fn no_banned_crate_is_in_the_lock_file() {
    let deny = deny();
    let mut banned = BTreeMap::new();
    for ban in deny["bans"]["deny"].as_array().expect("bans.deny") {
        let below = ban.get("version").map(|version| {
            let text = version.as_str().expect("text").strip_prefix('<').expect("bans say <VERSION or no version");
            numbers(text)
        });
        banned.insert(ban["name"].as_str().expect("name").to_owned(), below);
    }
    let found: Vec<_> = locked()
        .into_iter()
        .filter(|(name, version)| match banned.get(name) {
            None => false,
            Some(None) => true,
            Some(Some(below)) => numbers(version) < *below,
        })
        .collect();
    assert!(found.is_empty(), "banned by deny.toml, with the reason there: {found:?}");
}

fn numbers(version: &str) -> Vec<u64> {
    version.split(['.', '-', '+']).map_while(|part| part.parse().ok()).collect()
}

#[test]
fn the_lock_file_stays_small() {
    let count = locked().len();
    assert!(count <= MOST_PACKAGES, "{count} packages in Cargo.lock, at most {MOST_PACKAGES}");
}
