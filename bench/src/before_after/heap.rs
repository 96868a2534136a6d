//! What memory was held by: heap profiles of the process itself, and their difference in pictures and in words.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use local_stack::http_client;
use serde::Serialize;
use write_api::profiling::growth::{by_place, rank};
use write_api::profiling::pprof::{Profile, difference_graph};

/// The sample type that says what is held.
const HELD: &str = "inuse_space";
/// What is named in words.
const MOST_HOLDERS: usize = 3;

/// A function that holds memory: the innermost of the program's own, or a library's where none is on the stack.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Holder {
    pub(crate) function: String,
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

/// What `late` holds more than `early`, by the functions of the crate `program`.
pub(crate) fn growth(early: &Profile, late: &Profile, program: &str, title: &str) -> Result<Growth> {
    ensure!(early.sample_types == late.sample_types, "the two heap profiles measure different things");
    let held = late.sample_type(HELD).with_context(|| format!("the profiles have no {HELD}"))?;
    let mib = |bytes: i64| bytes as f64 / 1024.0 / 1024.0;
    let total = |profile: &Profile| profile.samples.iter().map(|sample| sample.values[held]).sum::<i64>();
    let by_function = [early, late].map(|profile| {
        let mut functions: BTreeMap<String, i64> = BTreeMap::new();
        for (place, amount) in by_place(profile, held, program) {
            *functions.entry(place.function).or_default() += amount.own;
        }
        functions
    });
    let grown = rank(&by_function).into_iter().filter(|grown| grown.grew > 0).take(MOST_HOLDERS);
    Ok(Growth {
        mib: mib(total(late) - total(early)),
        holders: grown.map(|grown| Holder { function: grown.key, mib: mib(grown.grew) }).collect(),
        svg: difference_graph(early, late, held, &[], title).svg(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use write_api::profiling::pprof::{Builder, ValueType};

    /// Stacks from the innermost function to the outermost, with MiB.
    fn profile(stacks: &[(&[&str], i64)]) -> Profile {
        let sample_types = vec![ValueType::new(HELD, "bytes")];
        let mut builder = Builder::new(Profile { sample_types, ..Profile::default() });
        for (stack, mib) in stacks {
            let places: Vec<usize> = stack.iter().map(|name| builder.place(name, "", 0)).collect();
            builder.add(&places, &[mib << 20], &[]);
        }
        builder.finish()
    }

    #[test]
    fn what_grew_belongs_to_the_programs_own_functions() {
        let rows: &[&str] = &["alloc::vec::push", "before::Worker::listings::{{closure}}", "before::main"];
        let answers: &[&str] = &["alloc::boxed", "before::Worker::call", "before::main"];
        let gone: &[&str] = &["alloc::boxed", "before::setup", "before::main"];
        let early = profile(&[(rows, 1), (gone, 2)]);
        let late = profile(&[(rows, 41), (answers, 3)]);
        let growth = growth(&early, &late, "before", "grew").unwrap();
        assert!((growth.mib - 41.0).abs() < 1e-9, "{}", growth.mib);
        let holders: Vec<_> = growth.holders.iter().map(|holder| (holder.function.as_str(), holder.mib)).collect();
        assert_eq!(holders, [("before::Worker::listings", 40.0), ("before::Worker::call", 3.0)]);
        assert!(growth.svg.contains("before::Worker::listings") && growth.svg.contains("+41943040"), "{}", growth.svg);
    }
}
