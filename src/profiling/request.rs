//! What a request for a profile may ask for, in the words of Go's `net/http/pprof` where that has any.

use std::time::Duration;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::heap::{EVENT_KIND, STAGE};
use super::pprof::{Profile, collapsed, flame_graph};
use super::{cpu, failure};

/// The longest time between the two profiles of a difference. The server ends a request after 120 s, and writing takes time.
const MOST_SECONDS: u64 = 100;

/// The options of one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// `seconds=N`: what changed within that time.
    pub seconds: Option<Duration>,
    /// `hz=N`: samples per second of CPU time.
    pub hz: Option<u32>,
    /// `debug=N`: text for people; 0 for none, 2 for more of it where there is more.
    pub debug: u32,
    /// `dump=1`: tokio's own view of its tasks, in programs that have it.
    pub dump: bool,
    /// `gc=1`: unused memory goes back to the system first.
    pub gc: bool,
    /// `force=1`: whoever is taking a profile has to make room.
    pub force: bool,
    /// `format=…`.
    pub format: Format,
}

/// The form of the answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Format {
    /// For `go tool pprof`.
    #[default]
    Pprof,
    /// A line for each stack, its kind of event and stage first.
    Collapsed,
    /// A flame graph.
    Svg,
}

impl Options {
    /// Reads the pairs of a query. As in Go, what is unknown does no harm, and of a name that is there twice the first counts.
    pub fn read(what: &str, pairs: &[(String, String)]) -> Result<Self, String> {
        let value = |name: &str| pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let level = |name: &str| match value(name) {
            None | Some("") => Ok(0),
            Some(text) => text.parse::<u32>().map_err(|_| format!("{name}={text}: give 1 or leave it out")),
        };
        let options = Options {
            seconds: value("seconds").map(seconds).transpose()?,
            hz: value("hz").map(hz).transpose()?,
            debug: level("debug")?,
            dump: level("dump")? > 0,
            gc: level("gc")? > 0,
            force: level("force")? > 0,
            format: match value("format") {
                None | Some("" | "pprof") => Format::Pprof,
                Some("collapsed") => Format::Collapsed,
                Some("svg") => Format::Svg,
                Some(other) => return Err(format!("format={other}: there are pprof, collapsed and svg")),
            },
        };
        // For these the seconds are those of the profile itself.
        let is_difference = !matches!(what, "profile" | "trace");
        if is_difference && options.debug > 0 && options.seconds.is_some() {
            return Err("seconds and debug do not go together: a difference has no text form".to_owned());
        }
        if options.dump && !cfg!(feature = "task-dump") {
            return Err(
                "dump=1: this program was built without tokio's task dump (docs/profiling.md says how to build it \
                with it); debug=2 shows the tasks one by one"
                    .to_owned(),
            );
        }
        if options.debug > 0 && options.format != Format::Pprof {
            return Err("format and debug do not go together: debug=1 is a form by itself".to_owned());
        }
        Ok(options)
    }
}

fn hz(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(hz @ 1..=cpu::MOST_HZ) => Ok(hz),
        _ => Err(format!("hz={text}: give a whole number from 1 to {}", cpu::MOST_HZ)),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds @ 1..=MOST_SECONDS) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("seconds={text}: give a whole number from 1 to {MOST_SECONDS}")),
    }
}

/// An answer, made on the thread that took the profile.
#[derive(Debug)]
pub(super) struct Answer {
    body: Vec<u8>,
    content_type: &'static str,
    /// The name of the file to save it as; none for what browsers show.
    attachment: Option<String>,
    /// What is other than it was asked for.
    note: Option<String>,
}

/// The header with what is other than it was asked for.
const NOTE: &str = "x-profiling-note";

impl Answer {
    /// JSON for a viewer.
    pub fn json(text: String, name: &str) -> Self {
        Answer {
            body: text.into_bytes(),
            content_type: "application/json",
            attachment: Some(format!("{name}.json")),
            note: None,
        }
    }

    /// Text for people.
    pub fn text(text: String) -> Self {
        Answer { body: text.into_bytes(), content_type: "text/plain; charset=utf-8", attachment: None, note: None }
    }

    /// With a header that says what is other than it was asked for.
    pub fn with_note(self, note: Option<String>) -> Self {
        Answer { note, ..self }
    }

    /// A profile in the form that was asked for.
    pub fn profile(profile: &Profile, name: &str, format: Format) -> Self {
        // A profile of ours names its default sample type.
        let sample_type = profile.sample_type("").unwrap_or_default();
        match format {
            Format::Pprof => Answer {
                body: profile.encode(),
                content_type: "application/octet-stream",
                attachment: Some(name.to_owned()),
                note: None,
            },
            Format::Collapsed => {
                let lines = collapsed(profile, sample_type, &[EVENT_KIND, STAGE]);
                Answer::text(lines.into_iter().map(|line| line + "\n").collect())
            }
            Format::Svg => {
                let title = format!("{name}: {}", profile.sample_types[sample_type].kind);
                Answer {
                    body: flame_graph(profile, sample_type, &[EVENT_KIND, STAGE], &title).svg().into_bytes(),
                    content_type: "image/svg+xml",
                    attachment: None,
                    note: None,
                }
            }
        }
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let mut response = ([(header::CONTENT_TYPE, self.content_type)], self.body).into_response();
        if let Some(name) = self.attachment {
            let value = format!("attachment; filename=\"{name}\"");
            let value = value.parse().expect("names of profiles are plain letters");
            response.headers_mut().insert(header::CONTENT_DISPOSITION, value);
        }
        if let Some(note) = self.note {
            let note = note.parse().expect("notes are plain letters");
            response.headers_mut().insert(NOTE, note);
        }
        response
    }
}

/// What a request with wrong options is told.
pub(super) fn refused(reason: &str) -> Response {
    failure(StatusCode::BAD_REQUEST, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(query: &[(&str, &str)]) -> Result<Options, String> {
        let pairs: Vec<_> = query.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Options::read("heap", &pairs)
    }

    #[test]
    fn options_are_read() {
        assert_eq!(read(&[("nothing", "we know")]), Ok(Options::default()));
        let all =
            read(&[("seconds", "30"), ("gc", "1"), ("force", "2"), ("format", "svg"), ("seconds", "x"), ("hz", "99")]);
        let seconds = Some(Duration::from_secs(30));
        assert_eq!(
            all,
            Ok(Options { seconds, hz: Some(99), gc: true, force: true, format: Format::Svg, ..Options::default() })
        );
        // The seconds of a CPU profile are its own, and no difference of two.
        let pairs = [("seconds", "30"), ("debug", "1")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        let own = Options::read("profile", &pairs);
        assert_eq!(own, Ok(Options { seconds, debug: 1, ..Options::default() }));
        assert_eq!(read(&[("debug", "1"), ("gc", "0")]), Ok(Options { debug: 1, ..Options::default() }));
    }

    #[test]
    fn wrong_options_are_named() {
        for (query, named) in [
            (&[("seconds", "0")][..], "seconds=0: give a whole number from 1 to 100"),
            (&[("seconds", "101")], "seconds=101"),
            (&[("seconds", "-1")], "seconds=-1"),
            (&[("seconds", "")], "seconds="),
            (&[("debug", "yes")], "debug=yes"),
            (&[("hz", "0")], "hz=0: give a whole number from 1 to 1000"),
            (&[("hz", "1001")], "hz=1001"),
            (&[("format", "png")], "format=png"),
            (&[("seconds", "1"), ("debug", "1")], "seconds and debug"),
            (&[("format", "svg"), ("debug", "1")], "format and debug"),
            #[cfg(not(feature = "task-dump"))]
            (&[("dump", "1")], "without tokio's task dump"),
        ] {
            let told = read(query).unwrap_err();
            assert!(told.contains(named), "{query:?}: {told}");
        }
    }
}
