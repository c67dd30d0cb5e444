//! The tables of a comparison, for a terminal or a README.

use std::fmt::Write as _;

use super::summary::{Summary, warning};
use super::{Cell, Place, Results};
use crate::size;

/// A table for each directory, one line for each load and contender.
pub(super) fn render(results: &Results) -> String {
    let mut text = format!("{}\n", results.machine);
    for place in &results.places {
        render_place(&mut text, results, place).expect("writing to a string cannot fail");
    }
    text
}

fn render_place(text: &mut String, results: &Results, place: &Place) -> std::fmt::Result {
    writeln!(
        text,
        "\n{} ({}): disk of {}, medians of {} x {} s\n",
        place.device,
        place.medium(),
        size::format(results.size_bytes),
        results.rounds,
        results.seconds
    )?;
    let names = place.cells.iter().map(|cell| cell.load.name().chars().count());
    let width = names.max().unwrap_or(0).max("load".len());
    writeln!(
        text,
        "{:<width$} {:>5}  {:<13} {:>8} {:>9} {:>9} {:>9} {:>8} {:>7}",
        "load", "depth", "server", "k IOPS", "p50 µs", "p99 µs", "p99.9 µs", "CPU µs", "ratio"
    )?;
    for cell in &place.cells {
        if let Some(summary) = Summary::of(place, cell) {
            render_cell(text, cell, &summary, width)?;
        }
    }
    for left_out in &place.left_out {
        writeln!(text, "\nleft out: {left_out}")?;
    }
    warning(place).map_or(Ok(()), |warning| writeln!(text, "\n{warning}"))
}

fn render_cell(
    text: &mut String,
    cell: &Cell,
    summary: &Summary,
    width: usize,
) -> std::fmt::Result {
    writeln!(
        text,
        "{:<width$} {:>5}  {:<13} {:>8.1} {:>9.1} {:>9.1} {:>9.1} {:>8} {:>7}",
        cell.load.name(),
        cell.load.depth,
        cell.contender.name(),
        summary.iops / 1e3,
        summary.latency_us("p50"),
        summary.latency_us("p99"),
        summary.latency_us("p99.9"),
        two_decimals(summary.server_cpu_us_per_request),
        two_decimals(summary.ratio)
    )
}

/// A figure that may not be known.
pub(super) fn two_decimals(value: Option<f64>) -> String {
    value.map_or("-".into(), |value| format!("{value:.2}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_cell_and_says_what_was_left_out() {
        let text = render(&super::super::tests::results());
        let bessel = text.lines().find(|line| line.contains("bessel")).unwrap();
        assert!(bessel.ends_with("1.50"), "{text}");
        assert!(text.contains("BUSY: in 9 of 9"), "{text}");
        assert!(text.contains("left out: qsd io_uring, snapshotted: a raw file"), "{text}");
    }
}
