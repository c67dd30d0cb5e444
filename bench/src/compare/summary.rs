//! What the measurements of a cell come to.

use super::{Cell, Place, Sample};
use crate::report::WAIT_TOLERATED;
use crate::server::Contender;

/// What ratios divide by: the first of these that was measured under the same load. The last three are without
/// files, where the first two are not.
pub(super) const REFERENCES: [Contender; 5] = [
    Contender::QsdUring,
    Contender::QsdQcow2,
    Contender::SpdkMalloc,
    Contender::SpdkLvol,
    Contender::SpdkNull,
];

/// The medians of a cell.
pub(super) struct Summary {
    pub(super) iops: f64,
    /// The lowest and the highest rate of a round.
    pub(super) iops_range: [f64; 2],
    /// The rate over that of the reference under the same load.
    pub(super) ratio: Option<f64>,
    /// In nanoseconds, at each of [`QUANTILES`].
    pub(super) latency_ns: [f64; QUANTILES.len()],
    pub(super) server_cpu_us_per_request: Option<f64>,
}

/// The quantiles that are kept of each measurement.
pub(super) const QUANTILES: [&str; 6] = ["p50", "p90", "p99", "p99.9", "p99.99", "max"];

impl Summary {
    /// Of a cell that was measured at this place; nothing when it never was.
    pub(super) fn of(place: &Place, cell: &Cell) -> Option<Self> {
        let (first, samples) = (cell.samples.first()?, &cell.samples);
        let iops = median_iops(cell);
        let range = samples.iter().fold([first.iops; 2], |[low, high], sample| {
            [low.min(sample.iops), high.max(sample.iops)]
        });
        let rate_of = |contender| {
            let is_its = |it: &&Cell| it.contender == contender && it.load == cell.load;
            place.cells.iter().find(is_its).map(median_iops).filter(|rate| *rate > 0.0)
        };
        let reference = REFERENCES.into_iter().find_map(rate_of);
        let cpu: Vec<f64> =
            samples.iter().filter_map(|sample| sample.server_cpu_us_per_request).collect();
        Some(Self {
            iops,
            iops_range: range,
            ratio: reference.map(|reference| iops / reference),
            latency_ns: std::array::from_fn(|index| {
                median(samples.iter().map(|sample| sample.quantiles_ns()[index] as f64).collect())
            }),
            server_cpu_us_per_request: (!cpu.is_empty()).then(|| median(cpu)),
        })
    }

    /// The latency at one of [`QUANTILES`], in microseconds.
    pub(super) fn latency_us(&self, quantile: &str) -> f64 {
        let index = QUANTILES.iter().position(|it| *it == quantile);
        self.latency_ns[index.expect("only quantiles that are kept are asked for")] / 1e3
    }
}

impl Sample {
    /// Latencies in the order of [`QUANTILES`].
    fn quantiles_ns(&self) -> [u64; QUANTILES.len()] {
        [self.p50_ns, self.p90_ns, self.p99_ns, self.p999_ns, self.p9999_ns, self.max_ns]
    }
}

fn median_iops(cell: &Cell) -> f64 {
    median(cell.samples.iter().map(|sample| sample.iops).collect())
}

/// Says when the machine was too busy to believe the figures.
pub(super) fn warning(place: &Place) -> Option<String> {
    let samples = place.cells.iter().flat_map(|cell| &cell.samples);
    let waits: Vec<f64> = samples.filter_map(|sample| sample.client_waited).collect();
    let busy = waits.iter().filter(|waited| **waited > WAIT_TOLERATED).count();
    let worst = waits.iter().copied().fold(0.0, f64::max) * 100.0;
    (busy > 0).then(|| {
        format!(
            "BUSY: in {busy} of {} measurements other work took the client's core, for up to \
             {worst:.0} % of the time; measure again on an idle machine",
            waits.len()
        )
    })
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
    fn a_summary_has_medians_their_range_and_a_ratio_within_the_same_load() {
        let results = super::super::tests::results();
        let place = &results.places[0];
        let bessel = place.cells.iter().find(|cell| cell.contender == Contender::Bessel).unwrap();
        let summary = Summary::of(place, bessel).unwrap();
        assert_eq!((summary.iops, summary.iops_range), (300.0, [1.0, 500.0]));
        assert_eq!(summary.ratio, Some(1.5));
        assert_eq!(summary.latency_us("p99.99"), 5.0);
        assert!(warning(place).unwrap().starts_with("BUSY: in 9 of 9"));
    }

    #[test]
    fn where_a_raw_file_has_no_figure_a_ratio_is_to_qcow2() {
        let mut results = super::super::tests::results();
        let place = &mut results.places[0];
        place.cells[1].contender = Contender::QsdQcow2;
        assert_eq!(Summary::of(place, &place.cells[2]).unwrap().ratio, Some(1.5));
        place.cells[1].contender = Contender::BareUring;
        assert_eq!(Summary::of(place, &place.cells[2]).unwrap().ratio, None);
    }

    #[test]
    fn what_was_not_measured_has_no_summary() {
        let mut results = super::super::tests::results();
        let place = &mut results.places[0];
        place.cells[0].samples.clear();
        assert!(Summary::of(place, &place.cells[0]).is_none());
    }
}
