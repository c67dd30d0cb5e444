//! Measures Bessel and its peers in turns: A B A B, never all of A and then all of B.
//!
//! Neighbours, frequency and the host's mood change over minutes, so only measurements made close
//! together can be compared. For each directory every contender's disk is written once in full;
//! then, round by round and load by load, each contender is started, warmed up, measured and
//! stopped in turn, in an order that rotates with the round. One server runs at a time.

mod table;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use serde::Serialize;

use crate::clock::unix_time;
use crate::load::{self, Options};
use crate::plan::Workload;
use crate::report::Report;
use crate::server::{Contender, Poll, Scratch, Site, spawn_on_core};
use crate::{cli, interrupt};

/// Load before each measurement: fills caches and lets an adaptive server wake up.
const WARMUP: Duration = Duration::from_millis(500);

/// Beyond what was asked for, one load may take this long to connect, flush and stop.
const SLACK: Duration = Duration::from_secs(60);

/// A comparison, as asked for.
pub(crate) struct Comparison {
    pub(crate) bessel: Option<PathBuf>,
    pub(crate) dirs: Vec<PathBuf>,
    pub(crate) size_bytes: u64,
    pub(crate) store_bytes: u64,
    pub(crate) depths: Vec<u16>,
    pub(crate) workloads: Vec<Workload>,
    pub(crate) block_bytes: u32,
    pub(crate) duration: Duration,
    pub(crate) rounds: u32,
    pub(crate) client_core: usize,
    pub(crate) server_core: usize,
    pub(crate) poll: Poll,
    pub(crate) json: Option<PathBuf>,
}

/// One measurement of one contender.
#[derive(Clone, Debug, Serialize)]
struct Sample {
    iops: f64,
    p50_ns: u64,
    p99_ns: u64,
    p999_ns: u64,
    max_ns: u64,
    server_cpu_us_per_request: Option<f64>,
    /// Share of the time for which another thread had the client's core.
    client_waited: Option<f64>,
}

/// All measurements of one contender under one load.
#[derive(Serialize)]
struct Cell {
    workload: Workload,
    depth: u16,
    contender: Contender,
    samples: Vec<Sample>,
}

/// What was measured in one directory.
#[derive(Serialize)]
struct Place {
    directory: PathBuf,
    tmpfs: bool,
    cells: Vec<Cell>,
}

/// Everything that was measured, with what is needed to do it again.
#[derive(Serialize)]
struct Results {
    unix_seconds: u64,
    machine: String,
    size_bytes: u64,
    block_bytes: u32,
    seconds: f64,
    rounds: u32,
    poll: Poll,
    places: Vec<Place>,
}

/// Runs the comparison, prints its tables and writes its file.
pub(crate) fn run(comparison: &Comparison) -> Result<(), String> {
    interrupt::watch()?;
    let mut results = Results {
        unix_seconds: unix_time().as_secs(),
        machine: machine(),
        size_bytes: comparison.size_bytes,
        block_bytes: comparison.block_bytes,
        seconds: comparison.duration.as_secs_f64(),
        rounds: comparison.rounds,
        poll: comparison.poll,
        places: Vec::new(),
    };
    for directory in &comparison.dirs {
        let place = measure_place(comparison, directory)?;
        results.places.push(place);
    }
    print!("{}", table::render(&results));
    if let Some(path) = &comparison.json {
        let text = serde_json::to_string_pretty(&results).map_err(|error| error.to_string())?;
        std::fs::write(path, text + "\n")
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    }
    Ok(())
}

fn measure_place(comparison: &Comparison, directory: &Path) -> Result<Place, String> {
    let kind = statfs(directory)
        .map_err(|error| format!("cannot look at {}: {error}", directory.display()))?;
    let tmpfs = kind.filesystem_type() == TMPFS_MAGIC;
    let site = Site {
        files: Scratch::new(directory, "files")?,
        run: Scratch::new(&std::env::temp_dir(), "run")?,
        direct: !tmpfs,
        size_bytes: comparison.size_bytes,
        store_bytes: comparison.store_bytes,
        server_core: comparison.server_core,
        poll: comparison.poll,
        bessel: comparison.bessel.clone(),
    };
    let contenders = contenders(comparison, tmpfs);
    let mut cells = empty_cells(comparison, &contenders);
    site.make_raw_file()?;
    fill(comparison, &site, Contender::QsdUring)?;
    if comparison.bessel.is_some() {
        fill(comparison, &site, Contender::Bessel)?;
    }
    for round in 0..comparison.rounds {
        for group in cells.chunk_by_mut(|a, b| (a.workload, a.depth) == (b.workload, b.depth)) {
            let count = group.len();
            for turn in 0..count {
                let cell = &mut group[(turn + round as usize) % count];
                let sample = measure(comparison, &site, cell, round)?;
                eprintln!(
                    "{} round {} {} depth {}: {} {:.0} IOPS",
                    directory.display(),
                    round + 1,
                    cell.workload.name(),
                    cell.depth,
                    cell.contender.name(),
                    sample.iops
                );
                cell.samples.push(sample);
            }
        }
    }
    Ok(Place { directory: directory.to_owned(), tmpfs, cells })
}

fn contenders(comparison: &Comparison, tmpfs: bool) -> Vec<Contender> {
    let mut contenders = vec![Contender::QsdUring];
    if tmpfs {
        // tmpfs has no NOWAIT: io_uring's workers share the server's core, and a thread pool may win.
        contenders.push(Contender::QsdThreads);
    }
    if comparison.bessel.is_some() {
        contenders.push(Contender::Bessel);
    }
    if fio_is_installed() {
        contenders.push(Contender::BareUring);
    }
    contenders
}

/// A cell for each load and contender, contenders of one load side by side.
fn empty_cells(comparison: &Comparison, contenders: &[Contender]) -> Vec<Cell> {
    let mut cells = Vec::new();
    for &depth in &comparison.depths {
        for &workload in &comparison.workloads {
            for &contender in contenders {
                cells.push(Cell { workload, depth, contender, samples: Vec::new() });
            }
        }
    }
    cells
}

/// Writes the whole disk of `contender`.
fn fill(comparison: &Comparison, site: &Site, contender: Contender) -> Result<(), String> {
    eprintln!("filling {} for {}", site.files.path().display(), contender.name());
    let options = Options {
        workload: Workload::Write,
        block_bytes: 256 << 10,
        depth: 8,
        one_pass: true,
        flush_at_end: true,
        ..Options::default()
    };
    serve_and_load(comparison, site, contender, options).map(drop)
}

fn measure(
    comparison: &Comparison,
    site: &Site,
    cell: &Cell,
    round: u32,
) -> Result<Sample, String> {
    if cell.contender == Contender::BareUring {
        return measure_bare(comparison, site, cell);
    }
    let options = Options {
        workload: cell.workload,
        block_bytes: comparison.block_bytes,
        depth: cell.depth,
        duration: Some(comparison.duration),
        warmup: WARMUP,
        timeout: comparison.duration + WARMUP + SLACK,
        // Equal for all contenders of a round.
        seed: u64::from(round) + 1,
        ..Options::default()
    };
    let report = serve_and_load(comparison, site, cell.contender, options)?;
    let latency = report
        .latency_ns
        .ok_or_else(|| format!("{} finished no request in time", cell.contender.name()))?;
    Ok(Sample {
        iops: report.iops,
        p50_ns: latency.p50,
        p99_ns: latency.p99,
        p999_ns: latency.p999,
        max_ns: latency.max,
        server_cpu_us_per_request: report.server_cpu_us_per_request,
        client_waited: report.client_waited,
    })
}

/// Starts `contender`, loads it from the client's core and stops it.
fn serve_and_load(
    comparison: &Comparison,
    site: &Site,
    contender: Contender,
    options: Options,
) -> Result<Report, String> {
    if interrupt::requested() {
        return Err("interrupted".into());
    }
    let server = site.start(contender)?;
    let options = Options { socket: site.socket(), server_pid: Some(server.pid()), ..options };
    // A thread of its own, so that this one stays off the client's core.
    let loaded = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                cli::pin_this_thread(comparison.client_core)?;
                load::run(&options)
            })
            .join()
            .expect("a load does not panic")
    });
    loaded.map_err(|error| server.explain(&error))
}

fn fio_is_installed() -> bool {
    let mut command = Command::new("fio");
    command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// The same load by fio on the raw file, without a server.
fn measure_bare(comparison: &Comparison, site: &Site, cell: &Cell) -> Result<Sample, String> {
    let mut command = Command::new("fio");
    command
        .args(["--name=bare", "--ioengine=io_uring", "--output-format=json", "--time_based"])
        .arg(format!("--filename={}", site.raw_file().display()))
        .arg(format!("--rw={}", fio_name(cell.workload)))
        .arg(format!("--bs={}", comparison.block_bytes))
        .arg(format!("--size={}", comparison.size_bytes))
        .arg(format!("--iodepth={}", cell.depth))
        .arg(format!("--direct={}", u8::from(site.direct)))
        .arg(format!("--ramp_time={}ms", WARMUP.as_millis()))
        .arg(format!("--runtime={}ms", comparison.duration.as_millis()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let output = spawn_on_core(command, comparison.server_core)?
        .wait_with_output()
        .map_err(|error| format!("cannot run fio: {error}"))?;
    if !output.status.success() {
        return Err(format!("fio failed: {}", output.status));
    }
    parse_fio(&output.stdout, cell.workload)
}

fn fio_name(workload: Workload) -> &'static str {
    match workload {
        Workload::Mix => "randrw",
        Workload::Stride => "write:60k",
        Workload::Runs => "randwrite:40",
        other => other.name(),
    }
}

/// Takes our figures out of fio's JSON.
fn parse_fio(output: &[u8], workload: Workload) -> Result<Sample, String> {
    // fio may print notes before the JSON.
    let start = output.iter().position(|byte| *byte == b'{').unwrap_or(0);
    let json: serde_json::Value = serde_json::from_slice(&output[start..])
        .map_err(|error| format!("cannot read fio's output: {error}"))?;
    let job = &json["jobs"][0];
    let side = &job[if workload.writes() { "write" } else { "read" }];
    let percentile = |name: &str| side["clat_ns"]["percentile"][name].as_u64().unwrap_or(0);
    let iops = side["iops"].as_f64().ok_or("fio's output has no figures")?;
    let cpu_percent =
        job["usr_cpu"].as_f64().unwrap_or(0.0) + job["sys_cpu"].as_f64().unwrap_or(0.0);
    Ok(Sample {
        iops,
        p50_ns: percentile("50.000000"),
        p99_ns: percentile("99.000000"),
        p999_ns: percentile("99.900000"),
        max_ns: side["clat_ns"]["max"].as_u64().unwrap_or(0),
        server_cpu_us_per_request: (iops > 0.0).then(|| cpu_percent * 1e4 / iops),
        client_waited: None,
    })
}

/// Processor and kernel, for a reader of the figures.
pub(crate) fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu_info = read("/proc/cpuinfo");
    let model = cpu_info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown processor", |(_, name)| name.trim());
    let cores = cpu_info.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{cores} cores of {model}, Linux {}", kernel.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_in_the_output_of_fio() {
        let output = br#"note: something
            {"jobs": [{"usr_cpu": 10.0, "sys_cpu": 40.0, "read": {"iops": 100000.0, "clat_ns":
            {"max": 9, "percentile": {"50.000000": 1, "99.000000": 2, "99.900000": 3}}}}]}"#;
        let sample = parse_fio(output, Workload::RandRead).unwrap();
        assert_eq!((sample.p50_ns, sample.p99_ns, sample.p999_ns, sample.max_ns), (1, 2, 3, 9));
        assert_eq!(sample.server_cpu_us_per_request, Some(5.0));
        assert!(parse_fio(output, Workload::RandWrite).is_err());
        assert!(parse_fio(b"fio: failed", Workload::RandRead).is_err());
    }
}
