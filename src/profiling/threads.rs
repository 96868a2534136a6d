//! The threads of the process by what they are for (`threadcreate`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use anyhow::Context as _;

use super::now;
use super::pprof::{Builder, Profile, ValueType};

/// Threads by who creates them, as their names tell: the number at the end of a name only tells one of a kind from another.
pub(super) fn by_creator() -> anyhow::Result<BTreeMap<String, i64>> {
    let mut creators = BTreeMap::new();
    let main = std::process::id().to_string();
    for entry in fs::read_dir("/proc/self/task").context("/proc/self/task")? {
        let number = entry.context("/proc/self/task")?.file_name();
        // It may have ended meanwhile.
        let Ok(name) = fs::read_to_string(format!("/proc/self/task/{}/comm", number.display())) else { continue };
        let creator = if number.to_str() == Some(&main) { "the system" } else { creator(name.trim_end()) };
        let name = if creator == "the system" { "main" } else { kind(name.trim_end()) };
        *creators.entry(format!("{name} (by {creator})")).or_default() += 1;
    }
    Ok(creators)
}

fn kind(name: &str) -> &str {
    name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches(['-', '/', ' ', ':'])
}

fn creator(name: &str) -> &'static str {
    match name {
        name if name.starts_with("rdk:") => "the Kafka client",
        name if name.starts_with("jemalloc") => "jemalloc",
        "worker" | "fast events" => "tokio: workers and blocking calls",
        name if name.starts_with("profile ") => "a profiling request",
        _ => "the service",
    }
}

/// As a profile.
pub(super) fn profile(creators: &BTreeMap<String, i64>) -> Profile {
    let mut builder = Builder::new(Profile {
        sample_types: vec![ValueType::new("threadcreate", "count")],
        period_type: ValueType::new("threadcreate", "count"),
        period: 1,
        time_nanos: now(),
        ..Profile::default()
    });
    for (creator, count) in creators {
        let place = builder.place(creator, "", 0);
        builder.add(&[place], &[*count], &[]);
    }
    builder.finish()
}

/// As text, the most numerous first.
pub(super) fn text(creators: &BTreeMap<String, i64>) -> String {
    let mut sorted: Vec<_> = creators.iter().collect();
    sorted.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let mut text = format!("threadcreate profile: total {}\n", creators.values().sum::<i64>());
    for (creator, count) in sorted {
        let _ = writeln!(text, "{count} @ {creator}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_counted_by_their_names() {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let stopped = std::sync::Arc::new(std::sync::Mutex::new(stopped));
        let (named, ready) = std::sync::mpsc::channel();
        let threads: Vec<_> = (0..3)
            .map(|number| {
                let (stopped, named) = (std::sync::Arc::clone(&stopped), named.clone());
                let thread = std::thread::Builder::new().name(format!("counted-{number}"));
                thread
                    .spawn(move || {
                        named.send(()).unwrap();
                        let _ = stopped.lock().unwrap().recv();
                    })
                    .unwrap()
            })
            .collect();
        (0..3).for_each(|_| ready.recv().unwrap());
        let creators = by_creator().unwrap();
        assert_eq!(creators.get("counted (by the service)"), Some(&3), "{creators:?}");
        assert_eq!(creators.get("main (by the system)"), Some(&1), "{creators:?}");
        let profile = profile(&creators);
        let total: i64 = profile.samples.iter().map(|sample| sample.values[0]).sum();
        assert_eq!(total, creators.values().sum::<i64>());
        assert!(text(&creators).contains("\n3 @ counted (by the service)\n"));
        drop(stop);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}
