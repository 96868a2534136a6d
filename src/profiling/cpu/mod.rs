//! CPU time by stack (`profile`).

mod ring;
mod sampler;

use std::collections::HashMap;
use std::time::Duration;

use super::heap::labels;
use super::objects::Objects;
use super::one_at_a_time::Interrupt;
use super::pprof::{Builder, Label, Profile, ValueType};
use super::{now, symbols};
use crate::task::Mark;
use sampler::{Key, Recording};

/// Samples per second of CPU time unless asked for otherwise, as in Go.
pub(super) const HZ: u32 = 100;

/// The most that may be asked for: at twice as many the handler itself would be seen.
pub(super) const MOST_HZ: u32 = 1000;

/// How long samples are taken unless asked for otherwise, as in Go.
pub(super) const SECONDS: Duration = Duration::from_secs(30);

/// The label with the name of the thread.
const THREAD: &str = "thread";

/// Samples for `duration`, `hz` times in each second of CPU time. Blocks for so long. What was sampled until an interrupt is
/// lost, as nobody waits for it.
pub(super) fn profile(duration: Duration, hz: u32, interrupt: &Interrupt) -> anyhow::Result<Profile> {
    let recording = sampler::record(duration, hz, |pause| interrupt.wait(pause))?;
    let mut profile = assembled(&recording);
    symbols::resolve(&mut profile);
    Ok(profile)
}

fn assembled(recording: &Recording) -> Profile {
    let period = recording.period.as_nanos() as i64;
    let mut comments = Vec::new();
    if recording.lost > 0 {
        comments.push(format!("{} samples were lost because too many came at once", recording.lost));
    }
    if let Some((threads, error)) = &recording.refused {
        comments.push(format!("{threads} threads could not be sampled: {error}"));
    }
    let mut builder = Builder::new(Profile {
        sample_types: vec![ValueType::new("samples", "count"), ValueType::new("cpu", "nanoseconds")],
        default_sample_type: "cpu".to_owned(),
        period_type: ValueType::new("cpu", "nanoseconds"),
        period,
        duration_nanos: recording.duration.as_nanos() as i64,
        comments,
        time_nanos: now(),
        ..Profile::default()
    });
    let objects = Objects::of_this_process();
    objects.program_first(&mut builder);
    let thread = |number: i32| recording.threads.get(&number).map_or("?", String::as_str);
    let mut sampled: HashMap<i32, u64> = HashMap::new();
    for (Key { stack, thread: number, mark }, count) in &recording.counts {
        *sampled.entry(*number).or_default() += count;
        // The innermost is the instruction itself; the others are return addresses, and belong to the call before.
        let locations = stack.iter().enumerate().map(|(depth, address)| match depth {
            0 => objects.location(&mut builder, *address),
            _ => objects.location(&mut builder, address.saturating_sub(1)),
        });
        let locations: Vec<usize> = locations.collect();
        let mut labels = labels(Mark::from_index((*mark).into()));
        labels.push(Label::text(THREAD, thread(*number)));
        let count = i64::try_from(*count).unwrap_or(i64::MAX);
        builder.add(&locations, &[count, count.saturating_mul(period)], &labels);
    }
    // Threads of C libraries that block all signals cannot be interrupted, but their clocks can be read.
    for (number, used) in &recording.cpu_time {
        let used = used.as_nanos() as i64;
        if !sampled.contains_key(number) && used >= period {
            let place = builder.place(&format!("[{}: blocks signals]", thread(*number)), "", 0);
            let mut labels = labels(Mark::NONE);
            labels.push(Label::text(THREAD, thread(*number)));
            builder.add(&[place], &[used / period, used], &labels);
        }
    }
    builder.finish()
}
