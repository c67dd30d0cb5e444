//! How people name volumes and snapshots: `vm1`, `3.17`, `vm1@before-upgrade`.
//!
//! Checked here, once, for the command line, the configuration and the API alike. Everything that
//! passes is also safe in a URL path and in a file name, so nothing later needs escaping.

use bessel_mapping::format::{NameError, check_name};
use bessel_mapping::request::SnapshotId;
use std::fmt;
use std::str::FromStr;

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
    /// No snapshot.
    #[error("{0:?} names no snapshot; write an id like 3.17 or volume@label")]
    Snapshot(String),
}

/// Passes a volume name on when it is one.
pub(crate) fn volume_name(text: &str) -> Result<String, ReferenceError> {
    name("volume name", text)
}

/// Passes a snapshot label on when it is one.
pub(crate) fn label(text: &str) -> Result<String, ReferenceError> {
    name("label", text)
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
}

impl FromStr for SnapshotReference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let Some((volume, name)) = text.split_once('@') else {
            let id = text.parse().map_err(|()| ReferenceError::Snapshot(text.to_owned()))?;
            return Ok(Self::Id(id));
        };
        Ok(Self::Label { volume: volume_name(volume)?, label: label(name)? })
    }
}

impl fmt::Display for SnapshotReference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => write!(formatter, "{id}"),
            Self::Label { volume, label } => write!(formatter, "{volume}@{label}"),
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
        for text in ["3.17", "vm1@base"] {
            assert_eq!(text.parse::<SnapshotReference>().unwrap().to_string(), text);
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
