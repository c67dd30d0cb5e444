//! Random reads with ever more snapshots behind.
//!
//! One volume is read before it has any and each time it has ten times as many, always in turns with another that
//! never has. And all of that is done twice, once without taking any: two volumes lie in different memory, which on a
//! virtual machine decides more than what is measured, and how the two compare drifts within minutes. What counts is
//! how their ratio with snapshots compares with that at the same stage without.

use std::path::PathBuf;

use super::bench::{Bench, random};
use super::{Plan, Progress, Row, Sorted, in_turns, median, ratios};
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
    let counts: Vec<u64> = std::iter::once(0)
        .chain(std::iter::successors(Some(1u64), |it| it.checked_mul(10)))
        .take_while(|count| *count <= plan.behind_max)
        .collect();
    let without = stages(plan, &counts, Taken::Nothing)?;
    let with = stages(plan, &counts, Taken::Snapshots)?;
    // Where both began, nothing had been taken in either.
    let began = with[0].beside.median() / without[0].beside.median();
    let rows = counts.iter().zip(with.iter().zip(&without)).map(|(count, (with, without))| {
        let control = without.beside.median() * began;
        let ratio = with.beside.median() / control;
        let kilo = with.iops / 1e3;
        let measured = format!(
            "{kilo:.1} k/s, {ratio:.3} of none (middle half of the turns {:.3} to {:.3})",
            with.beside.at(0.25) / control,
            with.beside.at(0.75) / control
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
                ("ratio", ratio),
            ])
    });
    Ok(rows.collect())
}

/// What a run takes on its way from stage to stage.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Taken {
    Snapshots,
    Nothing,
}

/// Reads with so many snapshots behind.
struct Stage {
    iops: f64,
    /// The rate over that of the volume beside it, turn by turn.
    beside: Sorted,
}

/// Reads a volume each time that so many snapshots of it were taken, or would have been.
fn stages(plan: &Plan, counts: &[u64], what: Taken) -> Result<Vec<Stage>, String> {
    let bench = Bench::empty(plan, plan.store_bytes)?;
    let mut sockets = Vec::new();
    for name in [BESIDE, BEHIND] {
        let socket = bench.create(name, plan.size_bytes)?;
        bench.fill(socket.clone())?;
        sockets.push(socket);
    }
    // What has just been written is read at another rate for some seconds.
    read_in_turns(&bench, &sockets, plan.rounds * READ_SLICES)?;
    let mut stages = Vec::new();
    let mut taken = 0;
    for count in counts {
        let mut progress = Progress::new("snapshots behind reads", *count);
        while taken < *count {
            // Something differs between any two that were taken so far apart.
            bench.write_some(sockets[1].clone(), 64, taken)?;
            let batch = WRITES_EVERY.min(count - taken);
            if what == Taken::Snapshots {
                bench.snapshots(BEHIND, batch, |_| Ok(()))?;
            }
            taken += batch;
            progress.at(taken)?;
        }
        let samples = read_in_turns(&bench, &sockets, plan.rounds * READ_SLICES)?;
        let iops = median(samples[1].iter().copied());
        stages.push(Stage { iops, beside: ratios(&samples[1], &samples[0]) });
    }
    Ok(stages)
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
