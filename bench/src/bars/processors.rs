//! How much of the machine's processors is used: what everything together does, not one process.

use anyhow::{Context, Result};

/// Processor time of all processes since the machine started, in seconds.
pub(crate) fn busy_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat").context("/proc/stat")?;
    parse(&stat).with_context(|| format!("/proc/stat begins with {:?}", stat.lines().next()))
}

fn parse(stat: &str) -> Option<f64> {
    /// User, nice, system; then idle and waiting for disks; then interrupts, of hardware and of software (proc(5)).
    const BUSY: [usize; 5] = [0, 1, 2, 5, 6];
    /// What times are given in, of a second (`USER_HZ`, which is the same on every architecture that is still sold).
    const TICKS: f64 = 100.0;
    let numbers = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    let ticks: Vec<f64> = numbers.map(|number| number.parse().ok()).collect::<Option<_>>()?;
    let busy: Option<f64> = BUSY.iter().map(|index| ticks.get(*index)).sum();
    Some(busy? / TICKS)
}

/// Looks at the processors, in the order of their times.
#[derive(Default)]
pub(crate) struct Looks(Vec<(f64, f64)>);

impl Looks {
    /// One now.
    pub(crate) fn look(&mut self) -> Result<()> {
        self.0.push((crate::ground::now(), busy_seconds()?));
        Ok(())
    }

    /// What was used between two moments, in seconds since 1970; between two looks it is taken to be even.
    pub(crate) fn between(&self, from: f64, to: f64) -> f64 {
        self.at(to) - self.at(from)
    }

    fn at(&self, moment: f64) -> f64 {
        let after = self.0.partition_point(|(time, _)| *time < moment);
        match (after.checked_sub(1).map(|before| self.0[before]), self.0.get(after).copied()) {
            (Some((from, less)), Some((to, more))) if to > from => less + (more - less) * (moment - from) / (to - from),
            (_, Some((_, busy))) | (Some((_, busy)), None) => busy,
            (None, None) => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_idle_or_waits_for_disks_is_not_busy() {
        let stat = "cpu  100 20 30 5000 400 7 3 60 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(parse(stat), Some(1.6));
        assert_eq!((parse("cpu  1 2"), parse("intr 5"), parse("")), (None, None, None));
        assert!(busy_seconds().unwrap() > 0.0);
    }

    #[test]
    fn between_two_looks_it_is_even() {
        let looks = Looks(vec![(10.0, 1.0), (20.0, 5.0), (30.0, 6.0)]);
        assert_eq!(looks.between(10.0, 30.0), 5.0);
        assert_eq!(looks.between(15.0, 25.0), 2.5);
        assert_eq!(looks.between(0.0, 99.0), 5.0);
    }
}
