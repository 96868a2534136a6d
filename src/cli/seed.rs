//! `write-api seed`: listings to work with.

use std::io::Read;

use anyhow::Context;
use clap::Args;
use flate2::read::GzDecoder;
use serde::Deserialize;
use serde_json::json;
use time::OffsetDateTime;
use time::macros::datetime;

use crate::config::Config;
use crate::db::Database;
use crate::db::listings::Listing;

pub(super) const HELP: &str = "\
Needs: database.url, and the schema (`write-api migrate`).

Example:
  write-api seed --count 17000

Exit codes: 0 done, 1 failed, 64 wrong usage, 78 wrong configuration.";

/// 21,436 homes of King County, USA; origin in data/README.md.
static KING_COUNTY: &[u8] = include_bytes!("../../data/king-county-listings.csv.gz");

/// Every event that a producer sends is newer than the seed.
const SEEDED_AT: OffsetDateTime = datetime!(2015-06-01 00:00 UTC);

/// Id of the seed as the event that wrote a row.
const SEED_ID: &str = "seed";

/// Beyond the file, a listing is repeated with this added to its id, once for each round: ids of the file have at most
/// ten digits, so the repeats follow in the same order.
const ROUND: i64 = 10_000_000_000;

/// Rows of one statement.
const CHUNK: usize = 1_000;

/// What to load.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// How many listings, in the order of their ids. Beyond the 21,436 real ones the file is repeated, with
    /// 10,000,000,000 added to the ids for each round.
    #[arg(long, value_name = "N", default_value_t = 21_436)]
    count: u64,
}

/// Loads what is missing; listings that exist stay as they are.
pub(super) async fn run(config: &Config, options: &Options) -> anyhow::Result<()> {
    let database = Database::new(&config.database)?;
    let real = king_county()?;
    let mut new = 0;
    let mut chunk = Vec::with_capacity(CHUNK);
    let wanted = usize::try_from(options.count)?;
    for number in 0..wanted {
        let round = i64::try_from(number / real.len())?;
        let mut listing = real[number % real.len()].clone();
        listing.listing_id += round * ROUND;
        listing.description = Some(description(&listing));
        listing.attributes = Some(attributes(&listing));
        chunk.push(listing);
        if chunk.len() == CHUNK || number + 1 == wanted {
            new += database
                .insert_listings(&chunk, SEEDED_AT, SEED_ID)
                .await
                .context("is the schema there? `write-api migrate`")?;
            chunk.clear();
        }
    }
    println!("{new} listings loaded, {} were there", options.count - new);
    Ok(())
}

/// A row of the file.
#[derive(Deserialize)]
struct Row {
    listing_id: i64,
    zip_code: i32,
    list_price_usd: i64,
    listed_on: String,
    bedrooms: i16,
    bathrooms: f32,
    living_square_feet: i32,
    lot_square_feet: i32,
    floors: f32,
    waterfront: bool,
    view_rating: i16,
    condition_rating: i16,
    grade_rating: i16,
    year_built: i16,
    year_renovated: i16,
    latitude: f64,
    longitude: f64,
}

/// The listings of the file, without the text that [`description`] and [`attributes`] add.
pub(super) fn king_county() -> anyhow::Result<Vec<Listing>> {
    let mut text = String::new();
    GzDecoder::new(KING_COUNTY).read_to_string(&mut text).context("the seed data compiled in cannot be unpacked")?;
    let day = time::macros::format_description!("[year]-[month]-[day]");
    csv::Reader::from_reader(text.as_bytes())
        .deserialize::<Row>()
        .map(|row| {
            let row = row?;
            Ok(Listing {
                listing_id: row.listing_id,
                zip_code: row.zip_code,
                list_price_cents: row.list_price_usd * 100,
                bedrooms: row.bedrooms,
                living_square_feet: row.living_square_feet,
                listed_on: Some(time::Date::parse(&row.listed_on, day)?),
                bathrooms: Some(row.bathrooms),
                lot_square_feet: Some(row.lot_square_feet),
                floors: Some(row.floors),
                waterfront: Some(row.waterfront),
                view_rating: Some(row.view_rating),
                condition_rating: Some(row.condition_rating),
                grade_rating: Some(row.grade_rating),
                year_built: Some(row.year_built),
                year_renovated: Some(row.year_renovated),
                latitude: Some(row.latitude),
                longitude: Some(row.longitude),
                description: None,
                attributes: None,
            })
        })
        .collect()
}

/// About 1.5 KB of text that does not compress well, the same for the same listing: real advertisements are not alike,
/// and Postgres would fold repeated words to nothing.
fn description(listing: &Listing) -> String {
    let mut text = format!(
        "Home of {} bedrooms and {} sq ft in {}, built in {}. Photographs:",
        listing.bedrooms,
        listing.living_square_feet,
        listing.zip_code,
        listing.year_built.unwrap_or_default(),
    );
    let mut random = fastrand::Rng::with_seed(listing.listing_id as u64);
    while text.len() < 1_500 {
        text.push(' ');
        text.extend((0..12).map(|_| random.alphanumeric()));
    }
    text
}

/// About 400 bytes of JSON, the same for the same listing.
fn attributes(listing: &Listing) -> serde_json::Map<String, serde_json::Value> {
    let mut random = fastrand::Rng::with_seed(!listing.listing_id as u64);
    let mut code = |length: usize| (0..length).map(|_| random.alphanumeric()).collect::<String>();
    let value = json!({
        "agent": code(24),
        "parcel": format!("{}-{}", listing.zip_code, code(16)),
        "photos": (0..8).map(|_| code(28)).collect::<Vec<_>>(),
        "tour": code(40),
    });
    match value {
        serde_json::Value::Object(map) => map,
        _ => unreachable!("the literal is an object"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_whole_sorted_and_leaves_room_for_repeats() {
        let listings = king_county().expect("the file is compiled in");
        assert_eq!(listings.len(), 21_436);
        assert!(listings.is_sorted_by_key(|listing| listing.listing_id));
        assert!(listings.iter().all(|listing| (0..ROUND).contains(&listing.listing_id)));
    }

    #[test]
    fn texts_have_their_size_and_do_not_change() {
        let listing = &king_county().expect("the file is compiled in")[0];
        let text = description(listing);
        assert!((1_450..1_600).contains(&text.len()), "{} bytes", text.len());
        assert_eq!(text, description(listing));
        let attributes = serde_json::to_string(&attributes(listing)).expect("JSON");
        assert!((350..450).contains(&attributes.len()), "{} bytes", attributes.len());
    }
}
