//! The page: one file, nothing loaded from elsewhere.

use std::fmt::Write as _;

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bench::text::duration;
use local_stack::thousands;

use crate::chart::{Chart, Curve, Span};
use crate::report::{Figures, ROWS, Report, WayReport};
use crate::timeline::Point;
use crate::way::Way;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Processor time is drawn as what was used within this many points, 100 ms each.
const CPU_WINDOW: usize = 5;

/// A row of charts: what it shows, its curves, and the value that every chart's axis reaches.
struct Figure {
    title: &'static str,
    text: &'static str,
    unit: &'static str,
    curves: fn(&WayReport) -> Vec<Curve>,
}

const FIGURES: [Figure; 3] = [
    Figure {
        title: "Memory",
        text: "The graph that raised the alerts: memory rises with an event and stays. Shaded: from an event being sent to its \
               last record. What comes after is taken apart by heap profiles, which cost memory themselves.",
        unit: "MiB",
        curves: |way| vec![curve(way, "resident (RSS)", |p| p.rss_mib), curve(way, "live heap", |p| p.live_mib)],
    },
    Figure {
        title: "Processor time",
        text: "Cores in use, over half a second each.",
        unit: "cores",
        curves: |way| vec![Curve { name: "cores", points: cores(&way.points) }],
    },
    Figure {
        title: "Progress",
        text: "Partner calls made and Kafka records read since the process was ready.",
        unit: "",
        curves: |way| vec![curve(way, "calls", |p| p.calls as f64), curve(way, "records", |p| p.records as f64)],
    },
];

fn curve(way: &WayReport, name: &'static str, value: fn(&Point) -> f64) -> Curve {
    Curve { name, points: way.points.iter().map(|point| (point.seconds, value(point))).collect() }
}

fn cores(points: &[Point]) -> Vec<(f64, f64)> {
    let used = |pair: &[Point]| {
        let (first, last) = (pair.first()?, pair.last()?);
        let seconds = last.seconds - first.seconds;
        (seconds > 0.0).then(|| (last.seconds, (last.cpu_seconds - first.cpu_seconds) / seconds))
    };
    points.windows(CPU_WINDOW + 1).filter_map(used).collect()
}

/// The page for a report.
pub(crate) fn html(report: &Report) -> Result<String> {
    let mut page = String::new();
    let add = &mut page;
    write!(
        add,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\"><title>WriteApi: before and after</title><style>{STYLE}</style></head>\
         <body><main><h1>Before and after</h1><p class=\"lead\">{}</p>",
        lead(report)
    )?;
    tables(add, report)?;
    for figure in &FIGURES {
        charts(add, report, figure)?;
    }
    heaps(add, report)?;
    notes(add, report)?;
    writeln!(add, "</main><div id=\"tip\" hidden></div><script>{SCRIPT}</script></body></html>")?;
    Ok(page)
}

/// What the page shows, in a sentence, of the greatest event.
fn lead(report: &Report) -> String {
    let greatest = |way: Way| {
        let way = report.ways.iter().find(|report| report.way == way)?;
        way.events.iter().max_by_key(|event| event.rows)
    };
    let (Some(before), Some(ours)) = (greatest(Way::Before), greatest(Way::Ours)) else { return String::new() };
    format!(
        "For {} listings the old way's memory rises by <b>{:.0} MiB</b>, and {:.0} of them are still there 10 s after its event; \
         WriteApi's rises by <b>{:.0} MiB</b> for {}, and is {:+.1} MiB against before 10 s after.",
        thousands(ours.rows.into()),
        before.rss_peak_mib - before.rss_before_mib,
        before.rss_after_mib - before.rss_before_mib,
        ours.rss_peak_mib - ours.rss_before_mib,
        duration(ours.wall_seconds),
        ours.rss_after_mib - ours.rss_before_mib,
    )
}

fn tables(add: &mut String, report: &Report) -> Result<()> {
    write!(add, "<section class=\"tables\">")?;
    for (index, rows) in report.settings.rows.iter().enumerate() {
        write!(add, "<table><thead><tr><th>{} listings</th>", thousands((*rows).into()))?;
        for way in &report.ways {
            write!(add, "<th>{}</th>", way.way.name())?;
        }
        write!(add, "</tr></thead><tbody>")?;
        for (name, cell) in ROWS {
            write!(add, "<tr><th>{name}</th>")?;
            for way in &report.ways {
                write!(add, "<td>{}</td>", cell(&way.events[index]))?;
            }
            write!(add, "</tr>")?;
        }
        write!(add, "</tbody></table>")?;
    }
    write!(add, "</section>")?;
    if let Some(scaled) = report.scaled() {
        write!(add, "<p class=\"note\">{scaled}</p>")?;
    }
    Ok(())
}

fn charts(add: &mut String, report: &Report, figure: &Figure) -> Result<()> {
    write!(add, "<section><h2>{}</h2><p>{}</p><p class=\"legend\">", figure.title, figure.text)?;
    let curves: Vec<Vec<Curve>> = report.ways.iter().map(figure.curves).collect();
    for (number, curve) in curves.first().into_iter().flatten().enumerate() {
        write!(add, "<span class=\"key c{number}\"></span>{} ", curve.name)?;
    }
    write!(add, "</p><div class=\"charts\">")?;
    let values = curves.iter().flatten().flat_map(|curve| &curve.points).map(|(_, value)| *value);
    let most = values.fold(0.0, f64::max);
    for (way, curves) in report.ways.iter().zip(&curves) {
        let spans: Vec<Span> =
            way.events.iter().map(|event| Span { from: event.began, to: event.ended, label: label(event) }).collect();
        let chart = Chart {
            title: format!("{}: {}", figure.title, way.way.name()),
            unit: figure.unit,
            most,
            seconds: way.points.last().map_or(0.0, |point| point.seconds),
            curves,
            spans: &spans,
        };
        write!(add, "<figure><figcaption>{}</figcaption>{}</figure>", way.way.name(), chart.svg())?;
    }
    write!(add, "</div></section>")?;
    Ok(())
}

/// What a shaded stretch is.
fn label(event: &Figures) -> String {
    let rows = thousands(event.rows.into());
    if event.is_of_a_part() { format!("{rows}, {} calls", thousands(event.calls.into())) } else { rows }
}

fn heaps(add: &mut String, report: &Report) -> Result<()> {
    write!(
        add,
        "<section><h2>What holds the memory</h2><p>A heap profile in the middle of an event against one from before it. The \
         width of a box is what is held, red is what was not there before. A click zooms in, a click on the lowest box out.</p>"
    )?;
    for way in &report.ways {
        write!(add, "<h3>{}</h3>", way.way.name())?;
        for heap in &way.heaps {
            let height = picture_height(&heap.growth.svg).unwrap_or(300) + 24;
            write!(
                add,
                "<p>{}</p><iframe style=\"height:{height}px\" title=\"heap of {}, {} listings\" src=\"data:image/svg+xml;base64,{}\"></iframe>",
                escape(&heap.sentence(way.way)),
                way.way.name(),
                thousands(heap.rows.into()),
                STANDARD.encode(&heap.growth.svg)
            )?;
        }
    }
    write!(add, "</section>")?;
    Ok(())
}

/// The height that an SVG file gives itself, in pixels.
fn picture_height(svg: &str) -> Option<u32> {
    svg.split_once(" height=\"")?.1.split('"').next()?.parse().ok()
}

fn notes(add: &mut String, report: &Report) -> Result<()> {
    write!(add, "<section><h2>How it was measured</h2><ul>")?;
    for way in &report.ways {
        write!(add, "<li><b>{}</b>: {}.</li>", way.way.name(), way.way.about())?;
    }
    let machine = &report.machine;
    write!(
        add,
        "<li>One after another on one machine, which also ran Postgres, SQS, Kafka and the partner, who answers after {} ms. Each is \
         one process that first got an event of 100 listings.</li><li>{}.</li>",
        report.settings.partner_latency_ms,
        escape(&machine.text())
    )?;
    let settings: Vec<String> =
        machine.postgres.iter().map(|(name, value)| format!("{} = {}", escape(name), escape(value))).collect();
    write!(add, "<li>Postgres: {}.</li>", settings.join(", "))?;
    write!(
        add,
        "<li>Memory and processor time are Linux's figures for the process; the live heap is the allocator's, jemalloc for all \
         three; the peak is that of Linux too (VmHWM), of the live heap the most of two looks a second; calls were counted by the partner, records by a consumer of the topic, SQS calls by a proxy.</li>"
    )?;
    write!(
        add,
        "<li>Before and The article's fix keep what they have freed, as the runtime of the story's service did: their allocator \
         is told so ({}). WriteApi's gives it back within seconds (dirty_decay_ms:3000). So the memory <i>after</i> tells the \
         allocator's settings apart, and the memory <i>in</i> an event the ways. With WriteApi's settings the old way would hold \
         as much for as long as its event runs: hours.</li>",
        Way::Before.allocator()
    )?;
    if machine.development_build {
        write!(add, "<li><b>Development builds</b>: memory and processor time are not a release's.</li>")?;
    }
    if let Some(rows) = report.settings.rows.first() {
        write!(
            add,
            "<li>The profiles lie beside this page, for <code>go tool pprof -base before-{rows}-early.pb.gz \
             before-{rows}-late.pb.gz</code>.</li>"
        )?;
    }
    write!(add, "</ul></section>")?;
    Ok(())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
