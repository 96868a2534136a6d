//! Where settings come from, and the typed reading of them.
//!
//! Three layers, the later one winning: the defaults (`config/default.toml`, compiled in), a file, the environment.
//! Reading never stops at the first error: [`Layers`] collects them all, each naming the key, the source of its value
//! and the fix.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The commented defaults, which are also the manual of all settings.
pub const DEFAULTS: &str = include_str!("../../config/default.toml");

/// What every environment variable of the service starts with.
pub const ENV_PREFIX: &str = "WRITE_API_";

/// Variables with the prefix that are no settings. The orders for fault points are known to builds that have such points;
/// to a release they are a mistake like any other unknown name.
#[cfg(not(feature = "fault-injection"))]
const OTHERS: &[&str] = &["WRITE_API_CONFIG"];
#[cfg(feature = "fault-injection")]
const OTHERS: &[&str] = &["WRITE_API_CONFIG", "WRITE_API_FAULTS", "WRITE_API_PLANTED_BUG"];

/// Where a value came from, as the operator would look for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `config/default.toml`, compiled in.
    Default,
    /// The file given by `--config` or `WRITE_API_CONFIG`.
    File(PathBuf),
    /// An environment variable.
    Environment(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("the default"),
            Source::File(path) => write!(f, "file {}", path.display()),
            Source::Environment(name) => write!(f, "environment variable {name}"),
        }
    }
}

/// One thing wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The dotted key, or the variable or file where there is no key.
    pub key: String,
    /// Where the value came from; `None` if the trouble is not with a value.
    pub source: Option<Source>,
    /// What is wrong, with the value where it is no secret.
    pub problem: String,
    /// What to do.
    pub fix: String,
    /// Whether nothing is set at all, which matters only to those who need the value.
    pub missing: bool,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.problem)?;
        if let Some(source) = &self.source {
            write!(f, " (from {source})")?;
        }
        write!(f, "; {}", self.fix)
    }
}

struct Entry {
    value: toml::Value,
    source: Source,
}

/// What a key takes, noted by whoever reads it.
#[derive(Default)]
struct Rule {
    accepts: String,
    secret: bool,
}

/// All settings by dotted key, and the errors met so far.
pub struct Layers {
    entries: BTreeMap<String, Entry>,
    rules: BTreeMap<String, Rule>,
    errors: Vec<ConfigError>,
}

impl Layers {
    /// Lays `file` over the defaults and `environment` over both. Unknown keys are errors.
    pub fn load(file: Option<&Path>, environment: impl Iterator<Item = (String, String)>) -> Self {
        let mut layers = Layers { entries: BTreeMap::new(), rules: BTreeMap::new(), errors: Vec::new() };
        let defaults: toml::Table = DEFAULTS.parse().expect("config/default.toml is valid TOML (a test parses it)");
        flatten("", toml::Value::Table(defaults), &mut |key, value| {
            layers.entries.insert(key, Entry { value, source: Source::Default });
        });
        if let Some(path) = file {
            layers.lay_file(path);
        }
        layers.lay_environment(environment);
        layers
    }

    fn lay_file(&mut self, path: &Path) {
        let whole_file = |problem: String, fix: &str| ConfigError {
            key: path.display().to_string(),
            source: None,
            problem,
            fix: fix.to_owned(),
            missing: false,
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => {
                let fix = "name a readable TOML file with --config or WRITE_API_CONFIG";
                self.errors.push(whole_file(format!("cannot be read: {error}"), fix));
                return;
            }
        };
        let table: toml::Table = match text.parse() {
            Ok(table) => table,
            Err(error) => {
                // Not the parser's whole text, which quotes the line: it may hold a password.
                let line = error.span().map_or(1, |span| text[..span.start].lines().count().max(1));
                let problem = format!("is not valid TOML in line {line}: {}", error.message());
                self.errors.push(whole_file(problem, "mend the file"));
                return;
            }
        };
        let source = Source::File(path.to_owned());
        let mut found = Vec::new();
        flatten("", toml::Value::Table(table), &mut |key, value| found.push((key, value)));
        for (key, value) in found {
            match self.entries.get_mut(&key) {
                Some(entry) => *entry = Entry { value, source: source.clone() },
                None => self.unknown(key, source.clone()),
            }
        }
    }

    fn lay_environment(&mut self, environment: impl Iterator<Item = (String, String)>) {
        let names: BTreeMap<String, String> = self.entries.keys().map(|key| (variable(key), key.clone())).collect();
        for (name, value) in environment {
            if !name.starts_with(ENV_PREFIX) || OTHERS.contains(&name.as_str()) {
                continue;
            }
            let source = Source::Environment(name.clone());
            match names.get(&name) {
                Some(key) => {
                    self.entries.insert(key.clone(), Entry { value: toml::Value::String(value), source });
                }
                None => self.unknown(name, source),
            }
        }
    }

    fn unknown(&mut self, key: String, source: Source) {
        let from_environment = matches!(source, Source::Environment(_));
        let nearest = self
            .entries
            .keys()
            .map(|known| if from_environment { variable(known) } else { known.clone() })
            .min_by_key(|known| edit_distance(known, &key));
        let fix = match nearest {
            Some(nearest) => format!("remove it, or did you mean {nearest}?"),
            None => "remove it".to_owned(),
        };
        self.errors.push(ConfigError {
            key,
            source: Some(source),
            problem: "is not a known setting".to_owned(),
            fix,
            missing: false,
        });
    }

    /// Notes an error about `key`, naming where its value came from. Only the first about a key: a second one is about
    /// what stands in for the value.
    pub fn error(&mut self, key: &str, problem: impl Into<String>, fix: impl Into<String>) {
        if self.errors.iter().any(|error| error.key == key) {
            return;
        }
        let source = self.entries.get(key).map(|entry| entry.source.clone());
        self.errors.push(ConfigError {
            key: key.to_owned(),
            source,
            problem: problem.into(),
            fix: fix.into(),
            missing: false,
        });
    }

    /// Notes that `key` has no value.
    pub fn missing(&mut self, key: &str, fix: impl Into<String>) {
        let problem = "is missing".to_owned();
        self.errors.push(ConfigError { key: key.to_owned(), source: None, problem, fix: fix.into(), missing: true });
    }

    /// Text, without surrounding white space; may be empty. `accepts` says what it must be, for people.
    pub fn text(&mut self, key: &str, accepts: impl Into<String>) -> String {
        self.rules.entry(key.to_owned()).or_default().accepts = accepts.into();
        self.scalar(key).unwrap_or_default()
    }

    /// Text that must not be empty; `what` completes the sentence "set it to ...".
    pub fn required(&mut self, key: &str, what: &str) -> String {
        let text = self.text(key, what);
        if text.is_empty() && !self.errors.iter().any(|error| error.key == key) {
            self.missing(key, format!("set it, or {}, to {what}", variable(key)));
        }
        text
    }

    /// A whole number within `range`.
    pub fn integer(&mut self, key: &str, range: RangeInclusive<u32>) -> u32 {
        let text = self.text(key, format!("{} to {}", range.start(), range.end()));
        match text.parse::<i64>().ok().and_then(|n| u32::try_from(n).ok()).filter(|n| range.contains(n)) {
            Some(number) => number,
            None => {
                let fix = format!("give a whole number from {} to {}", range.start(), range.end());
                self.error(key, format!("{text:?} is out of range or not a number"), fix);
                *range.start()
            }
        }
    }

    /// A duration within `range`, such as "250ms" or "1h30m".
    pub fn duration(&mut self, key: &str, range: RangeInclusive<Duration>) -> Duration {
        let (least, most) = (format_duration(*range.start()), format_duration(*range.end()));
        let text = self.text(key, format!("{least} to {most}"));
        match parse_duration(&text).filter(|duration| range.contains(duration)) {
            Some(duration) => duration,
            None => {
                let fix =
                    format!("give a duration from {least} to {most}, such as \"250ms\", \"20s\", \"5m\" or \"12h\"");
                self.error(key, format!("{text:?} is not a duration in range"), fix);
                *range.start()
            }
        }
    }

    /// `true` or `false`.
    pub fn boolean(&mut self, key: &str) -> bool {
        let text = self.text(key, "true, false");
        match text.as_str() {
            "true" => true,
            "false" => false,
            _ => {
                self.error(key, format!("{text:?} is neither true nor false"), "give true or false");
                false
            }
        }
    }

    /// One of `allowed`, returned as its index.
    pub fn choice(&mut self, key: &str, allowed: &[&str]) -> usize {
        let text = self.text(key, allowed.join(", "));
        match allowed.iter().position(|name| *name == text) {
            Some(index) => index,
            None => {
                self.error(key, format!("{text:?} is not a choice"), format!("give one of {}", allowed.join(", ")));
                0
            }
        }
    }

    /// `host:port` with a numeric host, as a listener needs it.
    pub fn socket_address(&mut self, key: &str) -> SocketAddr {
        let text = self.text(key, "IP:PORT");
        match text.parse() {
            Ok(address) => address,
            Err(_) => {
                self.error(key, format!("{text:?} is not an address"), "give IP:PORT, such as 127.0.0.1:8080");
                SocketAddr::from(([127, 0, 0, 1], 0))
            }
        }
    }

    /// As [`text`](Layers::text), for what must not be shown.
    pub fn secret(&mut self, key: &str, accepts: &str) -> String {
        let text = self.text(key, accepts);
        self.hide(key);
        text
    }

    /// Keeps the value of `key` from being shown.
    pub fn hide(&mut self, key: &str) {
        self.rules.entry(key.to_owned()).or_default().secret = true;
    }

    /// What `key` takes, in words; empty if nobody has read it.
    pub fn accepts(&self, key: &str) -> &str {
        self.rules.get(key).map_or("", |rule| &rule.accepts)
    }

    /// The value of `key` with its source; `None` in place of a value that must not be shown.
    pub fn shown(&self, key: &str) -> (Option<String>, Source) {
        let entry = self.entries.get(key).unwrap_or_else(|| panic!("{key} is missing from config/default.toml"));
        let value = single(&entry.value).unwrap_or_else(|| format!("({})", entry.value.type_str()));
        let secret = self.rules.get(key).is_none_or(|rule| rule.secret) && !value.is_empty();
        ((!secret).then_some(value), entry.source.clone())
    }

    /// All keys.
    #[cfg(test)]
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// How many errors were met so far.
    pub fn error_count(&self) -> usize {
        self.errors.len()
    }

    /// The errors met, in the order of the settings; empty if the configuration is good.
    pub fn finish(self) -> Vec<ConfigError> {
        self.errors
    }

    fn scalar(&mut self, key: &str) -> Option<String> {
        let entry = self.entries.get(key).unwrap_or_else(|| panic!("{key} is missing from config/default.toml"));
        let value = single(&entry.value);
        if value.is_none() {
            let problem = format!("is of type {}, not a single value", entry.value.type_str());
            self.error(key, problem, "give one value");
        }
        value
    }
}

/// A value as text, unless it is a collection or a date.
fn single(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.trim().to_owned()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(value) => Some(value.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        _ => None,
    }
}

/// The environment variable of a key: `queue.wait_time` is `WRITE_API_QUEUE_WAIT_TIME`.
pub fn variable(key: &str) -> String {
    format!("{ENV_PREFIX}{}", key.replace('.', "_").to_uppercase())
}

fn flatten(prefix: &str, value: toml::Value, each: &mut impl FnMut(String, toml::Value)) {
    match value {
        toml::Value::Table(table) => {
            for (name, value) in table {
                let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
                flatten(&key, value, each);
            }
        }
        value => each(prefix.to_owned(), value),
    }
}

/// "1h30m" and the like: whole numbers, each with a unit of `ms`, `s`, `m` or `h`.
fn parse_duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u32 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let one = match &rest[..unit] {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            _ => return None,
        };
        total = total.checked_add(one.checked_mul(number)?)?;
        rest = &rest[unit..];
    }
    (!text.is_empty()).then_some(total)
}

/// The shortest text that [`parse_duration`] reads as `duration`, down to the millisecond.
pub(super) fn format_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let parts = [
        (seconds / 3600, "h"),
        (seconds / 60 % 60, "m"),
        (seconds % 60, "s"),
        (u64::from(duration.subsec_millis()), "ms"),
    ];
    let text: String =
        parts.iter().filter(|(number, _)| *number > 0).map(|(number, unit)| format!("{number}{unit}")).collect();
    if text.is_empty() { "0s".to_owned() } else { text }
}

/// Levenshtein distance in bytes, to suggest the key that was meant.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_numbers_with_units() {
        assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(parse_duration("1h30m"), Some(Duration::from_secs(5400)));
        for wrong in ["", "5", "s", "5 s", "-5s", "5d", "1.5s", "99999999999s"] {
            assert_eq!(parse_duration(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn durations_are_written_as_they_are_read() {
        for text in ["0s", "1ms", "250ms", "1s500ms", "20s", "5m", "12h", "11h50m", "1h1s"] {
            assert_eq!(format_duration(parse_duration(text).expect("good")), text);
        }
    }

    #[test]
    fn a_misspelt_key_is_told_with_the_one_that_was_meant() {
        let layers = Layers::load(None, [("WRITE_API_QUEUE_WAITTIME".to_owned(), "5s".to_owned())].into_iter());
        let errors = layers.finish();
        assert_eq!(errors.len(), 1);
        assert!(errors[0].to_string().contains("did you mean WRITE_API_QUEUE_WAIT_TIME"), "{}", errors[0]);
    }

    #[test]
    fn no_two_keys_share_an_environment_variable() {
        let layers = Layers::load(None, std::iter::empty());
        let names: std::collections::BTreeSet<String> = layers.entries.keys().map(|key| variable(key)).collect();
        assert_eq!(names.len(), layers.entries.len());
    }
}
