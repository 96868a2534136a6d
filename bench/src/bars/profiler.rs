//! Bar 11: the service with its profiler and without, side by side: both work on an event of their own data at the same time, on
//! the same processors. In turn, one program's processor time differs by a tenth from one event to the next on a machine with
//! other guests, which is more than what is measured; side by side they share what disturbs them. Instructions would be better
//! still, and virtual machines seldom count them.
//!
//! On are samples of the heap, its listener and budget, and snapshots, each 5 s. Nobody asks for a profile. The books of tasks
//! are kept in both: what they cost is in the profiler's own account, and not in what one takes more than the other.

use anyhow::{Result, ensure};
use local_stack::Exposition;

use crate::ground::{Ground, Service};
use crate::outcome::Outcome;

/// Listings of an event, whose calls are answered at once: enough for a snapshot in each.
const LISTINGS: u32 = 170_000;
/// What the profiler's account tells apart, where nobody asks for a profile.
const PARTS: [&str; 4] = ["bookkeeping", "heap_samples", "snapshots", "wait_stacks"];

pub(crate) async fn profiler_on(ground: &mut Ground, pairs: u32) -> Result<Vec<Outcome>> {
    // Not the same data: one service would relay and publish what the other has done.
    let data = [ground.apart(LISTINGS).await?, ground.apart(LISTINGS).await?];
    ground.partner(0, 0)?;
    let (mut ratios, mut by_order, mut overlap) = (Vec::new(), 0.0_f64, 1.0_f64);
    let (mut memory_on, mut memory_off) = (0.0_f64, 0.0_f64);
    // By the profiler's own account, of one core in each event, and of all that the service took.
    let (mut of_core, mut of_service) = (Vec::new(), 0.0_f64);
    let mut of_parts = PARTS.map(|part| (part, 0.0_f64));
    for pair in 0..pairs {
        let snapshots = tempfile::tempdir()?;
        let directory = snapshots.path().display().to_string();
        let with = [("profiling.snapshots.directory", &*directory), ("profiling.snapshots.interval", "5s")];
        let without = [("profiling.enabled", "false")];
        // Who is first changes: it starts, is warm and gets its event before the other.
        let on_first = pair % 2 == 0;
        let start = async |data, on| ground.service_on(data, if on { &with[..] } else { &without[..] }).await;
        let mut first = start(&data[0], on_first).await?;
        let mut second = start(&data[1], !on_first).await?;
        first.refresh(ground, 1_000).await?;
        second.refresh(ground, 1_000).await?;
        let warm = exposition(if on_first { &first } else { &second }).await?;
        ground.partner.reset();
        let (one, other) =
            tokio::try_join!(first.refresh_beside(ground, LISTINGS), second.refresh_beside(ground, LISTINGS))?;
        let valued = ground.partner.stats().distinct_keys;
        ensure!(valued == 2 * u64::from(LISTINGS), "{valued} of twice {LISTINGS} listings valued");
        by_order += one.cpu_seconds / other.cpu_seconds / f64::from(pairs);
        overlap = overlap.min(
            (one.published.min(other.published) - one.sent.max(other.sent))
                / (one.published.max(other.published) - one.sent.min(other.sent)),
        );
        let (mut on, off, on_done, off_done) =
            if on_first { (first, second, one, other) } else { (second, first, other, one) };
        drop(off);
        let before = exposition(&on).await?;
        ensure!(written(&before) > written(&warm), "no snapshot was written in an event beside another: {directory}");
        ratios.push(on_done.cpu_seconds / off_done.cpu_seconds);
        memory_on += on_done.peak.rss_mib / f64::from(pairs);
        memory_off += off_done.peak.rss_mib / f64::from(pairs);
        // Alone, it does twice as much a second, and so does its profiler. A snapshot belongs to what is looked at, and comes 5 s
        // after the last one at the soonest: where an event takes less than that, a second one follows.
        let (mut seconds, mut cpu_seconds) = (0.0, 0.0);
        let after = loop {
            let done = on.refresh(ground, LISTINGS).await?;
            seconds += done.published - done.sent;
            cpu_seconds += done.cpu_seconds;
            let page = exposition(&on).await?;
            if written(&page) > written(&before) {
                break page;
            }
            ensure!(seconds < 60.0, "no snapshot was written in {seconds} s of events: {directory}");
        };
        let account = accounted(&after, &[]) - accounted(&before, &[]);
        ensure!(account > 0.0, "the profiler is on, and its own account has not grown: {account} s");
        of_core.push(account / seconds);
        of_service = of_service.max(account / cpu_seconds);
        for (part, most) in &mut of_parts {
            let label = format!(r#"part="{part}""#);
            *most = most.max((accounted(&after, &[&label]) - accounted(&before, &[&label])) / seconds);
        }
    }
    let (ratio, own) = (Spread::of(&ratios), Spread::of(&of_core));
    let mut outcome = Outcome::new(11, "profiler on")
        .at_most("CPU on (samples, snapshots each 5 s) / off, 95 % bound", ratio.upper, 1.03)
        .at_most("by its own account, of one core at most", of_core.iter().copied().fold(0.0, f64::max), 0.01)
        .at_most("peak RSS on, MiB", memory_on, memory_off * 1.03 + 10.0)
        .beside("CPU on / off, mean", ratio.mean)
        .beside("CPU on / off, standard deviation of the pairs", ratio.deviation)
        .beside("CPU of the first / the second, mean: 1 if neither has an advantage", by_order)
        .beside("both at work, of the time of a pair, at least", overlap)
        .beside("by its own account, of one core, mean", own.mean)
        .beside("by its own account, of one core, 95 % bound of the mean", own.upper)
        .beside("by its own account, of the service's CPU at most", of_service)
        .beside("peak RSS off, MiB", memory_off);
    for (part, most) in of_parts {
        outcome = outcome.beside(&format!("of one core at most: {part}"), most);
    }
    Ok(vec![if pairs < 30 { outcome.not_measured(format!("{} of 30 pairs (--full)", 30 - pairs)) } else { outcome }])
}

/// What some measurements of the same say.
struct Spread {
    mean: f64,
    /// Standard deviation of one measurement.
    deviation: f64,
    /// Upper end of the mean's two-sided 95 % interval.
    upper: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let deviation = (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
        Self { mean, deviation, upper: mean + students_t(values.len()) * deviation / n.sqrt() }
    }
}

async fn exposition(service: &Service) -> Result<Exposition> {
    Exposition::read(&service.program.environment().admin_url()).await
}

/// Snapshots that were written so far.
fn written(page: &Exposition) -> f64 {
    page.sum("write_api_snapshots_total", &[r#"result="written""#])
}

/// CPU seconds of the profiler so far, as it counts them itself; of the parts that have all of `labels`.
fn accounted(page: &Exposition, labels: &[&str]) -> f64 {
    page.sum("write_api_profiler_cpu_seconds_total", labels)
}

/// Student's t of the two-sided 95 % interval of a mean of `n` values.
fn students_t(n: usize) -> f64 {
    const BY_DEGREES: [f64; 10] = [12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228];
    match n.saturating_sub(2) {
        index if index < BY_DEGREES.len() => BY_DEGREES[index],
        index if index < 28 => 2.1,
        _ => 2.045,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_above_the_mean_by_what_chance_may_do() {
        let Spread { mean, deviation, upper } = Spread::of(&[1.0, 1.2, 0.9, 1.1, 1.3]);
        assert!((mean - 1.1).abs() < 1e-12 && (deviation - 0.158_113_883).abs() < 1e-9, "{mean} {deviation}");
        // Four degrees of freedom: t is 2.776.
        assert!((upper - 1.296_294_0).abs() < 1e-4, "{upper}");
        assert!((Spread::of(&[1.0; 30]).upper - 1.0).abs() < 1e-12);
    }
}
