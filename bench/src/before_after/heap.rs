//! What memory was held by: heap profiles of the process itself, and their difference in pictures and in words.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use local_stack::http_client;
use serde::Serialize;
use write_api::profiling::pprof::{FlameGraph, Profile, combine, frames};

/// The sample type that says what is held.
const HELD: &str = "inuse_space";
/// What is named in words.
const MOST_HOLDERS: usize = 3;

/// A function of the process that holds memory, with what its callees allocated for it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Holder {
    /// The innermost function of the program's own.
    pub(crate) function: String,
    /// What it calls that allocates most of it; empty if it allocates by itself.
    pub(crate) through: String,
    pub(crate) mib: f64,
}

/// What is held more in one profile than in another.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Growth {
    /// All that grew, in MiB.
    pub(crate) mib: f64,
    /// The functions that hold most of it, the greatest first.
    pub(crate) holders: Vec<Holder>,
    /// A flame graph of the later profile, coloured by what changed.
    #[serde(skip)]
    pub(crate) svg: String,
}

/// Takes a heap profile and keeps it in `file`, for `go tool pprof`.
pub(crate) async fn take(profiling_url: &str, file: &Path) -> Result<Profile> {
    let url = format!("{profiling_url}/debug/pprof/heap");
    let (status, body) = http_client::get(&url).await?;
    ensure!(status.is_success(), "GET {url} answered {status}: {}", String::from_utf8_lossy(&body));
    std::fs::write(file, &body).with_context(|| format!("cannot write {}", file.display()))?;
    Profile::decode(&body).with_context(|| format!("{url} gave no profile"))
}

/// What `late` holds more than `early`.
pub(crate) fn growth(early: &Profile, late: &Profile, title: &str) -> Result<Growth> {
    let difference = combine(&[(late, 1), (early, -1)])?;
    let held = difference.sample_type(HELD).with_context(|| format!("the profiles have no {HELD}"))?;
    let mut graph = FlameGraph::new(title, "bytes");
    for sample in &late.samples {
        let names = frames(late, sample);
        graph.add(names.iter().map(AsRef::as_ref), sample.values[held], 0);
    }
    let mut holders: BTreeMap<String, (i64, BTreeMap<String, i64>)> = BTreeMap::new();
    let mut bytes = 0;
    for sample in &difference.samples {
        let names = frames(&difference, sample);
        let change = sample.values[held];
        graph.add(names.iter().map(AsRef::as_ref), 0, change);
        bytes += change;
        let Some(own) = names.iter().rposition(|name| is_own(name)) else { continue };
        let holder = holders.entry(short(&names[own])).or_default();
        holder.0 += change;
        let through = names.get(own + 1).map(|name| short(name)).unwrap_or_default();
        *holder.1.entry(through).or_default() += change;
    }
    let mib = |bytes: i64| bytes as f64 / 1024.0 / 1024.0;
    let mut holders: Vec<Holder> = holders
        .into_iter()
        .filter(|(_, (change, _))| *change > 0)
        .map(|(function, (change, through))| Holder {
            function,
            through: through.into_iter().max_by_key(|(_, change)| *change).map(|(name, _)| name).unwrap_or_default(),
            mib: mib(change),
        })
        .collect();
    holders.sort_by(|left, right| right.mib.total_cmp(&left.mib));
    holders.truncate(MOST_HOLDERS);
    Ok(Growth { mib: mib(bytes), holders, svg: graph.svg() })
}

/// Whether a function is of the programs that are compared, also as the type that a library's function is for. The wrappers
/// of tasks are around everything and say nothing.
fn is_own(name: &str) -> bool {
    let own = |name: &str| {
        name.starts_with("before::") || (name.starts_with("write_api::") && !name.starts_with("write_api::task::"))
    };
    own(name) || name.strip_prefix('<').is_some_and(own)
}

/// A function's name without closures and the parameters of its types, which say little and are long.
fn short(name: &str) -> String {
    let mut short = String::with_capacity(name.len());
    let mut depth = 0_u32;
    for (index, c) in name.char_indices() {
        match c {
            // `<T as Trait>::f` begins with one, and is its name.
            '<' if index > 0 && !name[..index].ends_with(' ') => depth += 1,
            '>' if depth > 0 => depth -= 1,
            c if depth == 0 => short.push(c),
            _ => {}
        }
    }
    short.replace("::{closure#0}", "").replace("::{{closure}}", "").replace("::::", "::")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_to_what_they_say() {
        assert_eq!(short("before::Worker::listings::{closure#0}"), "before::Worker::listings");
        assert_eq!(short("alloc::vec::Vec<u8, A>::push"), "alloc::vec::Vec::push");
        assert_eq!(
            short("<alloc::string::String as serde::Deserialize>::deserialize"),
            "<alloc::string::String as serde::Deserialize>::deserialize"
        );
    }

    #[test]
    fn the_programs_own_functions_are_told_from_libraries() {
        assert!(is_own("before::Worker::listings") && is_own("<write_api::events::Events as Handler>::handle"));
        assert!(!is_own("sqlx_core::row::get") && !is_own("<alloc::vec::Vec<before::Listing>>::push"));
        assert!(!is_own("<write_api::task::registry::Tracked<F> as core::future::future::Future>::poll"));
    }
}
