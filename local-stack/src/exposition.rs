//! What the service says of itself at /metrics, in Prometheus' text format.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use crate::arithmetic::Histogram;
use crate::http_client;

/// The fast kind of event, as metrics call it.
const FAST: &str = r#"kind="listing.upsert""#;

/// One reading of the page.
#[derive(Clone, Debug)]
pub struct Exposition(String);

impl Exposition {
    /// Reads the page of the service at `admin_url` (http://host:port).
    pub async fn read(admin_url: &str) -> Result<Self> {
        let url = format!("{admin_url}/metrics");
        let (status, body) = http_client::get(&url).await?;
        ensure!(status.is_success(), "GET {url} answered {status}");
        Ok(Self(String::from_utf8(body.to_vec()).with_context(|| format!("{url} is not UTF-8"))?))
    }

    /// Fast events that were finished.
    pub fn fast_events_done(&self) -> u64 {
        self.samples("write_api_events_total", &[FAST, r#"outcome="done""#]).map(|(_, value)| value as u64).sum()
    }

    /// Times of fast events from the start of their task to its outcome, in seconds.
    pub fn fast_event_seconds(&self) -> Histogram {
        let mut below = 0.0;
        let buckets = self.samples("write_api_event_duration_seconds_bucket", &[FAST]).filter_map(|(labels, value)| {
            let bound = labels.split_once(r#"le=""#)?.1.split('"').next()?;
            let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().ok()? };
            // Prometheus' buckets include those below them.
            let inside = value - below;
            below = value;
            Some((bound, inside))
        });
        Histogram { buckets: buckets.collect() }
    }

    /// The sum of the samples of `metric` that have all of `labels`, each as it is written there; 0 without any.
    pub fn sum(&self, metric: &str, labels: &[&str]) -> f64 {
        self.samples(metric, labels).map(|(_, value)| value).sum()
    }

    /// The samples of `metric` by kind of event.
    pub fn by_kind(&self, metric: &str) -> BTreeMap<String, f64> {
        let kind = |labels: &str| Some(labels.split_once(r#"kind=""#)?.1.split('"').next()?.to_owned());
        self.samples(metric, &[]).filter_map(|(labels, value)| Some((kind(labels)?, value))).collect()
    }

    /// Labels and value of each sample of `metric` that has all of `wanted` among its labels.
    fn samples<'a>(&'a self, metric: &'a str, wanted: &'a [&str]) -> impl Iterator<Item = (&'a str, f64)> {
        self.0.lines().filter_map(move |line| {
            let (labels, value) = line.strip_prefix(metric)?.strip_prefix('{')?.rsplit_once("} ")?;
            wanted.iter().all(|label| labels.contains(label)).then_some(())?;
            Some((labels, value.parse().ok()?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_of_the_fast_events_are_found_among_the_others() {
        let page = Exposition(
            r#"# HELP write_api_events_total Events.
write_api_events_total{kind="listing.upsert",outcome="done"} 3990
write_api_events_total{kind="listing.upsert",outcome="retried"} 2
write_api_events_total{kind="valuations.refresh",outcome="done"} 1
write_api_event_duration_seconds_bucket{kind="listing.upsert",le="0.005"} 3000
write_api_event_duration_seconds_bucket{kind="listing.upsert",le="0.01"} 3990
write_api_event_duration_seconds_bucket{kind="listing.upsert",le="+Inf"} 3992
write_api_event_duration_seconds_bucket{kind="valuations.refresh",le="+Inf"} 1
write_api_event_duration_seconds_sum{kind="listing.upsert"} 17.5
write_api_event_duration_seconds_count{kind="listing.upsert"} 3992
"#
            .to_owned(),
        );
        assert_eq!(page.fast_events_done(), 3_990);
        let expected = vec![(0.005, 3_000.0), (0.01, 990.0), (f64::INFINITY, 2.0)];
        assert_eq!(page.fast_event_seconds().buckets, expected);
        assert_eq!(page.sum("write_api_events_total", &[r#"outcome="done""#]), 3_991.0);
        assert_eq!(page.sum("write_api_events_total", &[r#"outcome="lost""#]), 0.0);
        let sums = page.by_kind("write_api_event_duration_seconds_count");
        assert_eq!(sums, BTreeMap::from([("listing.upsert".to_owned(), 3_992.0)]));
    }
}
