//! Spans of time as people type them, on the command line, in YAML and in `vm1@10s ago`.
//!
//! One grammar everywhere: a whole number and its unit, `10ms`, `1s`, `5m`, `2h`, `1d`. A day has 24
//! hours. A bare number is refused rather than guessed at.

use std::time::Duration;

/// The text is no span of time.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum SpanError {
    /// Not a number with one of the known units.
    #[error("{0:?} is not a span of time; write 10ms, 1s, 5m, 2h or 1d")]
    Malformed(String),
    /// More than 64 bits of nanoseconds.
    #[error("{0:?} is longer than can be counted; write at most 200000d")]
    TooLong(String),
}

/// Each unit and its length in nanoseconds. A unit that ends in another stands before it.
const UNITS: [(&str, u64); 5] = [
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
    ("d", 86_400_000_000_000),
];

/// Parses a span.
pub(crate) fn parse_span(text: &str) -> Result<Duration, SpanError> {
    let malformed = || SpanError::Malformed(text.to_owned());
    let units = UNITS.iter();
    let found = units.filter_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit))).next();
    let (digits, unit) = found.ok_or_else(malformed)?;
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(malformed());
    }
    let too_long = || SpanError::TooLong(text.to_owned());
    let number: u64 = digits.parse().map_err(|_| too_long())?;
    number.checked_mul(unit).map(Duration::from_nanos).ok_or_else(too_long)
}

/// The span as it would be typed: in the largest unit that leaves a whole number. What is finer
/// than a millisecond is cut off.
pub(crate) fn span_text(span: Duration) -> String {
    let nanoseconds = u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
    let mut largest_first = UNITS.iter().rev();
    let whole = largest_first.find(|(_, unit)| nanoseconds.is_multiple_of(*unit));
    match whole {
        Some((name, unit)) if nanoseconds > 0 => format!("{}{name}", nanoseconds / unit),
        _ => format!("{}ms", nanoseconds / UNITS[0].1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_as_people_write_them_and_written_as_they_are_read() {
        for (text, milliseconds) in [
            ("1ms", 1),
            ("10ms", 10),
            ("1s", 1000),
            ("90s", 90_000),
            ("5m", 300_000),
            ("2h", 7_200_000),
            ("1d", 86_400_000),
            ("0ms", 0),
        ] {
            let span = Duration::from_millis(milliseconds);
            assert_eq!(parse_span(text), Ok(span), "{text}");
            assert_eq!(span_text(span), text);
        }
        assert_eq!(span_text(Duration::from_secs(120)), "2m");
        assert_eq!(parse_span("200000d").map(span_text), Ok("200000d".to_owned()));
    }

    #[test]
    fn what_could_mean_two_things_is_refused() {
        for text in ["", "s", "ms", "10", "1.5s", "-1s", "+1s", "1 s", "1S", "1us", "1w", "1h30m"] {
            assert_eq!(parse_span(text), Err(SpanError::Malformed(text.to_owned())), "{text}");
        }
        for text in ["18446744073709551616s", "300000d"] {
            assert_eq!(parse_span(text), Err(SpanError::TooLong(text.to_owned())), "{text}");
        }
    }
}
