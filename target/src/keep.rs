//! Which snapshots a schedule keeps, as people type it: `60`, `all`, or `1m, 1h every 1s, 1d every 1m`.
//!
//! The last reads: all up to a minute old, one a second up to an hour, one a minute up to a day; older
//! ones go.

use crate::span::{parse_span, span_text};
use bessel_mapping::schedule::{Age, Keep};

/// The text says nothing of what to keep.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{0:?} does not say which snapshots to keep; write a number of them, all, or ages from young to old \
     as in \"1m, 1h every 1s, 1d every 1m\""
)]
pub(crate) struct KeepError(String);

/// Parses it.
pub(crate) fn parse_keep(text: &str) -> Result<Keep, KeepError> {
    let malformed = || KeepError(text.to_owned());
    if text == "all" {
        return Ok(Keep::All);
    }
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().map(Keep::Newest).map_err(|_| malformed());
    }
    let ages: Option<Vec<Age>> = text.split(',').map(parse_age).collect();
    ages.map(Keep::Ages).ok_or_else(malformed)
}

fn parse_age(text: &str) -> Option<Age> {
    let mut words = text.split_whitespace();
    let up_to = parse_span(words.next()?).ok()?;
    let spacing = match words.next() {
        None => None,
        Some("every") => Some(parse_span(words.next()?).ok()?),
        Some(_) => return None,
    };
    words.next().is_none().then_some(Age { up_to, spacing })
}

/// As it would be typed.
pub(crate) fn keep_text(keep: &Keep) -> String {
    match keep {
        Keep::All => "all".to_owned(),
        Keep::Newest(count) => count.to_string(),
        Keep::Ages(ages) => {
            let age = |Age { up_to, spacing }: &Age| match spacing {
                None => span_text(*up_to),
                Some(spacing) => format!("{} every {}", span_text(*up_to), span_text(*spacing)),
            };
            ages.iter().map(age).collect::<Vec<_>>().join(", ")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_keep_is_read_as_it_is_written() {
        for text in ["all", "1", "60", "10s", "1m, 1h every 1s, 1d every 1m", "30d every 1d"] {
            assert_eq!(keep_text(&parse_keep(text).unwrap()), text);
        }
        assert_eq!(parse_keep(" 60s,1h   every 1s"), parse_keep("1m, 1h every 1s"));
    }

    #[test]
    fn what_could_mean_two_things_is_refused() {
        for text in
            ["", "none", "-1", "1.5", "1m 1h", "1m every", "1m for 1s", "1m,", "1m every 1s 1", "m"]
        {
            let error = parse_keep(text).unwrap_err().to_string();
            assert!(error.contains("1h every 1s"), "{error}");
        }
    }
}
