//! Finds the line of a value in the configuration text.
//!
//! The parser knows a position only while it stands on a value. So to blame a value that was found
//! wrong later (a duplicate, a missing file), the text is walked a second time along the path to
//! that value, by a visitor that fails there: the failure carries the parser's own position. No
//! text is searched, so comments, quoting and flow style cannot lead it astray.

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;

/// One step down into the document.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// To the value of this key.
    Key(&'static str),
    /// To this element, from 0.
    Index(usize),
}

/// The line, from 1, of the value at `path`; of its nearest ancestor when it is not there.
pub(crate) fn line_of(text: &str, path: &[Step]) -> usize {
    let walk = Walk { path }.deserialize(serde_yaml::Deserializer::from_str(text));
    let error = walk.expect_err("the walk always ends in its own failure");
    error.location().map_or(1, |location| within(text, location.line()))
}

/// A line that the text has. The parser stands one past the last when it has missed something at
/// the end of a text whose last line does not end.
pub(crate) fn within(text: &str, line: usize) -> usize {
    line.min(text.lines().count()).max(1)
}

struct Walk<'a> {
    path: &'a [Step],
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        match self.path.first() {
            // A scalar that is visited and a collection that is none both fail at their start.
            None => deserializer.deserialize_str(self),
            Some(Step::Key(_)) => deserializer.deserialize_map(self),
            Some(Step::Index(_)) => deserializer.deserialize_seq(self),
        }
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the end of the path")
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Err(E::custom("here"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Some((Step::Key(wanted), rest)) = self.path.split_first() else {
            return Err(A::Error::custom("here"));
        };
        while let Some(key) = map.next_key::<String>()? {
            if key == *wanted {
                return map.next_value_seed(Walk { path: rest });
            }
            map.next_value::<IgnoredAny>()?;
        }
        Err(A::Error::custom("not there"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        let Some((Step::Index(wanted), rest)) = self.path.split_first() else {
            return Err(A::Error::custom("here"));
        };
        for _ in 0..*wanted {
            sequence.next_element::<IgnoredAny>()?;
        }
        sequence.next_element_seed(Walk { path: rest })?;
        Err(A::Error::custom("not there"))
    }
}

#[cfg(test)]
mod tests {
    use super::Step::{Index, Key};
    use super::*;

    const TEXT: &str = "\
# name: not here
store: { device: /x,
  size: 1GiB }
volumes:
  - name: a
    queues: 1

  - queues: 2   # name: nor here
    name: \"b\"
";

    #[test]
    fn a_value_is_found_on_its_own_line() {
        for (path, line) in [
            (&[Key("store"), Key("size")][..], 3),
            (&[Key("store")], 2),
            (&[Key("volumes"), Index(0), Key("name")], 5),
            (&[Key("volumes"), Index(1)], 8),
            (&[Key("volumes"), Index(1), Key("queues")], 8),
            (&[Key("volumes"), Index(1), Key("name")], 9),
        ] {
            assert_eq!(line_of(TEXT, path), line, "{path:?}");
        }
    }

    #[test]
    fn what_is_not_there_is_blamed_on_its_nearest_ancestor() {
        assert_eq!(line_of(TEXT, &[Key("volumes"), Index(1), Key("size")]), 8);
        assert_eq!(line_of(TEXT, &[Key("store"), Key("node_cache")]), 2);
        assert_eq!(line_of("", &[Key("store")]), 1);
    }
}
