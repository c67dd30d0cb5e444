//! Snapshots of one volume by the hundred thousand: they must change neither how long opening takes nor reads.

use std::path::Path;

use serde_json::Value;

use super::bench::{Bench, number};
use super::reads::{READ_SLICES, read_in_turns};
use super::{Plan, Progress, Row, Sorted, median, ratios};
use crate::clock::Clock;

/// The volume that snapshots are taken of, and one beside it that has none.
const MANY: &str = "many";
const NONE: &str = "none";

pub(super) fn million(plan: &Plan) -> Result<Vec<Row>, String> {
    let count = plan.million;
    let mut bench = Bench::empty(plan, plan.store_bytes)?;
    let sockets = [NONE, MANY].map(|name| bench.create(name, plan.size_bytes));
    let [none, many] = sockets;
    let sockets = [none?, many?];
    for socket in &sockets {
        bench.fill(socket.clone())?;
    }
    let before = restarts(&mut bench, &sockets[1])?;

    let mut progress = Progress::new("snapshots of one volume", count);
    let clock = Clock::start();
    bench.snapshots(MANY, count, |taken| progress.at(taken))?;
    let seconds = clock.now_ns() as f64 / 1e9;
    let volume = bench.api.ask("GET", &format!("/v1/volumes/{MANY}"), &Value::Null)?;
    let there = number(&volume, "snapshots")?;
    let each_us = seconds * 1e6 / count as f64;
    let taken = Row::new(
        "snapshots of one volume",
        format!("{there} in {seconds:.1} s, one each {each_us:.1} µs by the API"),
    )
    .paper_or_peer("65,852")
    .goal("1,000,000")
    .figures([("count", there as f64), ("seconds", seconds), ("each_us", each_us)]);

    let after = restarts(&mut bench, &sockets[1])?;
    let (with, without) = (after.median(), before.median());
    let more = with - without;
    let measured = format!(
        "{with:.1} ms, {without:.1} ms before they were taken: {more:+.1} ms (middle half of {} starts each within {:.0} % and \
         {:.0} %)",
        after.0.len(),
        after.spread_percent(),
        before.spread_percent()
    );
    let opening =
        Row::new(format!("from the daemon's start to the first read, with {there}"), measured)
            .goal("unchanged")
            .figures([("milliseconds", with), ("without_milliseconds", without)]);

    let samples = read_in_turns(&bench, &sockets, plan.rounds * READ_SLICES)?;
    let ratio = ratios(&samples[1], &samples[0]);
    let kilo = median(samples[1].iter().copied()) / 1e3;
    let measured = format!(
        "{kilo:.1} k/s, {:.3} of none (middle half of the ratios {:.3} to {:.3})",
        ratio.median(),
        ratio.at(0.25),
        ratio.at(0.75)
    );
    let reads = Row::new(format!("4 KiB random reads with {there} behind"), measured)
        .paper_or_peer("lvol 0.03 of none with 400")
        .goal("≥ 0.98 of none")
        .figures([("kilo_reads_per_second", kilo), ("ratio", ratio.median())]);
    Ok(vec![taken, opening, reads])
}

/// Milliseconds from start to first read, a few times.
fn restarts(bench: &mut Bench<'_>, socket: &Path) -> Result<Sorted, String> {
    let rounds = bench.plan.rounds.max(3);
    let times = (0..rounds).map(|_| bench.restart(socket).map(|time| time.as_secs_f64() * 1e3));
    Ok(Sorted::new(times.collect::<Result<Vec<_>, _>>()?))
}
