//! Random reads with ever more snapshots behind.
//!
//! One volume is read before it has any and each time it has ten times as many, always in turns with another that
//! never has: two volumes lie in different memory, which on a virtual machine decides more than what is measured. What
//! counts is how the ratio of the two changes.

use std::path::PathBuf;

use super::bench::{Bench, random};
use super::{Plan, Progress, Row, in_turns, median, ratios};
use crate::load::Options;
use crate::plan::Workload;

/// A measurement is cut into so many: the more turns, the less a moment's neighbour decides.
pub(super) const READ_SLICES: u32 = 20;
/// Snapshots from one time that something is written to the next.
const WRITES_EVERY: u64 = 100;
/// The volume that snapshots are taken of, and the one beside it.
const BEHIND: &str = "behind";
const BESIDE: &str = "beside";

pub(super) fn reads(plan: &Plan) -> Result<Vec<Row>, String> {
    let bench = Bench::empty(plan, plan.store_bytes)?;
    let counts = std::iter::once(0)
        .chain(std::iter::successors(Some(1u64), |it| it.checked_mul(10)))
        .take_while(|count| *count <= plan.behind_max);
    let mut sockets = Vec::new();
    for name in [BESIDE, BEHIND] {
        let socket = bench.create(name, plan.size_bytes)?;
        bench.fill(socket.clone())?;
        sockets.push(socket);
    }
    let mut rows = Vec::new();
    let (mut taken, mut without) = (0, None);
    for count in counts {
        let mut progress = Progress::new("snapshots behind reads", count);
        while taken < count {
            // Something differs between any two that were taken so far apart.
            bench.write_some(sockets[1].clone(), 64, taken)?;
            let batch = WRITES_EVERY.min(count - taken);
            bench.snapshots(BEHIND, batch, |_| Ok(()))?;
            taken += batch;
            progress.at(taken)?;
        }
        let samples = read_in_turns(&bench, &sockets, plan.rounds * READ_SLICES)?;
        let beside = ratios(&samples[1], &samples[0]);
        let without = *without.get_or_insert(beside.median());
        let ratio = beside.median() / without;
        let kilo = median(samples[1].iter().copied()) / 1e3;
        let measured = format!(
            "{kilo:.1} k/s, {ratio:.3} of none (middle half of the turns {:.3} to {:.3})",
            beside.at(0.25) / without,
            beside.at(0.75) / without
        );
        let peer = match count {
            10 => "qcow2 0.43, lvol 0.81 of none",
            100 => "qcow2 0.04, lvol 0.27 of none",
            _ => "–",
        };
        let row = Row::new(format!("4 KiB random reads with {count} snapshots behind"), measured)
            .paper_or_peer(peer)
            .goal("0.98 to 1.02 of none")
            .figures([
                ("snapshots", count as f64),
                ("kilo_reads_per_second", kilo),
                ("ratio", ratio),
            ]);
        rows.push(row);
    }
    Ok(rows)
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
