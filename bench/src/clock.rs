//! The one place that reads the clock.
//!
//! Measuring time is this program's purpose, so it is an edge in the sense of the ban on
//! `Instant::now`; it keeps its own clock rather than depend on a crate that it measures.

use std::time::{Duration, Instant};

/// A monotonic clock counting from when it was started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    /// Starts counting now.
    #[expect(clippy::disallowed_methods, reason = "the edge where time is measured")]
    pub(crate) fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Nanoseconds since the start.
    pub(crate) fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// A point `after` from now that can be asked whether it has passed.
    pub(crate) fn deadline(&self, after: Duration) -> Deadline {
        let at_ns = self.now_ns().saturating_add(after.as_nanos() as u64);
        Deadline { clock: *self, at_ns }
    }
}

/// When to stop waiting.
pub(crate) struct Deadline {
    clock: Clock,
    at_ns: u64,
}

impl Deadline {
    /// True once the time is over.
    pub(crate) fn passed(&self) -> bool {
        self.clock.now_ns() >= self.at_ns
    }
}

/// Seconds since 1970, to tell one run's data from another's and to date a report.
#[expect(clippy::disallowed_methods, reason = "the edge where reports get their date")]
pub(crate) fn unix_time() -> Duration {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("the system clock is set after 1970")
}

/// Nanoseconds since 1970 of a time as the API prints it: `2026-11-20T11:40:00.123456789Z`.
pub(crate) fn parse_utc(text: &str) -> Option<u64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let [year, month, day] = numbers(date, '-')?;
    let [hour, minute, second] = numbers(time, ':')?;
    if !(1970..10_000).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Years that begin in March end with the day that is there every fourth year only.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let before_1970 = 719_468; // Days from 0000-03-01.
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    let seconds = ((days - before_1970) * 24 + hour) * 3600 + minute * 60 + second;
    let digits: u64 = fraction.parse().ok()?;
    let nanoseconds = digits * 10u64.pow(9u32.checked_sub(fraction.len() as u32)?);
    seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds)
}

/// A date and a time to the second, for people: `2026-11-20 11:40:00 UTC`.
pub(crate) fn format_utc(unix_seconds: u64) -> String {
    let (days, second) = (unix_seconds / 86_400, unix_seconds % 86_400);
    // Counted as in `parse_utc`: years begin in March, and 400 of them have always as many days.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = match month {
        0..10 => (era * 400 + year_of_era, month + 3),
        _ => (era * 400 + year_of_era + 1, month - 9),
    };
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// Exactly three numbers.
fn numbers(text: &str, separator: char) -> Option<[u64; 3]> {
    let numbers: Vec<u64> = text.split(separator).map(str::parse).collect::<Result<_, _>>().ok()?;
    numbers.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_the_api_are_read_to_the_nanosecond() {
        const S: u64 = 1_000_000_000;
        for (nanoseconds, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_399 * S, "2000-02-28T23:59:59Z"),
            (951_782_400 * S, "2000-02-29T00:00:00.000000000Z"),
            (1_700_000_000 * S + 123_456_789, "2023-11-14T22:13:20.123456789Z"),
            (4_107_542_400 * S, "2100-03-01T00:00:00.0Z"),
        ] {
            assert_eq!(parse_utc(text), Some(nanoseconds), "{text}");
        }
        for text in ["", "2023-11-14T22:13:20", "2023-13-14T22:13:20Z", "2023-11-14T22:13Z"] {
            assert_eq!(parse_utc(text), None, "{text}");
        }
    }

    #[test]
    fn dates_for_people_are_those_that_the_api_would_print() {
        // Some days of every year of four centuries.
        for seconds in (0..146_097 * 86_400).step_by(86_400 * 7 + 3601) {
            let text = format_utc(seconds);
            let api = text.replacen(' ', "T", 1).replace(" UTC", "Z");
            assert_eq!(parse_utc(&api), Some(seconds * 1_000_000_000), "{text}");
        }
        assert_eq!(format_utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(format_utc(1_700_000_000), "2023-11-14 22:13:20 UTC");
    }
}
