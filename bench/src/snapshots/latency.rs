//! How long a snapshot takes, and what it delays.
//!
//! Writes that a snapshot delays are those in flight when it is taken. So the generator keeps a timeline, the
//! daemon says when each snapshot was taken, and the longest of the writes then in flight is compared with the longest
//! at the instants midway between two snapshots, of the same run. A neighbour on the machine strikes both alike; what
//! a snapshot does shows at the snapshots alone. Nothing of ours runs beside the load meanwhile: snapshots come by schedule.

use std::time::Duration;

use serde_json::Value;

use super::bench::{Bench, MAIN, number, random};
use super::{Plan, Row, Sorted, in_turns, median};
use crate::clock::{Clock, parse_utc, unix_time};
use crate::load::Options;
use crate::plan::Workload;
use crate::report::Report;

/// Snapshots taken one after the other on an idle volume.
const IDLE_COUNT: u32 = 500;
/// Snapshots a second under writes: far enough apart that nothing of one is left midway to the next.
const UNDER_WRITES_PER_SECOND: u64 = 50;
/// From a snapshot on, so long is looked at: longer than a snapshot is to take.
const LOOKED_AT: Duration = Duration::from_millis(2);
/// What a write may be delayed by.
const DELAY_MAX_NS: u64 = 1_000_000;

pub(super) fn idle(plan: &Plan) -> Result<Vec<Row>, String> {
    let bench = Bench::start(plan)?;
    let mut connection = bench.api.connect()?;
    let path = format!("/v1/volumes/{MAIN}/snapshots");
    let (mut latencies, mut round_trips) = (Vec::new(), Vec::new());
    let clock = Clock::start();
    for _ in 0..IDLE_COUNT {
        let asked_ns = clock.now_ns();
        let taken = connection.ask("POST", &path, &serde_json::json!({}))?;
        round_trips.push((clock.now_ns() - asked_ns) as f64);
        latencies.push(number(&taken, "latency_ns")? as f64);
    }
    let (latencies, round_trips) = (Sorted::new(latencies), Sorted::new(round_trips));
    let (p50, p99, max) = microseconds(&latencies);
    let round_trip = round_trips.median() / 1e3;
    let measured = format!(
        "p50 {p50:.1} µs, p99 {p99:.1} µs, max {max:.1} µs of {IDLE_COUNT} (p50 {round_trip:.1} µs with the API's round trip)"
    );
    let row = Row::new("snapshot of an idle volume, in a tight loop", measured)
        .paper_or_peer("90 % < 1 ms, max 3.25 ms; lvol 6 ms")
        .goal("p50 < 50 µs, p99 < 200 µs");
    Ok(vec![row.figures([
        ("count", f64::from(IDLE_COUNT)),
        ("p50_us", p50),
        ("p99_us", p99),
        ("max_us", max),
        ("round_trip_p50_us", round_trip),
    ])])
}

fn microseconds(nanoseconds: &Sorted) -> (f64, f64, f64) {
    let at = |share| nanoseconds.at(share) / 1e3;
    (at(0.5), at(0.99), at(1.0))
}

/// What was seen of a load, and what became of the snapshots beside it.
struct Turn {
    report: Report,
    /// p50, p99 and the longest, in nanoseconds, and how many.
    snapshots: [u64; 4],
    /// The longest write in flight at each snapshot, and midway between two.
    at_snapshots: Vec<u64>,
    midway: Vec<u64>,
}

pub(super) fn under_writes(plan: &Plan) -> Result<Vec<Row>, String> {
    let rates = [0, UNDER_WRITES_PER_SECOND];
    let turns = in_turns("snapshots under writes", plan.rounds, rates.len(), |which, round| {
        turn(plan, rates[which], round)
    })?;
    let [without, with] = &turns[..] else { unreachable!("two rates were measured") };
    let count: u64 = with.iter().map(|turn| turn.snapshots[3]).sum();
    let [p50, p99, max] =
        [0, 1, 2].map(|which| median(with.iter().map(|turn| turn.snapshots[which] as f64)) / 1e6);
    let measured =
        format!("p50 {p50:.3} ms, p99 {p99:.3} ms, max {max:.3} ms of {count} in all rounds");
    let what = format!(
        "snapshot under 4 KiB random writes at depth 32, {UNDER_WRITES_PER_SECOND} a second"
    );
    let latency = Row::new(what, measured)
        .paper_or_peer("10–30 ms average; lvol 6 ms, p99 8 ms")
        .goal("p99 < 2 ms")
        .figures([("count", count as f64), ("p50_ms", p50), ("p99_ms", p99), ("max_ms", max)]);
    Ok(vec![latency, delays(with), tails(without, with)])
}

fn turn(plan: &Plan, per_second: u64, round: u32) -> Result<Turn, String> {
    let bench = Bench::start(plan)?;
    let (clock, wall) = (Clock::start(), unix_time());
    bench.schedule(per_second)?;
    let options = random(Workload::RandWrite, plan.duration, round);
    let report = bench.load(Options { timeline: Some(clock), ..options })?;
    bench.end_schedule()?;
    let latency = &bench.stats()?["snapshot_latency"];
    let mut snapshots = [0; 4];
    for (place, name) in snapshots.iter_mut().zip(["p50_ns", "p99_ns", "max_ns", "count"]) {
        *place = number(latency, name)?;
    }
    let list = bench.api.ask("GET", &format!("/v1/volumes/{MAIN}/snapshots"), &Value::Null)?;
    let times = list.as_array().map(Vec::as_slice).unwrap_or_default().iter().map(|it| {
        let time = it["time"].as_str().and_then(parse_utc);
        let time = time.ok_or_else(|| format!("a snapshot has no time: {it}"))?;
        // What was taken before the load is before all that the timeline covers.
        Ok(time.saturating_sub(wall.as_nanos() as u64))
    });
    let times: Vec<u64> = times.collect::<Result<_, String>>()?;
    let timeline = report.timeline.as_ref().ok_or("the load kept no timeline")?;
    let longest_from = |at_ns: u64| {
        let longest = timeline.longest(at_ns..at_ns + LOOKED_AT.as_nanos() as u64);
        longest.filter(|ns| *ns > 0) // None was in flight: the load had not begun.
    };
    let half = 500_000_000u64.checked_div(per_second).unwrap_or(0);
    Ok(Turn {
        snapshots,
        at_snapshots: times.iter().filter_map(|at| longest_from(*at)).collect(),
        midway: times.iter().filter_map(|at| longest_from(at + half)).collect(),
        report,
    })
}

/// The row that tells what snapshots delay.
fn delays(with: &[Turn]) -> Row {
    let pooled =
        |of: fn(&Turn) -> &Vec<u64>| Sorted::new(with.iter().flat_map(of).map(|ns| *ns as f64));
    let (there, midway) = (pooled(|turn| &turn.at_snapshots), pooled(|turn| &turn.midway));
    let [at, between] = [&there, &midway].map(|longest| {
        let (p50, p99, max) = microseconds(longest);
        let limit = DELAY_MAX_NS as f64;
        let over = longest.0.iter().filter(|ns| **ns > limit).count();
        (p50, p99, max, over, longest.0.len())
    });
    let shown = |(p50, p99, max, over, count)| {
        format!("p50 {p50:.0} µs, p99 {p99:.0} µs, max {max:.0} µs, over 1 ms {over} of {count}")
    };
    let measured = format!("at snapshots {}; midway between {}", shown(at), shown(between));
    let milliseconds = LOOKED_AT.as_millis();
    let what = format!("longest write in flight within {milliseconds} ms of a snapshot");
    Row::new(what, measured)
        .paper_or_peer("qcow2 stalls 5–7 ms, lvol 42–46 ms")
        .goal("none delayed more than 1 ms by a snapshot")
        .figures([
            ("at_p50_us", at.0),
            ("at_p99_us", at.1),
            ("at_max_us", at.2),
            ("at_over_1_ms", at.3 as f64),
            ("at_count", at.4 as f64),
            ("midway_p50_us", between.0),
            ("midway_p99_us", between.1),
            ("midway_max_us", between.2),
            ("midway_over_1_ms", between.3 as f64),
            ("midway_count", between.4 as f64),
        ])
}

/// The row with the tail of all writes.
fn tails(without: &[Turn], with: &[Turn]) -> Row {
    let [none, some] = [without, with].map(|turns| {
        let of = |value: fn(&crate::report::Latency) -> u64| {
            let values = turns.iter().filter_map(|turn| turn.report.latency_ns.as_ref());
            median(values.map(|it| value(it) as f64)) / 1e3
        };
        [of(|it| it.p50), of(|it| it.p99), of(|it| it.p999), of(|it| it.max)]
    });
    let shown = |[p50, p99, p999, max]: [f64; 4]| {
        format!("p50 {p50:.0} µs, p99 {p99:.0} µs, p99.9 {p999:.0} µs, max {max:.0} µs")
    };
    let measured = format!("{}; without snapshots {}", shown(some), shown(none));
    Row::new("all writes meanwhile", measured).figures([
        ("p99_us", some[1]),
        ("p999_us", some[2]),
        ("max_us", some[3]),
        ("without_p99_us", none[1]),
        ("without_p999_us", none[2]),
        ("without_max_us", none[3]),
    ])
}
