//! The three ways that are compared.

use serde::Serialize;

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Way {
    /// One query for all rows, one call after another.
    Before,
    /// Pages of 1,000 by OFFSET, 1,000 calls in parallel, then the next page.
    Article,
    /// WriteApi.
    Ours,
}

impl Way {
    pub(crate) const ALL: [Way; 3] = [Way::Before, Way::Article, Way::Ours];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Before => "Before",
            Way::Article => "The article's fix",
            Way::Ours => "WriteApi",
        }
    }

    /// For names of files and ids.
    pub(crate) fn file_name(self) -> &'static str {
        match self {
            Way::Before => "before",
            Way::Article => "article",
            Way::Ours => "ours",
        }
    }

    pub(crate) fn about(self) -> &'static str {
        match self {
            Way::Before => "one query for all rows, one call after another, one Kafka record after another",
            Way::Article => {
                "pages of 1,000 by OFFSET, 1,000 calls in parallel, then the next page; all records at once"
            }
            Way::Ours => "keyset pages, calls across page borders, answers in batches, records page by page",
        }
    }

    /// What its allocator is told beyond what all three are, as jemalloc's `MALLOC_CONF`: to keep what was freed, as the
    /// runtime of the story's service did.
    pub(crate) fn allocator(self) -> &'static str {
        match self {
            Way::Before | Way::Article => "dirty_decay_ms:-1,muzzy_decay_ms:-1",
            Way::Ours => "",
        }
    }

    /// The program's name in the workspace, and its arguments.
    pub(crate) fn command(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Way::Before => ("before", &[]),
            Way::Article => ("before", &["--fix", "article"]),
            Way::Ours => ("write-api", &["serve"]),
        }
    }
}
