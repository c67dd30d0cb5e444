//! What commands print: aligned tables for people, JSON for programs.
//!
//! Everything goes out in one write at the end, or a page at a time where a list may be long; and a reader
//! that has left (`bessel tree | head`) is no error.

use super::Outcome;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::Write;

/// Prints `text` and a line end, unless it ends in one.
pub(crate) fn print(text: &str) -> Outcome {
    let end = if text.ends_with('\n') || text.is_empty() { "" } else { "\n" };
    print_part(&format!("{text}{end}")).map(|_| ())
}

/// Prints what is a part of something. False when nobody reads it any more.
fn print_part(text: &str) -> Result<bool, Box<dyn std::error::Error>> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(format!("cannot write the output: {error}").into()),
        Ok(()) => Ok(true),
    }
}

/// Prints `value` as JSON when that was asked for, else the text that `for_people` makes.
pub(crate) fn print_either<T: Serialize>(
    json: bool,
    value: &T,
    for_people: impl FnOnce(&T) -> String,
) -> Outcome {
    if json {
        let text = serde_json::to_string_pretty(value)
            .expect("the API's answers have string keys and finite numbers");
        return print(&text);
    }
    print(&for_people(value))
}

/// Rows under a header, in columns as wide as their widest cell.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(header: &[&str]) -> Self {
        Self { rows: vec![header.iter().map(|cell| (*cell).to_owned()).collect()] }
    }

    /// Adds a row with as many cells as the header.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.rows[0].len(), "a row of another table");
        self.rows.push(cells);
    }

    /// The lines, each with its end.
    pub(crate) fn render(&self) -> String {
        self.render_on(&mut Vec::new())
    }

    /// The lines, with columns at least as wide as those of the part before, whose widths `widths` has.
    fn render_on(&self, widths: &mut Vec<usize>) -> String {
        widths.resize(self.rows.first().map_or(widths.len(), Vec::len), 0);
        for (column, width) in widths.iter_mut().enumerate() {
            let cells = self.rows.iter().map(|row| row[column].chars().count());
            *width = cells.max().unwrap_or(0).max(*width);
        }
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&*widths) {
                line.push_str(&format!("{cell:width$}  "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// A list that comes in parts and is printed as it comes: a table for people, an array for programs.
pub(crate) struct Parts {
    json: bool,
    /// Nothing has been printed yet.
    first: bool,
    header: Vec<&'static str>,
    widths: Vec<usize>,
}

impl Parts {
    pub(crate) fn new(json: bool, header: &[&'static str]) -> Self {
        Self { json, first: true, header: header.to_vec(), widths: Vec::new() }
    }

    /// Prints some more of the list. False when nobody reads it any more.
    pub(crate) fn add<T: Serialize>(
        &mut self,
        items: &[T],
        row: impl Fn(&T) -> Vec<String>,
    ) -> Result<bool, Box<dyn std::error::Error>> {
        let text = if self.json { self.elements(items) } else { self.rows(items, row) };
        self.first &= items.is_empty() && self.json;
        print_part(&text)
    }

    fn rows<T>(&mut self, items: &[T], row: impl Fn(&T) -> Vec<String>) -> String {
        let mut table = Table { rows: Vec::new() };
        if self.first {
            table = Table::new(&self.header);
        }
        table.rows.extend(items.iter().map(row));
        table.render_on(&mut self.widths)
    }

    /// As a part of an array, as it would look if it was printed at once.
    fn elements<T: Serialize>(&self, items: &[T]) -> String {
        let mut text = String::new();
        for (index, item) in items.iter().enumerate() {
            text.push_str(if self.first && index == 0 { "[\n" } else { ",\n" });
            let item = serde_json::to_string_pretty(item)
                .expect("the API's answers have string keys and finite numbers");
            text.push_str(&format!("  {}", item.replace('\n', "\n  ")));
        }
        text
    }

    /// Ends the list.
    pub(crate) fn end(self) -> Outcome {
        match (self.json, self.first) {
            (false, _) => Ok(()),
            (true, true) => print("[]"),
            (true, false) => print("\n]"),
        }
    }
}

/// A bar on standard error while long work runs, if that is a terminal. Gone when dropped.
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar for `what` is being done; none when `quiet`.
    pub(crate) fn new(what: &'static str, quiet: bool) -> Self {
        if quiet {
            return Self { bar: ProgressBar::hidden() };
        }
        let style = ProgressStyle::with_template("{msg} [{bar:40}] {percent}% {eta}")
            .expect("the template is a constant that parses")
            .progress_chars("=> ");
        Self { bar: ProgressBar::new(0).with_style(style).with_message(what) }
    }

    /// The same for work of which nobody knows how much there is.
    pub(crate) fn counting(what: &'static str, quiet: bool) -> Self {
        if quiet {
            return Self { bar: ProgressBar::hidden() };
        }
        let style = ProgressStyle::with_template("{msg} {bytes} {elapsed}")
            .expect("the template is a constant that parses");
        Self { bar: ProgressBar::no_length().with_style(style).with_message(what) }
    }

    /// Shows that so much is done.
    pub(crate) fn count(&self, done: u64) {
        self.bar.set_position(done);
    }

    /// Shows that `done` of `total` is done.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A duration as people read it: three digits or so, and the unit that fits.
pub(crate) fn duration(nanoseconds: u64) -> String {
    let value = nanoseconds as f64;
    match nanoseconds {
        0..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{:.1} us", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} ms", value / 1e6),
        _ => format!("{:.2} s", value / 1e9),
    }
}

/// A dash for what is not there.
pub(crate) fn or_dash(text: &Option<String>) -> String {
    text.clone().unwrap_or_else(|| "-".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_trailing_spaces() {
        let mut table = Table::new(&["NAME", "SIZE"]);
        table.row(vec!["a-long-name".into(), "4GiB".into()]);
        table.row(vec!["b".into(), String::new()]);
        assert_eq!(table.render(), "NAME         SIZE\na-long-name  4GiB\nb\n");
    }

    #[test]
    fn a_list_in_parts_looks_as_it_would_at_once() {
        let all: Vec<(u32, &str)> = vec![(1, "a"), (22, "bb"), (333, "c"), (4, "d")];
        let row = |item: &(u32, &str)| vec![item.0.to_string(), item.1.to_owned()];
        for cut in 0..=all.len() {
            let mut parts = Parts::new(true, &["N", "S"]);
            let mut text = String::new();
            for part in [&all[..cut], &all[cut..]] {
                text += &parts.elements(part);
                parts.first &= part.is_empty();
            }
            assert_eq!(text + "\n]", serde_json::to_string_pretty(&all).unwrap());
        }
        let mut parts = Parts::new(false, &["N", "S"]);
        let first = parts.rows(&all[..2], row);
        parts.first = false;
        assert_eq!(first + &parts.rows(&all[2..], row), "N   S\n1   a\n22  bb\n333  c\n4    d\n");
    }

    #[test]
    fn durations_have_the_unit_that_fits() {
        assert_eq!(duration(999), "999 ns");
        assert_eq!(duration(12_345), "12.3 us");
        assert_eq!(duration(1_234_567), "1.23 ms");
        assert_eq!(duration(2_500_000_000), "2.50 s");
    }
}
