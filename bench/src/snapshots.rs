//! What snapshots cost: latencies, the rate that a guest keeps, the bytes that are written.
//!
//! Each row has a store of its own, so that none pays for what another has left behind, and rows that
//! are compared are measured in turns. Only Bessel is measured: what a peer does for a snapshot is not the
//! same thing (64 KiB and more copied at the first write after it, I/O stopped to take it).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use serde::Serialize;
use serde_json::{Value, json};

use crate::api::Api;
use crate::clock::{Clock, unix_time};
use crate::load::{self, Options};
use crate::plan::Workload;
use crate::report::Report;
use crate::server::{Contender, Poll, Scratch, Server, Site};
use crate::{cli, compare, interrupt};

const VOLUME: &str = "/v1/volumes/bench";
/// Beyond what was asked for, one load may take this long to connect, flush and stop.
const SLACK: Duration = Duration::from_secs(60);
const WARMUP: Duration = Duration::from_millis(300);
/// Snapshots taken one after the other on an idle volume.
const IDLE_COUNT: u32 = 500;
/// Snapshots a second beside a write load.
const RATES: [u64; 3] = [5, 100, 1000];
/// Snapshots with a few writes between them.
const LIGHT_COUNT: u32 = 200;
const LIGHT_WRITES: u64 = 4;
const CLONES: u32 = 1000;

/// What to measure, and where.
pub(crate) struct Plan {
    pub(crate) bessel: PathBuf,
    pub(crate) dir: PathBuf,
    pub(crate) size_bytes: u64,
    pub(crate) store_bytes: u64,
    pub(crate) duration: Duration,
    pub(crate) rounds: u32,
    /// Most snapshots behind a read load: the loads are at 0, 1, 10 and so on up to it.
    pub(crate) behind_max: u64,
    pub(crate) client_core: usize,
    pub(crate) server_core: usize,
    pub(crate) json: Option<PathBuf>,
}

/// One line of the table.
#[derive(Serialize)]
struct Row {
    what: String,
    value: String,
}

#[derive(Serialize)]
struct Results {
    unix_seconds: u64,
    machine: String,
    load_average: String,
    directory: PathBuf,
    size_bytes: u64,
    seconds: f64,
    rounds: u32,
    rows: Vec<Row>,
}

/// Measures, prints a table and writes the file.
pub(crate) fn run(plan: &Plan) -> Result<(), String> {
    interrupt::watch()?;
    let mut results = Results {
        unix_seconds: unix_time().as_secs(),
        machine: compare::machine(),
        load_average: load_average(),
        directory: plan.dir.clone(),
        size_bytes: plan.size_bytes,
        seconds: plan.duration.as_secs_f64(),
        rounds: plan.rounds,
        rows: Vec::new(),
    };
    for measure in [idle, under_writes, cost_of_rates, light_writes, first_writes, reads, clones] {
        for row in measure(plan)? {
            eprintln!("{}: {}", row.what, row.value);
            results.rows.push(row);
        }
    }
    print!("{}", render(&results));
    if let Some(path) = &plan.json {
        let text = serde_json::to_string_pretty(&results).map_err(|error| error.to_string())?;
        std::fs::write(path, text + "\n")
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    }
    Ok(())
}

fn render(results: &Results) -> String {
    let Results { machine, load_average, directory, .. } = results;
    let mut text = format!(
        "\n{machine}, load average before the start {load_average}, {}\n\n| what | |\n| --- | --- |\n",
        directory.display()
    );
    for Row { what, value } in &results.rows {
        let _ = writeln!(text, "| {what} | {value} |");
    }
    text
}

/// What other work the machine has, which spoils the figures.
fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_owned()
}

fn row(what: impl Into<String>, value: impl Into<String>) -> Row {
    Row { what: what.into(), value: value.into() }
}

/// A daemon over a store of its own, with one written volume.
struct Bench<'a> {
    plan: &'a Plan,
    server: Server,
    api: Api,
    /// Dropped after the server.
    site: Site,
}

impl<'a> Bench<'a> {
    fn start(plan: &'a Plan) -> Result<Self, String> {
        let kind = statfs(&plan.dir)
            .map_err(|error| format!("cannot look at {}: {error}", plan.dir.display()))?;
        let site = Site {
            files: Scratch::new(&plan.dir, "files")?,
            run: Scratch::new(&std::env::temp_dir(), "run")?,
            direct: kind.filesystem_type() != TMPFS_MAGIC,
            size_bytes: plan.size_bytes,
            store_bytes: plan.store_bytes,
            server_core: plan.server_core,
            poll: Poll::Adaptive,
            bessel: Some(plan.bessel.clone()),
        };
        let server = site.start(Contender::Bessel)?;
        let api = Api { socket: site.run.path().join("api.sock") };
        let bench = Self { plan, server, api, site };
        bench.load(Options {
            workload: Workload::Write,
            block_bytes: 256 << 10,
            depth: 8,
            one_pass: true,
            flush_at_end: true,
            ..Options::default()
        })?;
        Ok(bench)
    }

    fn load(&self, options: Options) -> Result<Report, String> {
        if interrupt::requested() {
            return Err("interrupted".into());
        }
        let socket = self.site.socket();
        let options = Options { socket, server_pid: Some(self.server.pid()), ..options };
        let core = self.plan.client_core;
        let loaded = std::thread::scope(|scope| {
            let load = || {
                cli::pin_this_thread(core)?;
                load::run(&options)
            };
            scope.spawn(load).join().expect("a load does not panic")
        });
        loaded.map_err(|error| self.server.explain(&error))
    }

    /// Random 4 KiB requests for the time of a measurement.
    fn random(&self, workload: Workload, seed: u32) -> Result<Report, String> {
        self.load(Options {
            workload,
            duration: Some(self.plan.duration),
            warmup: WARMUP,
            timeout: self.plan.duration + WARMUP + SLACK,
            seed: u64::from(seed) + 1,
            ..Options::default()
        })
    }

    fn write_some(&self, requests: u64, seed: u64) -> Result<(), String> {
        let options = Options {
            workload: Workload::RandWrite,
            requests: Some(requests),
            depth: 4,
            seed,
            ..Options::default()
        };
        self.load(options).map(drop)
    }

    /// Takes a snapshot, and returns how long it took from request to durable, in nanoseconds.
    fn snapshot(&self) -> Result<u64, String> {
        let taken = self.api.ask("POST", &format!("{VOLUME}/snapshots"), &json!({}))?;
        taken["latency_ns"].as_u64().ok_or_else(|| format!("{taken} has no latency"))
    }

    fn schedule(&self, per_second: u64) -> Result<(), String> {
        let path = format!("{VOLUME}/schedule");
        let every = 1_000_000_000 / per_second;
        let body = json!({ "every_ns": every, "keep": { "newest": 1_000_000 } });
        self.api.ask("PUT", &path, &body).map(drop)
    }

    fn stats(&self) -> Result<Value, String> {
        self.api.ask("GET", "/v1/stats", &Value::Null)
    }
}

/// Percentiles of latencies in nanoseconds.
fn latencies(mut values: Vec<u64>) -> String {
    values.sort_unstable();
    let at = |share: f64| {
        let index = ((values.len() as f64 * share) as usize).min(values.len().saturating_sub(1));
        values.get(index).map_or(0.0, |value| *value as f64 / 1e3)
    };
    let count = values.len();
    format!("p50 {:.1} µs, p99 {:.1} µs, max {:.1} µs of {count}", at(0.5), at(0.99), at(1.0))
}

fn idle(plan: &Plan) -> Result<Vec<Row>, String> {
    let bench = Bench::start(plan)?;
    let taken = (0..IDLE_COUNT).map(|_| bench.snapshot()).collect::<Result<_, _>>()?;
    Ok(vec![row("snapshot of an idle volume, in a tight loop", latencies(taken))])
}

fn under_writes(plan: &Plan) -> Result<Vec<Row>, String> {
    let bench = Bench::start(plan)?;
    let without = bench.random(Workload::RandWrite, 1)?;
    let (report, taken) = std::thread::scope(|scope| {
        let writing = scope.spawn(|| bench.random(Workload::RandWrite, 2));
        let mut taken = Vec::new();
        while !writing.is_finished() {
            taken.push(bench.snapshot()?);
            // As a schedule of 100 a second does; a tight loop would measure itself.
            std::thread::sleep(Duration::from_millis(10));
        }
        let report = writing.join().expect("a load does not panic")?;
        Ok::<_, String>((report, taken))
    })?;
    let longest = |report: &Report| {
        report
            .latency_ns
            .map_or_else(|| "-".to_owned(), |it| format!("{:.2} ms", it.max as f64 / 1e6))
    };
    Ok(vec![
        row("the same under 4 KiB random writes at depth 32", latencies(taken)),
        row(
            "longest write meanwhile, and without snapshots",
            format!("{}, {}", longest(&report), longest(&without)),
        ),
    ])
}

fn cost_of_rates(plan: &Plan) -> Result<Vec<Row>, String> {
    let mut rates: Vec<(u64, Vec<f64>, u64, u64)> =
        [0].into_iter().chain(RATES).map(|rate| (rate, Vec::new(), 0, 0)).collect();
    for round in 0..plan.rounds {
        let count = rates.len();
        for turn in 0..count {
            let (rate, samples, taken, skipped) = &mut rates[(turn + round as usize) % count];
            let bench = Bench::start(plan)?;
            if *rate > 0 {
                bench.schedule(*rate)?;
            }
            samples.push(bench.random(Workload::RandWrite, round)?.iops);
            let schedule = &bench.api.ask("GET", VOLUME, &Value::Null)?["schedule"];
            *taken += schedule["taken"].as_u64().unwrap_or(0);
            *skipped += schedule["skipped"].as_u64().unwrap_or(0);
        }
    }
    let without = median(&rates[0].1);
    let rows = rates.iter().map(|(rate, samples, taken, skipped)| {
        let iops = median(samples);
        let (kilo, ratio) = (iops / 1e3, iops / without);
        let what = format!("4 KiB random writes over the volume, {rate} snapshots a second");
        row(what, format!("{kilo:.1} k/s, {ratio:.2} of none ({taken} taken, {skipped} skipped)"))
    });
    Ok(rows.collect())
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn light_writes(plan: &Plan) -> Result<Vec<Row>, String> {
    let bench = Bench::start(plan)?;
    let metadata = |stats: &Value| stats["store"]["metadata_bytes"].as_u64().unwrap_or(0);
    bench.snapshot()?;
    let before = metadata(&bench.stats()?);
    for round in 0..LIGHT_COUNT {
        bench.write_some(LIGHT_WRITES, u64::from(round))?;
        bench.snapshot()?;
    }
    let after = metadata(&bench.stats()?);
    let each = after.saturating_sub(before) as f64 / f64::from(LIGHT_COUNT) / 1e3;
    let what =
        format!("metadata for each snapshot, {LIGHT_WRITES} random writes of 4 KiB between two");
    Ok(vec![row(what, format!("{each:.2} KB"))])
}

fn first_writes(plan: &Plan) -> Result<Vec<Row>, String> {
    let mut rows = Vec::new();
    for (workload, name) in [
        (Workload::Stride, "one 4 KiB write in each 64 KiB"),
        (Workload::Write, "each 4 KiB in order"),
    ] {
        let bench = Bench::start(plan)?;
        bench.snapshot()?;
        let counters = |stats: &Value| {
            let nodes = stats["reactors"][0]["metadata_writes"].as_u64().unwrap_or(0);
            (nodes * 4096, stats["volumes"][0]["written_bytes"].as_u64().unwrap_or(0))
        };
        let before = counters(&bench.stats()?);
        let options =
            Options { workload, one_pass: true, flush_at_end: true, ..Options::default() };
        let report = bench.load(options)?;
        let after = counters(&bench.stats()?);
        let (metadata, data) = (after.0 - before.0, after.1 - before.1);
        let ratio = (metadata + data) as f64 / data as f64;
        rows.push(row(
            format!("first write after a snapshot, {name}: bytes written / asked, rate"),
            format!("{ratio:.3}, {:.0} k/s", report.iops / 1e3),
        ));
    }
    Ok(rows)
}

fn reads(plan: &Plan) -> Result<Vec<Row>, String> {
    let bench = Bench::start(plan)?;
    let mut rows: Vec<Row> = Vec::new();
    let (mut taken, mut behind, mut first) = (0, 0, None);
    loop {
        while taken < behind {
            // Something differs between any two that were taken hundreds apart.
            if taken % 100 == 0 {
                bench.write_some(64, taken)?;
            }
            bench.snapshot()?;
            taken += 1;
        }
        let samples: Vec<f64> = (0..plan.rounds)
            .map(|round| bench.random(Workload::RandRead, round).map(|report| report.iops))
            .collect::<Result<_, _>>()?;
        let iops = median(&samples);
        let ratio = iops / *first.get_or_insert(iops);
        let what = format!("4 KiB random reads with {behind} snapshots behind");
        rows.push(row(what, format!("{:.1} k/s, {ratio:.3} of none", iops / 1e3)));
        behind = if behind == 0 { 1 } else { behind * 10 };
        if behind > plan.behind_max {
            return Ok(rows);
        }
    }
}

fn clones(plan: &Plan) -> Result<Vec<Row>, String> {
    let bench = Bench::start(plan)?;
    let snapshot = bench.api.ask("POST", &format!("{VOLUME}/snapshots"), &json!({}))?;
    let id = snapshot["id"].as_str().unwrap_or_default().to_owned();
    let clock = Clock::start();
    let path = format!("/v1/snapshots/{id}/clones");
    let made = bench.api.ask("POST", &path, &json!({ "prefix": "clone", "count": CLONES }))?;
    let took = Duration::from_nanos(clock.now_ns());
    let count = made.as_array().map_or(0, Vec::len);
    let value = format!("{:.0} ms", took.as_secs_f64() * 1e3);
    Ok(vec![row(format!("{count} clones of a snapshot, each durable and served"), value)])
}

/// The directory must be there before anything is started.
pub(crate) fn check_dir(dir: &Path) -> Result<(), String> {
    if dir.is_dir() { Ok(()) } else { Err(format!("{} is no directory; make it", dir.display())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_and_medians_are_of_what_was_measured() {
        let values = (1..=1000).rev().map(|it| it * 1000).collect();
        assert_eq!(latencies(values), "p50 501.0 µs, p99 991.0 µs, max 1000.0 µs of 1000");
        assert_eq!(latencies(vec![]), "p50 0.0 µs, p99 0.0 µs, max 0.0 µs of 0");
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert!(median(&[]).is_nan());
    }
}
