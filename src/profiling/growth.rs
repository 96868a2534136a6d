//! Whose memory it is, where it was asked for, and what of it grew from profile to profile.

use std::collections::BTreeMap;

use super::heap::EVENT_KIND;
use super::pprof::{Profile, Sample, frames};

/// The name of this program's crate, as its functions begin with it.
pub const PROGRAM: &str = env!("CARGO_CRATE_NAME");

/// Samples without the label belong to no event that is known.
const NO_KIND: &str = "-";

/// Whose memory, and which function asked for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The kind of event.
    pub kind: String,
    /// The innermost function of the program on the stack that is more than a wrapper, closures and async blocks under the
    /// function that has them. A stack without any goes by its innermost function.
    pub function: String,
}

/// How much of a sample type there is at a place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    /// Asked for by the function itself, or by a library on its behalf.
    pub own: i64,
    /// The same, and by all functions of the program that it called.
    pub with_callees: i64,
}

/// What a profile has of the sample type at that index, by place; `program` is the name of the crate whose functions count as
/// the program's.
pub fn by_place(profile: &Profile, sample_type: usize, program: &str) -> BTreeMap<Place, Amount> {
    let mut places: BTreeMap<Place, Amount> = BTreeMap::new();
    let is_own = |function: &str| within(program, function).is_some();
    // The tasks only mark and count what others do: they are on most stacks and to blame for none.
    let is_more_than_a_wrapper =
        |function: &str| within(program, function).is_some_and(|rest| !rest.starts_with("task::"));
    for sample in &profile.samples {
        let (value, kind) = (sample.values[sample_type], kind(sample));
        let names = frames(profile, sample);
        let those = |wanted: &dyn Fn(&str) -> bool| -> Vec<&str> {
            // From the innermost to the outermost.
            names.iter().rev().map(|name| plain(name)).filter(|name| wanted(name)).collect()
        };
        let mut functions = those(&is_more_than_a_wrapper);
        if functions.is_empty() {
            functions = those(&is_own);
        }
        if functions.is_empty() {
            functions.push(names.last().map_or("(no stack)", |name| name));
        }
        let mut place = |function: &str, change: fn(&mut Amount, i64)| {
            change(places.entry(Place { kind: kind.to_owned(), function: function.to_owned() }).or_default(), value);
        };
        place(functions[0], |amount, value| amount.own = amount.own.saturating_add(value));
        // A function that calls itself counts once.
        functions.sort_unstable();
        functions.dedup();
        for function in functions {
            place(function, |amount, value| amount.with_callees = amount.with_callees.saturating_add(value));
        }
    }
    places
}

/// What a profile has of the sample type at that index, by kind of event.
pub fn by_kind(profile: &Profile, sample_type: usize) -> BTreeMap<String, i64> {
    let mut kinds: BTreeMap<String, i64> = BTreeMap::new();
    for sample in &profile.samples {
        let sum = kinds.entry(kind(sample).to_owned()).or_default();
        *sum = sum.saturating_add(sample.values[sample_type]);
    }
    kinds
}

fn kind(sample: &Sample) -> &str {
    sample.label(EVENT_KIND).unwrap_or(NO_KIND)
}

/// The name of a program's function, or of the type whose method it is, within the program; of others none.
fn within<'a>(program: &str, function: &'a str) -> Option<&'a str> {
    function.trim_start_matches(['<', '&']).strip_prefix(program)?.strip_prefix("::")
}

/// The function that has a closure or async block.
fn plain(mut function: &str) -> &str {
    while let Some(outer) = function.strip_suffix("::{{closure}}") {
        function = outer;
    }
    function
}

/// Something that was measured again and again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grown<K> {
    /// What it is.
    pub key: K,
    /// By how much more there is of it; see [`rank`].
    pub grew: i64,
    /// How often it was more than the time before.
    pub rose: usize,
    /// All that was measured, in the order of time; 0 where it was not there.
    pub series: Vec<i64>,
}

/// What grew over a series of measurements, the most first, then what shrank.
///
/// The growth is the least of the last quarter, less the median of the first quarter: what came and went within the series
/// is no growth, nor is what a process needs once to get going. Of fewer than eight, it is the last less the first.
pub fn rank<K: Ord + Clone>(measured: &[BTreeMap<K, i64>]) -> Vec<Grown<K>> {
    let mut series: BTreeMap<&K, Vec<i64>> = BTreeMap::new();
    for (index, one) in measured.iter().enumerate() {
        for (key, value) in one {
            series.entry(key).or_insert_with(|| vec![0; measured.len()])[index] = *value;
        }
    }
    let mut ranked: Vec<Grown<K>> = series
        .into_iter()
        .map(|(key, series)| Grown { key: key.clone(), grew: growth(&series), rose: rises(&series), series })
        .collect();
    ranked.sort_by_key(|grown| (std::cmp::Reverse(grown.grew), std::cmp::Reverse(grown.rose)));
    ranked
}

fn growth(series: &[i64]) -> i64 {
    let quarter = (series.len() / 4).max(1);
    let mut first = series[..quarter].to_vec();
    first.sort_unstable();
    let median = first[(quarter - 1) / 2];
    let least = series[series.len() - quarter..].iter().min().copied().unwrap_or(0);
    least.saturating_sub(median)
}

fn rises(series: &[i64]) -> usize {
    series.windows(2).filter(|pair| pair[1] > pair[0]).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profiling::pprof::{Builder, Label, ValueType};

    /// Stacks from the innermost function to the outermost, with kind and bytes.
    fn profile(stacks: &[(&[&str], &str, i64)]) -> Profile {
        let sample_types = vec![ValueType::new("inuse_space", "bytes")];
        let mut builder = Builder::new(Profile { sample_types, ..Profile::default() });
        for (stack, kind, bytes) in stacks {
            let places: Vec<usize> = stack.iter().map(|name| builder.place(name, "", 0)).collect();
            let labels: &[Label] = if kind.is_empty() { &[] } else { &[Label::text(EVENT_KIND, kind)] };
            builder.add(&places, &[*bytes], labels);
        }
        builder.finish()
    }

    #[test]
    fn memory_belongs_to_the_innermost_function_of_the_program() {
        let profile = profile(&[
            (
                &["alloc::vec::push", "<write_api::db::X as T>::read::{{closure}}", "std::go", "write_api::app::run"],
                "a",
                10,
            ),
            (&["write_api::app::run::{{closure}}::{{closure}}", "write_api::app::run"], "a", 5),
            (&["rd_malloc", "rd_thread"], "service", 3),
            (&["alloc::boxed", "<write_api::task::waits::Wait<F> as Future>::poll", "write_api::db::wait"], "a", 4),
            (&["alloc::boxed", "write_api::task::mark::under", "std::go"], "b", 1),
            (&[], "", 2),
        ]);
        let places: Vec<_> = by_place(&profile, 0, PROGRAM)
            .into_iter()
            .map(|(place, amount)| (place.kind, place.function, amount.own, amount.with_callees))
            .collect();
        let row = |kind: &str, function: &str, own, with| (kind.to_owned(), function.to_owned(), own, with);
        assert_eq!(
            places,
            [
                row("-", "(no stack)", 2, 2),
                row("a", "<write_api::db::X as T>::read", 10, 10),
                row("a", "write_api::app::run", 5, 15),
                row("a", "write_api::db::wait", 4, 4),
                row("b", "write_api::task::mark::under", 1, 1),
                row("service", "rd_malloc", 3, 3),
            ]
        );
        let kinds: Vec<_> = by_kind(&profile, 0).into_iter().collect();
        assert_eq!(kinds, [("-".to_owned(), 2), ("a".to_owned(), 19), ("b".to_owned(), 1), ("service".to_owned(), 3)]);
    }

    fn ranked(series: &[(&'static str, &[i64])]) -> Vec<(&'static str, i64, usize)> {
        let count = series[0].1.len();
        let measured: Vec<BTreeMap<&'static str, i64>> = (0..count)
            .map(|index| series.iter().map(|(key, values)| (*key, values[index])).filter(|(_, v)| *v != 0).collect())
            .collect();
        rank(&measured).into_iter().map(|grown| (grown.key, grown.grew, grown.rose)).collect()
    }

    #[test]
    fn what_came_and_went_and_what_was_needed_once_did_not_grow() {
        let seen = ranked(&[
            ("came and went", &[5, 5, 5, 5, 90, 90, 5, 5, 5, 5, 90, 5]),
            ("needed once", &[0, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40, 40]),
            ("leaks", &[10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]),
            ("shrank", &[50, 50, 50, 50, 50, 50, 50, 50, 50, 50, 50, 1]),
            ("a step that stayed", &[1, 1, 1, 1, 1, 1, 1, 9, 9, 9, 9, 9]),
        ]);
        assert_eq!(
            seen,
            [
                ("leaks", 8, 11),
                ("a step that stayed", 8, 1),
                ("came and went", 0, 2),
                ("needed once", 0, 1),
                ("shrank", -49, 0)
            ]
        );
    }

    #[test]
    fn of_two_it_is_the_difference() {
        assert_eq!(ranked(&[("a", &[1, 4]), ("b", &[0, 2])]), [("a", 3, 1), ("b", 2, 1)]);
        assert_eq!(ranked(&[("a", &[7])]), [("a", 0, 0)]);
    }
}
