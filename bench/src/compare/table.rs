//! The tables of a comparison, for a terminal or a README.

use std::fmt::Write as _;

use super::{Cell, Place, Results, Sample};
use crate::report::WAIT_TOLERATED;
use crate::server::Contender;
use crate::size;

/// What the last column divides by.
const REFERENCE: Contender = Contender::QsdUring;

/// A table for each directory, one line for each load and contender.
pub(super) fn render(results: &Results) -> String {
    let mut text = format!("{}\n", results.machine);
    for place in &results.places {
        render_place(&mut text, results, place).expect("writing to a string cannot fail");
    }
    text
}

fn render_place(text: &mut String, results: &Results, place: &Place) -> std::fmt::Result {
    let medium = if place.tmpfs { "tmpfs" } else { "O_DIRECT" };
    writeln!(
        text,
        "\n{} ({medium}): written disk of {}, requests of {}, medians of {} x {} s\n",
        place.directory.display(),
        size::format(results.size_bytes),
        size::format(results.block_bytes.into()),
        results.rounds,
        results.seconds
    )?;
    writeln!(
        text,
        "{:<10} {:>5}  {:<13} {:>8} {:>9} {:>9} {:>9} {:>8} {:>7}",
        "load", "depth", "server", "k IOPS", "p50 µs", "p99 µs", "p99.9 µs", "CPU µs", "ratio"
    )?;
    for cell in &place.cells {
        let reference = place.cells.iter().find(|other| {
            other.contender == REFERENCE
                && (other.workload, other.depth) == (cell.workload, cell.depth)
        });
        render_cell(text, cell, reference)?;
    }
    render_warning(text, place)
}

/// Says when the machine was too busy to believe the figures.
fn render_warning(text: &mut String, place: &Place) -> std::fmt::Result {
    let samples = place.cells.iter().flat_map(|cell| &cell.samples);
    let waits: Vec<f64> = samples.filter_map(|sample| sample.client_waited).collect();
    let busy = waits.iter().filter(|waited| **waited > WAIT_TOLERATED).count();
    if busy == 0 {
        return Ok(());
    }
    let worst = waits.iter().copied().fold(0.0, f64::max) * 100.0;
    writeln!(
        text,
        "\nBUSY: in {busy} of {} measurements other work took the client's core, for up to \
         {worst:.0} % of the time; measure again on an idle machine",
        waits.len()
    )
}

fn render_cell(text: &mut String, cell: &Cell, reference: Option<&Cell>) -> std::fmt::Result {
    let median = |value: fn(&Sample) -> f64| median(cell.samples.iter().map(value).collect());
    let cpu = median_of_some(cell.samples.iter().map(|s| s.server_cpu_us_per_request).collect());
    let cpu = cpu.map_or("-".into(), |cpu| format!("{cpu:.2}"));
    let iops = median(|sample| sample.iops);
    let ratio = reference
        .map(|cell| self::median(cell.samples.iter().map(|sample| sample.iops).collect()))
        .filter(|reference| *reference > 0.0)
        .map_or("-".into(), |reference| format!("{:.2}", iops / reference));
    writeln!(
        text,
        "{:<10} {:>5}  {:<13} {:>8.1} {:>9.1} {:>9.1} {:>9.1} {:>8} {:>7}",
        cell.workload.name(),
        cell.depth,
        cell.contender.name(),
        iops / 1e3,
        median(|sample| sample.p50_ns as f64) / 1e3,
        median(|sample| sample.p99_ns as f64) / 1e3,
        median(|sample| sample.p999_ns as f64) / 1e3,
        cpu,
        ratio
    )
}

/// The middle value; the mean of the two in the middle when there are two; 0 of nothing.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let count = values.len();
    match (count, count % 2) {
        (0, _) => 0.0,
        (_, 1) => values[count / 2],
        _ => (values[count / 2 - 1] + values[count / 2]) / 2.0,
    }
}

fn median_of_some(values: Vec<Option<f64>>) -> Option<f64> {
    let known: Vec<f64> = values.into_iter().flatten().collect();
    (!known.is_empty()).then(|| median(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(vec![]), 0.0);
    }

    #[test]
    fn a_ratio_compares_medians_of_the_same_load() {
        let cell = |contender, depth, rates: [f64; 3]| Cell {
            workload: crate::plan::Workload::RandRead,
            depth,
            contender,
            samples: rates
                .map(|iops| Sample {
                    iops,
                    p50_ns: 1,
                    p99_ns: 1,
                    p999_ns: 1,
                    max_ns: 1,
                    server_cpu_us_per_request: None,
                    client_waited: Some(0.25),
                })
                .into(),
        };
        let place = Place {
            directory: "/dev/shm".into(),
            tmpfs: true,
            cells: vec![
                cell(Contender::QsdUring, 1, [9.0, 9.0, 9.0]),
                cell(Contender::QsdUring, 32, [100.0, 200.0, 9000.0]),
                cell(Contender::Bessel, 32, [500.0, 1.0, 300.0]),
            ],
        };
        let results = Results {
            unix_seconds: 0,
            machine: "machine".into(),
            size_bytes: 1 << 30,
            block_bytes: 4096,
            seconds: 5.0,
            rounds: 3,
            poll: crate::server::Poll::Adaptive,
            places: vec![place],
        };
        let text = render(&results);
        let bessel = text.lines().find(|line| line.contains("bessel")).unwrap();
        assert!(bessel.ends_with("1.50"), "{text}");
        assert!(text.contains("BUSY: in 9 of 9"), "{text}");
    }
}
