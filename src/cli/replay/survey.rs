//! The first reading of the files: every line decoded as the service would, and counted.

use time::OffsetDateTime;

use super::input::{Decoded, Input, Walk};
use super::meter::Meter;
use super::report::Refusals;
use super::state::{Place, Trail};
use super::{Kinds, input};
use crate::events::request::{self, Request};

/// What is in the files, beyond what was sent before.
#[derive(Default)]
pub(super) struct Survey {
    /// Of each file. What grows afterwards is not looked at.
    pub(super) lines: Vec<u64>,
    /// Where sending begins.
    pub(super) start: Trail,
    pub(super) kinds: Kinds,
    /// The earliest and the latest time.
    pub(super) times: Option<(OffsetDateTime, OffsetDateTime)>,
    /// Of the first event, from which `--speed` counts.
    begin: Option<OffsetDateTime>,
    /// Events that are older than the one before them.
    pub(super) backwards: u64,
    pub(super) demand: Demand,
}

/// What refresh events ask of the partner.
#[derive(Default)]
pub(super) struct Demand {
    pub(super) refreshes: u64,
    /// Of those with a limit, all limits together.
    pub(super) listings: u64,
    /// Those without a limit: all listings, or all of some zip codes.
    pub(super) unlimited: u64,
}

impl Survey {
    /// Reads all files, from `place` on if there is one.
    pub(super) fn of(
        inputs: &[Input],
        place: Option<Place<'_>>,
        refusals: &mut Refusals,
        meter: &mut Meter,
    ) -> anyhow::Result<Survey> {
        let mut survey = Survey { lines: vec![0; inputs.len()], ..Survey::default() };
        let sent = place.as_ref().map_or(0, |place| place.lines);
        let mut before = None;
        let mut walk = Walk::new(inputs, &[]);
        let mut events = 0;
        while walk.advance()? {
            let (file, number) = walk.position();
            survey.lines[file] = number;
            let line = walk.line();
            if survey.start.lines < sent {
                survey.start.pass(&line);
                continue;
            }
            match line.decode() {
                Ok(Some(decoded)) => {
                    survey.add(&decoded, &mut before);
                    events += 1;
                    meter.show(events);
                }
                Ok(None) => {}
                Err(refusal) => refusals.add(&walk.place(), &refusal),
            }
        }
        if let Some(place) = place {
            place.check(&survey.start)?;
        }
        Ok(survey)
    }

    fn add(&mut self, decoded: &input::Decoded<'_>, before: &mut Option<OffsetDateTime>) {
        let Decoded { event, request, .. } = decoded;
        // The request says that the kind is known.
        *self.kinds.entry(request::kind(event).unwrap_or("unknown")).or_default() += 1;
        let (first, last) = self.times.unwrap_or((event.time, event.time));
        self.times = Some((first.min(event.time), last.max(event.time)));
        self.begin.get_or_insert(event.time);
        self.backwards += u64::from(before.replace(event.time).is_some_and(|before| event.time < before));
        if let Request::Refresh(data) = request {
            self.demand.refreshes += 1;
            match data.limit {
                Some(limit) => self.demand.listings = self.demand.listings.saturating_add_signed(limit),
                None => self.demand.unlimited += 1,
            }
        }
    }

    /// Events that are to be sent.
    pub(super) fn events(&self) -> u64 {
        self.kinds.values().sum()
    }

    /// From the first event to the latest.
    pub(super) fn span(&self) -> time::Duration {
        let (Some(begin), Some((_, last))) = (self.begin, self.times) else { return time::Duration::ZERO };
        last - begin
    }
}
