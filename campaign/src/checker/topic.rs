//! I4: the topic has a record for each valuation and none for anything else, right byte by byte; repeats are equal.

use std::collections::{BTreeMap, HashMap};

use time::OffsetDateTime;
use time::macros::format_description;
use uuid::Uuid;

use super::{Findings, Valuation, World};

/// A record by its contract.
#[derive(Debug, PartialEq)]
struct Record {
    key: String,
    value: String,
    headers: BTreeMap<String, String>,
}

pub(super) fn check(world: &World<'_>, found: &mut Findings) {
    let observed = world.observed;
    if observed.records_missed > 0 {
        found.add("I4", format!("{} records were gone before they could be read", observed.records_missed));
    }
    let mut expected: HashMap<String, (Record, u64)> = HashMap::new();
    for row in &observed.valuations {
        let Some(completed_at) = world.run(&row.run_id).and_then(|run| run.completed_at) else { continue };
        if let Some(record) = record(row, completed_at) {
            expected.insert(record.headers["ce_id"].clone(), (record, 0));
        }
    }
    for record in &observed.records {
        let value = String::from_utf8_lossy(&record.payload).into_owned();
        let Some((right, times)) = expected.get_mut(record.ce_id()) else {
            found.add("I4", format!("a record of no committed valuation: {value}"));
            continue;
        };
        *times += 1;
        let is = Record { key: record.key.clone(), value, headers: record.headers.clone() };
        if is != *right {
            found.add("I4", format!("the record is {is:?} and should be {right:?}"));
        }
    }
    for (id, (record, times)) in &expected {
        if *times == 0 {
            found.add("I4", format!("no record {id}: {}", record.value));
        }
    }
}

/// `None` for a failed listing: those are not published.
fn record(row: &Valuation, completed_at: OffsetDateTime) -> Option<Record> {
    let Valuation { run_id, listing_id, zip_code, list_price_cents: price, .. } = row;
    let (valuation, confidence) = (row.valuation_cents?, row.confidence?);
    let delta = i128::from(valuation) - i128::from(*price);
    let price_wide = i128::from(*price);
    let assessment = if *price > 0 && delta * 100 >= price_wide * 5 {
        "undervalued"
    } else if *price > 0 && delta * 100 <= price_wide * -5 {
        "overvalued"
    } else {
        "fair"
    };
    let value = format!(
        "{{\"run_id\":\"{run_id}\",\"listing_id\":{listing_id},\"zip_code\":{zip_code},\"list_price_cents\":{price},\
         \"valuation_cents\":{valuation},\"delta_cents\":{delta},\"delta_ratio\":{},\"assessment\":\"{assessment}\",\
         \"confidence\":{confidence:?}}}",
        ratio(delta, price_wide)
    );
    let ce_id = Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("{run_id}:{listing_id}").as_bytes());
    let headers = [
        ("ce_id", ce_id.to_string()),
        ("ce_type", "writeapi.listing.valued.v1".to_owned()),
        ("ce_specversion", "1.0".to_owned()),
        ("ce_source", "/writeapi".to_owned()),
        ("ce_time", rfc3339(completed_at)),
        ("content-type", "application/json".to_owned()),
    ];
    let headers = headers.map(|(name, value)| (name.to_owned(), value)).into();
    Some(Record { key: listing_id.to_string(), value, headers })
}

/// In UTC; the fraction without zeros at its end.
fn rfc3339(at: OffsetDateTime) -> String {
    let seconds = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]");
    let seconds = at.to_offset(time::UtcOffset::UTC).format(seconds).unwrap_or_default();
    match at.nanosecond() {
        0 => format!("{seconds}Z"),
        nanosecond => format!("{seconds}.{}Z", format!("{nanosecond:09}").trim_end_matches('0')),
    }
}

/// `delta / price`, four decimals, ties to the even one; `null` without a price.
fn ratio(delta: i128, price: i128) -> String {
    if price == 0 {
        return "null".to_owned();
    }
    let (size, rest) = (delta.abs() * 10_000 / price, delta.abs() * 10_000 % price);
    let rounded = match (rest * 2).cmp(&price) {
        std::cmp::Ordering::Less => size,
        std::cmp::Ordering::Greater => size + 1,
        std::cmp::Ordering::Equal => size + size % 2,
    };
    let sign = if delta < 0 && rounded > 0 { "-" } else { "" };
    format!("{sign}{}.{:04}", rounded / 10_000, rounded % 10_000)
}
