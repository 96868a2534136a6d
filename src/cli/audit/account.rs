//! What the audit knows of one run.

use std::fmt::Display;

/// Examples that are shown of a gap; the rest are only counted.
const SHOWN: usize = 10;

/// Something that should be and is not, or is and should not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Gap {
    /// A fixed word.
    pub(super) kind: &'static str,
    /// How often.
    pub(super) count: u64,
    /// The first ones, in words or as listing ids.
    pub(super) first: Vec<String>,
}

/// Adds to the gap of a kind, or makes it.
pub(super) fn add_gap(gaps: &mut Vec<Gap>, kind: &'static str, count: u64, first: impl IntoIterator<Item: Display>) {
    if count == 0 {
        return;
    }
    let at = gaps.iter().position(|gap| gap.kind == kind).unwrap_or_else(|| {
        gaps.push(Gap { kind, count: 0, first: Vec::new() });
        gaps.len() - 1
    });
    let gap = &mut gaps[at];
    gap.count += count;
    let room = SHOWN.saturating_sub(gap.first.len());
    gap.first.extend(first.into_iter().take(room).map(|example| example.to_string()));
}

/// Makes a list of texts one.
pub(super) fn listed(texts: &[String]) -> Option<String> {
    (!texts.is_empty()).then(|| texts.join("; "))
}

/// The account of one run.
#[derive(Debug, Clone, Default)]
pub(super) struct Account {
    /// The run.
    pub(super) run_id: String,
    /// State of the run.
    pub(super) state: String,
    /// Matches at its opening.
    pub(super) selected: i64,
    /// Valuations, counted.
    pub(super) valued: i64,
    /// Failures, counted.
    pub(super) failed: i64,
    /// What is wrong.
    pub(super) gaps: Vec<Gap>,
    /// What is under way, and since when nothing moved.
    pub(super) unfinished: Vec<String>,
    /// What there is to know besides.
    pub(super) notes: Vec<String>,
    /// How many publish events of the run were begun.
    pub(super) publications: usize,
    /// Whether Kafka must have a record of every valuation: a publication is complete.
    pub(super) is_published: bool,
    /// When the run was completed, in milliseconds since 1970.
    pub(super) completed_at_ms: Option<f64>,
    /// Listings with a right record.
    pub(super) records: u64,
    /// Records beyond the first of a listing, equal to it.
    pub(super) repeats: u64,
    /// Listings whose record retention may have removed.
    pub(super) truncated: u64,
}

impl Account {
    /// Adds to the gap of a kind.
    pub(super) fn gap(&mut self, kind: &'static str, count: u64, first: impl IntoIterator<Item: Display>) {
        add_gap(&mut self.gaps, kind, count, first);
    }

    /// A gap that is one sentence.
    pub(super) fn is_wrong(&mut self, kind: &'static str, sentence: String) {
        self.gap(kind, 1, [sentence]);
    }
}
