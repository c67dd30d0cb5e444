//! What a guest keeps of its rate, with snapshots by schedule or after every write.

use std::time::Duration;

use serde_json::json;

use super::bench::{Bench, MAIN, Taken, random};
use super::{Plan, Row, Sorted, in_turns, median, ratios};
use crate::load::{AfterWrite, Options};
use crate::plan::Workload;
use crate::report::Report;

/// Snapshots a second beside writes that come as fast as they are answered.
const RATES: [u64; 4] = [0, 5, 100, 1000];
/// A load that leaves the server room.
const PACED_WRITES: f64 = 20_000.0;
/// The same for a minute: what it writes must find room in memory.
const SUSTAINED_WRITES: f64 = 5_000.0;
/// Requests of a paced load in flight, at most: more than can be due while a server is not stuck.
const PACED_DEPTH: u16 = 256;

pub(super) fn flat_out(plan: &Plan) -> Result<Vec<Row>, String> {
    let samples = in_turns("writes flat out", plan.rounds, RATES.len(), |which, round| {
        // Each on a store of its own: what is written after a snapshot is never given back meanwhile.
        let bench = Bench::start(plan)?;
        bench.schedule(RATES[which])?;
        let iops = bench.random(Workload::RandWrite, plan.duration, round)?.iops;
        Ok((iops, bench.end_schedule()?))
    })?;
    let iops = |which: usize| samples[which].iter().map(|(iops, _)| *iops).collect::<Vec<_>>();
    let without = iops(0);
    let rows = RATES.iter().enumerate().map(|(which, per_second)| {
        let (kilo, ratio) = (median(iops(which)) / 1e3, ratios(&iops(which), &without));
        let count = |of: fn(&Taken) -> u64| -> u64 {
            samples[which].iter().map(|(_, taken)| of(taken)).sum()
        };
        let (taken, skipped) = (count(|it| it.taken), count(|it| it.skipped));
        let measured = match per_second {
            0 => format!("{kilo:.1} k/s, spread {:.0} %", Sorted::new(iops(0)).spread_percent()),
            _ => format!(
                "{kilo:.1} k/s, {:.2} of none ({taken} taken, {skipped} skipped)",
                ratio.median()
            ),
        };
        let (peer, goal) = match per_second {
            0 => ("lvol 403 k/s", "–"),
            5 => ("lvol 2.2 k/s, 0.005 of none", "≥ 0.8 of none"),
            100 => ("lvol cannot", "≥ 0.5 of none"),
            _ => ("–", "–"),
        };
        let what = format!("4 KiB random writes over the volume, {per_second} snapshots a second");
        Row::new(what, measured).paper_or_peer(peer).goal(goal).figures([
            ("kilo_writes_per_second", kilo),
            ("ratio", ratio.median()),
            ("taken", taken as f64),
            ("skipped", skipped as f64),
        ])
    });
    Ok(rows.collect())
}

/// A load of some writes a second, and what it cost.
struct Paced {
    report: Report,
    taken: Taken,
    /// CPU time of the reactors for each second.
    cpu: f64,
    /// Metadata that was added.
    metadata_bytes: u64,
}

impl Paced {
    /// Loads for some time, while snapshots are taken.
    fn measure(
        plan: &Plan,
        writes: f64,
        per_second: u64,
        duration: Duration,
        round: u32,
    ) -> Result<Self, String> {
        let bench = Bench::start(plan)?;
        bench.schedule(per_second)?;
        let (cpu, metadata) = (bench.reactor_cpu()?, bench.metadata_bytes()?);
        let options = random(Workload::RandWrite, duration, round);
        let seconds = (options.warmup + duration).as_secs_f64();
        let report = bench.load(Options { rate: Some(writes), depth: PACED_DEPTH, ..options })?;
        let taken = bench.end_schedule()?;
        Ok(Self {
            cpu: bench.reactor_cpu()?.saturating_sub(cpu).as_secs_f64() / seconds,
            metadata_bytes: bench.metadata_bytes()?.saturating_sub(metadata),
            report,
            taken,
        })
    }

    /// Rate, mean, p50 and p99 in microseconds, and percent of a core.
    fn medians(turns: &[Self]) -> [f64; 5] {
        let latency = |of: fn(&crate::report::Latency) -> u64| {
            let values = turns.iter().filter_map(|turn| turn.report.latency_ns.as_ref());
            median(values.map(|it| of(it) as f64)) / 1e3
        };
        [
            median(turns.iter().map(|turn| turn.report.iops)),
            latency(|it| it.mean),
            latency(|it| it.p50),
            latency(|it| it.p99),
            median(turns.iter().map(|turn| turn.cpu)) * 100.0,
        ]
    }
}

/// In words, with and without snapshots.
fn paced_row(what: String, more: &str, with: &[Paced], without: &[Paced]) -> Row {
    let (some, none) = (Paced::medians(with), Paced::medians(without));
    let rates = |turns: &[Paced]| turns.iter().map(|turn| turn.report.iops).collect::<Vec<_>>();
    let lost = (1.0 - ratios(&rates(with), &rates(without)).median()) * 100.0;
    let [rate, mean, p50, p99, cpu] = some;
    let measured = format!(
        "{rate:.0}/s kept, {lost:.2} % less than without; mean {mean:.1} µs ({:.1} without), p50 {p50:.1} µs ({:.1}), \
         p99 {p99:.1} µs ({:.1}); reactor {cpu:.0} % of a core ({:.0}){more}",
        none[1], none[2], none[3], none[4]
    );
    let sum = |of: fn(&Paced) -> u64| with.iter().map(of).sum::<u64>() as f64;
    Row::new(what, measured).figures([
        ("writes_per_second", rate),
        ("lost_percent", lost),
        ("mean_us", mean),
        ("p50_us", p50),
        ("p99_us", p99),
        ("reactor_percent", cpu),
        ("without_writes_per_second", none[0]),
        ("without_mean_us", none[1]),
        ("without_p50_us", none[2]),
        ("without_p99_us", none[3]),
        ("without_reactor_percent", none[4]),
        ("taken", sum(|turn| turn.taken.taken)),
        ("skipped", sum(|turn| turn.taken.skipped)),
        ("not_issued", sum(|turn| turn.report.not_issued)),
    ])
}

pub(super) fn paced(plan: &Plan) -> Result<Vec<Row>, String> {
    let rates = [0, 100];
    let turns = in_turns("writes with a pace", plan.rounds, rates.len(), |which, round| {
        Paced::measure(plan, PACED_WRITES, rates[which], plan.duration, round)
    })?;
    let what = "20 k/s of 4 KiB random writes, 100 snapshots a second";
    let row = paced_row(what.to_owned(), "", &turns[1], &turns[0]);
    Ok(vec![row.paper_or_peer("4 % of a kernel build").goal("≤ 2 %")])
}

pub(super) fn sustained(plan: &Plan) -> Result<Vec<Row>, String> {
    eprintln!("1,000 snapshots a second: {:.0} s and as long without", plan.long.as_secs_f64());
    let without = Paced::measure(plan, SUSTAINED_WRITES, 0, plan.long, 0)?;
    let with = Paced::measure(plan, SUSTAINED_WRITES, 1000, plan.long, 0)?;
    let Taken { taken, skipped } = with.taken;
    let kept = taken as f64 / (taken + skipped).max(1) as f64 * 100.0;
    let each = with.metadata_bytes as f64 / taken.max(1) as f64 / 1e3;
    let more = format!(
        "; {taken} taken, {skipped} skipped ({kept:.2} % kept), {each:.1} KB of metadata each"
    );
    let seconds = plan.long.as_secs_f64();
    let what = format!("1,000 snapshots a second for {seconds:.0} s under 5 k/s of 4 KiB writes");
    let row = paced_row(what, &more, &[with], &[without]).goal("sustained, cost reported");
    Ok(vec![row.figures([("kept_percent", kept), ("metadata_kilobytes_each", each)])])
}

pub(super) fn continuous(plan: &Plan) -> Result<Vec<Row>, String> {
    let samples = in_turns("a snapshot after every write", plan.rounds, 2, |which, round| {
        continuous_turn(plan, which == 1, round)
    })?;
    let column = |which: usize, of: usize| samples[which].iter().map(move |it: &[f64; 3]| it[of]);
    let collect = |which: usize| column(which, 0).collect::<Vec<_>>();
    let ratio = ratios(&collect(1), &collect(0)).median();
    let (with, without) = (median(collect(1)) / 1e3, median(collect(0)) / 1e3);
    let (written, metadata) = (median(column(1, 1)), median(column(1, 2)) / 1e3);
    let measured = format!(
        "{with:.1} k/s, {ratio:.2} of none ({without:.1} k/s); {written:.1} bytes written for each asked, {metadata:.1} KB of \
         metadata kept for each"
    );
    let row = Row::new("a snapshot after every 4 KiB random write, by the API, depth 1", measured)
        .paper_or_peer("16–33 % of a kernel build")
        .goal("runs, cost reported");
    Ok(vec![row.figures([
        ("kilo_writes_per_second", with),
        ("without_kilo_writes_per_second", without),
        ("ratio", ratio),
        ("written_per_asked", written),
        ("metadata_kilobytes_each", metadata),
    ])])
}

/// Writes a second, bytes written for each asked, and metadata kept for each write.
fn continuous_turn(plan: &Plan, protected: bool, round: u32) -> Result<[f64; 3], String> {
    let bench = Bench::start(plan)?;
    let path = format!("/v1/volumes/{MAIN}/snapshots");
    let mut connection = bench.api.connect()?;
    let after_write: AfterWrite =
        Box::new(move || connection.ask("POST", &path, &json!({})).map(drop));
    let (before, metadata) = (bench.written()?, bench.metadata_bytes()?);
    let options = random(Workload::RandWrite, plan.duration, round);
    let options = Options { depth: 1, flush_at_end: true, ..options };
    let report = bench.load_with(options, protected.then_some(after_write))?;
    let written = bench.written()?.since(before);
    let metadata = bench.metadata_bytes()?.saturating_sub(metadata);
    let each = metadata as f64 / (written.data / 4096).max(1) as f64;
    Ok([report.iops, written.ratio(), each])
}
