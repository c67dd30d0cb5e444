//! Names of volumes and labels of snapshots: what may be one.
//!
//! People type them in shells, URLs and file names, and write a snapshot as `volume@label`, so
//! they are plain.

/// Longest name or label, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Why a name is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NameError {
    /// No characters, or too many.
    #[error("{0:?} has {len} characters; a name has 1 to 64", len = .0.len())]
    Length(String),
    /// Does not start with a letter or digit.
    #[error("{0:?} does not start with a letter or a digit")]
    Start(String),
    /// Has a character that is not allowed.
    #[error("{name:?} contains {character:?}; allowed are A-Z a-z 0-9 . _ -")]
    Character {
        /// The name.
        name: String,
        /// The offender.
        character: char,
    },
}

/// Checks a volume name or snapshot label: 1 to 64 of `[A-Za-z0-9._-]`, the first alphanumeric.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(NameError::Length(name.to_owned()));
    }
    if let Some(character) = name.chars().find(|&c| !plain(c)) {
        return Err(NameError::Character { name: name.to_owned(), character });
    }
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err(NameError::Start(name.to_owned()));
    }
    Ok(())
}

/// A name in its field of the device: its length, and its bytes, zero-filled.
pub(super) fn encode_name(name: &str) -> (u8, [u8; NAME_BYTES_MAX]) {
    assert!(name.len() <= NAME_BYTES_MAX, "{name:?} was not checked before it got here");
    let mut field = [0; NAME_BYTES_MAX];
    field[..name.len()].copy_from_slice(name.as_bytes());
    (name.len() as u8, field)
}

/// The name in a field of the device, if it is one of at most 64 bytes of UTF-8.
pub(super) fn decode_name(length: u8, field: &[u8; NAME_BYTES_MAX]) -> Option<&str> {
    std::str::from_utf8(field.get(..usize::from(length))?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names_pass_and_others_say_why_not() {
        for good in ["a", "vm1", "0-root_disk.v2", &"x".repeat(64)] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in ["", ".hidden", "-rf", "_x", "a b", "a/b", "a@b", "ä", "a\n", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
