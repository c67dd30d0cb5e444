//! Sizes as people type them, on the command line and in YAML.
//!
//! One grammar everywhere: `4GiB`, `512MiB`, `64KiB`, `2TiB`, `1PiB`, or a bare number of bytes.
//! Powers of ten (`GB`) are refused rather than guessed at.

use bessel_reactor::units::ByteCount;

/// The text is no size.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum SizeError {
    /// Not a number with one of the known units.
    #[error("{0:?} is not a size; write 4GiB, 512MiB or a number of bytes")]
    Malformed(String),
    /// More than 64 bits of bytes.
    #[error("{0:?} is larger than any device can be; write at most 64PiB")]
    TooLarge(String),
}

/// Each unit and its power of two.
const UNITS: [(&str, u32); 5] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40), ("PiB", 50)];

/// Parses a size.
pub(crate) fn parse_size(text: &str) -> Result<ByteCount, SizeError> {
    let unit = UNITS.iter().find(|(name, _)| text.ends_with(name));
    let (digits, shift) = match unit {
        Some((name, shift)) => (&text[..text.len() - name.len()], *shift),
        None => (text, 0),
    };
    // `u64::from_str` takes a leading `+`, which is no digit to us.
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(SizeError::Malformed(text.to_owned()));
    }
    let too_large = || SizeError::TooLarge(text.to_owned());
    let number: u64 = digits.parse().map_err(|_| too_large())?;
    number.checked_mul(1 << shift).map(ByteCount::new).ok_or_else(too_large)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64KiB", 64 << 10),
            ("512MiB", 512 << 20),
            ("4GiB", 4 << 30),
            ("2TiB", 2 << 40),
            ("64PiB", 64 << 50),
        ] {
            assert_eq!(parse_size(text), Ok(ByteCount::new(bytes)), "{text}");
        }
    }

    #[test]
    fn what_could_mean_two_things_is_refused() {
        for text in ["", "GiB", "4GB", "4G", "4 GiB", "-1", "+1", "1.5GiB", "0x10", "4gib", "four"]
        {
            assert_eq!(parse_size(text), Err(SizeError::Malformed(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn sizes_past_64_bits_are_refused_and_do_not_wrap() {
        for text in ["16384PiB", "18446744073709551616", "99999999999999999999GiB"] {
            assert_eq!(parse_size(text), Err(SizeError::TooLarge(text.to_owned())), "{text}");
        }
    }
}
