//! The leg of the audit that is on Kafka: every record is the one that follows from a valuation, and every valuation that
//! was published has one.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use time::OffsetDateTime;

use super::account::{Account, Gap, add_gap};
use super::books::PRUNED_AFTER_DAYS;
use super::expected::{self, About};
use crate::config;
use crate::db::Database;
use crate::db::audit::{RunHead, ValuationBooks};
use crate::kafka::{Extent, StoredRecord, TopicReader};

/// Listings whose records are looked for at once.
const PAGE: i64 = 10_000;

/// How far the clocks of those who send may be behind that of the database.
const CLOCK_SLACK_MS: f64 = 60_000.0;

/// What was read of the topic, and what is wrong with records of no run.
#[derive(Default)]
pub(super) struct Topic {
    pub(super) records: u64,
    pub(super) gaps: Vec<Gap>,
    /// Records of runs that were pruned since.
    pub(super) of_pruned_runs: u64,
    /// Where each partition begins and ends.
    pub(super) extents: BTreeMap<i32, Extent>,
    /// When the oldest record of each partition was sent, in milliseconds since 1970.
    begins_at_ms: BTreeMap<i32, i64>,
    /// How many were read of each partition.
    read: BTreeMap<i32, i64>,
}

impl Topic {
    /// Whether all records that were sent after `completed_at_ms` must still be there. They were sent later than the oldest
    /// record of their partition, if that was sent before the run was complete.
    fn proves(&self, completed_at_ms: Option<f64>) -> bool {
        self.extents.iter().all(|(partition, extent)| {
            !self.has_holes(*partition, extent)
                && (extent.low == 0
                    || match (self.begins_at_ms.get(partition), completed_at_ms) {
                        (Some(begins_at), Some(completed_at)) => *begins_at as f64 + CLOCK_SLACK_MS <= completed_at,
                        _ => false,
                    })
        })
    }

    /// Whether records between the oldest and the newest are gone, as compaction removes them: of any age.
    fn has_holes(&self, partition: i32, extent: &Extent) -> bool {
        self.read.get(&partition).copied().unwrap_or(0) < extent.high - extent.low
    }

    /// Partitions of which records were removed.
    pub(super) fn cut_partitions(&self) -> usize {
        let is_cut = |(partition, extent): &(&i32, &Extent)| extent.low > 0 || self.has_holes(**partition, extent);
        self.extents.iter().filter(is_cut).count()
    }
}

/// Reads the topic up to where it ended when the reading began and holds it against the accounts. With `of_all_runs`, a
/// record of a run that is in no account is looked at as well.
pub(super) async fn check(
    database: &Database,
    kafka: &config::Kafka,
    accounts: &mut [Account],
    of_all_runs: bool,
    patience: Duration,
) -> anyhow::Result<Topic> {
    let reader = TopicReader::open(kafka).await?;
    let mut topic = Topic { extents: reader.extents().clone(), ..Topic::default() };
    let places: HashMap<String, usize> =
        accounts.iter().enumerate().map(|(place, account)| (account.run_id.clone(), place)).collect();
    let mut checking = Checking {
        database,
        seen: accounts.iter().map(|_| HashSet::new()).collect(),
        accounts,
        heads: HashMap::new(),
        places,
        of_all_runs,
    };
    let mut batches = reader.read(patience);
    while let Some(batch) = batches.recv().await {
        checking.batch(&mut topic, batch?).await?;
    }
    checking.missing(&topic).await?;
    Ok(topic)
}

struct Checking<'a> {
    database: &'a Database,
    accounts: &'a mut [Account],
    /// By place of the account: listings with a right record.
    seen: Vec<HashSet<i64>>,
    /// Runs as they are since a record of theirs was met; `None`: there is no such run.
    heads: HashMap<String, Option<RunHead>>,
    places: HashMap<String, usize>,
    of_all_runs: bool,
}

impl Checking<'_> {
    async fn batch(&mut self, topic: &mut Topic, batch: Vec<StoredRecord>) -> anyhow::Result<()> {
        let mut by_run: BTreeMap<String, Vec<(i64, StoredRecord)>> = BTreeMap::new();
        for record in batch {
            topic.records += 1;
            *topic.read.entry(record.partition).or_default() += 1;
            if let Some(timestamp) = record.timestamp_ms {
                topic.begins_at_ms.entry(record.partition).or_insert(timestamp);
            }
            match expected::about(&record) {
                Some(About { run_id, listing_id }) => by_run.entry(run_id).or_default().push((listing_id, record)),
                None if self.of_all_runs => add_gap(&mut topic.gaps, "record_unreadable", 1, [place(&record)]),
                None => {}
            }
        }
        for (run_id, records) in by_run {
            match self.places.get(&run_id) {
                Some(&account) => self.records(account, &run_id, records).await?,
                None if self.of_all_runs => self.foreign(topic, &run_id, &records).await?,
                None => {}
            }
        }
        Ok(())
    }

    /// The run as it is now, which is after the end of the reading was fixed: what was sent until then was sent by a run
    /// that was complete.
    async fn head(&mut self, run_id: &str) -> anyhow::Result<Option<RunHead>> {
        if !self.heads.contains_key(run_id) {
            let head = self.database.run_head(run_id).await?;
            self.heads.insert(run_id.to_owned(), head);
        }
        Ok(self.heads[run_id].clone())
    }

    /// Records of a run that was opened after the accounts were made, that was pruned, or that never was.
    async fn foreign(
        &mut self,
        topic: &mut Topic,
        run_id: &str,
        records: &[(i64, StoredRecord)],
    ) -> anyhow::Result<()> {
        if self.head(run_id).await?.is_some() {
            return Ok(());
        }
        let kept = Duration::from_secs(PRUNED_AFTER_DAYS * 86_400);
        let oldest_kept = (OffsetDateTime::now_utc() - kept).unix_timestamp() * 1000;
        for (_, record) in records {
            match record.timestamp_ms {
                Some(sent_at) if sent_at < oldest_kept => topic.of_pruned_runs += 1,
                _ => {
                    let example = format!("run {run_id:?}, {}", place(record));
                    add_gap(&mut topic.gaps, "record_of_unknown_run", 1, [example]);
                }
            }
        }
        Ok(())
    }

    async fn records(&mut self, account: usize, run_id: &str, records: Vec<(i64, StoredRecord)>) -> anyhow::Result<()> {
        let head = self.head(run_id).await?;
        let Some(head) = head.filter(|head| head.completed_at.is_some()) else {
            let places = records.iter().map(|(listing_id, record)| format!("{listing_id} ({})", place(record)));
            self.accounts[account].gap("record_without_completion", records.len() as u64, places);
            return Ok(());
        };
        let ids: HashSet<i64> = records.iter().map(|(listing_id, _)| *listing_id).collect();
        let ids: Vec<i64> = ids.into_iter().collect();
        let rows = self.database.valuation_books(run_id, &ids).await?;
        let rows: HashMap<i64, ValuationBooks> = rows.into_iter().map(|row| (row.listing_id, row)).collect();
        let (account, seen) = (&mut self.accounts[account], &mut self.seen[account]);
        for (listing_id, record) in records {
            let Some(row) = rows.get(&listing_id).filter(|row| row.valuation_cents.is_some()) else {
                account.gap("record_without_valuation", 1, [format!("{listing_id} ({})", place(&record))]);
                continue;
            };
            let wrong = expected::differences(&record, run_id, &head, row);
            if !wrong.is_empty() {
                account.gap("record_wrong", 1, [format!("{listing_id} ({}): {}", place(&record), wrong.join(", "))]);
            } else if seen.insert(listing_id) {
                account.records += 1;
            } else {
                account.repeats += 1;
            }
        }
        Ok(())
    }

    /// Valuations of published runs that have no right record.
    async fn missing(&mut self, topic: &Topic) -> anyhow::Result<()> {
        for (account, seen) in self.accounts.iter_mut().zip(&self.seen) {
            if !account.is_published {
                continue;
            }
            let is_proof = topic.proves(account.completed_at_ms);
            let mut after = i64::MIN;
            loop {
                let page = self.database.listings_to_publish(&account.run_id, after, PAGE).await?;
                let Some(last) = page.last() else { break };
                after = *last;
                let missing: Vec<i64> = page.into_iter().filter(|listing_id| !seen.contains(listing_id)).collect();
                if is_proof {
                    account.gap("record_missing", missing.len() as u64, missing);
                } else {
                    account.truncated += missing.len() as u64;
                }
            }
        }
        Ok(())
    }
}

fn place(record: &StoredRecord) -> String {
    format!("partition {} offset {}", record.partition, record.offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_topic_proves_what_is_younger_than_its_oldest_records() {
        let extent = |low| Extent { low, high: 9 };
        let read = [(0, 9), (1, 4)].into();
        let mut topic = Topic { extents: [(0, extent(0)), (1, extent(5))].into(), read, ..Topic::default() };
        assert!(!topic.proves(Some(1e12)), "all of partition 1 was removed");
        topic.begins_at_ms = [(0, 2_000_000), (1, 1_000_000)].into();
        assert!(topic.proves(Some(1_060_000.0)) && topic.proves(Some(2e9)));
        assert!(!topic.proves(Some(1_059_999.0)) && !topic.proves(Some(0.0)) && !topic.proves(None));
        assert_eq!(topic.cut_partitions(), 1);
        topic.extents.insert(1, extent(0));
        topic.read.insert(1, 9);
        assert!(topic.proves(Some(0.0)) && topic.cut_partitions() == 0, "nothing was removed");
        topic.read.insert(0, 8);
        assert!(!topic.proves(Some(2e9)) && topic.cut_partitions() == 1, "a compacted topic proves nothing");
    }
}
