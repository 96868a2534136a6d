//! Which dead letters are meant.

use std::time::Duration;

use clap::{Args, ValueEnum};
use time::OffsetDateTime;

use super::letter::Letter;
use crate::cli::text::moment;
use crate::config::Config;
use crate::events::lane;

/// A lane, as the command line names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(super) enum LaneName {
    /// What producers send to.
    Events,
    /// `valuations.refresh`.
    Valuations,
    /// `valuations.publish`.
    PostProcessing,
}

impl LaneName {
    /// As in logs and metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            LaneName::Events => lane::EVENTS,
            LaneName::Valuations => lane::VALUATIONS,
            LaneName::PostProcessing => lane::POST_PROCESSING,
        }
    }

    /// Name of its queue.
    pub(super) fn queue(self, config: &Config) -> &str {
        match self {
            LaneName::Events => &config.lanes.events.queue,
            LaneName::Valuations => &config.lanes.valuations.queue,
            LaneName::PostProcessing => &config.lanes.post_processing.queue,
        }
    }
}

/// Filters. A letter must pass all of them; of one that is given several times, one value is enough.
#[derive(Debug, Args, Default)]
pub(super) struct Filters {
    /// Look at the dead-letter queue of this lane only; may be repeated. Says where to look, and is no filter.
    #[arg(long = "lane", value_name = "LANE", value_enum)]
    lanes: Vec<LaneName>,
    /// Kind of event: listing.upsert, valuations.refresh, valuations.publish, or unknown where it cannot be read. May be
    /// repeated.
    #[arg(long = "kind", value_name = "KIND",
          value_parser = ["listing.upsert", "valuations.refresh", "valuations.publish", "unknown"])]
    kinds: Vec<String>,
    /// Code of the reason, such as invalid_json; received_too_often where SQS itself moved the message, unexplained where
    /// nobody says why it is there. May be repeated.
    #[arg(long = "reason", value_name = "CODE")]
    reasons: Vec<String>,
    /// Sent at this time or later, RFC 3339.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<OffsetDateTime>,
    /// Sent before this time, RFC 3339.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<OffsetDateTime>,
    /// Sent longer ago than this: 90s, 30m, 12h, 7d.
    #[arg(long, value_name = "SPAN", value_parser = span, conflicts_with = "until")]
    older_than: Option<Duration>,
    /// Sent less long ago than this: 90s, 30m, 12h, 7d.
    #[arg(long, value_name = "SPAN", value_parser = span, conflicts_with = "since")]
    newer_than: Option<Duration>,
    /// Id of the event, or of the message; may be repeated.
    #[arg(long = "id", value_name = "ID")]
    ids: Vec<String>,
}

/// A time span with one unit.
fn span(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no span; give a number with a unit, such as 90s, 30m, 12h or 7d");
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let number: u32 = number.parse().map_err(|_| wrong())?;
    Ok(Duration::from_secs(u64::from(number) * seconds))
}

impl Filters {
    /// Letters with this id, wherever they are.
    pub(super) fn by_id(id: &str) -> Self {
        Filters { ids: vec![id.to_owned()], ..Filters::default() }
    }

    /// For verbs that change something: without a filter only by saying so.
    pub(super) fn check(&self, all: bool) -> Result<(), String> {
        let filters = !self.kinds.is_empty()
            || !self.reasons.is_empty()
            || !self.ids.is_empty()
            || self.since.is_some()
            || self.until.is_some()
            || self.older_than.is_some()
            || self.newer_than.is_some();
        match (filters, all) {
            (false, false) => {
                Err("give a filter (--kind, --reason, --id, a time), or --all for everything; --lane only \
                                   says where to look"
                    .to_owned())
            }
            (true, true) => Err("--all means everything: leave it out, or the filters".to_owned()),
            _ => Ok(()),
        }
    }

    /// The lanes asked for, or all, each once.
    pub(super) fn lanes(&self) -> Vec<LaneName> {
        let all = [LaneName::Events, LaneName::Valuations, LaneName::PostProcessing];
        all.into_iter().filter(|lane| self.lanes.is_empty() || self.lanes.contains(lane)).collect()
    }

    /// Whether the letter passes. One whose time is not known passes no filter of time.
    pub(super) fn match_(&self, letter: &Letter) -> bool {
        let now = OffsetDateTime::now_utc();
        // A span that goes back beyond the calendar goes back to its beginning.
        let ago = |span| now.saturating_sub(time::Duration::try_from(span).unwrap_or(time::Duration::MAX));
        let since = self.since.or(self.newer_than.map(ago));
        let until = self.until.or(self.older_than.map(ago));
        let is_one_of = |wanted: &[String], value: &str| wanted.is_empty() || wanted.iter().any(|w| w == value);
        is_one_of(&self.kinds, letter.kind)
            && is_one_of(&self.reasons, &letter.code)
            && (self.ids.is_empty() || self.ids.iter().any(|id| letter.has_id(id)))
            && since.is_none_or(|since| letter.sent_at.is_some_and(|sent_at| sent_at >= since))
            && until.is_none_or(|until| letter.sent_at.is_some_and(|sent_at| sent_at < until))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_one_unit() {
        assert_eq!(span("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(span("7d"), Ok(Duration::from_secs(604_800)));
        for wrong in ["", "s", "5", "5w", "-1h", "1h30m", "5µ"] {
            assert!(span(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn everything_is_meant_only_if_that_is_said() {
        let lane = Filters { lanes: vec![LaneName::Events], ..Filters::default() };
        let kind = Filters { kinds: vec!["unknown".to_owned()], ..Filters::default() };
        assert!(lane.check(false).is_err() && lane.check(true).is_ok());
        assert!(kind.check(false).is_ok() && kind.check(true).is_err());
    }
}
