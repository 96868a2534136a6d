//! The live tasks, as Go shows goroutines (`goroutine`).
//!
//! Tasks are not stopped and not polled for it: what is shown is what each of them left in the registry when it last went to
//! wait. A stack has two frames, where the task waits and where it was spawned.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::Location;
use std::time::Duration;

use super::heap::EVENT_KIND;
use super::now;
use super::pprof::{Builder, Label, Profile, ValueType};
use crate::task::places;
use crate::task::registry::Snapshot;

/// Tasks that have neither run nor ended for so long are marked in the text.
const LONG: Duration = Duration::from_secs(60);

/// The tasks as a profile: how many, and how many waits are under way inside them, which for work side by side is more than one
/// a task.
pub(super) fn profile(tasks: &[Snapshot]) -> Profile {
    let mut builder = Builder::new(Profile {
        sample_types: vec![ValueType::new("goroutine", "count"), ValueType::new("waits", "count")],
        default_sample_type: "goroutine".to_owned(),
        period_type: ValueType::new("goroutine", "count"),
        period: 1,
        time_nanos: now(),
        ..Profile::default()
    });
    for task in tasks {
        let spawned = builder.place(&format!("task {}", task.name), task.place.file(), task.place.line().into());
        let state = builder.place(&state(task), task.waits_at.map_or("", Location::file), line_of(task.waits_at));
        builder.add(&[state, spawned], &[1, 0], &[Label::text(EVENT_KIND, task.kind.name())]);
    }
    for row in places::rows() {
        if row.waited.now > 0 {
            let name = format!("waits for {}", row.reason.name());
            let place = builder.place(&name, row.place.map_or("", Location::file), line_of(row.place));
            builder.add(&[place], &[0, row.waited.now as i64], &[Label::text(EVENT_KIND, row.kind.name())]);
        }
    }
    builder.finish()
}

fn line_of(place: Option<&Location>) -> i64 {
    place.map_or(0, |place| place.line().into())
}

fn state(task: &Snapshot) -> String {
    match (task.running, task.waits_at) {
        (true, _) => "running".to_owned(),
        (false, Some(_)) => "waiting".to_owned(),
        (false, None) if task.polls == 0 => "not run yet".to_owned(),
        (false, None) => "waiting, place unknown".to_owned(),
    }
}

fn place(place: Option<&Location>) -> String {
    place.map_or_else(|| "?".to_owned(), |place| format!("{}:{}", place.file(), place.line()))
}

/// The tasks in groups of the same state and places (`debug=1`), the largest group first, then the waits under way.
pub(super) fn grouped(tasks: &[Snapshot]) -> String {
    // By what is the same in a group, which is its text: how many there are, and the age of the oldest.
    let mut groups: BTreeMap<String, (usize, Duration)> = BTreeMap::new();
    for task in tasks {
        let same = format!(
            "{}\n# labels: {{{EVENT_KIND:?}:{:?}}}\n#\t{}\t{}\n#\tspawned\t{}",
            task.name,
            task.kind.name(),
            state(task),
            place(task.waits_at),
            place(Some(task.place))
        );
        let (count, oldest) = groups.entry(same).or_default();
        (*count, *oldest) = (*count + 1, task.age.max(*oldest));
    }
    let mut groups: Vec<_> = groups.into_iter().collect();
    groups.sort_by_key(|(_, (count, _))| std::cmp::Reverse(*count));
    let mut text = format!("goroutine profile: total {}\n", tasks.len());
    for (same, (count, oldest)) in groups {
        let _ = write!(text, "{count} @ {same}\n#\toldest\t{}\n\n", seconds(oldest));
    }
    text.push_str("waits under way (several side by side in one task count each):\n");
    let mut rows: Vec<_> = places::rows().into_iter().filter(|row| row.waited.now > 0).collect();
    rows.sort_by_key(|row| std::cmp::Reverse(row.waited.now));
    for row in rows {
        let (now, reason, kind) = (row.waited.now, row.reason.name(), row.kind.name());
        let _ = writeln!(text, "{now} @ {reason}\t{}\t{EVENT_KIND}={kind}", place(row.place));
    }
    text
}

/// Each task for itself (`debug=2`), the oldest first.
pub(super) fn one_by_one(tasks: &[Snapshot]) -> String {
    let mut text = String::new();
    for task in tasks {
        let state = state(task);
        let since = seconds(task.since);
        let long = if task.since > LONG { ", for long" } else { "" };
        let _ = writeln!(text, "goroutine {} [{state}, {since}{long}]: {}", task.number, task.name);
        let about = task.about.as_deref().unwrap_or("-");
        let _ = writeln!(
            text,
            "\tkind {}, about {about}, age {}, {} polls",
            task.kind.name(),
            seconds(task.age),
            task.polls
        );
        if task.waits_at.is_some() {
            let _ = writeln!(text, "\twaits at {}", place(task.waits_at));
        }
        let _ = writeln!(text, "created by {}\n", place(Some(task.place)));
    }
    text
}

fn seconds(duration: Duration) -> String {
    format!("{:.3} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::registry;
    use crate::task::{For, Kind, identify, spawn_event, wait};

    #[tokio::test]
    async fn a_task_is_shown_with_its_kind_its_event_and_its_places() {
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let line = line!() + 3;
        let task = spawn_event("shown", async move {
            identify(Kind::Planted, "event 9");
            wait(For::Database, gone).await.unwrap();
        });
        let ours = || -> Vec<Snapshot> { registry::live().into_iter().filter(|task| task.name == "shown").collect() };
        while ours().iter().all(|task| task.waits_at.is_none()) {
            tokio::task::yield_now().await;
        }
        let tasks = ours();
        let here = format!("{}:{line}", file!());

        let text = grouped(&tasks);
        assert!(
            text.starts_with("goroutine profile: total 1\n1 @ shown\n# labels: {\"event_kind\":\"planted\"}\n"),
            "{text}"
        );
        assert!(text.contains(&format!("#\twaiting\t{here}\n")), "{text}");
        assert!(text.contains(&format!("1 @ database\t{here}\tevent_kind=planted")), "{text}");

        let text = one_by_one(&tasks);
        assert!(text.contains(": shown\n\tkind planted, about event 9, age 0.") && text.contains(&here), "{text}");

        let profile = profile(&tasks);
        let sample = &profile.samples[0];
        assert_eq!((sample.values.as_slice(), sample.label(EVENT_KIND)), (&[1, 0][..], Some("planted")));
        let lines: Vec<i64> = sample.locations.iter().map(|index| profile.locations[*index].lines[0].line).collect();
        assert_eq!(lines[0], i64::from(line));
        assert_eq!(Profile::decode(&profile.encode()).unwrap().samples.len(), profile.samples.len());
        go.send(()).unwrap();
        task.await.unwrap();
    }
}
