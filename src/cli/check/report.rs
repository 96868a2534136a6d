//! What was found, as lines for people and as a document for machines.

use std::fmt::Write as _;

use serde::Serialize;

use crate::config::ConfigError;

/// How a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    /// As it should be.
    Ok,
    /// The service works; somebody should know all the same.
    Warn,
    /// The service, or a promise of it, does not work.
    Fail,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub status: Status,
    /// What was looked at.
    pub name: String,
    /// How it is.
    pub found: String,
    /// What to do; `None` if there is nothing to do.
    #[serde(rename = "fix")]
    pub remedy: Option<String>,
}

impl Finding {
    pub fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Finding { status: Status::Ok, name: name.into(), found: found.into(), remedy: None }
    }

    pub fn warn(name: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { status: Status::Warn, name: name.into(), found: found.into(), remedy: Some(remedy.into()) }
    }

    pub fn fail(name: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { status: Status::Fail, name: name.into(), found: found.into(), remedy: Some(remedy.into()) }
    }
}

impl From<&ConfigError> for Finding {
    fn from(error: &ConfigError) -> Self {
        let found = match &error.source {
            Some(source) => format!("{} (from {source})", error.problem),
            None => error.problem.clone(),
        };
        Finding::fail(&error.key, found, &error.fix)
    }
}

/// How many of the findings are failures.
pub(super) fn failures(findings: &[Finding]) -> usize {
    findings.iter().filter(|finding| finding.status == Status::Fail).count()
}

/// `FAIL  name  what was found; what to do`, a line each.
pub(super) fn lines(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for Finding { status, name, found, remedy } in findings {
        let word = match status {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        // What neighbours answer may have line ends in it. Writing to a string does not fail.
        let found = found.replace(['\n', '\r'], " ");
        let _ = match remedy {
            Some(remedy) => writeln!(text, "{word:4}  {name:width$}  {found}; {remedy}"),
            None => writeln!(text, "{word:4}  {name:width$}  {found}"),
        };
    }
    text
}

/// The same as one JSON document.
pub(super) fn json(findings: &[Finding]) -> anyhow::Result<String> {
    #[derive(Serialize)]
    struct Document<'a> {
        ok: bool,
        checks: &'a [Finding],
    }
    let document = Document { ok: failures(findings) == 0, checks: findings };
    Ok(serde_json::to_string_pretty(&document)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_one_aligned_line_each_and_the_same_in_json() {
        let findings = [
            Finding::ok("database", "15.18"),
            Finding::warn("kafka", "4 partitions", "add some"),
            Finding::fail("queue events", "a\nb", "create it"),
        ];
        assert_eq!(
            lines(&findings),
            "ok    database      15.18\nwarn  kafka         4 partitions; add some\nFAIL  queue events  a b; create it\n"
        );
        let document: serde_json::Value = serde_json::from_str(&json(&findings).expect("JSON")).expect("JSON");
        assert_eq!(document["ok"], false);
        assert_eq!(document["checks"][0]["fix"], serde_json::Value::Null);
        assert_eq!(document["checks"][2]["status"], "fail");
        assert_eq!(document["checks"][2]["fix"], "create it");
    }
}
