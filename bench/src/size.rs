//! Sizes as people write them: `4096`, `512MiB`, `1GiB`.

/// Parses a size into bytes. The message of an error is for a person at a terminal.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match &text[digits.len()..] {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        other => return Err(format!("unknown unit {other:?}; use KiB, MiB, GiB, TiB or bytes")),
    };
    let count: u64 = digits.parse().map_err(|_| format!("{text:?} is not a size, such as 1GiB"))?;
    count.checked_mul(unit).ok_or_else(|| format!("{text} is too large"))
}

/// The shortest exact way to write `bytes`.
pub(crate) fn format(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_survive_being_written_and_read() {
        for bytes in [0, 1, 512, 4096, 5000, 1 << 20, 3 << 30, 1 << 44] {
            assert_eq!(parse(&format(bytes)), Ok(bytes));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "GiB", "1GB", "1.5GiB", "-1", "99999999999TiB"] {
            assert!(parse(text).is_err(), "{text:?} was accepted");
        }
    }
}
