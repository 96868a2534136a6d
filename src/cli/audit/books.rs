//! The legs of the audit that are in Postgres.

use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use super::account::{Account, Gap, add_gap};
use super::expected::publish_event_id;
use crate::cli::count;
use crate::cli::text::span;
use crate::db::audit::{Listings, Passed, PublicationBooks, SHOWN};
use crate::db::{Database, DbError};

/// Sent outbox rows of older runs may be pruned: retention of a queue, of its dead-letter queue, and a day.
pub(super) const PRUNED_AFTER_DAYS: u64 = 14 + 14 + 1;

/// Looks at a run that seems wrong. The tables are read by several statements, and a run at work moves between them; what
/// is really wrong is so each time.
const LOOKS: u32 = 3;
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);

/// Whether an event that was written so long ago has left every queue, and its row in the outbox may have been pruned.
fn is_over(seconds: f64) -> bool {
    seconds > PRUNED_AFTER_DAYS as f64 * 86_400.0
}

/// The account of a run; `None` if there is no such run any more. `in_flight` is the longest that the insert of a listing
/// may take.
pub(super) async fn account(
    database: &Database,
    run_id: &str,
    in_flight: Duration,
) -> Result<Option<Account>, DbError> {
    let mut look = 1;
    loop {
        let account = look_at(database, run_id, in_flight.as_secs_f64()).await?;
        match &account {
            Some(account) if !account.gaps.is_empty() && look < LOOKS => look += 1,
            _ => return Ok(account),
        }
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }
}

/// What of the database belongs to no run that there is.
pub(super) async fn of_no_run(database: &Database) -> Result<Vec<Gap>, DbError> {
    let mut gaps = Vec::new();
    let rows = database.rows_of_unknown_runs().await?;
    add_gap(&mut gaps, "rows_of_unknown_run", rows.len() as u64, rows);
    let pruned_after = PRUNED_AFTER_DAYS as f64 * 86_400.0;
    let (current, first) = database.current_of_unknown_runs(pruned_after).await?;
    add_gap(&mut gaps, "current_value_of_unknown_run", current.unsigned_abs(), first);
    Ok(gaps)
}

async fn look_at(database: &Database, run_id: &str, in_flight: f64) -> Result<Option<Account>, DbError> {
    let Some(run) = database.run_books(run_id).await? else { return Ok(None) };
    let mut account = Account {
        run_id: run_id.to_owned(),
        state: run.state.clone(),
        selected: run.selected,
        valued: run.rows_valued,
        failed: run.rows_failed,
        completed_at_ms: run.completed_at_ms,
        ..Account::default()
    };
    let is_complete = run.state == "complete";

    if (run.valued, run.failed) != (run.rows_valued, run.rows_failed) {
        account.is_wrong(
            "count_mismatch",
            format!(
                "runs says {} valued and {} failed, valuations has {} and {}",
                run.valued, run.failed, run.rows_valued, run.rows_failed
            ),
        );
    }
    let of_listings = |account: &mut Account, kind, listings: Listings| {
        account.gap(kind, listings.count.unsigned_abs(), listings.first);
    };
    let rows = run.rows_valued + run.rows_failed;
    let Passed { missing, young } = database.passed_without_row(run_id, in_flight).await?;
    of_listings(&mut account, "passed_without_row", missing);
    if is_complete && rows < run.selected {
        // What was counted at the opening was committed by then.
        of_listings(&mut account, "passed_without_row", young);
    } else if young.count > 0 {
        account.notes.push(format!(
            "no row for {} inserted within {in_flight} s before the opening, which may have been committed after the page \
             was read: {}",
            count(young.count.unsigned_abs(), "listing"),
            shown(&young)
        ));
    }
    of_listings(&mut account, "outside_the_set", database.outside_the_set(run_id).await?);
    of_listings(&mut account, "listing_not_updated", database.not_carried(run_id).await?);

    if let Some(set) = run.set_size
        && set != run.selected
    {
        account.is_wrong("set_mismatch", format!("runs says {} were selected, run_listings has {set}", run.selected));
    }
    if rows > run.selected {
        let more = rows - run.selected;
        let young = database.young_with_row(run_id, in_flight).await?;
        if more > young.count {
            account.gap(
                "excess",
                more.unsigned_abs(),
                [format!("{} were selected and {rows} have a row", run.selected)],
            );
        } else {
            account.notes.push(format!(
                "{} more than the {} counted at the opening, of {} inserted within {in_flight} s before it, which may have \
                 been committed after it: {}",
                count(more.unsigned_abs(), "row"),
                run.selected,
                count(young.count.unsigned_abs(), "listing"),
                shown(&young)
            ));
        }
    }
    if is_complete {
        if rows < run.selected {
            account.is_wrong("incomplete", format!("{} were selected and {rows} have a row", run.selected));
        }
        if run.cursor < run.last_listing_id {
            account.is_wrong(
                "incomplete",
                format!("the cursor is {}, the set ends at {}", run.cursor, run.last_listing_id),
            );
        }
    }
    if run.state != "running" && run.owned {
        account.is_wrong("owned_after_its_end", format!("a run that is {} has an owner", run.state));
    }

    post_processing(database, &mut account, is_complete, run.completed_seconds).await?;
    if run.state == "running" {
        let what = if run.owned { "worked on" } else { "waiting for its event" };
        let still = span(run.still_seconds);
        account.unfinished.push(format!("{what}, {rows} of {} done, no progress for {still}", run.selected));
    }
    if run.state == "failed" {
        account.unfinished.push(format!("failed, {rows} of {} done; `write-api retry` lets it go on", run.selected));
    }
    Ok(Some(account))
}

/// The first listings, and that there are more.
fn shown(listings: &Listings) -> String {
    let ids: Vec<String> = listings.first.iter().map(i64::to_string).collect();
    format!("{}{}", ids.join(", "), if listings.count > SHOWN { ", …" } else { "" })
}

/// What the outbox has of a run.
#[derive(Default)]
struct Outbox {
    /// Rows that announce the run's post-processing.
    announcing: u64,
    /// Of these, those with the id that follows from the run's: one or none.
    derived: u64,
    /// Whether that one's document says what it should.
    derived_is_right: bool,
    /// Whether that one was sent.
    derived_sent: bool,
}

async fn outbox(database: &Database, account: &mut Account, derived: Uuid) -> Result<Outbox, DbError> {
    let run_id = account.run_id.clone();
    // As it is written inside of a document.
    let text = Value::from(run_id.as_str()).to_string();
    let mut outbox = Outbox::default();
    for row in database.outbox_rows(derived, &text).await? {
        let is_derived = row.event_id == derived;
        let document: Value = match serde_json::from_str(&row.body) {
            Ok(document) => document,
            Err(error) if !is_derived => {
                account.is_wrong("outbox_wrong", format!("row {} is no JSON: {error}", row.event_id));
                continue;
            }
            // Told as one that does not say what it should.
            Err(_) => Value::Null,
        };
        if !is_derived && document["data"]["run_id"] != run_id.as_str() {
            continue;
        }
        outbox.announcing += 1;
        if is_derived {
            outbox.derived += 1;
            outbox.derived_sent = row.is_sent;
            outbox.derived_is_right = row.lane == "post_processing"
                && document["id"] == derived.to_string()
                && document["type"] == "writeapi.valuations.publish.v1"
                && document["data"]["run_id"] == run_id.as_str();
        }
    }
    Ok(outbox)
}

/// Post-processing exists if and only if the run is complete.
async fn post_processing(
    database: &Database,
    account: &mut Account,
    is_complete: bool,
    completed_seconds: Option<f64>,
) -> Result<(), DbError> {
    let derived = publish_event_id(&account.run_id);
    let outbox = outbox(database, account, derived).await?;
    let publications = database.publication_books(&account.run_id).await?;
    account.publications = publications.len();
    if !is_complete {
        account.gap("outbox_without_completion", outbox.announcing, [derived]);
        let events = publications.iter().map(|publication| &publication.event_id);
        account.gap("publication_without_completion", publications.len() as u64, events);
        return Ok(());
    }

    let since = completed_seconds.unwrap_or_default();
    let may_be_pruned = is_over(since);
    let mut is_waiting = false;
    match (outbox.announcing, outbox.derived) {
        (1, 1) if !outbox.derived_is_right => {
            account.is_wrong("outbox_wrong", format!("row {derived} is not the event that publishes this run"));
        }
        (1, 1) if !outbox.derived_sent => {
            is_waiting = true;
            account.unfinished.push(format!("complete for {}, its post-processing is not sent yet", span(since)));
        }
        (1, 1) => {}
        (0, _) if may_be_pruned => {
            account.notes.push("its outbox row is older than outbox rows are kept".to_owned());
        }
        (0, _) => account.is_wrong("outbox_missing", format!("no row {derived}")),
        (announcing, derived_rows) => account.is_wrong(
            "outbox_wrong",
            format!("{announcing} rows announce its post-processing, {derived_rows} of them with the id {derived}"),
        ),
    }

    let first = derived.to_string();
    if publications.iter().any(|publication| publication.event_id == first) || is_waiting {
        // Told by the publication, or by the outbox.
    } else if may_be_pruned && publications.is_empty() {
        account.is_wrong(
            "publication_missing",
            format!("complete for {}, and no publication of it was begun: its event cannot come any more", span(since)),
        );
    } else {
        account.unfinished.push(format!("complete for {}, its post-processing has not begun", span(since)));
    }
    account.is_published = publications.iter().any(|publication| publication.state == "complete");
    for publication in &publications {
        self::publication(account, publication);
    }
    Ok(())
}

fn publication(account: &mut Account, publication: &PublicationBooks) {
    let PublicationBooks { event_id, state, published, quarantined, is_behind, since_seconds } = publication;
    let done = published + quarantined;
    let is_complete = state == "complete";
    if is_complete && done != account.valued || done > account.valued {
        let valued = account.valued;
        account.is_wrong(
            "publication_mismatch",
            format!(
                "{event_id} is {state} with {published} published and {quarantined} quarantined, {valued} are valued"
            ),
        );
    } else if is_complete && *is_behind {
        account.is_wrong(
            "publication_mismatch",
            format!("{event_id} is complete and its cursor is before the last valuation"),
        );
    } else if !is_complete {
        let what = format!(
            "publication {event_id} is {state} for {}, {done} of {} done",
            span(*since_seconds),
            account.valued
        );
        match (state.as_str(), account.is_published) {
            ("failed", true) => account.notes.push(format!("{what}; another one is complete")),
            ("failed", false) => {
                account.unfinished.push(format!("{what}; `write-api dlq redrive --reason quarantined` lets it go on"))
            }
            _ => account.unfinished.push(what),
        }
    }
    if *quarantined > 0 {
        account.notes.push(format!("{quarantined} records quarantined by {event_id}"));
    }
}
