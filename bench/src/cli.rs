//! The command line, and the checks that need nothing but it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::compare::scenario::{Load, Scenario, distinct};
use crate::compare::{self, Comparison};
use crate::load::{self, Options};
use crate::plan::Workload;
use crate::queue::DEPTH_MAX;
use crate::server::{Contender, Device, Poll};
use crate::snapshots::{self, Part};
use crate::{output, report::Report, size};

/// The smallest disk that snapshots are measured on: it holds a run of writes.
const SNAPSHOTS_SIZE_MIN: u64 = 1 << 20;

#[derive(Parser)]
#[command(version, about = "Loads and measures vhost-user-blk servers")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Load a server and say how fast it was
    Load(LoadArguments),
    /// Write a whole disk once, in order, so that every block of it is mapped
    Fill(FillArguments),
    /// Measure Bessel and its peers in turns, on the same directories
    Compare(CompareArguments),
    /// Measure what snapshots cost on Bessel: latencies, the rate that a guest keeps, bytes written
    Snapshots(SnapshotsArguments),
}

/// How to reach a server, and how to print.
#[derive(Args)]
struct Target {
    /// Socket of the vhost-user-blk server
    #[arg(long)]
    socket: PathBuf,
    /// Use only the first SIZE bytes of the disk
    #[arg(long, value_parser = size::parse)]
    region: Option<u64>,
    /// Requests in flight on each queue
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=DEPTH_MAX as i64))]
    depth: u16,
    /// Pin the load generator to this core
    #[arg(long)]
    core: Option<usize>,
    /// Write a pattern, check every read against it, and read back all that was written
    #[arg(long)]
    verify: bool,
    /// Wait this long for a server that is still starting, in seconds
    #[arg(long, default_value_t = 5.0, value_parser = seconds)]
    connect_timeout: f64,
    /// Fail when the whole load takes longer than this, in seconds
    #[arg(long, default_value_t = 600.0, value_parser = seconds)]
    timeout: f64,
    /// Process whose CPU time is measured [default: the one behind the socket]
    #[arg(long)]
    pid: Option<u32>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct LoadArguments {
    #[command(flatten)]
    target: Target,
    /// What to do
    #[arg(long, value_enum)]
    rw: Workload,
    /// Bytes of a request, a multiple of 512
    #[arg(long, default_value = "4096", value_parser = block_size)]
    block_size: u32,
    /// Measure for this long [default: 5, unless --requests is given]
    #[arg(long, value_parser = seconds)]
    seconds: Option<f64>,
    /// Stop after this many requests
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    requests: Option<u64>,
    /// Requests a second that come due, whether or not those before are answered; their latency counts from
    /// then [default: as many as the server takes]
    #[arg(long, value_parser = rate)]
    rate: Option<f64>,
    /// Load for this long before measuring, in seconds
    #[arg(long, default_value_t = 0.0, value_parser = seconds)]
    warmup: f64,
    /// Queues to use
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// The first of them: some servers poll each queue on another core
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=63))]
    first_queue: u16,
    /// Share of reads in a mixed load
    #[arg(long, default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    read_percent: u8,
    /// Flush after each run of this many writes
    #[arg(long, default_value_t = 0)]
    flush_every: u64,
    /// Use indirect descriptors
    #[arg(long)]
    indirect: bool,
    /// Do without the event index
    #[arg(long)]
    no_event_index: bool,
    /// Equal seeds give equal requests
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Args)]
struct FillArguments {
    #[command(flatten)]
    target: Target,
    /// Bytes of a write, a multiple of 512
    #[arg(long, default_value = "256KiB", value_parser = block_size)]
    block_size: u32,
}

#[derive(Args)]
struct CompareArguments {
    /// The `bessel` program; without it only the peers are measured
    #[arg(long)]
    bessel: Option<PathBuf>,
    /// Directory for the disks' files, such as /dev/shm and one on a disk; `loop:` and a directory for block devices
    /// over such files; `memory` for disks in the servers' own memory, `null` for none; may be repeated
    #[arg(long = "dir", required = true)]
    devices: Vec<Device>,
    /// Size of the disk that each server serves
    #[arg(long, default_value = "1GiB", value_parser = size::parse)]
    size: u64,
    /// Size of Bessel's store, a sparse file [default: twice the disk and 8GiB; without a file, 256MiB]
    #[arg(long, value_parser = size::parse)]
    store_size: Option<u64>,
    /// Named sets of loads to measure [default: quick, unless --rw or --depths is given]
    #[arg(long, value_enum, value_delimiter = ',')]
    scenarios: Vec<Scenario>,
    /// Loads to measure on a written disk, besides those of --scenarios [default: randread,randwrite, if --depths
    /// is given]
    #[arg(long, value_enum, value_delimiter = ',')]
    rw: Vec<Workload>,
    /// Depths to measure those of --rw at [default: 1,32]
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=DEPTH_MAX as i64))]
    depths: Vec<u16>,
    /// Bytes of a request of those of --rw
    #[arg(long, default_value = "4096", value_parser = block_size)]
    block_size: u32,
    /// What to measure [default: all that are installed]
    #[arg(long, value_enum, value_delimiter = ',')]
    contenders: Vec<Contender>,
    /// Length of one measurement
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    seconds: f64,
    /// How often each measurement is made; the medians are shown
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Core of the load generator
    #[arg(long, default_value_t = 0)]
    client_core: usize,
    /// Core of the servers
    #[arg(long, default_value_t = 1)]
    server_core: usize,
    /// How Bessel's reactor waits
    #[arg(long, value_enum, default_value = "adaptive")]
    poll: Poll,
    /// Count system calls, instructions and cycles of the servers with perf, and messages between Bessel's threads, in
    /// one more measurement of each
    #[arg(long)]
    costs: bool,
    /// Write everything measured to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write a report with tables and plots to this file
    #[arg(long)]
    html: Option<PathBuf>,
    /// What `bessel-bench snapshots --json` has written: the report plots reads with snapshots behind
    #[arg(long, requires = "html")]
    snapshots: Option<PathBuf>,
}

#[derive(Args)]
struct SnapshotsArguments {
    /// The `bessel` program
    #[arg(long)]
    bessel: PathBuf,
    /// Directory for the scratch files
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Measure only these [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Size of the disk
    #[arg(long, default_value = "1GiB", value_parser = size::parse)]
    size: u64,
    /// Size of the store, a sparse file: random writes under many snapshots fill it
    #[arg(long, default_value = "64GiB", value_parser = size::parse)]
    store_size: u64,
    /// Length of one measurement
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    /// How often each rate is measured, in turns; the medians are shown
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of what needs long, in seconds: 1,000 snapshots a second, and light writing
    #[arg(long, default_value_t = 60.0, value_parser = seconds)]
    long: f64,
    /// Read with 1, 10 and so on up to so many snapshots behind
    #[arg(long, default_value_t = 10_000)]
    behind: u64,
    /// Most snapshots of one volume; a million take 5 GiB of the directory
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    million: u64,
    /// Data that the store maps on which the collector is measured; it takes no space
    #[arg(long, default_value = "50GiB", value_parser = size::parse)]
    mapped: u64,
    /// Clones of one snapshot
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=4096))]
    clones: u32,
    /// Core of the load generator
    #[arg(long, default_value_t = 0)]
    client_core: usize,
    /// Core of the server
    #[arg(long, default_value_t = 1)]
    server_core: usize,
    /// Write everything measured to this file
    #[arg(long)]
    json: Option<PathBuf>,
}

impl SnapshotsArguments {
    fn plan(self) -> Result<snapshots::Plan, String> {
        snapshots::check_dir(&self.dir)?;
        if !self.size.is_multiple_of(4096) || !(SNAPSHOTS_SIZE_MIN..1 << 40).contains(&self.size) {
            return Err("--size is not a multiple of 4096 from 1MiB to 1TiB".into());
        }
        if !self.mapped.is_multiple_of(SNAPSHOTS_SIZE_MIN) || !(1..1 << 50).contains(&self.mapped) {
            return Err("--mapped is not a multiple of 1MiB below 1024TiB".into());
        }
        Ok(snapshots::Plan {
            bessel: self.bessel,
            dir: self.dir,
            only: self.only,
            size_bytes: self.size,
            store_bytes: self.store_size,
            duration: Duration::from_secs_f64(self.seconds),
            rounds: self.rounds,
            long: Duration::from_secs_f64(self.long),
            behind_max: self.behind,
            million: self.million,
            mapped_bytes: self.mapped,
            clones: self.clones,
            client_core: self.client_core,
            server_core: self.server_core,
            json: self.json,
            waits: snapshots::Waits::default(),
        })
    }
}

/// Parses the arguments and does what they say. An error is one line for the terminal.
pub(crate) fn run() -> Result<(), String> {
    match Cli::parse().command {
        Command::Load(arguments) => {
            let (core, json) = (arguments.target.core, arguments.target.json);
            print(&measure(&arguments.options()?, core)?, json)
        }
        Command::Fill(arguments) => {
            print(&measure(&arguments.options(), arguments.target.core)?, arguments.target.json)
        }
        Command::Compare(arguments) => compare::run(&arguments.comparison()?),
        Command::Snapshots(arguments) => snapshots::run(&arguments.plan()?),
    }
}

fn measure(options: &Options, core: Option<usize>) -> Result<Report, String> {
    core.map_or(Ok(()), pin_this_thread)?;
    load::run(options)
}

fn print(report: &Report, json: bool) -> Result<(), String> {
    let text = if json {
        serde_json::to_string_pretty(report).map_err(|error| error.to_string())?
    } else {
        report.to_string()
    };
    output::print(&(text + "\n"))
}

/// Pins the calling thread, and the processes it starts, to `core`.
pub(crate) fn pin_this_thread(core: usize) -> Result<(), String> {
    if core_affinity::set_for_current(core_affinity::CoreId { id: core }) {
        return Ok(());
    }
    let cores: Vec<_> =
        core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect();
    Err(format!("cannot use core {core}; this process may use {cores:?}"))
}

fn seconds(text: &str) -> Result<f64, String> {
    // A day is beyond any sensible measurement, and keeps every sum of times in range.
    match text.parse() {
        Ok(value) if (0.0..=86_400.0).contains(&value) => Ok(value),
        _ => Err("not a number of seconds from 0 to 86400".into()),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.001..=1e9).contains(&value) => Ok(value),
        _ => Err("not a number of requests a second from 0.001 to 1e9".into()),
    }
}

fn block_size(text: &str) -> Result<u32, String> {
    let bytes = size::parse(text)?;
    match u32::try_from(bytes) {
        Ok(bytes) if bytes.is_multiple_of(512) && (512..=64 << 20).contains(&bytes) => Ok(bytes),
        _ => Err("not a multiple of 512 from 512 to 64MiB".into()),
    }
}

impl Target {
    /// The options that only depend on these arguments; a whole-disk, timed read otherwise.
    fn options(&self, workload: Workload, block_bytes: u32) -> Options {
        Options {
            socket: self.socket.clone(),
            workload,
            block_bytes,
            depth: self.depth,
            region_bytes: self.region,
            verify: self.verify,
            server_pid: self.pid,
            connect_patience: Duration::from_secs_f64(self.connect_timeout),
            timeout: Duration::from_secs_f64(self.timeout),
            ..Options::default()
        }
    }
}

impl LoadArguments {
    fn options(&self) -> Result<Options, String> {
        let seconds = match (self.seconds, self.requests) {
            (None, None) => Some(5.0),
            (seconds, _) => seconds,
        };
        if seconds.is_some_and(|length| self.warmup + length >= self.target.timeout) {
            return Err("--timeout is too short for --seconds and --warmup".into());
        }
        Ok(Options {
            duration: seconds.map(Duration::from_secs_f64),
            requests: self.requests,
            rate: self.rate,
            warmup: Duration::from_secs_f64(self.warmup),
            queues: self.queues,
            first_queue: self.first_queue,
            read_percent: self.read_percent,
            flush_every: self.flush_every,
            event_index: !self.no_event_index,
            indirect: self.indirect,
            seed: self.seed,
            ..self.target.options(self.rw, self.block_size)
        })
    }
}

impl FillArguments {
    fn options(&self) -> Options {
        Options {
            one_pass: true,
            flush_at_end: true,
            ..self.target.options(Workload::Write, self.block_size)
        }
    }
}

/// What was given, or else the default.
fn or_default<T: Clone>(given: &[T], default: &[T]) -> Vec<T> {
    if given.is_empty() { default.to_vec() } else { given.to_vec() }
}

impl CompareArguments {
    /// The loads of `--rw` and `--depths`, then those of the scenarios, each once.
    fn loads(&self) -> Vec<Load> {
        let mut loads = Vec::new();
        let mut scenarios = self.scenarios.clone();
        if !self.rw.is_empty() || !self.depths.is_empty() {
            let workloads = or_default(&self.rw, &[Workload::RandRead, Workload::RandWrite]);
            for depth in or_default(&self.depths, &[1, 32]) {
                loads.extend(workloads.iter().map(|it| Load::new(*it, self.block_size, depth)));
            }
        } else {
            scenarios = or_default(&scenarios, &[Scenario::Quick]);
        }
        distinct(loads.into_iter().chain(scenarios.into_iter().flat_map(Scenario::loads)))
    }

    fn comparison(self) -> Result<Comparison, String> {
        let loads = self.loads();
        if loads.iter().any(|load| load.workload == Workload::Discard) {
            return Err("a disk that was discarded is not compared: `load` has --rw discard".into());
        }
        let largest = loads.iter().map(|load| load.block_bytes).max().unwrap_or(0);
        if !self.size.is_multiple_of(4096) || self.size < u64::from(largest) {
            let largest = size::format(largest.into());
            return Err(format!(
                "--size is not a multiple of 4096 that holds the largest request, of {largest}"
            ));
        }
        if self.seconds <= 0.0 {
            return Err("--seconds is 0; give each measurement some time, such as 1".into());
        }
        for file in [&self.json, &self.html].into_iter().flatten() {
            // Known before the measurements, not after.
            let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty());
            parent.map_or(Ok(()), snapshots::check_dir)?;
        }
        if self.client_core == self.server_core {
            return Err("--client-core and --server-core are the same".into());
        }
        Ok(Comparison {
            bessel: self.bessel,
            devices: self.devices,
            size_bytes: self.size,
            store_bytes: self.store_size,
            loads,
            contenders: self.contenders,
            duration: Duration::from_secs_f64(self.seconds),
            rounds: self.rounds,
            client_core: self.client_core,
            server_core: self.server_core,
            poll: self.poll,
            costs: self.costs,
            json: self.json,
            html: self.html,
            snapshots: self.snapshots,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The options of `load --socket s` with more `arguments`.
    pub(crate) fn load_options(arguments: &[&str]) -> Options {
        try_load_options(arguments).unwrap()
    }

    fn try_load_options(arguments: &[&str]) -> Result<Options, String> {
        let command = ["bessel-bench", "load", "--socket", "s"];
        let cli = Cli::try_parse_from(command.iter().chain(arguments));
        match cli.map_err(|error| error.to_string())?.command {
            Command::Load(arguments) => arguments.options(),
            _ => panic!("load was parsed as another command"),
        }
    }

    fn try_comparison(arguments: &[&str]) -> Result<Comparison, String> {
        let command = ["bessel-bench", "compare", "--dir", "/tmp"];
        let cli = Cli::try_parse_from(command.iter().chain(arguments));
        match cli.map_err(|error| error.to_string())?.command {
            Command::Compare(arguments) => arguments.comparison(),
            _ => panic!("compare was parsed as another command"),
        }
    }

    #[test]
    fn discards_are_not_compared() {
        let refused = try_comparison(&["--rw", "randread,discard"]).map(drop);
        assert!(refused.is_err_and(|error| error.contains("load")));
    }

    #[test]
    fn a_comparison_is_of_scenarios_of_loads_by_hand_or_of_both() {
        let loads = |arguments: &[&str]| try_comparison(arguments).unwrap().loads;
        let by_hand = |depth| Load::new(Workload::Read, 4096, depth);
        assert_eq!(loads(&[]), Scenario::Quick.loads());
        assert_eq!(loads(&["--rw", "read"]), [by_hand(1), by_hand(32)]);
        assert_eq!(loads(&["--rw", "read", "--depths", "7"]), [by_hand(7)]);
        assert_eq!(loads(&["--depths", "7,9"]).len(), 4);
        let both = loads(&["--rw", "read", "--depths", "7", "--scenarios", "flush,empty"]);
        assert_eq!(both[0], by_hand(7));
        assert_eq!(both[1..], [Scenario::Flush.loads(), Scenario::Empty.loads()].concat());
        assert_eq!(loads(&["--scenarios", "random,all"]).len(), Scenario::All.loads().len());
    }

    #[test]
    fn a_comparison_that_cannot_be_is_refused_with_what_to_do() {
        for (arguments, what) in [
            (&["--size", "4KiB"][..], "largest request, of 128KiB"),
            (&["--seconds", "0"], "--seconds"),
            (&["--html", "/nonexistent/x.html"], "/nonexistent is no directory"),
            (&["--snapshots", "x.json"], "--html"),
            (&["--scenarios", "fast"], "snapshotted"),
            (&["--client-core", "1"], "--server-core"),
        ] {
            let error = try_comparison(arguments).map(drop).unwrap_err();
            assert!(error.contains(what), "{arguments:?}: {error}");
        }
        assert!(try_comparison(&["--html", "x.html"]).is_ok(), "in the current directory");
    }

    #[test]
    fn a_place_is_a_directory_unless_it_is_called_otherwise() {
        let places = ["memory", "null", "./null", "loop:/tmp", "./loop:a"];
        let arguments: Vec<&str> = places.iter().flat_map(|place| ["--dir", place]).collect();
        let found = try_comparison(&arguments).unwrap().devices;
        let directory = |path: &str| Device::Directory(path.into());
        let expected = [
            directory("/tmp"),
            Device::Memory,
            Device::Null,
            directory("./null"),
            Device::Loop("/tmp".into()),
            directory("./loop:a"),
        ];
        assert_eq!(found, expected);
        let written: Vec<String> = found[1..].iter().map(ToString::to_string).collect();
        assert_eq!(written, places);
    }

    #[test]
    fn the_grammar_has_no_contradictions() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_load_is_bounded_by_time_by_count_or_by_both() {
        let limits = |arguments: &[&str]| {
            let options = load_options(arguments);
            (options.duration.map(|duration| duration.as_secs()), options.requests)
        };
        assert_eq!(limits(&["--rw", "mix"]), (Some(5), None));
        assert_eq!(limits(&["--rw", "mix", "--requests", "20000"]), (None, Some(20_000)));
        assert_eq!(
            limits(&["--rw", "mix", "--requests", "9", "--seconds", "1"]),
            (Some(1), Some(9))
        );
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (option, value) in [
            ("--block-size", "1000"),
            ("--block-size", "0"),
            ("--depth", "0"),
            ("--depth", "40000"),
            ("--queues", "0"),
            ("--requests", "0"),
            ("--seconds", "-1"),
            ("--seconds", "NaN"),
            ("--seconds", "600"),
            ("--read-percent", "101"),
        ] {
            let refused = try_load_options(&["--rw", "mix", &format!("{option}={value}")]);
            assert!(refused.is_err(), "{option} {value} was accepted");
        }
    }
}
