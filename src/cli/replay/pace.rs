//! When each event is due.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;

/// How much of a delay `--rate` makes up for afterwards: little, so that no second has many more than it should.
const CATCH_UP: Duration = Duration::from_millis(100);

/// The longest wait for one event: centuries between two events are a mistake, and an instant cannot be that far away.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// How fast events follow each other.
pub(super) enum Pace {
    /// As fast as they are taken.
    Free,
    /// So many a second.
    Rate {
        gap: Duration,
        /// When the next is due.
        next: Option<Instant>,
    },
    /// As their times say, so many times faster.
    Recorded {
        speed: f64,
        /// The first event: when it was sent, and its time.
        first: Option<(Instant, OffsetDateTime)>,
        /// When the one before was due: the order is that of the file.
        before: Option<Instant>,
    },
}

impl Pace {
    pub(super) fn rate(events_per_second: u32) -> Self {
        Pace::Rate { gap: Duration::from_secs(1) / events_per_second, next: None }
    }

    pub(super) fn recorded(speed: f64) -> Self {
        Pace::Recorded { speed, first: None, before: None }
    }

    /// When the next event, which has this `time`, is due; `None` means at once.
    pub(super) fn due(&mut self, time: OffsetDateTime) -> Option<Instant> {
        let now = Instant::now();
        match self {
            Pace::Free => None,
            Pace::Rate { gap, next } => {
                // What a slow moment kept back does not come as a burst.
                let due = next.map_or(now, |next| next.max(now.checked_sub(CATCH_UP).unwrap_or(now)));
                *next = Some(due + *gap);
                Some(due)
            }
            Pace::Recorded { speed, first, before } => {
                let (began, first_time) = *first.get_or_insert((now, time));
                let by_time = began + at_speed(time - first_time, *speed);
                let due = before.map_or(by_time, |before| before.max(by_time));
                *before = Some(due);
                Some(due)
            }
        }
    }

    /// How long `events` take whose times span `recorded`; `None` if that depends on SQS alone.
    pub(super) fn planned(&self, events: u64, recorded: time::Duration) -> Option<Duration> {
        match self {
            Pace::Free => None,
            Pace::Rate { gap, .. } => Some(Duration::from_secs_f64(gap.as_secs_f64() * events as f64)),
            Pace::Recorded { speed, .. } => Some(at_speed(recorded, *speed)),
        }
    }
}

/// A gap between times, so many times shorter; none if it is negative.
fn at_speed(gap: time::Duration, speed: f64) -> Duration {
    let seconds = gap.as_seconds_f64().max(0.0) / speed;
    Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: OffsetDateTime = time::macros::datetime!(2026-01-31 02:00 UTC);

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_kept_and_a_delay_is_no_excuse_for_a_burst() {
        let begin = Instant::now();
        let mut pace = Pace::rate(50);
        let mut due = || pace.due(BEGIN).expect("paced") - begin;
        assert_eq!([due(), due(), due()], [0, 20, 40].map(Duration::from_millis));
        tokio::time::advance(Duration::from_secs(60)).await;
        let late: Vec<Duration> = (0..7).map(|_| due()).collect();
        assert_eq!(late[0], Duration::from_millis(59_900));
        assert_eq!(late[6], Duration::from_millis(60_020));
    }

    #[tokio::test(start_paused = true)]
    async fn recorded_gaps_shrink_by_the_speed_and_an_older_event_follows_at_once() {
        let begin = Instant::now();
        let mut pace = Pace::recorded(10.0);
        let mut due = |seconds: i64| pace.due(BEGIN + time::Duration::seconds(seconds)).expect("paced") - begin;
        let found = [0, 50, 20, -100, 60].map(&mut due);
        assert_eq!(found, [0, 5, 5, 5, 6].map(Duration::from_secs));
    }

    #[tokio::test(start_paused = true)]
    async fn the_widest_gap_at_the_lowest_speed_is_only_long() {
        let mut pace = Pace::recorded(0.001);
        let times = [time::macros::datetime!(0000-01-01 0:00 UTC), time::macros::datetime!(9999-12-31 0:00 UTC)];
        let begin = Instant::now();
        assert_eq!(times.map(|time| pace.due(time).expect("paced") - begin), [Duration::ZERO, LONGEST]);
    }
}
