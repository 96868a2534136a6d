//! What must have come of an event, in the database and on the topic: made anew from the contract, not by the service's code.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use local_stack::{KafkaTap, partner};
use sqlx::Row;

use super::{Home, LONG, SOON, World, text, until};

impl World {
    /// Listings that the run's cursor has passed without a result: there must be none, whenever one looks.
    pub async fn passed_without_result(&self, id: &str) -> Result<i64> {
        Ok(sqlx::query_scalar(
            "SELECT count(*) FROM runs AS r JOIN listings AS l ON l.listing_id <= r.cursor
             WHERE r.run_id = $1 AND NOT EXISTS
                 (SELECT FROM valuations AS v WHERE v.run_id = r.run_id AND v.listing_id = l.listing_id)",
        )
        .bind(id)
        .fetch_one(&self.database)
        .await?)
    }

    /// Checks that a complete run has one right valuation for each of `homes` and nothing else, that the listings carry
    /// it, that the counts are right, and that its post-processing was sent once.
    pub async fn check_run(&self, id: &str, homes: &[Home]) -> Result<()> {
        let run = self.run(id).await?.with_context(|| format!("no run {id}"))?;
        let count = homes.len() as i64;
        let counts = (run.state.as_str(), run.selected, run.valued, run.failed, run.owned, run.leased);
        ensure!(counts == ("complete", count, count, 0, false, false), "{count} homes, and the run is {run:?}");

        let valuations = sqlx::query(
            "SELECT listing_id, zip_code, list_price_cents, valuation_cents, confidence
             FROM valuations WHERE run_id = $1 ORDER BY listing_id",
        )
        .bind(id)
        .fetch_all(&self.database)
        .await?;
        ensure!(valuations.len() == homes.len(), "{} valuations for {} homes", valuations.len(), homes.len());
        for (row, home) in valuations.iter().zip(homes) {
            let (valuation_cents, confidence) = expected_valuation(home);
            let expected = (home.listing_id, home.zip_code, home.list_price_cents, valuation_cents, confidence);
            let found: (i64, i32, i64, i64, f64) =
                (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?, row.try_get(4)?);
            ensure!(found == expected, "the valuation is {found:?} and should be {expected:?}");
        }

        let different: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM valuations AS v LEFT JOIN listing_valuations AS l USING (listing_id)
             WHERE v.run_id = $1
               AND (l.run_id, l.valuation_cents, l.confidence) IS DISTINCT FROM (v.run_id, v.valuation_cents, v.confidence)",
        )
        .bind(id)
        .fetch_one(&self.database)
        .await?;
        ensure!(different == 0, "{different} listings do not carry their newest valuation");

        let like = format!("%{id}%");
        let sent = "SELECT sent_at IS NOT NULL FROM outbox WHERE body LIKE $1 AND lane = 'post_processing'";
        let sent: Vec<bool> = sqlx::query_scalar(sent).bind(like).fetch_all(&self.database).await?;
        ensure!(sent == [true], "the outbox has {sent:?} for the run");
        Ok(())
    }

    /// Checks that the topic has, for each of `homes`, the one record that follows from the contract, byte by byte; the
    /// same record may be there more than once.
    pub async fn check_records(&self, tap: &KafkaTap, id: &str, homes: &[Home]) -> Result<()> {
        let read = until(&format!("{} records", homes.len()), SOON, async || {
            Ok((tap.distinct_ids() >= homes.len() as u64).then_some(()))
        })
        .await;
        read.with_context(|| format!("{} records, {} distinct", tap.count(), tap.distinct_ids()))?;
        ensure!(tap.missed() == 0, "the broker dropped {} records before they were read", tap.missed());
        let completed_at: String = sqlx::query_scalar(
            "SELECT to_char(completed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US') FROM runs WHERE run_id = $1",
        )
        .bind(id)
        .fetch_one(&self.database)
        .await?;
        let completed_at = format!("{}Z", completed_at.trim_end_matches('0').trim_end_matches('.'));

        let mut expected: BTreeMap<String, ExpectedRecord> = BTreeMap::new();
        for home in homes {
            let record = ExpectedRecord::of(id, home, &completed_at);
            expected.insert(record.headers["ce_id"].clone(), record);
        }
        ensure!(expected.len() == homes.len(), "two homes share a ce_id");
        ensure!(tap.distinct_ids() == homes.len() as u64, "{} distinct records", tap.distinct_ids());
        for record in tap.records() {
            let expected =
                expected.get(record.ce_id()).with_context(|| format!("unexpected {}", text(&record.payload)))?;
            let found =
                ExpectedRecord { key: record.key, value: String::from_utf8(record.payload)?, headers: record.headers };
            ensure!(found == *expected, "the record is\n{found:?}\nand should be\n{expected:?}");
        }
        Ok(())
    }

    /// Nothing waits, nothing is half done, nobody owns anything.
    pub(super) async fn check_work_done(&self) -> Result<()> {
        self.quiet(LONG).await?;
        for (left, statement) in [
            ("events in the outbox", "SELECT count(*) FROM outbox WHERE sent_at IS NULL"),
            (
                "runs",
                "SELECT count(*) FROM runs
                 WHERE state NOT IN ('complete', 'cancelled') OR owner IS NOT NULL OR publisher IS NOT NULL",
            ),
            ("publications", "SELECT count(*) FROM publications WHERE state <> 'complete'"),
            (
                "runs whose counts are wrong",
                "SELECT count(*) FROM runs AS r
                 JOIN LATERAL (SELECT count(*), count(valuation_cents), count(failure)
                               FROM valuations WHERE run_id = r.run_id) AS v (rows, valued, failed) ON true
                 WHERE (r.valued, r.failed) <> (v.valued, v.failed) OR r.state = 'complete' AND r.selected <> v.rows",
            ),
        ] {
            let count = self.number(statement).await?;
            ensure!(count == 0, "{count} {left} are left");
        }
        Ok(())
    }
}

/// What the partner answers for a home.
fn expected_valuation(home: &Home) -> (i64, f64) {
    let valuation = partner::valuation(home.listing_id, home.list_price_cents);
    (valuation.valuation_cents, f64::from(valuation.confidence_percent) / 100.0)
}

/// A Kafka record, made anew from the contract and not by the service's code.
#[derive(Debug, PartialEq)]
struct ExpectedRecord {
    key: String,
    value: String,
    headers: BTreeMap<String, String>,
}

impl ExpectedRecord {
    fn of(run_id: &str, home: &Home, completed_at: &str) -> Self {
        let (valuation, confidence) = expected_valuation(home);
        let Home { listing_id, zip_code, list_price_cents: price } = *home;
        let delta = valuation - price;
        let assessment = match 100 * i128::from(delta) {
            hundredfold if hundredfold >= 5 * i128::from(price) => "undervalued",
            hundredfold if hundredfold <= -5 * i128::from(price) => "overvalued",
            _ => "fair",
        };
        let value = format!(
            "{{\"run_id\":\"{run_id}\",\"listing_id\":{listing_id},\"zip_code\":{zip_code},\
             \"list_price_cents\":{price},\"valuation_cents\":{valuation},\"delta_cents\":{delta},\
             \"delta_ratio\":{},\"assessment\":\"{assessment}\",\"confidence\":{confidence:?}}}",
            ratio(delta, price)
        );
        let namespace = uuid::uuid!("6ba7b812-9dad-11d1-80b4-00c04fd430c8");
        let ce_id = uuid::Uuid::new_v5(&namespace, format!("{run_id}:{listing_id}").as_bytes());
        let headers = [
            ("ce_id", ce_id.to_string()),
            ("ce_type", "writeapi.listing.valued.v1".to_owned()),
            ("ce_specversion", "1.0".to_owned()),
            ("ce_source", "/writeapi".to_owned()),
            ("ce_time", completed_at.to_owned()),
            ("content-type", "application/json".to_owned()),
        ];
        let headers = headers.map(|(name, value)| (name.to_owned(), value)).into();
        Self { key: listing_id.to_string(), value, headers }
    }
}

/// `delta / price` with four decimals, ties to the even one.
fn ratio(delta: i64, price: i64) -> String {
    let (size, price) = (u128::from(delta.unsigned_abs()) * 10_000, u128::from(price.unsigned_abs()));
    let (down, rest) = (size / price, size % price);
    let rounded = match (2 * rest).cmp(&price) {
        std::cmp::Ordering::Less => down,
        std::cmp::Ordering::Greater => down + 1,
        std::cmp::Ordering::Equal => down + down % 2,
    };
    let sign = if delta < 0 && rounded > 0 { "-" } else { "" };
    format!("{sign}{}.{:04}", rounded / 10_000, rounded % 10_000)
}
