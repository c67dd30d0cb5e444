//! Measures Bessel and its peers in turns: A B A B, never all of A and then all of B.
//!
//! Neighbours, frequency and the host's mood change over minutes, so only measurements made close
//! together can be compared. For each directory every contender's disk is written once in full;
//! then, round by round and load by load, each contender is started, warmed up, measured and
//! stopped in turn, in an order that rotates with the round. One server runs at a time. A disk in the memory of its
//! server is gone with it, and so is written after each start.
//!
//! ```text
//! scenario ──► loads ──► cells (load x contender) ──► samples ──► summary ──► table, html (plot)
//! ```

mod costs;
mod fio;
mod html;
mod plot;
pub(crate) mod scenario;
mod summary;
mod table;

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use serde::Serialize;

use crate::clock::unix_time;
use crate::load::{self, Options};
use crate::plan::Workload;
use crate::report::{Latency, Report};
use crate::server::{Contender, Device, Medium, Poll, Scratch, Server, Serving, Site, State};
use crate::{cli, interrupt, output};
use costs::{Costs, Meter};
use scenario::Load;

/// Load before each measurement, unless that is shorter: fills caches and lets an adaptive server wake up.
const WARMUP: Duration = Duration::from_millis(500);

/// Beyond what was asked for, one load may take this long to connect, flush and stop.
const SLACK: Duration = Duration::from_secs(60);

/// A comparison, as asked for.
pub(crate) struct Comparison {
    pub(crate) bessel: Option<PathBuf>,
    /// All that are installed, when none is named.
    pub(crate) contenders: Vec<Contender>,
    pub(crate) devices: Vec<Device>,
    pub(crate) size_bytes: u64,
    /// What the device needs, when nothing is said.
    pub(crate) store_bytes: Option<u64>,
    pub(crate) loads: Vec<Load>,
    pub(crate) duration: Duration,
    pub(crate) rounds: u32,
    pub(crate) client_core: usize,
    pub(crate) server_core: usize,
    pub(crate) poll: Poll,
    /// Count system calls and the like too.
    pub(crate) costs: bool,
    pub(crate) json: Option<PathBuf>,
    pub(crate) html: Option<PathBuf>,
    /// What `bessel-bench snapshots` has written, for the report.
    pub(crate) snapshots: Option<PathBuf>,
}

impl Comparison {
    fn warmup(&self) -> Duration {
        WARMUP.min(self.duration)
    }

    /// A file is sparse, and has room for what snapshots of many rounds leave behind. Memory is taken, for one disk
    /// and what is written over a snapshot of it.
    fn store_bytes(&self, device: &Device) -> u64 {
        let beside = if device.outlives_servers() { 8 << 30 } else { 256 << 20 };
        self.store_bytes.unwrap_or(2 * self.size_bytes + beside)
    }
}

/// One measurement of one contender.
#[derive(Clone, Debug, Serialize)]
struct Sample {
    iops: f64,
    p50_ns: u64,
    p90_ns: u64,
    p99_ns: u64,
    p999_ns: u64,
    p9999_ns: u64,
    max_ns: u64,
    server_cpu_us_per_request: Option<f64>,
    /// Share of the time for which another thread had the client's core.
    client_waited: Option<f64>,
}

/// All measurements of one contender under one load.
#[derive(Serialize)]
struct Cell {
    #[serde(flatten)]
    load: Load,
    contender: Contender,
    samples: Vec<Sample>,
    /// Of a server, if they were asked for and can be counted here.
    costs: Option<Costs>,
}

/// What was measured on one device.
#[derive(Serialize)]
struct Place {
    device: Device,
    tmpfs: bool,
    cells: Vec<Cell>,
    /// What was not measured there, and why.
    left_out: Vec<String>,
}

impl Place {
    /// What its disks are.
    fn medium(&self) -> &'static str {
        match self.device {
            Device::Directory(_) if self.tmpfs => "tmpfs",
            Device::Directory(_) => "O_DIRECT",
            Device::Loop(_) => "block devices over files",
            Device::Memory => "of each server",
            Device::Null => "data is dropped",
        }
    }
}

/// A contender that is measured, and what its program says of its version.
#[derive(Serialize)]
struct Version {
    contender: Contender,
    version: String,
}

/// Everything that was measured, with what is needed to do it again.
#[derive(Serialize)]
struct Results {
    unix_seconds: u64,
    machine: String,
    command: Vec<String>,
    size_bytes: u64,
    seconds: f64,
    rounds: u32,
    poll: Poll,
    contenders: Vec<Version>,
    /// Contenders that could not be measured, and why.
    skipped: Vec<String>,
    places: Vec<Place>,
}

/// Runs the comparison, prints its tables and writes its files.
pub(crate) fn run(comparison: &Comparison) -> Result<(), String> {
    interrupt::watch()?;
    // Read first: a file that will not do is told before the measurements, not after.
    let snapshots = comparison.snapshots.as_deref().map(html::read_snapshots).transpose()?;
    let (contenders, mut skipped) = contenders(comparison)?;
    let perf_counts = comparison.costs
        && costs::check()
            .map_err(|why| skipped.push(format!("system calls, instructions and cycles: {why}")))
            .is_ok();
    for skipped in &skipped {
        eprintln!("skipped: {skipped}");
    }
    let mut results = Results {
        unix_seconds: unix_time().as_secs(),
        machine: machine(),
        command: std::env::args_os().map(|it| it.to_string_lossy().into_owned()).collect(),
        size_bytes: comparison.size_bytes,
        seconds: comparison.duration.as_secs_f64(),
        rounds: comparison.rounds,
        poll: comparison.poll,
        contenders,
        skipped,
        places: Vec::new(),
    };
    for device in &comparison.devices {
        let place = measure_place(comparison, device, &results.contenders, perf_counts)?;
        results.places.push(place);
        // After each: a long run that ends early has not been for nothing.
        save(comparison, &results, snapshots.as_ref())?;
    }
    output::print(&table::render(&results))
}

/// Writes the files that were asked for.
fn save(
    comparison: &Comparison,
    results: &Results,
    snapshots: Option<&html::SnapshotReads>,
) -> Result<(), String> {
    if let Some(path) = &comparison.json {
        let text = serde_json::to_string_pretty(results).map_err(|error| error.to_string())?;
        write(path, &(text + "\n"))?;
    }
    match &comparison.html {
        Some(path) => write(path, &html::render(results, snapshots)),
        None => Ok(()),
    }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Those that can be measured here, and why the others cannot. One that was named must be there.
fn contenders(comparison: &Comparison) -> Result<(Vec<Version>, Vec<String>), String> {
    let named = &comparison.contenders;
    let (mut found, mut skipped) = (Vec::new(), Vec::new());
    for &contender in <Contender as clap::ValueEnum>::value_variants() {
        if !named.is_empty() && !named.contains(&contender) {
            continue;
        }
        // SPDK has a contender for each of its disks: those of devices that were not asked for are not missed.
        let is_wanted = |device| contender.cannot_be_on(device).is_none();
        if named.is_empty()
            && contender.medium() == Medium::NoFile
            && !comparison.devices.iter().any(is_wanted)
        {
            continue;
        }
        let must_be_there = match contender {
            Contender::Bessel => comparison.bessel.is_some() || !named.is_empty(),
            _ => !named.is_empty(),
        };
        match contender.version(comparison.bessel.as_deref()) {
            Ok(version) => found.push(Version { contender, version }),
            Err(why) if must_be_there => {
                return Err(format!("{} cannot be measured: {why}", contender.name()));
            }
            Err(why) => skipped.push(format!("{}: {why}", contender.name())),
        }
    }
    if found.is_empty() {
        return Err(format!("there is nothing to measure: {}", skipped.join("; ")));
    }
    Ok((found, skipped))
}

fn measure_place(
    comparison: &Comparison,
    device: &Device,
    contenders: &[Version],
    perf_counts: bool,
) -> Result<Place, String> {
    let (tmpfs, files) = match device.directory() {
        Some(path) => {
            let kind = statfs(path)
                .map_err(|error| format!("cannot look at {}: {error}", path.display()))?;
            // A loop device takes O_DIRECT whatever is below it.
            let tmpfs =
                kind.filesystem_type() == TMPFS_MAGIC && *device == Device::Directory(path.into());
            (tmpfs, Some(Scratch::new(path, "files")?))
        }
        None => (false, None),
    };
    let site = Site {
        device: device.clone(),
        files,
        run: Scratch::new(&std::env::temp_dir(), "run")?,
        direct: !tmpfs,
        size_bytes: comparison.size_bytes,
        store_bytes: comparison.store_bytes(device),
        server_core: comparison.server_core,
        poll: comparison.poll,
        bessel: comparison.bessel.clone(),
    };
    let contenders: Vec<Contender> = contenders.iter().map(|it| it.contender).collect();
    let (mut cells, left_out) = empty_cells(&comparison.loads, &contenders, device, tmpfs);
    say_how_long(comparison, device, &cells);
    if device.outlives_servers() {
        for (contender, state) in disks_to_fill(&cells) {
            fill(comparison, &site, contender, state)?;
        }
    }
    for round in 0..comparison.rounds {
        for group in cells.chunk_by_mut(|a, b| a.load == b.load) {
            let count = group.len();
            for turn in 0..count {
                let cell = &mut group[(turn + round as usize) % count];
                let sample = measure(comparison, &site, cell, round)?;
                eprintln!(
                    "{} round {} {} depth {}: {} {:.0} IOPS",
                    device,
                    round + 1,
                    cell.load.name(),
                    cell.load.depth,
                    cell.contender.name(),
                    sample.iops
                );
                cell.samples.push(sample);
            }
        }
    }
    // Without perf there is what Bessel counts itself.
    let has_costs = |cell: &&mut Cell| match cell.contender {
        Contender::Bessel => comparison.costs,
        Contender::BareUring => false,
        _ => perf_counts,
    };
    for cell in cells.iter_mut().filter(has_costs) {
        cell.costs = Some(measure_costs(comparison, &site, cell, perf_counts)?);
    }
    Ok(Place { device: device.clone(), tmpfs, cells, left_out })
}

fn say_how_long(comparison: &Comparison, device: &Device, cells: &[Cell]) {
    let each = |cell: &Cell| cell.load.warmup(comparison.warmup()) + comparison.duration;
    let seconds: f64 = cells.iter().map(|cell| each(cell).as_secs_f64()).sum();
    eprintln!(
        "{}: {} measurements, {:.0} minutes at most and what starting and filling takes",
        device,
        cells.len() * comparison.rounds as usize,
        (seconds * f64::from(comparison.rounds) / 60.0).ceil()
    );
}

/// A cell for each load and each contender that can do it, those of one load side by side; and what is left
/// out, with the reason, each once.
fn empty_cells(
    loads: &[Load],
    contenders: &[Contender],
    device: &Device,
    tmpfs: bool,
) -> (Vec<Cell>, Vec<String>) {
    let (mut cells, mut left_out) = (Vec::new(), Vec::new());
    for &load in loads {
        if let Some(why) = load.cannot_be_on(device) {
            // Once for all depths and contenders.
            let why = format!("{}: {why}", load.name());
            if !left_out.contains(&why) {
                left_out.push(why);
            }
            continue;
        }
        for &contender in contenders {
            let why = match contender {
                _ if contender.cannot_be_on(device).is_some() => {
                    let why = contender.cannot_be_on(device);
                    why.map(|why| format!("{} {why}", contender.name()))
                }
                // tmpfs has no NOWAIT: io_uring's workers share the server's core, and a thread pool may win.
                Contender::QsdThreads if !tmpfs => {
                    Some(format!("{}: measured on tmpfs only", contender.name()))
                }
                _ if load.flush_every > 0 && contender.cannot_flush().is_some() => {
                    let why = contender.cannot_flush();
                    why.map(|why| format!("{}, flush: {why}", contender.name()))
                }
                _ => contender.cannot(load.state, load.queues).map(|why| {
                    let what = match load.state {
                        State::Snapshotted => load.state.name(),
                        _ => "several queues",
                    };
                    format!("{}, {what}: {why}", contender.name())
                }),
            };
            match why {
                None => cells.push(Cell { load, contender, samples: Vec::new(), costs: None }),
                Some(why) if left_out.contains(&why) => {}
                Some(why) => left_out.push(why),
            }
        }
    }
    (cells, left_out)
}

/// Each file that must be written before it is measured, with a contender that can do it: one that serves,
/// where there is one.
fn disks_to_fill(cells: &[Cell]) -> Vec<(Contender, State)> {
    let mut disks: Vec<(Contender, State)> = Vec::new();
    for &Cell { contender, load, .. } in cells.iter().filter(|cell| cell.load.state != State::Empty)
    {
        let same = |disk: &&mut (Contender, State)| {
            disk.0.medium() == contender.medium() && disk.1 == load.state
        };
        match disks.iter_mut().find(same) {
            Some(disk) if disk.0 == Contender::BareUring => disk.0 = contender,
            Some(_) => {}
            None => disks.push((contender, load.state)),
        }
    }
    disks
}

/// Makes the disk of `contender` and writes all of it.
fn fill(
    comparison: &Comparison,
    site: &Site,
    contender: Contender,
    state: State,
) -> Result<(), String> {
    let file = site.disk_file(contender, state);
    eprintln!("filling {} by {}", file.display(), contender.name());
    site.make_disk(contender, state)?;
    if contender == Contender::BareUring {
        return fio::fill(site, &site.open_disk(contender, state)?.path);
    }
    let server = site.start(Serving { contender, state, queues: 1 })?;
    fill_by(comparison, site, &server)
}

/// Writes all of the disk that a server serves. It need not last where it ends with the server.
fn fill_by(comparison: &Comparison, site: &Site, server: &Server) -> Result<(), String> {
    let options = Options {
        workload: Workload::Write,
        block_bytes: 256 << 10,
        depth: 8,
        one_pass: true,
        flush_at_end: site.device.outlives_servers(),
        ..Options::default()
    };
    load_server(comparison, site, server, options).map(drop)
}

fn measure(
    comparison: &Comparison,
    site: &Site,
    cell: &Cell,
    round: u32,
) -> Result<Sample, String> {
    let Cell { load, contender, .. } = *cell;
    if contender == Contender::BareUring {
        return with_disk(site, cell, || {
            let disk = site.open_disk(contender, load.state)?;
            fio::measure(site, &disk.path, &load, comparison.duration, comparison.warmup())
        });
    }
    let options = Options {
        duration: Some(comparison.duration),
        timeout: comparison.duration + WARMUP + SLACK,
        // Equal for all contenders of a round.
        seed: u64::from(round) + 1,
        ..load.options(comparison.size_bytes, comparison.warmup())
    };
    let report =
        serve(comparison, site, cell, |server| load_server(comparison, site, server, options))?;
    Ok(sample_of(&report, comparison.duration))
}

/// What is kept of a report.
fn sample_of(report: &Report, duration: Duration) -> Sample {
    // Where no request was finished in time, all that is known is that each takes longer. That is a result too:
    // a slow contender does not end the comparison.
    let longer = duration.as_nanos() as u64;
    let at = |quantile: fn(&Latency) -> u64| report.latency_ns.as_ref().map_or(longer, quantile);
    Sample {
        iops: report.iops,
        p50_ns: at(|latency| latency.p50),
        p90_ns: at(|latency| latency.p90),
        p99_ns: at(|latency| latency.p99),
        p999_ns: at(|latency| latency.p999),
        p9999_ns: at(|latency| latency.p9999),
        max_ns: at(|latency| latency.max),
        server_cpu_us_per_request: report.server_cpu_us_per_request,
        client_waited: report.client_waited,
    }
}

/// The same load once more, and what it costs the server.
fn measure_costs(
    comparison: &Comparison,
    site: &Site,
    cell: &Cell,
    perf_counts: bool,
) -> Result<Costs, String> {
    let Cell { load, contender, .. } = *cell;
    eprintln!("costs of {} depth {}: {}", load.name(), load.depth, contender.name());
    let options = Options {
        duration: Some(comparison.duration),
        timeout: comparison.duration + SLACK,
        ..load.options(comparison.size_bytes, Duration::ZERO)
    };
    serve(comparison, site, cell, |server| {
        let messages = || site.messages_of_bessel();
        let counts_messages = contender == Contender::Bessel;
        if counts_messages {
            server.wait_for(&site.api_socket())?;
        }
        let meter = Meter {
            pid: server.pid(),
            perf_core: perf_counts.then_some(comparison.client_core),
            messages: counts_messages.then_some(&messages),
        };
        costs::count(&meter, || load_server(comparison, site, server, options))
    })
}

/// Has the disk of a cell served in its state while `load` runs.
fn serve<T>(
    comparison: &Comparison,
    site: &Site,
    cell: &Cell,
    load: impl FnOnce(&mut Server) -> Result<T, String>,
) -> Result<T, String> {
    let Load { state, queues, .. } = cell.load;
    let serving = Serving { contender: cell.contender, state, queues };
    if !site.device.outlives_servers() {
        let mut server = site.start(serving)?;
        if state != State::Empty {
            fill_by(comparison, site, &server)?;
        }
        if state == State::Snapshotted {
            site.take_snapshot(cell.contender, &mut server)?;
        }
        return load(&mut server);
    }
    with_disk(site, cell, || match state {
        State::Snapshotted => site.with_snapshot(serving, load),
        State::Empty | State::Written => load(&mut site.start(serving)?),
    })
}

/// Makes an empty disk for one measurement. Others are there, filled.
fn with_disk<T>(
    site: &Site,
    cell: &Cell,
    measure: impl FnOnce() -> Result<T, String>,
) -> Result<T, String> {
    let Cell { load: Load { state, .. }, contender, .. } = *cell;
    if state != State::Empty {
        return measure();
    }
    site.make_disk(contender, state)?;
    let measured = measure()?;
    // Its space is free for the next.
    site.remove_disk(contender, state).map(|()| measured)
}

/// Loads a server from the client's core.
fn load_server(
    comparison: &Comparison,
    site: &Site,
    server: &Server,
    options: Options,
) -> Result<Report, String> {
    if interrupt::requested() {
        return Err("interrupted".into());
    }
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

    /// Three rounds of two contenders, for the tests of what is made of them.
    pub(super) fn results() -> Results {
        let cell = |contender, depth, rates: [f64; 3]| Cell {
            load: Load::new(Workload::RandRead, 4096, depth),
            contender,
            samples: rates
                .map(|iops| Sample {
                    iops,
                    p50_ns: 1000,
                    p90_ns: 2000,
                    p99_ns: 3000,
                    p999_ns: 4000,
                    p9999_ns: 5000,
                    max_ns: 6000,
                    server_cpu_us_per_request: None,
                    client_waited: Some(0.25),
                })
                .into(),
            costs: (contender == Contender::Bessel).then_some(Costs {
                system_calls: Some(0.125),
                instructions: None,
                cycles: None,
                messages: Some(0.0),
            }),
        };
        let place = Place {
            device: Device::Directory("/dev/shm".into()),
            tmpfs: true,
            cells: vec![
                cell(Contender::QsdUring, 1, [9.0, 9.0, 9.0]),
                cell(Contender::QsdUring, 32, [100.0, 200.0, 9000.0]),
                cell(Contender::Bessel, 32, [500.0, 1.0, 300.0]),
            ],
            left_out: vec!["qsd io_uring, snapshotted: a raw file has no snapshots".into()],
        };
        let version = |contender| Version { contender, version: "1.0".into() };
        Results {
            unix_seconds: 0,
            machine: "machine".into(),
            command: vec!["bessel-bench".into(), "compare".into()],
            size_bytes: 1 << 30,
            seconds: 5.0,
            rounds: 3,
            poll: Poll::Adaptive,
            contenders: vec![version(Contender::QsdUring), version(Contender::Bessel)],
            skipped: vec!["spdk aio: not there".into()],
            places: vec![place],
        }
    }

    fn directory() -> Device {
        Device::Directory("/dev/shm".into())
    }

    #[test]
    fn a_device_without_files_has_the_contenders_that_have_such_disks() {
        let written = Load::new(Workload::RandRead, 4096, 1);
        let flushed = Load { flush_every: 1, ..Load::new(Workload::RandWrite, 4096, 1) };
        let loads = [written, Load { state: State::Snapshotted, ..written }, flushed];
        let all = <Contender as clap::ValueEnum>::value_variants();
        let found = |device| {
            let (cells, left_out) = empty_cells(&loads, all, device, false);
            let found: Vec<_> = cells.iter().map(|it| (it.contender, it.load.state)).collect();
            (found, left_out)
        };
        let (cells, left_out) = found(&Device::Memory);
        let expected = [
            (Contender::SpdkMalloc, State::Written),
            (Contender::SpdkLvol, State::Written),
            (Contender::Bessel, State::Written),
            (Contender::SpdkLvol, State::Snapshotted),
            (Contender::Bessel, State::Snapshotted),
            (Contender::SpdkMalloc, State::Written),
            (Contender::Bessel, State::Written),
        ];
        assert_eq!(cells, expected);
        let said = "spdk malloc, snapshotted: a malloc disk has no snapshots";
        assert!(left_out.iter().any(|why| why == said), "{left_out:?}");
        assert!(left_out.iter().any(|why| why == "bare io_uring is measured on files"));
        let (cells, left_out) = found(&Device::Null);
        let expected = [(Contender::SpdkNull, State::Written), (Contender::Bessel, State::Written)];
        assert_eq!(cells, expected);
        assert!(left_out.iter().any(|why| why.contains("no data")), "{left_out:?}");
        let (cells, _) = found(&directory());
        assert!(cells.iter().all(|(contender, _)| contender.medium() != Medium::NoFile));
    }

    #[test]
    fn contenders_of_one_load_are_side_by_side_and_what_they_cannot_do_is_left_out() {
        let written = Load::new(Workload::RandRead, 4096, 1);
        let snapshotted = Load { state: State::Snapshotted, ..written };
        let contenders =
            [Contender::QsdUring, Contender::QsdThreads, Contender::QsdQcow2, Contender::BareUring];
        let loads = [written, snapshotted, Load { depth: 32, ..snapshotted }];
        let (cells, left_out) = empty_cells(&loads, &contenders, &directory(), false);
        let found: Vec<_> = cells.iter().map(|it| (it.contender, it.load.state)).collect();
        let expected = [
            (Contender::QsdUring, State::Written),
            (Contender::QsdQcow2, State::Written),
            (Contender::BareUring, State::Written),
            (Contender::QsdQcow2, State::Snapshotted),
            (Contender::QsdQcow2, State::Snapshotted),
        ];
        assert_eq!(found, expected);
        assert_eq!(left_out.len(), 3, "each reason once: {left_out:?}");
        let (_, left_out) = empty_cells(&loads[..1], &contenders, &directory(), true);
        assert!(left_out.is_empty(), "{left_out:?}");
    }

    #[test]
    fn each_file_is_filled_once_and_by_a_server_where_there_is_one() {
        let written = Load::new(Workload::RandRead, 4096, 1);
        let empty = Load { state: State::Empty, ..written };
        let contenders = [Contender::BareUring, Contender::QsdUring, Contender::Bessel];
        let (cells, _) = empty_cells(&[written, empty], &contenders, &directory(), true);
        let disks = disks_to_fill(&cells);
        let expected = [(Contender::QsdUring, State::Written), (Contender::Bessel, State::Written)];
        assert_eq!(disks, expected);
        let (cells, _) = empty_cells(&[written], &contenders[..1], &directory(), true);
        assert_eq!(disks_to_fill(&cells), [(Contender::BareUring, State::Written)]);
    }
}
