//! The collector: how fast it goes through a large store, and what it costs a guest meanwhile.
//!
//! The store maps tens of gigabytes without taking them: see `store_file`. A daemon without a collector is measured no
//! further, and the row says so.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::bench::{Bench, number};
use super::store_file::forget_data;
use super::{Plan, Progress, Row, in_turns, median, ratios};
use crate::api::{Answer, Api};
use crate::clock::Clock;
use crate::interrupt;
use crate::plan::Workload;

const PATH: &str = "/v1/gc";
/// The store is filled by volumes of this size, each given back to the file system before the next.
const SLICE_BYTES: u64 = 2 << 30;
/// What a store needs beside its data.
const ROOM_BYTES: u64 = 8 << 30;
/// The longest that a collection may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// What the last collection came to.
struct Collection {
    seconds: f64,
    reachable_bytes: u64,
    freed_bytes: u64,
    nodes_read: u64,
}

pub(super) fn collector(plan: &Plan) -> Result<Vec<Row>, String> {
    let store_bytes = plan.store_bytes.max(plan.mapped_bytes * 5 / 4 + ROOM_BYTES);
    let bench = Bench::with_store(plan, store_bytes)?;
    let Answer { status, .. } = bench.api.try_ask("GET", PATH, &Value::Null)?;
    if status == 404 {
        return Ok(vec![
            rate_row("not there: this daemon has no collector"),
            cost_row("not there: this daemon has no collector"),
        ]);
    }
    map(&bench)?;
    let collections: Vec<Collection> =
        (0..plan.rounds).map(|_| collect(&bench.api)).collect::<Result<_, _>>()?;
    let first = collections.first().ok_or("no round was asked for")?;
    let rate = median(collections.iter().map(|it| it.reachable_bytes as f64 / it.seconds / 1e9));
    let seconds = median(collections.iter().map(|it| it.seconds));
    let stored = first.reachable_bytes as f64 / 1e9;
    let measured = format!(
        "{rate:.1} GB/s: {stored:.1} GB in {:.1} ms, {} nodes read; the first freed {:.2} GB",
        seconds * 1e3,
        first.nodes_read,
        first.freed_bytes as f64 / 1e9
    );
    let rate = rate_row(&measured).figures([
        ("gigabytes_per_second", rate),
        ("reachable_gigabytes", stored),
        ("milliseconds", seconds * 1e3),
        ("freed_bytes", first.freed_bytes as f64),
    ]);
    Ok(vec![rate, cost(&bench)?])
}

fn rate_row(measured: &str) -> Row {
    Row::new("collector, stored data a second", measured)
        .paper_or_peer("0.96 GB/s")
        .goal("≥ 100 GB/s on tmpfs")
}

fn cost_row(measured: &str) -> Row {
    Row::new("4 KiB random writes while it runs over and over", measured).goal("≥ 0.9 of without")
}

/// Maps as much as was asked for, and deletes one volume more, so that there is something to free.
fn map(bench: &Bench<'_>) -> Result<(), String> {
    let (plan, store) = (bench.plan, bench.site.store_file());
    let slices = plan.mapped_bytes.div_ceil(SLICE_BYTES);
    let mut progress = Progress::new("mapping a store for the collector", slices + 1);
    for slice in 0..=slices {
        let left = plan.mapped_bytes.saturating_sub(slice * SLICE_BYTES);
        let size = if left == 0 { plan.size_bytes } else { left.min(SLICE_BYTES) };
        let name = format!("mapped-{slice}");
        let socket = bench.create(&name, size)?;
        bench.fill(socket)?;
        if left == 0 {
            bench.api.ask("DELETE", &format!("/v1/volumes/{name}"), &Value::Null)?;
        }
        forget_data(&store)?;
        progress.at(slice + 1)?;
    }
    // The volume that is loaded has lost its data too: with its space taken again, writes cost what they always do.
    bench.fill(bench.site.socket())
}

/// One collection, from its start to its end.
fn collect(api: &Api) -> Result<Collection, String> {
    api.ask("POST", PATH, &json!({}))?;
    let deadline = Clock::start().deadline(PATIENCE);
    loop {
        let state = api.ask("GET", PATH, &Value::Null)?;
        let last = &state["last"];
        if state["running"] == false && !last.is_null() {
            if last["outcome"] != "done" {
                return Err(format!("the collection ended so: {last}"));
            }
            return Ok(Collection {
                seconds: number(last, "duration_ns")? as f64 / 1e9,
                reachable_bytes: number(last, "reachable_bytes")?,
                freed_bytes: number(last, "freed_data_bytes")?
                    + number(last, "freed_metadata_bytes")?,
                nodes_read: number(last, "nodes_read")?,
            });
        }
        if interrupt::requested() || deadline.passed() {
            return Err("the collection did not end in time".into());
        }
        // The daemon says how long it took; asking more often would cost the load beside it more than the
        // collection does.
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What collections over and over cost a write load, in turns.
fn cost(bench: &Bench<'_>) -> Result<Row, String> {
    let collected = AtomicU64::new(0);
    let samples =
        in_turns("writes beside the collector", bench.plan.rounds.max(3), 2, |which, round| {
            let load = || bench.random(Workload::RandWrite, bench.plan.duration, round);
            if which == 0 {
                return Ok(load()?.iops);
            }
            let stop = AtomicBool::new(false);
            let (report, collecting) = std::thread::scope(|scope| {
                let collecting = scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        collect(&bench.api)?;
                        collected.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok::<_, String>(())
                });
                let report = load();
                stop.store(true, Ordering::Relaxed);
                (report, collecting.join().expect("a collection does not panic"))
            });
            collecting?;
            Ok(report?.iops)
        })?;
    let ratio = ratios(&samples[1], &samples[0]);
    let kilo = median(samples[1].iter().copied()) / 1e3;
    let count = collected.into_inner();
    let measured = format!("{kilo:.1} k/s, {:.3} of without, {count} collections", ratio.median());
    Ok(cost_row(&measured).figures([
        ("kilo_writes_per_second", kilo),
        ("ratio", ratio.median()),
        ("collections", count as f64),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::Scratch;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    /// Collects from a daemon that gives these answers, each on a connection of its own.
    fn collect_from(name: &str, answers: &[(u16, Value)]) -> Result<Collection, String> {
        let scratch = Scratch::new(&std::env::temp_dir(), name)?;
        let api = Api { socket: scratch.path().join("api.sock") };
        let listener = UnixListener::bind(&api.socket).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for (status, body) in answers {
                    let (mut stream, body) = (listener.accept().unwrap().0, body.to_string());
                    let (mut request, mut byte) = (Vec::new(), [0]);
                    while !request.ends_with(b"\r\n\r\n") {
                        stream.read_exact(&mut byte).unwrap();
                        request.push(byte[0]);
                    }
                    if request.starts_with(b"POST") {
                        stream.read_exact(&mut [0; 2]).unwrap(); // Its body: an empty object.
                    }
                    let length = body.len();
                    let head = format!("HTTP/1.1 {status} x\r\ncontent-length: {length}\r\n\r\n");
                    stream.write_all((head + &body).as_bytes()).unwrap();
                }
            });
            collect(&api)
        })
    }

    fn ended(outcome: &str) -> Value {
        json!({ "running": false, "phase": null, "last": {
            "outcome": outcome, "reason": "the device failed", "duration_ns": 500_000_000,
            "nodes_read": 7, "reachable_bytes": 50_000_000_000u64, "freed_data_bytes": 4096,
            "freed_metadata_bytes": 8192, "volumes_reclaimed": 1,
        } })
    }

    #[test]
    fn a_collection_is_waited_for_and_its_end_is_read() {
        let began = json!({ "running": false, "last": null });
        let running = json!({ "running": true, "phase": "mark", "last": null });
        let answers = [(202, json!({})), (200, began), (200, running), (200, ended("done"))];
        let collection = collect_from("test-gc", &answers).unwrap();
        assert_eq!(collection.reachable_bytes as f64 / collection.seconds, 100e9);
        assert_eq!((collection.freed_bytes, collection.nodes_read), (12_288, 7));
    }

    #[test]
    fn a_collection_that_failed_or_was_refused_is_an_error() {
        let answers = [(202, json!({})), (200, ended("failed"))];
        let error = collect_from("test-gc-failed", &answers).err().unwrap();
        assert!(error.contains("the device failed"), "{error}");
        let refused = [(409, json!({ "error": "one is running" }))];
        let error = collect_from("test-gc-refused", &refused).err().unwrap();
        assert_eq!(error, "POST /v1/gc: one is running");
    }
}
