//! The fewest seconds that the partner's limits allow, and quantiles of a histogram.

use serde::Serialize;

/// What holds a run back when everything else is perfect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Requests a second.
    Rate,
    /// Calls in flight, each taking the latency.
    Latency,
}

/// The least time from the first call of a run to its last answer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ideal {
    /// In seconds.
    pub seconds: f64,
    /// What makes it so long.
    pub bound: Bound,
}

/// The ideal of `rows` calls at `rate` a second (0: no limit), `in_flight` at once, `latency` seconds each; `None` when
/// nothing holds them back.
pub fn ideal(rows: u32, rate: u32, in_flight: u32, latency: f64) -> Option<Ideal> {
    if rows == 0 {
        return None;
    }
    let rounds = f64::from(rows.div_ceil(in_flight.max(1)));
    let by_latency = Ideal { seconds: rounds * latency, bound: Bound::Latency };
    let by_rate =
        (rate > 0).then(|| Ideal { seconds: f64::from(rows) / f64::from(rate) + latency, bound: Bound::Rate });
    // Even within the rate, no more than `in_flight / latency` calls a second come back.
    let rate_is_tighter = f64::from(rate) * latency <= f64::from(in_flight);
    let ideal = by_rate.filter(|_| rate_is_tighter).unwrap_or(by_latency);
    (ideal.seconds > 0.0).then_some(ideal)
}

/// Counts of a histogram by upper bound, ascending, each bucket with only its own; the last bound is infinite.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// Upper bound and count.
    pub buckets: Vec<(f64, f64)>,
}

impl Histogram {
    /// All observations.
    pub fn count(&self) -> f64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }

    /// What was observed since `earlier`, an older state of the same histogram or an empty one.
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |bound: f64| earlier.buckets.iter().find(|(b, _)| *b == bound).map_or(0.0, |(_, count)| *count);
        Self { buckets: self.buckets.iter().map(|(bound, count)| (*bound, count - before(*bound))).collect() }
    }

    /// The value that the ratio `quantile` of the observations does not exceed, taking those of a bucket as spread
    /// evenly over it. Beyond the last finite bound nothing is known: that bound is given. `None` without observations.
    pub fn quantile(&self, quantile: f64) -> Option<f64> {
        let count = self.count();
        let rank = quantile * count;
        let (mut below, mut lower) = (0.0, 0.0);
        for (upper, inside) in &self.buckets {
            if *inside > 0.0 && below + inside >= rank {
                let share = ((rank - below) / inside).clamp(0.0, 1.0);
                return Some(if upper.is_finite() { lower + (upper - lower) * share } else { lower });
            }
            below += inside;
            lower = *upper;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tighter_limit_gives_the_ideal() {
        let seconds =
            |rows, rate, in_flight, latency| ideal(rows, rate, in_flight, latency).map(|i| (i.seconds, i.bound));
        assert_eq!(seconds(17_000, 1_000, 1_000, 0.25), Some((17.25, Bound::Rate)));
        assert_eq!(seconds(17_000, 0, 1_000, 0.5), Some((8.5, Bound::Latency)));
        // 1,000 a second would need 2,000 in flight.
        assert_eq!(seconds(17_000, 1_000, 1_000, 2.0), Some((34.0, Bound::Latency)));
        // The last round is not full, and takes as long as a full one.
        assert_eq!(seconds(1_001, 0, 1_000, 0.5), Some((1.0, Bound::Latency)));
        assert_eq!(seconds(17_000, 1_000, 1_000, 0.0), Some((17.0, Bound::Rate)));
        assert_eq!(seconds(17_000, 0, 1_000, 0.0), None);
        assert_eq!(seconds(0, 1_000, 1_000, 0.25), None);
    }

    #[test]
    fn quantiles_lie_within_their_bucket_by_their_rank() {
        let histogram = Histogram { buckets: vec![(0.01, 90.0), (0.02, 0.0), (0.04, 10.0), (f64::INFINITY, 0.0)] };
        // The 99th of 100 is the 9th of 10 in the bucket from 20 to 40 ms.
        let p99 = histogram.quantile(0.99).expect("not empty");
        assert!((p99 - 0.038).abs() < 1e-9, "{p99}");
        let median = histogram.quantile(0.5).expect("not empty");
        assert!((median - 0.01 * 50.0 / 90.0).abs() < 1e-9, "{median}");
        assert_eq!(histogram.quantile(1.0), Some(0.04));
    }

    #[test]
    fn beyond_the_last_bound_nothing_is_made_up() {
        let histogram = Histogram { buckets: vec![(0.5, 1.0), (f64::INFINITY, 9.0)] };
        assert_eq!(histogram.quantile(0.99), Some(0.5));
        assert_eq!(Histogram::default().quantile(0.99), None);
        assert_eq!(Histogram { buckets: vec![(0.5, 0.0), (f64::INFINITY, 0.0)] }.quantile(0.99), None);
    }

    #[test]
    fn what_was_there_before_is_left_out() {
        let before = Histogram { buckets: vec![(0.01, 5.0), (f64::INFINITY, 1.0)] };
        let after = Histogram { buckets: vec![(0.01, 7.0), (f64::INFINITY, 1.0)] };
        assert_eq!(after.since(&before).buckets, vec![(0.01, 2.0), (f64::INFINITY, 0.0)]);
        assert_eq!(after.since(&Histogram::default()), after);
    }
}
