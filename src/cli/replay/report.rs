//! What a replay tells: refused lines, the dry run, the summary.

use std::fmt::{self, Write};
use std::time::Duration;

use time::format_description::well_known::Rfc3339;

use super::Kinds;
use super::meter::span;
use super::pace::Pace;
use super::survey::{Demand, Survey};
use crate::cli::count;
use crate::config;
use crate::queue::Refusal;

/// Refused lines that an error tells by name; a dry run tells all.
const SHOWN: usize = 10;

/// Lines that the service would refuse.
pub(super) struct Refusals {
    count: u64,
    /// None if they are told as they come.
    kept: Option<Vec<String>>,
}

impl Refusals {
    /// On stdout, as they come, however many.
    pub(super) fn told_at_once() -> Self {
        Refusals { count: 0, kept: None }
    }

    /// The first few, to be told in an error.
    pub(super) fn kept() -> Self {
        Refusals { count: 0, kept: Some(Vec::new()) }
    }

    pub(super) fn add(&mut self, place: &str, refusal: &Refusal) {
        self.count += 1;
        let line = format!("{place}: {}: {}", refusal.code, refusal.reason);
        match &mut self.kept {
            None => println!("{line}"),
            Some(kept) if kept.len() < SHOWN => kept.push(line),
            Some(_) => {}
        }
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }
}

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} that the service would refuse:", count(self.count, "line"))?;
        let kept = self.kept.as_deref().unwrap_or_default();
        for line in kept {
            write!(f, "\n  {line}")?;
        }
        match self.count - kept.len() as u64 {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more; --dry-run tells all"),
        }
    }
}

/// What would be sent, and what follows from it.
pub(super) fn dry_run(survey: &Survey, partner: &config::Partner, pace: Pace) -> String {
    let mut text = String::new();
    let mut line = |line: String| {
        let _ = writeln!(text, "{line}");
    };
    line(format!(
        "{} in {}, nothing was sent",
        count(survey.events(), "event"),
        count(survey.lines.len() as u64, "file")
    ));
    for (kind, number) in &survey.kinds {
        line(format!("  {kind:<20} {number:>10}"));
    }
    if let Some((first, last)) = survey.times {
        // A time that was read can be written.
        let shown = |time: time::OffsetDateTime| time.format(&Rfc3339).unwrap_or_default();
        let recorded = span((last - first).unsigned_abs());
        line(format!("times from {} to {}: {recorded}", shown(first), shown(last)));
    }
    if survey.backwards > 0 {
        line(format!(
            "{} older than the one before: with --speed, such an event follows at once",
            count(survey.backwards, "event")
        ));
    }
    line(match pace.planned(survey.events(), survey.span()) {
        Some(planned) => format!("sending takes {}", span(planned)),
        None => "sending takes as long as SQS does: there is no --rate and no --speed".to_owned(),
    });
    if survey.demand.refreshes > 0 {
        line(demand(&survey.demand, partner));
    }
    text
}

/// What the refresh events cost, by the partner's limits: they share them, so their listings add up.
fn demand(demand: &Demand, partner: &config::Partner) -> String {
    let mut text = count(demand.refreshes, "refresh event");
    let of_limits = format!("{} at most", count(demand.listings, "listing"));
    match (demand.unlimited, demand.refreshes - demand.unlimited) {
        (0, _) => text += &format!(": {of_limits}"),
        (all, 0) => text += &format!(": all listings, {all} times"),
        (all, limited) => text += &format!(": {limited} of {of_limits}, and {all} of all listings"),
    }
    let in_flight = partner.in_flight as u64;
    let listings = if demand.unlimited > 0 && demand.listings == 0 { 1_000_000 } else { demand.listings };
    let what = if demand.unlimited == 0 {
        "the partner's calls take".to_owned()
    } else {
        format!("how many that are only the database knows; {} take", count(listings, "listing"))
    };
    let _ = write!(text, "\n  {what} ");
    let by_answers =
        |answer: Duration| Duration::try_from_secs_f64(listings as f64 / in_flight as f64 * answer.as_secs_f64());
    let slowest = by_answers(partner.request_timeout).map_or("for ever".to_owned(), span);
    let slowest = format!("{slowest} if each takes partner.request_timeout = {}", span(partner.request_timeout));
    let _ = match partner.rate_per_second {
        Some(rate) => {
            let by_rate = span(Duration::from_secs_f64(listings as f64 / f64::from(rate)));
            let answer = Duration::from_secs_f64(in_flight as f64 / f64::from(rate));
            write!(
                text,
                "{by_rate} at partner.rate_per_second = {rate}, if answers come within {} on average \
                 (partner.in_flight = {in_flight}); {slowest}",
                span(answer)
            )
        }
        None => {
            let each = by_answers(Duration::from_secs(1)).map_or("for ever".to_owned(), span);
            write!(
                text,
                "{each} for each second that an answer takes (partner.in_flight = {in_flight}, no rate); {slowest}"
            )
        }
    };
    text
}

/// What was sent.
pub(super) struct Summary {
    pub(super) kinds: Kinds,
    pub(super) queue: String,
    pub(super) took: Duration,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let events: u64 = self.kinds.values().sum();
        let rate = events as f64 / self.took.as_secs_f64().max(0.001);
        writeln!(f, "sent {} to {} in {}, {rate:.0} a second", count(events, "event"), self.queue, span(self.took))?;
        for (kind, number) in &self.kinds {
            writeln!(f, "  {kind:<20} {number:>10}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn partner() -> config::Partner {
        Config::load(None, std::iter::empty(), &[]).expect("the defaults are good").partner
    }

    #[test]
    fn what_refreshes_cost_follows_from_both_limits_of_the_partner() {
        let demand = |refreshes, listings, unlimited| Demand { refreshes, listings, unlimited };
        let text = super::demand(&demand(1, 17_000, 0), &partner());
        assert_eq!(
            text,
            "1 refresh event: 17000 listings at most\n  the partner's calls take 17 s at partner.rate_per_second = 1000, \
             if answers come within 1.0 s on average (partner.in_flight = 1000); 2 min 50 s if each takes \
             partner.request_timeout = 10 s"
        );
        let free = config::Partner { rate_per_second: None, in_flight: 100, ..partner() };
        let text = super::demand(&demand(2, 34_000, 0), &free);
        assert!(
            text.contains("5 min 40 s for each second that an answer takes (partner.in_flight = 100, no rate)"),
            "{text}"
        );
        let text = super::demand(&demand(3, 2_000, 1), &partner());
        assert!(text.starts_with("3 refresh events: 2 of 2000 listings at most, and 1 of all listings\n"), "{text}");
        let text = super::demand(&demand(1, 0, 1), &partner());
        assert!(text.contains("only the database knows; 1000000 listings take 16 min 40 s at"), "{text}");
    }

    #[test]
    fn an_error_names_the_first_refused_lines_and_counts_the_rest() {
        let mut refusals = Refusals::kept();
        for number in 1..=12 {
            refusals.add(&format!("f:{number}"), &Refusal { code: "invalid_json", reason: "why".to_owned() });
        }
        let text = refusals.to_string();
        assert!(text.starts_with("12 lines that the service would refuse:\n  f:1: invalid_json: why\n"), "{text}");
        assert!(text.ends_with("\n  f:10: invalid_json: why\n  and 2 more; --dry-run tells all"), "{text}");
    }
}
