//! How people name volumes and snapshots: `vm1`, `3.17`, `vm1@before-upgrade`, `vm1@10s ago`.
//!
//! Checked here, once, for the command line, the configuration and the API alike. Names and labels
//! that pass are also safe in a URL path and in a file name, so nothing later needs escaping; a
//! reference with a space in it has [`SnapshotReference::in_path`].

use crate::span::{parse_span, span_text};
use crate::time::parse_rfc3339;
use bessel_mapping::format::{NameError, check_name};
use bessel_mapping::request::SnapshotId;
use bessel_reactor::clock::WallTime;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The text names nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum ReferenceError {
    /// No name.
    #[error("{what} {reason}")]
    Name {
        /// What it should have been.
        what: &'static str,
        /// Why it is none.
        reason: NameError,
    },
    /// A label that nobody could name the snapshot by.
    #[error("label {0:?} would be read as a time; choose one that is no time")]
    LabelIsTime(String),
    /// No snapshot.
    #[error(
        "{0:?} names no snapshot; write an id like 3.17, volume@label, volume@2026-11-20T11:40:00Z or \
         \"volume@10s ago\""
    )]
    Snapshot(String),
}

/// Passes a volume name on when it is one.
pub(crate) fn volume_name(text: &str) -> Result<String, ReferenceError> {
    name("volume name", text)
}

/// Passes on what may become a snapshot's label.
pub(crate) fn label(text: &str) -> Result<String, ReferenceError> {
    let label = name("label", text)?;
    match parse_rfc3339(text) {
        None => Ok(label),
        Some(_) => Err(ReferenceError::LabelIsTime(label)),
    }
}

fn name(what: &'static str, text: &str) -> Result<String, ReferenceError> {
    check_name(text).map_err(|reason| ReferenceError::Name { what, reason })?;
    Ok(text.to_owned())
}

/// A snapshot, as people name it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum SnapshotReference {
    /// `3.17`: for ever the same one.
    Id(SnapshotId),
    /// `vm1@label`: the one of that volume that has the label now.
    Label {
        /// The volume's name.
        volume: String,
        /// The label.
        label: String,
    },
    /// `vm1@2026-11-20T11:40:00Z`, `vm1@10s ago`: the volume's newest then or before.
    Time {
        /// The volume's name.
        volume: String,
        /// When.
        moment: Moment,
    },
}

/// A point in time, as people name it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Moment {
    /// A wall-clock time.
    At {
        /// When.
        time: WallTime,
        /// As it was typed.
        text: String,
    },
    /// So long before whoever answers reads the clock.
    Ago(Duration),
}

impl Moment {
    /// When it is, seen from `now`.
    pub(crate) fn seen_from(&self, now: WallTime) -> WallTime {
        match self {
            Self::At { time, .. } => *time,
            Self::Ago(span) => {
                let span = u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
                WallTime::from_unix_nanos(now.as_unix_nanos().saturating_sub(span))
            }
        }
    }
}

impl FromStr for Moment {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if let Some(span) = text.strip_suffix(" ago") {
            return parse_span(span).map(Self::Ago).map_err(|_| ());
        }
        let time = parse_rfc3339(text).ok_or(())?;
        Ok(Self::At { time, text: text.to_owned() })
    }
}

impl SnapshotReference {
    /// As a segment of a URL's path.
    pub(crate) fn in_path(&self) -> String {
        self.to_string().replace(' ', "%20")
    }
}

impl FromStr for SnapshotReference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let none = || ReferenceError::Snapshot(text.to_owned());
        let Some((volume, which)) = text.split_once('@') else {
            return text.parse().map(Self::Id).map_err(|()| none());
        };
        let volume = volume_name(volume)?;
        if let Ok(moment) = which.parse() {
            return Ok(Self::Time { volume, moment });
        }
        match name("label", which) {
            Ok(label) => Ok(Self::Label { volume, label }),
            // No label has these, times do: it was meant as one.
            Err(_) if which.contains([' ', ':', '+']) => Err(none()),
            Err(error) => Err(error),
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At { text, .. } => formatter.write_str(text),
            Self::Ago(span) => write!(formatter, "{} ago", span_text(*span)),
        }
    }
}

impl fmt::Display for SnapshotReference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => write!(formatter, "{id}"),
            Self::Label { volume, label } => write!(formatter, "{volume}@{label}"),
            Self::Time { volume, moment } => write!(formatter, "{volume}@{moment}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bessel_mapping::request::VolumeId;

    #[test]
    fn a_snapshot_is_named_by_id_or_by_label_and_prints_as_it_was_typed() {
        let by_id = SnapshotReference::Id(SnapshotId { volume: VolumeId(3), sequence: 17 });
        assert_eq!("3.17".parse(), Ok(by_id));
        let by_label =
            SnapshotReference::Label { volume: "vm1".into(), label: "before-upgrade.2".into() };
        assert_eq!("vm1@before-upgrade.2".parse(), Ok(by_label));
        for text in ["3.17", "vm1@base", "vm1@10s ago", "vm1@2026-11-20T11:40:00.5+01:00"] {
            assert_eq!(text.parse::<SnapshotReference>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_time_names_the_snapshot_that_was_the_newest_then() {
        let moment = |text: &str| match text.parse() {
            Ok(SnapshotReference::Time { volume, moment }) if volume == "vm1" => moment,
            other => panic!("{text}: {other:?}"),
        };
        let now = WallTime::from_unix_nanos(1_700_000_000_000_000_000);
        for (text, nanoseconds) in [
            ("vm1@10s ago", 1_699_999_990_000_000_000),
            ("vm1@1d ago", 1_699_913_600_000_000_000),
            ("vm1@200000d ago", 0),
            ("vm1@2023-11-14T22:13:19Z", 1_699_999_999_000_000_000),
            ("vm1@2023-11-14T23:13:19.25+01:00", 1_699_999_999_250_000_000),
        ] {
            let seen = moment(text).seen_from(now);
            assert_eq!(seen, WallTime::from_unix_nanos(nanoseconds), "{text}");
        }
        let ago: SnapshotReference = "vm1@5m ago".parse().unwrap();
        assert_eq!(ago.in_path(), "vm1@5m%20ago");
    }

    #[test]
    fn what_is_nearly_a_time_is_refused_with_how_to_write_one() {
        for text in [
            "vm1@10 ago",
            "vm1@ago s",
            "vm1@ten s ago",
            "vm1@2026-11-20T11:40",
            "vm1@11:40",
            "a@b:c",
        ] {
            let error = text.parse::<SnapshotReference>().unwrap_err().to_string();
            assert!(error.contains("volume@10s ago"), "{text}: {error}");
        }
    }

    #[test]
    fn a_label_that_would_be_read_as_a_time_is_refused_and_a_date_is_none() {
        for text in ["20261120T114000Z", "2026-11-20T114000Z"] {
            let error = label(text).unwrap_err();
            assert_eq!(error, ReferenceError::LabelIsTime(text.to_owned()));
            assert!(matches!(
                format!("vm1@{text}").parse(),
                Ok(SnapshotReference::Time { moment: Moment::At { .. }, .. })
            ));
        }
        for text in ["2026-11-20", "20261120", "10s", "ago", "10s-ago", "2026-11-20T1140"] {
            assert_eq!(label(text).as_deref(), Ok(text));
        }
    }

    #[test]
    fn what_could_leave_a_path_or_a_url_is_refused() {
        for text in ["", ".", "..", "../a", "a/b", "a b", "a@b", "-a", "ä", "a%2fb", "a\n"] {
            assert!(volume_name(text).is_err(), "{text:?}");
        }
        assert!(volume_name(&"x".repeat(65)).is_err());
        assert!(volume_name(&"x".repeat(64)).is_ok());
        for text in ["", "3", "3.", ".17", "3.17.1", "vm1", "vm1@", "@a", "a@b@c", "3.-1", "3.+1"] {
            assert!(text.parse::<SnapshotReference>().is_err(), "{text:?}");
        }
    }
}
