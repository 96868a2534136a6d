//! The settings for people: the table of all of them, and what they are in this environment.
//!
//! Both follow `config/default.toml`, in its order: the comment above a key is its meaning, and a key without one shares
//! the comment of the key right before it. What a key takes comes from the code that reads it.

use std::fmt::Write as _;
use std::path::Path;

use super::layers::{ConfigError, DEFAULTS, Source, variable};
use super::{Config, Layers};

/// A setting as it is in effect.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The dotted key.
    pub key: String,
    /// Its value, without what must not be shown.
    pub value: String,
    /// Where the value came from.
    pub source: Source,
}

/// All settings that `file` and `environment` give, in the order of the manual, and all that is wrong with them. Values
/// that nobody set are there as they are, mostly empty.
pub fn settings(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
) -> (Vec<Setting>, Vec<ConfigError>) {
    let (config, layers) = Config::load_layers(file, environment);
    let settings = sections(DEFAULTS).into_iter().flat_map(|section| section.keys).map(|Key { key, .. }| {
        let (value, source) = layers.shown(&key);
        let value = value.unwrap_or_else(|| match key.as_str() {
            "database.url" => config.database.address(),
            _ => "(hidden)".to_owned(),
        });
        Setting { key, value, source }
    });
    (settings.collect(), layers.finish().into_iter().filter(|error| !error.missing).collect())
}

/// A table of every setting for each section, in Markdown.
pub fn markdown() -> String {
    let (_, layers) = Config::load_layers(None, std::iter::empty());
    let mut text = String::new();
    for section in sections(DEFAULTS) {
        // Writing to a string does not fail.
        let _ = writeln!(text, "### {}\n", section.name);
        if !section.about.is_empty() {
            let _ = writeln!(text, "{}\n", section.about);
        }
        text.push_str("| setting | default | takes | meaning |\n|---|---|---|---|\n");
        for key in section.keys {
            let _ = writeln!(text, "{}", row(&key, &layers));
        }
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

fn row(key: &Key, layers: &Layers) -> String {
    let Key { key, default, meaning } = key;
    let default = if default.is_empty() { String::new() } else { format!("`{default}`") };
    let cell = |text: &str| text.replace('|', "\\|");
    let (takes, meaning) = (cell(layers.accepts(key)), cell(meaning));
    format!("| `{key}`<br>`{}` | {default} | {takes} | {meaning} |", variable(key))
}

/// A section of `config/default.toml`.
struct Section {
    name: String,
    /// The comment above its name.
    about: String,
    keys: Vec<Key>,
}

struct Key {
    /// Dotted, with the section.
    key: String,
    default: String,
    meaning: String,
}

/// Reads the file line by line: a TOML parser would lose the comments. Values are on one line each.
fn sections(text: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    let mut comment = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(more) = line.strip_prefix('#') {
            let gap = if comment.is_empty() { "" } else { " " };
            comment = comment + gap + more.trim();
        } else if let Some(name) = line.strip_prefix('[') {
            let name = name.trim_end_matches(']').to_owned();
            sections.push(Section { name, about: std::mem::take(&mut comment), keys: Vec::new() });
        } else if let (Some((key, default)), Some(section)) = (line.split_once('='), sections.last_mut()) {
            let meaning = match (comment.is_empty(), section.keys.last()) {
                (true, Some(before)) => before.meaning.clone(),
                _ => std::mem::take(&mut comment),
            };
            let key = format!("{}.{}", section.name, key.trim());
            section.keys.push(Key { key, default: default.trim().trim_matches('"').to_owned(), meaning });
        } else {
            // A paragraph of its own, such as the head of the file.
            comment.clear();
        }
    }
    sections
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(settings: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
        let settings: Vec<_> = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        settings.into_iter()
    }

    #[test]
    fn the_document_has_the_table_that_the_code_gives() {
        let document = include_str!("../../docs/configuration.md");
        let (begin, end) = ("<!-- table: begin -->\n", "<!-- table: end -->");
        let (_, rest) = document.split_once(begin).expect("docs/configuration.md has a line `<!-- table: begin -->`");
        let (table, _) = rest.split_once(end).expect("docs/configuration.md has a line `<!-- table: end -->`");
        assert!(
            table.trim() == markdown().trim(),
            "the table in docs/configuration.md is not that of config/default.toml and the code: run \
             scripts/configuration-table and commit what it changed"
        );
    }

    #[test]
    fn every_setting_is_in_the_table_with_its_meaning_and_what_it_takes() {
        let (_, layers) = Config::load_layers(None, std::iter::empty());
        let keys: Vec<Key> = sections(DEFAULTS).into_iter().flat_map(|section| section.keys).collect();
        let mut names: Vec<&str> = keys.iter().map(|key| key.key.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, layers.keys().collect::<Vec<_>>());
        for Key { key, default, meaning } in &keys {
            assert!(!meaning.is_empty(), "{key} has no comment in config/default.toml");
            assert!(!layers.accepts(key).is_empty(), "{key} is read by nobody");
            assert_eq!(layers.shown(key).0.as_deref(), Some(default.as_str()), "{key}");
        }
    }

    #[test]
    fn ranges_in_the_comments_are_those_of_the_code() {
        let (_, layers) = Config::load_layers(None, std::iter::empty());
        let mut found = 0;
        for Key { key, meaning, .. } in sections(DEFAULTS).into_iter().flat_map(|section| section.keys) {
            let words: Vec<&str> = meaning.split(' ').collect();
            for window in words.windows(3).filter(|window| window[1] == "to") {
                let most = window[2].trim_end_matches(['.', ',', ';']);
                if [window[0], most].iter().all(|word| word.starts_with(|c: char| c.is_ascii_digit())) {
                    assert_eq!(format!("{} to {most}", window[0]), layers.accepts(&key), "the comment of {key}");
                    found += 1;
                }
            }
        }
        assert!(found >= 9, "{found} ranges in the comments");
    }

    #[test]
    fn a_key_without_a_comment_shares_the_one_before() {
        let text = "# Head.\n\n# Of the section,\n# on.\n[a]\n# Of x.\nx = 1\ny = \"\"\n\n[b.c]\nz = true\n";
        let sections = sections(text);
        let about: Vec<&str> = sections.iter().map(|section| section.about.as_str()).collect();
        assert_eq!(about, ["Of the section, on.", ""]);
        let keys = sections.iter().flat_map(|section| &section.keys);
        let keys: Vec<_> = keys.map(|key| (key.key.as_str(), key.default.as_str(), key.meaning.as_str())).collect();
        assert_eq!(keys, [("a.x", "1", "Of x."), ("a.y", "", "Of x."), ("b.c.z", "true", "")]);
    }

    #[test]
    fn values_are_shown_with_their_source_and_secrets_are_not() {
        let (settings, errors) = settings(
            None,
            environment(&[
                ("WRITE_API_DATABASE_URL", "postgres://app:hunter2@db.example:5433/homes?sslmode=require"),
                ("WRITE_API_PROFILING_TOKEN", "hunter2-hunter2-hunter2"),
                ("WRITE_API_PARTNER_BASE_URL", "https://app:hunter2@partner.example"),
                ("WRITE_API_QUEUE_WAIT_TIME", "7s"),
                ("WRITE_API_QUEUE_MAX_POLLS", "many"),
            ]),
        );
        let of = |key: &str| settings.iter().find(|setting| setting.key == key).expect("a known key");
        assert_eq!(of("database.url").value, "app@db.example:5433/homes");
        assert_eq!(of("profiling.token").value, "(hidden)");
        assert_eq!(of("partner.base_url").value, "(hidden)");
        assert_eq!(of("queue.wait_time").value, "7s");
        assert_eq!(of("queue.wait_time").source, Source::Environment("WRITE_API_QUEUE_WAIT_TIME".to_owned()));
        assert_eq!(of("queue.max_polls").value, "many");
        assert_eq!(of("log.level").source, Source::Default);
        assert!(!format!("{settings:?}").contains("hunter2"));
        let keys: Vec<&str> = errors.iter().map(|error| error.key.as_str()).collect();
        assert_eq!(keys, ["queue.max_polls", "partner.base_url"], "{errors:?}");
    }
}
