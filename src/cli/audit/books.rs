//! The legs of the audit that are in Postgres.

use std::time::Duration;

use super::account::Account;
use super::expected::publish_event_id;
use crate::cli::count;
use crate::cli::text::span;
use crate::db::audit::{Listings, PublicationBooks};
use crate::db::{Database, DbError};

/// Sent outbox rows of older runs may be pruned: retention of a queue, of its dead-letter queue, and a day.
pub(super) const PRUNED_AFTER_DAYS: u64 = 14 + 14 + 1;

/// Looks at a run that seems wrong. The tables are read by several statements, and a run at work moves between them; what
/// is really wrong is so each time.
const LOOKS: u32 = 3;
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);

/// The account of a run; `None` if there is no such run any more.
pub(super) async fn account(database: &Database, run_id: &str, settled: bool) -> Result<Option<Account>, DbError> {
    let mut look = 1;
    loop {
        let account = look_at(database, run_id, settled).await?;
        match &account {
            Some(account) if !account.gaps.is_empty() && look < LOOKS => look += 1,
            _ => return Ok(account),
        }
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }
}

async fn look_at(database: &Database, run_id: &str, settled: bool) -> Result<Option<Account>, DbError> {
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
    of_listings(&mut account, "passed_without_row", database.passed_without_row(run_id).await?);
    of_listings(&mut account, "outside_the_set", database.outside_the_set(run_id).await?);
    of_listings(&mut account, "listing_not_updated", database.not_carried(run_id).await?);

    let rows = run.rows_valued + run.rows_failed;
    if let Some(set) = run.set_size
        && set != run.selected
    {
        account.is_wrong("set_mismatch", format!("runs says {} were selected, run_listings has {set}", run.selected));
    }
    if is_complete {
        if rows < run.selected {
            account.is_wrong("incomplete", format!("{} were selected and {rows} have a row", run.selected));
        } else if rows > run.selected {
            // Inserted in the very moment of the opening, such a listing is in the set without being counted.
            let more = count((rows - run.selected).unsigned_abs(), "listing");
            account.notes.push(format!("{more} more than counted at the opening"));
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
        account.unfinished =
            Some(format!("{what}, {rows} of {} done, no progress for {}", run.selected, span(run.still_seconds)));
    }
    if run.state == "failed" {
        account.unfinished = Some(format!("failed, {rows} of {} done; `write-api retry` lets it go on", run.selected));
    }
    if settled && let Some(unfinished) = account.unfinished.clone() {
        account.is_wrong("unfinished", unfinished);
    }
    Ok(Some(account))
}

/// Post-processing exists if and only if the run is complete.
async fn post_processing(
    database: &Database,
    account: &mut Account,
    is_complete: bool,
    completed_seconds: Option<f64>,
) -> Result<(), DbError> {
    let derived = publish_event_id(&account.run_id);
    let outbox = database.outbox_books(&account.run_id, derived).await?;
    let publications = database.publication_books(&account.run_id).await?;
    if !is_complete {
        account.gap("outbox_without_completion", outbox.announcing.unsigned_abs(), [derived]);
        let events = publications.iter().map(|publication| &publication.event_id);
        account.gap("publication_without_completion", publications.len() as u64, events);
        return Ok(());
    }

    let since = completed_seconds.unwrap_or_default();
    let may_be_pruned = since > PRUNED_AFTER_DAYS as f64 * 86_400.0;
    match (outbox.announcing, outbox.derived) {
        (1, 1) if !outbox.derived_is_right => {
            account.is_wrong("outbox_wrong", format!("row {derived} is not the event that publishes this run"));
        }
        (1, 1) if !outbox.derived_sent => {
            account.unfinished = Some(format!("complete for {}, its post-processing is not sent yet", span(since)));
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
    if !publications.iter().any(|publication| publication.event_id == first) && account.unfinished.is_none() {
        account.unfinished = Some(format!("complete for {}, its post-processing has not begun", span(since)));
    }
    for publication in &publications {
        self::publication(account, publication);
    }
    Ok(())
}

fn publication(account: &mut Account, publication: &PublicationBooks) {
    let PublicationBooks { event_id, state, published, quarantined, opened_seconds } = publication;
    let done = published + quarantined;
    let is_complete = state == "complete";
    account.is_published |= is_complete;
    if is_complete && done != account.valued || done > account.valued {
        let valued = account.valued;
        account.is_wrong(
            "publication_mismatch",
            format!(
                "{event_id} is {state} with {published} published and {quarantined} quarantined, {valued} are valued"
            ),
        );
    } else if !is_complete {
        let since = span(*opened_seconds);
        account.unfinished =
            Some(format!("publication {event_id} is {state} for {since}, {done} of {} done", account.valued));
    }
    if *quarantined > 0 {
        account.notes.push(format!("{quarantined} records quarantined by {event_id}"));
    }
}
