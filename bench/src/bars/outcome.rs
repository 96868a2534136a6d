//! What came of a bar: figures, each with its limit.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// A bar that was looked at.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) bar: u32,
    pub(crate) name: String,
    pub(crate) figures: Vec<Figure>,
    /// Why a part, or all of it, was not measured; empty if all was.
    pub(crate) not_measured: String,
}

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) value: f64,
    /// `None`: told beside the others, and no bar.
    pub(crate) limit: Option<Limit>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Limit {
    AtMost(f64),
    AtLeast(f64),
    Exactly(f64),
}

impl Outcome {
    pub(crate) fn new(bar: u32, name: &str) -> Self {
        Self { bar, name: name.to_owned(), figures: Vec::new(), not_measured: String::new() }
    }

    pub(crate) fn at_most(mut self, name: &str, value: f64, limit: f64) -> Self {
        self.figures.push(Figure { name: name.to_owned(), value, limit: Some(Limit::AtMost(limit)) });
        self
    }

    pub(crate) fn at_least(mut self, name: &str, value: f64, limit: f64) -> Self {
        self.figures.push(Figure { name: name.to_owned(), value, limit: Some(Limit::AtLeast(limit)) });
        self
    }

    pub(crate) fn exactly(mut self, name: &str, value: f64, limit: f64) -> Self {
        self.figures.push(Figure { name: name.to_owned(), value, limit: Some(Limit::Exactly(limit)) });
        self
    }

    pub(crate) fn beside(mut self, name: &str, value: f64) -> Self {
        self.figures.push(Figure { name: name.to_owned(), value, limit: None });
        self
    }

    pub(crate) fn not_measured(mut self, why: impl Into<String>) -> Self {
        self.not_measured = why.into();
        self
    }

    /// Whether no figure misses its limit, even if limits were `slack` times as wide.
    pub(crate) fn holds(&self, slack: f64) -> bool {
        self.figures.iter().all(|figure| figure.holds(slack))
    }

    pub(crate) fn verdict(&self) -> &'static str {
        match (self.figures.iter().any(|figure| figure.limit.is_some()), self.holds(1.0), self.not_measured.is_empty())
        {
            (false, ..) => "not measured",
            (true, false, _) => "FALLS SHORT",
            (true, true, true) => "holds",
            (true, true, false) => "holds in part",
        }
    }

    /// Lines for a terminal.
    pub(crate) fn text(&self) -> String {
        let mut text = format!("{:>2}  {:<24} {}\n", self.bar, self.name, self.verdict());
        for figure in &self.figures {
            let limit = match figure.limit {
                Some(Limit::AtMost(limit)) => format!("at most {limit:.3}"),
                Some(Limit::AtLeast(limit)) => format!("at least {limit:.3}"),
                Some(Limit::Exactly(limit)) => format!("exactly {limit:.3}"),
                None => String::new(),
            };
            let mark = if figure.holds(1.0) { ' ' } else { '!' };
            let line = format!("    {mark} {:<58} {:>12.3}  {limit}", figure.name, figure.value);
            let _ = writeln!(text, "{}", line.trim_end());
        }
        if !self.not_measured.is_empty() {
            let _ = writeln!(text, "      not measured: {}", self.not_measured);
        }
        text
    }
}

impl Figure {
    fn holds(&self, slack: f64) -> bool {
        match self.limit {
            // What is not a number is no figure at all.
            Some(Limit::AtMost(limit)) => self.value <= limit * slack,
            Some(Limit::AtLeast(limit)) => self.value >= limit / slack,
            Some(Limit::Exactly(limit)) => (limit / slack..=limit * slack).contains(&self.value),
            None => true,
        }
    }
}

/// The differences from an older report that are greater than `noise`, a part of the older value.
pub(crate) fn compare(old: &[Outcome], new: &[Outcome], noise: f64) -> Vec<String> {
    let mut lines = Vec::new();
    for outcome in new {
        let Some(before) = old.iter().find(|before| before.bar == outcome.bar) else { continue };
        for figure in &outcome.figures {
            let Some(was) = before.figures.iter().find(|was| was.name == figure.name) else { continue };
            let change = (figure.value - was.value) / was.value.abs().max(f64::EPSILON);
            if change.abs() > noise {
                lines.push(format!(
                    "bar {}, {}: {:.3} -> {:.3} ({:+.0} %)",
                    outcome.bar,
                    figure.name,
                    was.value,
                    figure.value,
                    change * 100.0
                ));
            }
        }
    }
    lines
}

/// The one in the middle by `key`.
pub(crate) fn median<T>(mut all: Vec<T>, key: impl Fn(&T) -> f64) -> T {
    all.sort_by(|one, other| key(one).total_cmp(&key(other)));
    let middle = all.len() / 2;
    all.swap_remove(middle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_one_in_the_middle() {
        assert_eq!(median(vec![3.0, 9.0, 1.0], |value| *value), 3.0);
    }

    #[test]
    fn a_bar_holds_if_all_its_figures_do() {
        let bar = Outcome::new(1, "one").at_most("a", 1.0, 2.0).at_least("b", 5.0, 4.0).beside("c", 1e9);
        assert_eq!(bar.verdict(), "holds");
        assert_eq!(bar.clone().not_measured("no time").verdict(), "holds in part");
        let missed = bar.at_most("d", 3.0, 2.0);
        assert_eq!((missed.verdict(), missed.holds(1.5)), ("FALLS SHORT", true));
        let exactly = |value| Outcome::new(1, "one").exactly("e", value, 4.0);
        assert_eq!([3.9, 4.0, 4.1].map(|value| exactly(value).holds(1.0)), [false, true, false]);
        assert_eq!([3.5, 4.5, 6.1].map(|value| exactly(value).holds(1.5)), [true, true, false]);
        assert_eq!(Outcome::new(1, "one").at_most("nan", f64::NAN, 1.0).verdict(), "FALLS SHORT");
        assert_eq!(Outcome::new(1, "one").not_measured("why").verdict(), "not measured");
    }

    #[test]
    fn only_what_changed_beyond_noise_is_told() {
        let one = |value| vec![Outcome::new(1, "one").at_most("a", value, 2.0).beside("b", 1.0)];
        assert_eq!(compare(&one(1.0), &one(1.04), 0.05), Vec::<String>::new());
        assert_eq!(compare(&one(1.0), &one(1.2), 0.05), ["bar 1, a: 1.000 -> 1.200 (+20 %)"]);
    }
}
