//! Bars of the slow event: 1 to 6, 9 and 10.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use local_stack::{Bound, Exposition, PostgresProxy, ideal};

use crate::bare;
use crate::ground::{Done, Ground, Service};
use crate::outcome::{Outcome, median};

/// Listings of the nightly event.
const NIGHTLY: u32 = 17_000;
/// Of one ten times as great.
const GREAT: u32 = 170_000;
/// And a hundred times.
const HUGE: u32 = 1_700_000;
/// An event before the one that is measured, so that connections, caches and the allocator are as they are in use.
const WARM_UP_MS: u64 = 20;

async fn rest(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

/// Bar 1.
pub(crate) async fn rate_bound(ground: &mut Ground) -> Result<Vec<Outcome>> {
    const RATE: u32 = 1_000;
    ground.seed(NIGHTLY).await?;
    ground.partner(250, RATE)?;
    let mut service = ground.service(&[("partner.rate_per_second", "1000")]).await?;
    let done = service.refresh(ground, NIGHTLY).await?;
    let stats = ground.partner.stats();
    let best = ideal(NIGHTLY, RATE, 1_000, 0.25).context("there is an ideal")?;
    debug_assert_eq!(best.bound, Bound::Rate);
    let took = done.complete - stats.first_call.context("no call")?;
    let refused = stats.by_status.get(&429).copied().unwrap_or(0);
    Ok(vec![
        Outcome::new(1, "rate-bound")
            .at_most("first call to run complete, against the ideal", took / best.seconds, 1.05)
            .at_most("most calls in any sliding second, as they arrive", stats.max_in_one_second as f64, RATE.into())
            .at_most("answers 429", refused as f64, 0.0),
    ])
}

/// Bars 2, 4 and the first half of 6, which are of one run; and the second half of 6 unless `quick`.
pub(crate) async fn latency_bound(ground: &mut Ground, quick: bool) -> Result<Vec<Outcome>> {
    ground.seed(NIGHTLY).await?;
    ground.partner(WARM_UP_MS, 0)?;
    let mut service = ground.service(&[]).await?;
    service.refresh(ground, NIGHTLY).await?;
    rest(if quick { 5 } else { 30 }).await;
    ground.partner(500, 0)?;
    let done = service.refresh(ground, NIGHTLY).await?;
    let stats = ground.partner.stats();
    rest(10).await;
    let after = service.sampler.memory()?;
    let best = ideal(NIGHTLY, 0, 1_000, 0.5).context("there is an ideal")?;
    let Done { before, peak, .. } = done;
    let two = Outcome::new(2, "latency-bound")
        .at_most("event sent to run complete, against the ideal", (done.complete - done.sent) / best.seconds, 1.06)
        .exactly("most calls in flight", stats.max_in_flight as f64, 1_000.0)
        .at_least("mean calls in flight, first call to last answer", stats.mean_in_flight, 940.0)
        .beside("event sent to all published, s", done.published - done.sent);
    let mut four = Outcome::new(4, "memory in the event")
        .at_most("idle RSS, MiB", before.rss_mib, 26.0)
        .at_most("idle RssAnon, MiB", before.anonymous_mib, 14.0)
        .at_most("peak - idle, MiB", peak.rss_mib - before.rss_mib, 28.0);
    let mut six = Outcome::new(6, "memory after").at_most(
        "RSS 10 s after - idle, MiB",
        after.rss_mib - before.rss_mib,
        (before.rss_mib / 10.0).max(3.0),
    );
    if quick {
        four = four.not_measured("idle is 5 s after an event instead of 30");
        six = six.not_measured("50 events in a row; idle is 5 s after an event instead of 30");
    } else {
        let slope = slope_of_events(ground, &mut service, 50).await?;
        six = six.at_most("50 events at 20 ms: slope's upper 95 % bound, MiB an event", slope, 0.05);
    }
    Ok(vec![two, four, six])
}

/// How RSS goes from event to event: the upper bound of the slope's 95 % confidence interval, by least squares.
async fn slope_of_events(ground: &Ground, service: &mut Service, events: u32) -> Result<f64> {
    ground.partner(20, 0)?;
    let mut points = Vec::new();
    for event in 0..events {
        service.refresh(ground, NIGHTLY).await?;
        points.push((f64::from(event), service.sampler.memory()?.rss_mib));
    }
    Ok(upper_slope(&points))
}

/// The upper end of the 95 % confidence interval of the slope of a line through the points.
fn upper_slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let (mean_x, mean_y) = points.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0 / n, sum.1 + point.1 / n));
    let xx: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    let xy: f64 = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let slope = xy / xx;
    let residues: f64 = points.iter().map(|(x, y)| (y - mean_y - slope * (x - mean_x)).powi(2)).sum();
    // Student's t for 48 degrees of freedom; for a few points less it is hardly more.
    slope + 2.01 * (residues / (n - 2.0) / xx).sqrt()
}

/// Bars 3 and 9, the latter by so many turns of the loops and the service.
pub(crate) async fn processor_time(ground: &mut Ground, turns: u32) -> Result<Vec<Outcome>> {
    ground.seed(GREAT).await?;
    ground.partner(0, 0)?;
    let mut service = ground.service(&[]).await?;
    service.refresh(ground, NIGHTLY).await?;
    let allocated = async |service: &Service| -> Result<f64> {
        let page = Exposition::read(&service.program.environment().admin_url()).await?;
        Ok(page.sum("write_api_allocated_bytes_total", &[r#"kind="valuations.refresh""#]))
    };
    let allocated_before = allocated(&service).await?;
    let done = service.refresh(ground, GREAT).await?;
    let allocated = allocated(&service).await? - allocated_before;
    let run: String = sqlx::query_scalar("SELECT run_id FROM runs ORDER BY completed_at DESC NULLS LAST LIMIT 1")
        .fetch_one(&mut service.database)
        .await?;
    // In turn, and a ratio of each turn, since a publication is over in less time than other guests of the machine disturb it for. All
    // publish a run once more, as the loops do; how long the event's own publication took is told beside.
    let (url, topic) = (ground.base.database_url(), &ground.base.names().topic);
    let (mut published, mut reads, mut produces, mut ratios) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..turns {
        let ours = service.publish(&run).await?;
        let read = bare::run(&["read", url, &run], &[]).await?;
        let produce = bare::run(&["produce", ground.stack.kafka().bootstrap(), topic, url, &run], &[]).await?;
        ratios.push(read.seconds.max(produce.seconds) / ours.0);
        published.push(ours);
        reads.push(read);
        produces.push(produce);
    }
    let least_ratio = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let most_ratio = ratios.iter().copied().fold(0.0, f64::max);
    let ratio = median(ratios, |ratio| *ratio);
    let (publishing_seconds, publishing_busy) = median(published, |(seconds, _)| *seconds);
    drop(service);
    ground.partner.reset();
    let calls = bare::run(&["calls", &ground.partner.url(), &GREAT.to_string()], &[]).await?;
    for done in reads.iter().chain(&produces).chain([&calls]) {
        ensure!(done.count == f64::from(GREAT), "a bare loop did {} of {GREAT}: {done:?}", done.count);
    }
    let (read, produce) = (median(reads, |done| done.seconds), median(produces, |done| done.seconds));
    let each = |seconds: f64| seconds / f64::from(GREAT) * 1e6;
    let rate = f64::from(GREAT) / publishing_seconds;
    // What both loops need together of the processors, one row read and one record produced, is the least that publishing can
    // need, and so many processors are all that there is.
    let least = each(read.busy_seconds) + each(produce.busy_seconds);
    let processors = std::thread::available_parallelism()?.get() as f64;
    let (reading, producing) = (read.count / read.seconds, produce.count / produce.seconds);
    Ok(vec![
        Outcome::new(3, "CPU per listing")
            .at_most("service's CPU against the bare client's", done.cpu_seconds / calls.cpu_seconds, 1.6)
            .beside("service, us a listing (the aim is 40)", each(done.cpu_seconds))
            .beside("bare client, us a call", each(calls.cpu_seconds))
            .beside("bare client, calls a second", calls.count / calls.seconds)
            .beside(
                "service, listings a second until the last answer is written",
                f64::from(GREAT) / (done.complete - done.sent),
            )
            .beside("service, bytes allocated a listing, publishing apart", allocated / f64::from(GREAT))
            .beside("event sent to all published, s", done.published - done.sent),
        Outcome::new(9, "publishing")
            .at_least("rate against the slower of the bare loops", ratio, 0.8)
            .beside("the least of the turns", least_ratio)
            .beside("the most of the turns", most_ratio)
            .beside("records a second", rate)
            .beside("bare produce loop, records a second", producing)
            .beside("bare paged read, rows a second", reading)
            .beside("all processes, us a record", each(publishing_busy))
            .beside("all processes, us a record: both bare loops", least)
            .beside("what the processors allow both loops at once, a second", processors / least * 1e6)
            .beside(
                "the event's own publication, records a second",
                f64::from(GREAT) / (done.published - done.publishing),
            )
            .beside("from the calls' end to the publishing's begin, s", done.publishing - done.complete),
    ])
}

/// How many peaks there are of each size, of which the median is taken.
const PEAKS: u32 = 3;

/// Bar 5.
pub(crate) async fn memory_against_rows(ground: &mut Ground, full: bool) -> Result<Vec<Outcome>> {
    let sizes: &[u32] = if full { &[NIGHTLY, GREAT, HUGE] } else { &[NIGHTLY, GREAT] };
    let mut peaks = Vec::new();
    for size in sizes {
        ground.seed(*size).await?;
        ground.partner(0, 0)?;
        let mut of_size = Vec::new();
        for _ in 0..PEAKS {
            let mut service = ground.service(&[]).await?;
            of_size.push(service.refresh(ground, *size).await?.peak);
        }
        peaks.push(median(of_size, |peak| peak.rss_mib));
    }
    let mut outcome = Outcome::new(5, "memory against rows");
    for (size, peak) in sizes.iter().zip(&peaks) {
        outcome = outcome
            .beside(&format!("peak RSS at {size}, MiB"), peak.rss_mib)
            .beside(&format!("heap and stacks at {size}, MiB"), peak.anonymous_mib);
    }
    let ratio = peaks[peaks.len() - 1].rss_mib / peaks[0].rss_mib;
    outcome = outcome.at_most("peak of the most rows against the fewest", ratio, 1.10);
    if !full {
        outcome = outcome.not_measured("1,700,000 listings (--full)");
    }
    Ok(vec![outcome])
}

/// What a statement is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Refresh,
    Publishing,
    /// It renews leases, which the bar leaves out.
    Lease,
    /// It is asked whether or not there is work.
    Beside,
}

/// Of the two statements that each page needs.
const PAGE_READ: &str = "FROM listings AS l WHERE listing_id > $1";
const ANSWERS_WRITTEN: &str = "INSERT INTO valuations";

/// Of the two that publishing needs: one for each of its pages, which are larger, and one for one or more of them.
const VALUATIONS_READ: &str = "FROM valuations WHERE run_id = $1 AND listing_id > $2 AND failure IS NULL";
const CURSOR_WRITTEN: &str = "published = p.published";

/// Words of the statements of publishing: claim, page, cursor, completion.
const PUBLISHING: [&str; 7] = [
    "published_by_another",
    "INSERT INTO publications",
    "FROM publications WHERE event_id = $1",
    "UPDATE publications SET owner",
    "UPDATE publications AS p SET",
    "UPDATE runs SET publisher = $2",
    VALUATIONS_READ,
];

/// Words of the statements that keep leases and hear of cancels of what is held.
const LEASES: [&str; 1] = ["AS held (run_id, token)"];

/// Words of the other statements that come with time: the outbox's relay, health, retention.
const BESIDE: [&str; 6] = [
    "FROM outbox",
    "UPDATE outbox",
    "current_setting(",
    "to_regclass(needed.name)",
    "FOR UPDATE SKIP LOCKED",
    "SET pruned_since",
];

/// Whatever is on no list is the refresh's, BEGIN and COMMIT too, so that nothing new goes uncounted.
fn part_of(sql: &str) -> Part {
    let has = |words: &[&str]| words.iter().any(|word| sql.contains(word));
    [(Part::Publishing, &PUBLISHING[..]), (Part::Lease, &LEASES), (Part::Beside, &BESIDE)]
        .into_iter()
        .find(|(_, words)| has(words))
        .map_or(Part::Refresh, |(part, _)| part)
}

fn on_one_line(sql: &str) -> String {
    sql.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Bar 10: as a proxy that follows Postgres' protocol counts them.
pub(crate) async fn statements(ground: &mut Ground) -> Result<Vec<Outcome>> {
    ground.seed(NIGHTLY).await?;
    ground.partner(20, 0)?;
    let proxy = PostgresProxy::start(ground.base.database_url())?;
    let mut service = ground.service(&[("database.url", proxy.url())]).await?;
    service.refresh(ground, 100).await?;
    let before = proxy.statements();
    service.refresh(ground, NIGHTLY).await?;
    let pages = f64::from(NIGHTLY.div_ceil(1_000));
    let mut outcome = Outcome::new(10, "SQL");
    // Words, how many there must be at least, and how many were seen. While a batch is committed, the next one takes the answers of
    // all calls that are out: it may hold nearly two pages. A page of publishing is three times as large.
    let mut of_pages = [
        (PAGE_READ, pages, 0.0),
        (ANSWERS_WRITTEN, pages / 2.0, 0.0),
        (VALUATIONS_READ, pages / 3.0, 0.0),
        (CURSOR_WRITTEN, 1.0, 0.0),
    ];
    let (mut refreshing, mut publishing, mut leases, mut others) = (0.0, 0.0, 0.0, 0.0);
    for (sql, count) in proxy.statements() {
        let count = (count - before.get(&sql).copied().unwrap_or(0)) as f64;
        let sql = on_one_line(&sql);
        match part_of(&sql) {
            Part::Refresh => refreshing += count,
            Part::Publishing => publishing += count,
            Part::Lease => leases += count,
            Part::Beside => others += count,
        }
        for (_, _, seen) in of_pages.iter_mut().filter(|(words, ..)| sql.contains(words)) {
            *seen += count;
        }
        if count / pages >= 0.5 {
            let name: String = sql.chars().take(50).collect();
            outcome = outcome.beside(&name, count);
        }
    }
    for (words, least, seen) in of_pages {
        ensure!(
            seen >= least,
            "{seen} statements with {words:?} were seen, and there must be {least}: nothing was measured"
        );
    }
    ensure!(3.0 * publishing >= 2.0 * pages, "{publishing} statements of publishing were seen, for {pages} pages");
    Ok(vec![
        outcome
            .at_most("statements a page of 1,000, refresh and what comes with time", (refreshing + others) / pages, 4.0)
            .beside("of the refresh itself, a page", refreshing / pages)
            .beside("with publishing, a page", (refreshing + publishing + others) / pages)
            .beside("leases and cancels, in the whole event", leases)
            .beside("outbox, health and retention, in the whole event", others),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The statements of the service, as its build keeps them.
    fn statements() -> Vec<String> {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../.sqlx");
        let query = |file: std::io::Result<std::fs::DirEntry>| {
            let text = std::fs::read(file.unwrap().path()).unwrap();
            let query: serde_json::Value = serde_json::from_slice(&text).unwrap();
            on_one_line(query["query"].as_str().unwrap())
        };
        std::fs::read_dir(directory).unwrap().map(query).collect()
    }

    #[test]
    fn every_word_of_the_lists_is_one_of_the_services_statements() {
        let statements = statements();
        for word in PUBLISHING.iter().chain(&LEASES).chain(&BESIDE).chain(&[PAGE_READ, ANSWERS_WRITTEN, CURSOR_WRITTEN])
        {
            assert!(statements.iter().any(|sql| sql.contains(word)), "no statement has {word:?}");
        }
    }

    #[test]
    fn a_statement_counts_for_what_it_is_for() {
        let statements = statements();
        let of = |word: &str| -> Vec<Part> {
            statements.iter().filter(|sql| sql.contains(word)).map(|sql| part_of(sql)).collect()
        };
        // Page, answers, claim, opening (all listings, or a list of zip codes), completion.
        assert_eq!(of(PAGE_READ), [Part::Refresh]);
        assert_eq!(of(ANSWERS_WRITTEN), [Part::Refresh]);
        assert_eq!(of("WITH found AS MATERIALIZED"), [Part::Refresh]);
        assert_eq!(of("INSERT INTO runs (run_id"), [Part::Refresh; 2]);
        assert_eq!(of("state = 'complete', completed_at = clock_timestamp(), cursor"), [Part::Refresh]);
        // The cursor of a publication.
        assert_eq!(of(CURSOR_WRITTEN), [Part::Publishing]);
        assert_eq!(of("SET lease_until = clock_timestamp()"), [Part::Lease]);
        // Claimed, sent, given back.
        assert_eq!(of("UPDATE outbox"), [Part::Beside; 3]);
        assert_eq!([part_of("BEGIN"), part_of("COMMIT"), part_of("SELECT news")], [Part::Refresh; 3]);
    }

    #[test]
    fn the_bound_of_a_slope_is_above_it_by_what_the_points_scatter() {
        let line: Vec<_> = (0..50).map(|x| (f64::from(x), 20.0 + 0.5 * f64::from(x))).collect();
        assert!((upper_slope(&line) - 0.5).abs() < 1e-9);
        let scattered: Vec<_> = (0..50).map(|x| (f64::from(x), 20.0 + f64::from(x % 2))).collect();
        let upper = upper_slope(&scattered);
        assert!(upper > 0.005 && upper < 0.03, "{upper}");
    }
}
