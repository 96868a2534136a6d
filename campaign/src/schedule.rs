//! Which round comes when, from the seed alone: the same seed and number give the same round.

use std::time::Duration;

use fastrand::Rng;

use crate::faults::Kind;
use crate::options::Profile;
use crate::round::Spec;
use crate::world::Size;

/// 500 listings, pages of 50.
const SMALL: Size = Size {
    listings: 500,
    page: 50,
    in_flight: 40,
    rate: 300,
    limit: Duration::from_secs(300),
    recovery: Duration::from_secs(60),
    replicas: 1,
    postgres_proxy: false,
};
/// As many as the data of a county; pages and the partner's limit as in production. A round has several refreshes of all.
const FULL: Size = Size {
    listings: 17_000,
    page: 1_000,
    in_flight: 400,
    rate: 1_000,
    limit: Duration::from_secs(1_800),
    // A burst of work alone takes more than a minute at the partner's rate, and as long again to be published.
    recovery: Duration::from_secs(600),
    replicas: 1,
    postgres_proxy: false,
};

/// Crash points a round.
const POINTS_A_ROUND: usize = 4;

/// Makes rounds.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// The campaign's seed.
    pub seed: u64,
    /// The kinds to choose from.
    pub kinds: Vec<Kind>,
    /// Fault points of the sources.
    pub points: Vec<String>,
    /// How much is done.
    pub profile: Profile,
}

impl Schedule {
    /// How many rounds there must be: each kind once, and then all crash points unless it is the profile for every change.
    #[must_use]
    pub fn least(&self) -> u64 {
        let points =
            if self.profile == Profile::Ci || !self.kinds.contains(&Kind::CrashPoint) { 0 } else { self.points.len() };
        (self.kinds.len() + points.div_ceil(POINTS_A_ROUND)) as u64
    }

    /// Round `number`, from 0.
    #[must_use]
    pub fn round(&self, number: u64) -> Spec {
        // Neighbouring numbers must not give neighbouring streams.
        let seed = Rng::with_seed(self.seed ^ number.wrapping_mul(0x9E37_79B9_7F4A_7C15)).u64(..);
        let mut rng = Rng::with_seed(seed);
        let first = usize::try_from(number).unwrap_or(usize::MAX);
        let kind = match self.kinds.get(first) {
            Some(kind) => *kind,
            None if number < self.least() => Kind::CrashPoint,
            // Afterwards every second round is of deaths, where there are some to choose from.
            None if rng.bool() && self.kinds.contains(&Kind::Kill) => Kind::Kill,
            None => self.kinds[rng.usize(..self.kinds.len())],
        };
        let size = if self.profile == Profile::Full { FULL } else { SMALL };
        let injections = match self.profile {
            Profile::Ci => kind.injections().div_ceil(2),
            _ => kind.injections(),
        };
        Spec {
            number,
            seed,
            kinds: vec![kind],
            injections,
            points: self.points_of(kind, number, injections, &mut rng),
            size: Size { replicas: kind.replicas(), postgres_proxy: kind.needs_postgres_proxy(), ..size },
            planted: None,
        }
    }

    /// Points for a round: crash points in turn, so that all are met; for the others some that the event's own task passes.
    fn points_of(&self, kind: Kind, number: u64, count: usize, rng: &mut Rng) -> Vec<String> {
        let mut points = self.points.clone();
        if matches!(kind, Kind::Panic | Kind::Stall) {
            // The relay and the keeper are not the event's task; a panic there is the end of the process.
            let own = ["events.", "upsert.", "run.", "publication.", "publish.", "forward."];
            points.retain(|point| own.iter().any(|room| point.starts_with(room)));
        }
        if points.is_empty() {
            return points;
        }
        if kind == Kind::CrashPoint {
            // Those of the profile for every change are others each time, all others in turn.
            let turn = usize::try_from(number).unwrap_or(0).saturating_sub(self.kinds.len()) * count;
            let turn = if number < self.kinds.len() as u64 { rng.usize(..points.len()) } else { turn };
            let length = points.len();
            points.rotate_left(turn % length);
        } else {
            rng.shuffle(&mut points);
        }
        points.truncate(count);
        points
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_least_rounds_have_every_kind_and_every_point() {
        let kinds = vec![Kind::Kill, Kind::CrashPoint, Kind::Term];
        let points: Vec<String> = (0..27).map(|number| format!("run.{number}")).collect();
        let schedule = Schedule { seed: 9, kinds: kinds.clone(), points, profile: Profile::Small };
        let rounds: Vec<Spec> = (0..schedule.least()).map(|number| schedule.round(number)).collect();
        let first: Vec<Kind> = rounds.iter().take(3).flat_map(|round| round.kinds.clone()).collect();
        assert_eq!(first, kinds);
        let crashes = rounds.iter().skip(3).filter(|round| round.kinds == [Kind::CrashPoint]);
        let met: BTreeSet<String> = crashes.flat_map(|round| round.points.clone()).collect();
        assert_eq!(met.len(), 27);
        assert_eq!(format!("{:?}", schedule.round(5)), format!("{:?}", schedule.round(5)), "the same again");
    }
}
