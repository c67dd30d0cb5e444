//! What snapshots write and keep: metadata of each, and what the first write after one costs.

use std::time::Duration;

use super::bench::{Bench, MAIN, Written};
use super::{Plan, Progress, Row, Sorted, in_turns, median, ratios};
use crate::clock::Clock;
use crate::interrupt;
use crate::load::Options;
use crate::plan::Workload;
use crate::report::Report;

/// Snapshots of an idle volume, and with a few writes between them.
const COUNT: u64 = 200;
const WRITES_BETWEEN: u64 = 4;

/// Light writing as in the paper: 65,852 snapshots, one each 10 ms, while 396 MB were written are 1.54 blocks for each.
/// A kernel build writes files, which a page cache writes back every few seconds, and its journal between.
const LIGHT_PER_SECOND: u64 = 100;
const LIGHT_BLOCKS_PER_SNAPSHOT: f64 = 1.54;
const BURST_EVERY: u64 = 5;
const LONE_PER_SECOND: u64 = 3;
/// Mean of the runs of [`Workload::Runs`], in blocks, each of which is one request here.
const RUN_BLOCKS: f64 = 40.0;
const RUN_BYTES_MAX: u32 = 256 << 10;
/// The journal: lone writes go to the first of the disk, one after the other.
const JOURNAL_BYTES: u64 = 32 << 20;

/// Writes after a snapshot, one at a time.
const LONE_COUNT: u64 = 200;

pub(super) fn metadata(plan: &Plan) -> Result<Vec<Row>, String> {
    let mut rows = vec![light(plan)?];
    let bench = Bench::start(plan)?;
    bench.snapshot()?;
    let before = bench.metadata_bytes()?;
    bench.snapshots(MAIN, COUNT, |_| Ok(()))?;
    let idle = kept_each(&bench, before, COUNT)?;

    let before = bench.metadata_bytes()?;
    for round in 0..COUNT {
        bench.write_some(bench.site.socket(), WRITES_BETWEEN, round)?;
        bench.snapshot()?;
    }
    let some = kept_each(&bench, before, COUNT)?;
    let what = format!("the same, {WRITES_BETWEEN} random writes of 4 KiB between two");
    let row = |what: String, each: f64| {
        Row::new(what, format!("{each:.2} KB")).figure("kilobytes_each", each)
    };
    rows.push(row("metadata for each snapshot of an idle volume".into(), idle));
    rows.push(row(what, some));
    Ok(rows)
}

/// Kilobytes of nodes and snapshot log that were added for each snapshot.
fn kept_each(bench: &Bench<'_>, before: u64, snapshots: u64) -> Result<f64, String> {
    let added = bench.metadata_bytes()?.saturating_sub(before);
    Ok(added as f64 / snapshots.max(1) as f64 / 1e3)
}

fn light(plan: &Plan) -> Result<Row, String> {
    let bench = Bench::start(plan)?;
    let (metadata, written) = (bench.metadata_bytes()?, bench.written()?);
    bench.schedule(LIGHT_PER_SECOND)?;
    let seconds = plan.long.as_secs().max(1);
    let blocks = LIGHT_BLOCKS_PER_SNAPSHOT * (LIGHT_PER_SECOND * BURST_EVERY) as f64;
    let runs = ((blocks - (LONE_PER_SECOND * BURST_EVERY) as f64) / RUN_BLOCKS).round() as u64;
    let journal_blocks = (plan.size_bytes.min(JOURNAL_BYTES) / 4096).max(1);
    let mut progress = Progress::new("light writing", seconds);
    let clock = Clock::start();
    for second in 0..seconds {
        if second % BURST_EVERY == 0 {
            bench.load(Options {
                workload: Workload::Runs,
                block_bytes: RUN_BYTES_MAX,
                requests: Some(runs),
                depth: 8,
                seed: second + 1,
                ..Options::default()
            })?;
        }
        for lone in 0..LONE_PER_SECOND {
            sleep_until(&clock, second * 1000 + (lone + 1) * 1000 / (LONE_PER_SECOND + 1))?;
            let block = (second * LONE_PER_SECOND + lone) % journal_blocks;
            bench.load(Options {
                workload: Workload::Write,
                first_byte: block * 4096,
                requests: Some(1),
                depth: 1,
                flush_at_end: true,
                ..Options::default()
            })?;
        }
        sleep_until(&clock, (second + 1) * 1000)?;
        progress.at(second + 1)?;
    }
    let taken = bench.end_schedule()?;
    let each = kept_each(&bench, metadata, taken.taken)?;
    let blocks = bench.written()?.since(written).data as f64 / 4096.0 / taken.taken.max(1) as f64;
    let what =
        "metadata for each snapshot, 100 a second, files written back every 5 s and a journal";
    let measured = format!(
        "{each:.2} KB at {blocks:.2} blocks written for each of {} ({} skipped)",
        taken.taken, taken.skipped
    );
    Ok(Row::new(what, measured)
        .paper_or_peer("5.84 KB at 1.54 blocks for each of 65,852")
        .goal("≤ 5.84 KB")
        .figures([
            ("kilobytes_each", each),
            ("blocks_each", blocks),
            ("taken", taken.taken as f64),
            ("skipped", taken.skipped as f64),
        ]))
}

/// Waits until so many milliseconds of `clock` have passed.
fn sleep_until(clock: &Clock, milliseconds: u64) -> Result<(), String> {
    loop {
        if interrupt::requested() {
            return Err("interrupted".into());
        }
        let left_ns = (milliseconds * 1_000_000).saturating_sub(clock.now_ns());
        if left_ns == 0 {
            return Ok(());
        }
        std::thread::sleep(Duration::from_nanos(left_ns.min(100_000_000)));
    }
}

/// One pass of writes: what it wrote, and its rates, the flush at its end left out and counted.
struct Pass {
    written: Written,
    iops: f64,
    iops_with_flush: f64,
}

impl Pass {
    fn measure(bench: &Bench<'_>, workload: Workload) -> Result<Self, String> {
        let before = bench.written()?;
        let options =
            Options { workload, one_pass: true, flush_at_end: true, ..Options::default() };
        let Report { requests, seconds, iops, last_flush_seconds, .. } = bench.load(options)?;
        let written = bench.written()?.since(before);
        let flush = last_flush_seconds.ok_or("the load ended without its flush")?;
        Ok(Self { written, iops, iops_with_flush: requests as f64 / (seconds + flush) })
    }
}

pub(super) fn first_writes(plan: &Plan) -> Result<Vec<Row>, String> {
    let mut rows = Vec::new();
    for (workload, name) in [
        (Workload::Stride, "one 4 KiB write in each 64 KiB"),
        (Workload::Write, "each 4 KiB in order"),
    ] {
        let bench = Bench::start(plan)?;
        // One turn in place before all others, so that none is the first.
        Pass::measure(&bench, workload)?;
        let passes = in_turns("first writes", plan.rounds.max(3), 2, |which, _| {
            if which == 1 {
                bench.snapshot()?;
            }
            Pass::measure(&bench, workload)
        })?;
        let column = |which: usize, of: fn(&Pass) -> f64| -> Vec<f64> {
            passes[which].iter().map(of).collect()
        };
        let bytes = Sorted::new(column(1, |it| it.written.ratio()));
        let (first, in_place) = (column(1, |it| it.iops), column(0, |it| it.iops));
        let flushed =
            ratios(&column(1, |it| it.iops_with_flush), &column(0, |it| it.iops_with_flush));
        let (bytes, ratio, flushed) =
            (bytes.median(), ratios(&first, &in_place).median(), flushed.median());
        let (first, in_place) = (median(first) / 1e3, median(in_place) / 1e3);
        let with_flush = median(column(1, |it| it.iops_with_flush)) / 1e3;
        let measured = format!(
            "{bytes:.3}, {first:.0} k/s, {ratio:.2} of in place ({in_place:.0} k/s); with the flush at the end {with_flush:.0} k/s, \
             {flushed:.2}"
        );
        let what = format!("first write after a snapshot, {name}: bytes written / asked, rate");
        let row = Row::new(what, measured).figures([
            ("written_per_asked", bytes),
            ("kilo_writes_per_second", first),
            ("in_place_kilo_writes_per_second", in_place),
            ("ratio", ratio),
            ("with_flush_kilo_writes_per_second", with_flush),
            ("with_flush_ratio", flushed),
        ]);
        rows.push(match workload {
            Workload::Stride => row
                .paper_or_peer("qcow2 16, 16.7 k/s; lvol 18 to 1026, 41 k/s")
                .goal("≤ 1.5, ≥ 200 k/s, ≥ 0.5 of in place"),
            _ => row.goal("≤ 1.5, ≥ 0.5 of in place"),
        });
    }
    Ok(rows)
}

pub(super) fn lone_writes(plan: &Plan) -> Result<Vec<Row>, String> {
    let bench = Bench::start(plan)?;
    let start = bench.written()?;
    let mut sum = Written { data: 0, metadata: 0 };
    for seed in 0..LONE_COUNT {
        bench.snapshot()?;
        let before = bench.written()?;
        bench.load(Options {
            workload: Workload::RandWrite,
            requests: Some(1),
            depth: 1,
            flush_at_end: true,
            seed: seed + 1,
            ..Options::default()
        })?;
        let Written { data, metadata } = bench.written()?.since(before);
        sum = Written { data: sum.data + data, metadata: sum.metadata + metadata };
    }
    let all = bench.written()?.since(start).ratio();
    let alone = sum.ratio();
    let measured = format!("{alone:.2}; {all:.2} with what the snapshots themselves write");
    let row = Row::new(
        "a lone 4 KiB write after a snapshot, then a flush: bytes written / asked",
        measured,
    )
    .paper_or_peer("qcow2 16, lvol 18 to 1026")
    .goal("≤ 4");
    Ok(vec![row.figures([("written_per_asked", alone), ("with_snapshots", all)])])
}
