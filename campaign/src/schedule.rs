//! Which round comes when, from the seed alone: the same seed and number give the same round.

use fastrand::Rng;

use crate::faults::Kind;
use crate::options::Profile;
use crate::round::Spec;
use crate::world::Size;

/// 500 listings, pages of 50.
const SMALL: (i64, u64) = (500, 50);
/// As many as the data of a county; pages as in production.
const FULL: (i64, u64) = (17_000, 1_000);

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
    /// Round `number`, from 0. The first rounds have each kind once.
    #[must_use]
    pub fn round(&self, number: u64) -> Spec {
        // Neighbouring numbers must not give neighbouring streams.
        let seed = Rng::with_seed(self.seed ^ number.wrapping_mul(0x9E37_79B9_7F4A_7C15)).u64(..);
        let mut rng = Rng::with_seed(seed);
        let first = usize::try_from(number).unwrap_or(usize::MAX);
        let kind = match self.kinds.get(first) {
            Some(kind) => *kind,
            // Afterwards every second round is of deaths, where there are some to choose from.
            None if rng.bool() && self.kinds.contains(&Kind::Kill) => Kind::Kill,
            None => self.kinds[rng.usize(..self.kinds.len())],
        };
        let (listings, page) = if self.profile == Profile::Full { FULL } else { SMALL };
        let injections = kind.injections();
        Spec {
            number,
            seed,
            kinds: vec![kind],
            injections,
            points: self.points_of(kind, number, injections, &mut rng),
            size: Size { listings, page, replicas: kind.replicas(), proxies: kind.needs_proxies() },
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
            let turn = usize::try_from(number).unwrap_or(0) * count % points.len();
            points.rotate_left(turn);
        } else {
            rng.shuffle(&mut points);
        }
        points.truncate(count);
        points
    }
}
