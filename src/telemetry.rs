//! Log lines: one for each record, on stderr, with the time in UTC.
//!
//! A record says what happened in its message and by which figures in its fields, with units in the names. A failure is
//! logged once, where it is handled.

use std::io::IsTerminal;
use std::panic::PanicHookInfo;

use anyhow::Context;
use tracing::Subscriber;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;

use crate::config::{Log, LogFormat};

/// Starts logging for the whole process, panics included. To be called once.
pub fn init(log: &Log) -> anyhow::Result<()> {
    let filter: Targets =
        log.level.parse().with_context(|| format!("log.level: {:?} is not a tracing filter", log.level))?;
    let terminal = std::io::stderr().is_terminal();
    let json = match log.format {
        LogFormat::Auto => !terminal,
        LogFormat::Json => true,
        LogFormat::Pretty => false,
    };
    let subscriber = if json { json_lines(filter, std::io::stderr) } else { lines(filter, std::io::stderr, terminal) };
    tracing::subscriber::set_global_default(subscriber).context("logging was started before")?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(())
}

type BoxedSubscriber = Box<dyn Subscriber + Send + Sync>;

/// For machines: one JSON object a line, the record's own fields beside `timestamp`, `level` and `target`.
fn json_lines(filter: Targets, writer: impl for<'w> MakeWriter<'w> + Send + Sync + 'static) -> BoxedSubscriber {
    let layer = tracing_subscriber::fmt::layer().json().flatten_event(true).with_span_list(false).with_writer(writer);
    Box::new(tracing_subscriber::registry().with(filter).with(layer))
}

/// For people; coloured where that can be seen.
fn lines(
    filter: Targets,
    writer: impl for<'w> MakeWriter<'w> + Send + Sync + 'static,
    colour: bool,
) -> BoxedSubscriber {
    let layer = tracing_subscriber::fmt::layer().with_ansi(colour).with_writer(writer);
    Box::new(tracing_subscriber::registry().with(filter).with(layer))
}

/// In place of the standard library's hook, whose text of several lines would break up the JSON.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let message = panic.payload_as_str().unwrap_or("(the payload is not text)");
    let location = panic.location().map(ToString::to_string);
    // Empty unless RUST_BACKTRACE asks for it; resolving symbols costs tens of megabytes.
    let backtrace = std::backtrace::Backtrace::capture();
    let backtrace =
        matches!(backtrace.status(), std::backtrace::BacktraceStatus::Captured).then(|| backtrace.to_string());
    tracing::error!(
        thread = thread.name().unwrap_or("unnamed"),
        location,
        backtrace,
        "a thread or task panicked: {message}"
    );
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Keeps what is written.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Kept {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }

        fn json(&self) -> Vec<serde_json::Value> {
            self.text().lines().map(|line| serde_json::from_str(line).expect("one JSON object a line")).collect()
        }
    }

    fn logged(filter: &str, work: impl FnOnce()) -> Kept {
        let kept = Kept::default();
        let writer = kept.clone();
        let subscriber = json_lines(filter.parse().unwrap(), move || writer.clone());
        tracing::subscriber::with_default(subscriber, work);
        kept
    }

    #[test]
    fn a_json_line_has_time_level_target_and_the_fields_beside_them() {
        let kept = logged("info", || {
            tracing::info!(target: "write_api::events", event_id = "night-1", rows = 17_000, duration_ms = 8.5, "done\nnow");
        });
        let lines = kept.json();
        assert_eq!(lines.len(), 1, "a line break in a message stays inside its line");
        let line = &lines[0];
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["target"], "write_api::events");
        assert_eq!(line["message"], "done\nnow");
        assert_eq!(
            (&line["event_id"], &line["rows"], &line["duration_ms"]),
            (&"night-1".into(), &17_000.into(), &8.5.into())
        );
        let time = line["timestamp"].as_str().expect("a text");
        let time = time::OffsetDateTime::parse(time, &time::format_description::well_known::Rfc3339).expect(time);
        assert!(time.offset().is_utc());
    }

    #[test]
    fn the_filter_holds_for_targets() {
        let kept = logged("warn,write_api::kafka=debug", || {
            tracing::info!(target: "write_api::db", "not shown");
            tracing::debug!(target: "write_api::kafka::publisher", "shown");
        });
        assert_eq!(kept.json().len(), 1);
    }

    #[test]
    fn the_format_for_people_is_one_line_as_well() {
        let kept = Kept::default();
        let writer = kept.clone();
        let subscriber = lines("info".parse().unwrap(), move || writer.clone(), false);
        tracing::subscriber::with_default(subscriber, || tracing::warn!(queue = "writeapi-events", "throttled"));
        let text = kept.text();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("WARN") && text.contains(r#"throttled queue="writeapi-events""#), "{text}");
    }

    #[test]
    fn a_panic_is_one_record_with_thread_place_and_message() {
        let kept = logged("info", || {
            // The hook is the process's, and other tests panic on purpose meanwhile; so it speaks for this thread only.
            let me = std::thread::current().id();
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                if std::thread::current().id() == me {
                    log_panic(panic);
                }
            }));
            let _ = std::panic::catch_unwind(|| panic!("listing {} is missing", 42));
            std::panic::set_hook(before);
        });
        let lines = kept.json();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert_eq!(lines[0]["level"], "ERROR");
        assert!(lines[0]["message"].as_str().unwrap().ends_with("panicked: listing 42 is missing"), "{lines:?}");
        assert!(lines[0]["location"].as_str().unwrap().contains("telemetry.rs:"), "{lines:?}");
        assert!(lines[0]["thread"].as_str().unwrap().contains("a_panic_is_one_record"), "{lines:?}");
    }
}
