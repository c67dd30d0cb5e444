//! Wall-clock times as people and programs read and write them: RFC 3339.

use bessel_reactor::clock::WallTime;
use jiff::Timestamp;

/// `2026-11-20T11:40:00.123456789Z`: all that is known, so that a snapshot's time names it.
pub(crate) fn rfc3339(time: WallTime) -> String {
    let nanoseconds = i128::from(time.as_unix_nanos());
    let time = Timestamp::from_nanosecond(nanoseconds);
    let time = time.expect("64 bits of nanoseconds end in 2554, a Timestamp in 9999");
    format!("{time:.9}")
}

/// The time that `text` is: RFC 3339 with or without a fraction, `Z` or an offset. What lies before
/// 1970 or after 2554 is the nearest time that a store knows.
pub(crate) fn parse_rfc3339(text: &str) -> Option<WallTime> {
    // The parser takes more than RFC 3339 has (time zones in brackets, a space for the T).
    let plain = |byte: u8| byte.is_ascii_digit() || b"TtZz:.+-".contains(&byte);
    if !text.bytes().all(plain) {
        return None;
    }
    let time: Timestamp = text.parse().ok()?;
    let nanoseconds = time.as_nanosecond().clamp(0, i128::from(u64::MAX));
    Some(WallTime::from_unix_nanos(nanoseconds as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn known_moments_print_as_the_calendar_says_and_are_read_again() {
        for (nanoseconds, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_399 * S, "2000-02-28T23:59:59.000000000Z"),
            (951_782_400 * S, "2000-02-29T00:00:00.000000000Z"),
            (1_700_000_000 * S + 123_456_789, "2023-11-14T22:13:20.123456789Z"),
            (4_107_542_400 * S, "2100-03-01T00:00:00.000000000Z"),
            (u64::MAX, "2554-07-21T23:34:33.709551615Z"),
        ] {
            let time = WallTime::from_unix_nanos(nanoseconds);
            assert_eq!(rfc3339(time), text);
            assert_eq!(parse_rfc3339(text), Some(time));
        }
    }

    #[test]
    fn times_are_read_with_any_fraction_and_offset_and_nothing_else_is() {
        for (text, nanoseconds) in [
            ("2023-11-14T22:13:20Z", 1_700_000_000 * S),
            ("2023-11-14t22:13:20.5z", 1_700_000_000 * S + S / 2),
            ("2023-11-14T23:13:20+01:00", 1_700_000_000 * S),
            ("2023-11-14T16:43:20-05:30", 1_700_000_000 * S),
            ("0001-01-01T00:00:00Z", 0),
            ("9999-01-01T00:00:00Z", u64::MAX),
        ] {
            let time = WallTime::from_unix_nanos(nanoseconds);
            assert_eq!(parse_rfc3339(text), Some(time), "{text}");
        }
        for text in [
            "",
            "2023",
            "2023-11-14",
            "2023-11-14T22:13:20",
            "22:13:20Z",
            "2023-11-14 22:13:20Z",
            "2023-11-14T22:13:20Z[UTC]",
            "2023-13-14T22:13:20Z",
            "2023-02-29T22:13:20Z",
            "2023-11-14T25:13:20Z",
        ] {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
    }
}
