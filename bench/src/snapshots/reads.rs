//! Random reads with ever more snapshots behind.
//!
//! Each number of snapshots has a volume of its own, in one store under one daemon. The volumes are read in turns, a
//! fraction of a second each, and what counts are the ratios within a turn.

use std::path::PathBuf;

use super::bench::{Bench, random};
use super::{Plan, Progress, Row, in_turns, median, ratios};
use crate::load::Options;
use crate::plan::Workload;

/// A measurement is cut into so many: the more turns, the less a moment's neighbour decides.
pub(super) const READ_SLICES: u32 = 20;
/// Snapshots from one time that something is written to the next.
const WRITES_EVERY: u64 = 100;

pub(super) fn reads(plan: &Plan) -> Result<Vec<Row>, String> {
    let bench = Bench::empty(plan, plan.store_bytes)?;
    let counts: Vec<u64> = std::iter::once(0)
        .chain(std::iter::successors(Some(1u64), |it| it.checked_mul(10)))
        .take_while(|count| *count <= plan.behind_max)
        .collect();
    let mut sockets = Vec::new();
    let mut progress = Progress::new("snapshots behind reads", counts.iter().sum());
    let mut done = 0;
    for count in &counts {
        let name = format!("behind-{count}");
        let socket = bench.create(&name, plan.size_bytes)?;
        bench.fill(socket.clone())?;
        let mut taken = 0;
        while taken < *count {
            // Something differs between any two that were taken so far apart.
            bench.write_some(socket.clone(), 64, taken)?;
            let batch = WRITES_EVERY.min(count - taken);
            bench.snapshots(&name, batch, |_| Ok(()))?;
            taken += batch;
            progress.at(done + taken)?;
        }
        done += count;
        sockets.push(socket);
    }
    let samples = read_in_turns(&bench, &sockets, plan.rounds * READ_SLICES)?;
    let rows = counts.iter().zip(&samples).map(|(count, these)| {
        let ratio = ratios(these, &samples[0]);
        let kilo = median(these.iter().copied()) / 1e3;
        let measured = format!(
            "{kilo:.1} k/s, {:.3} of none (middle half of the ratios {:.3} to {:.3})",
            ratio.median(),
            ratio.at(0.25),
            ratio.at(0.75)
        );
        let peer = match count {
            10 => "qcow2 0.43, lvol 0.81 of none",
            100 => "qcow2 0.04, lvol 0.27 of none",
            _ => "–",
        };
        Row::new(format!("4 KiB random reads with {count} snapshots behind"), measured)
            .paper_or_peer(peer)
            .goal("0.98 to 1.02 of none")
            .figures([
                ("snapshots", *count as f64),
                ("kilo_reads_per_second", kilo),
                ("ratio", ratio.median()),
            ])
    });
    Ok(rows.collect())
}

/// Rates of random reads of the volume at each socket, all in each turn.
pub(super) fn read_in_turns(
    bench: &Bench<'_>,
    sockets: &[PathBuf],
    turns: u32,
) -> Result<Vec<Vec<f64>>, String> {
    let duration = bench.plan.duration / READ_SLICES;
    in_turns("reads in turns", turns, sockets.len(), |which, turn| {
        let options = random(Workload::RandRead, duration, turn);
        let socket = sockets[which].clone();
        Ok(bench.load(Options { socket, warmup: duration / 5, ..options })?.iops)
    })
}
