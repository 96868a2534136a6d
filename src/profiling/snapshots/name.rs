//! The names of snapshots, on disk and as keys in S3.

use std::fmt;
use std::str::FromStr;

/// What the file of a profile ends in.
pub(super) const PROFILE: &str = ".pb.gz";

/// What the file of a record ends in.
pub(super) const RECORD: &str = ".json";

/// What a snapshot is known by: the name of its two files without what tells them apart,
/// `SERVICE_VERSION_BUILD_HOST_START_SEQUENCE_REASON`. In the order of time within a process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// When the process began to take snapshots, in milliseconds since 1970.
    pub start_ms: u64,
    /// The machine's or container's name.
    pub host: String,
    /// Counted from 1 in the process.
    pub sequence: u64,
    /// Why it was taken.
    pub reason: String,
    /// The program.
    pub service: String,
    /// Its version.
    pub version: String,
    /// The first twelve digits of its build id; empty where it has none.
    pub build: String,
}

impl Name {
    /// The file with the profile.
    pub fn profile(&self) -> String {
        format!("{self}{PROFILE}")
    }

    /// The file with the record.
    pub fn record(&self) -> String {
        format!("{self}{RECORD}")
    }

    /// The process that took it, by host and start.
    pub fn process(&self) -> (&str, u64) {
        (&self.host, self.start_ms)
    }

    /// The name of the snapshot whose profile is in a file of this name.
    pub fn of_profile(file: &str) -> Option<Name> {
        file.strip_suffix(PROFILE)?.parse().ok()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Name { service, version, build, host, start_ms, sequence, reason } = self;
        write!(f, "{service}_{version}_{build}_{host}_{start_ms}_{sequence:06}_{reason}")
    }
}

/// The text is no snapshot's name.
#[derive(Debug, PartialEq, Eq)]
pub struct NoName;

impl FromStr for Name {
    type Err = NoName;

    fn from_str(text: &str) -> Result<Self, NoName> {
        let parts: Vec<&str> = text.split('_').collect();
        let [service, version, build, host, start_ms, sequence, reason] = parts[..] else { return Err(NoName) };
        let number = |text: &str| text.parse().map_err(|_| NoName);
        let (service, version, build) = (service.to_owned(), version.to_owned(), build.to_owned());
        let (start_ms, sequence) = (number(start_ms)?, number(sequence)?);
        Ok(Name { start_ms, host: host.to_owned(), sequence, reason: reason.to_owned(), service, version, build })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_written_as_it_is_read() {
        let text = "write-api_0.1.0_0123456789ab_pod-1_1764295201000_000012_event-start";
        let name: Name = text.parse().expect("a name");
        assert_eq!((name.host.as_str(), name.sequence, name.reason.as_str()), ("pod-1", 12, "event-start"));
        assert_eq!(name.to_string(), text);
        assert_eq!(Name::of_profile(&name.profile()), Some(name.clone()));
        assert_eq!(Name::of_profile(&name.record()), None);
        for wrong in ["", "a_b", "write-api_0.1.0_0_pod_x_000012_stop", "a_b_c_d_1_2_e_f"] {
            assert_eq!(wrong.parse::<Name>(), Err(NoName), "{wrong}");
        }
    }
}
