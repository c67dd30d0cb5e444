//! What snapshots cost: latencies, the rate that a guest keeps, the bytes that are written.
//!
//! Each part has a store of its own, so that none pays for what another has left behind. What is compared is
//! measured in turns, and the ratio is the median of those of the turns: on a shared machine the rates of two
//! minutes differ by more than a snapshot costs. Only Bessel is measured: what a peer does for a snapshot is not
//! the same thing (64 KiB and more copied at the first write after it, I/O stopped to take it). Beside each
//! figure stand the paper's or the best peer's, which are of another machine, and what Bessel is to reach.
//!
//! ```text
//! Plan ──► parts, one file each ──► bench (a daemon and its volumes) ──► load, api, server
//!               └──► Row ──► table, JSON
//! ```

mod bench;
mod bytes;
mod clones;
mod collector;
mod latency;
mod million;
mod rates;
mod reads;
mod store_file;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use crate::clock::unix_time;
use crate::report::{Report, WAIT_TOLERATED};
use crate::{compare, interrupt, output};

/// What to measure, and where.
pub(crate) struct Plan {
    pub(crate) bessel: PathBuf,
    pub(crate) dir: PathBuf,
    /// All, when none is named.
    pub(crate) only: Vec<Part>,
    pub(crate) size_bytes: u64,
    pub(crate) store_bytes: u64,
    pub(crate) duration: Duration,
    pub(crate) rounds: u32,
    /// Length of what needs long: a minute of 1,000 snapshots a second, light writing.
    pub(crate) long: Duration,
    /// Most snapshots behind a read load: the loads are at 0, 1, 10 and so on up to it.
    pub(crate) behind_max: u64,
    /// Snapshots of one volume, at most.
    pub(crate) million: u64,
    /// Data that is mapped in the store that the collector works on.
    pub(crate) mapped_bytes: u64,
    pub(crate) clones: u32,
    pub(crate) client_core: usize,
    pub(crate) server_core: usize,
    pub(crate) json: Option<PathBuf>,
    pub(crate) waits: Waits,
}

/// Shares of the time for which the loads of a part were without their core.
#[derive(Default)]
pub(crate) struct Waits(Mutex<Vec<f64>>);

impl Waits {
    fn note(&self, report: &Report) {
        self.0.lock().expect("no holder of this lock panics").extend(report.client_waited);
    }

    /// The median of those noted since the last call.
    fn take(&self) -> f64 {
        let waits = std::mem::take(&mut *self.0.lock().expect("no holder of this lock panics"));
        if waits.is_empty() { 0.0 } else { median(waits) }
    }
}

/// A part that can be measured alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Part {
    /// Snapshots of an idle volume
    Idle,
    /// Snapshots under random writes, and what they delay
    UnderWrites,
    /// 100 snapshots a second beside 20,000 writes a second
    Paced,
    /// Random writes, flat out, under 5, 100 and 1,000 snapshots a second
    FlatOut,
    /// 1,000 snapshots a second for a minute
    Sustained,
    /// A million snapshots of one volume
    Million,
    /// Metadata for each snapshot
    Metadata,
    /// The first write to each 64 KiB after a snapshot
    FirstWrites,
    /// One write after a snapshot
    LoneWrites,
    /// Random reads with snapshots behind
    Reads,
    /// A snapshot after every write
    Continuous,
    /// The collector
    Collector,
    /// Clones of one snapshot
    Clones,
}

impl Part {
    fn measure(self, plan: &Plan) -> Result<Vec<Row>, String> {
        match self {
            Self::Idle => latency::idle(plan),
            Self::UnderWrites => latency::under_writes(plan),
            Self::Paced => rates::paced(plan),
            Self::FlatOut => rates::flat_out(plan),
            Self::Sustained => rates::sustained(plan),
            Self::Million => million::million(plan),
            Self::Metadata => bytes::metadata(plan),
            Self::FirstWrites => bytes::first_writes(plan),
            Self::LoneWrites => bytes::lone_writes(plan),
            Self::Reads => reads::reads(plan),
            Self::Continuous => rates::continuous(plan),
            Self::Collector => collector::collector(plan),
            Self::Clones => clones::clones(plan),
        }
    }
}

/// One line of the table.
#[derive(Serialize)]
struct Row {
    what: String,
    measured: String,
    /// What the paper says, or what the best peer does on the machine that it was measured on.
    paper_or_peer: &'static str,
    goal: &'static str,
    /// The same for programs, each with its unit in its name.
    figures: BTreeMap<String, f64>,
}

impl Row {
    fn new(what: impl Into<String>, measured: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            measured: measured.into(),
            paper_or_peer: "–",
            goal: "–",
            figures: BTreeMap::new(),
        }
    }

    fn paper_or_peer(self, paper_or_peer: &'static str) -> Self {
        Self { paper_or_peer, ..self }
    }

    fn goal(self, goal: &'static str) -> Self {
        Self { goal, ..self }
    }

    fn figure(mut self, name: impl Into<String>, value: f64) -> Self {
        self.figures.insert(name.into(), value);
        self
    }

    fn figures<'a>(self, figures: impl IntoIterator<Item = (&'a str, f64)>) -> Self {
        figures.into_iter().fold(self, |row, (name, value)| row.figure(name, value))
    }
}

/// A row and what it belongs to.
#[derive(Serialize)]
struct Entry {
    part: Part,
    /// Share of the time for which the generator was without its core, while this part was measured.
    client_waited: f64,
    #[serde(flatten)]
    row: Row,
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
    rows: Vec<Entry>,
}

/// Measures, prints a table and writes the file, which is renewed after each part: a long run that ends early
/// has not been for nothing.
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
    let wanted = |part: &&Part| plan.only.is_empty() || plan.only.contains(*part);
    for &part in Part::value_variants().iter().filter(wanted) {
        let rows = part.measure(plan)?;
        let client_waited = plan.waits.take();
        for row in rows {
            eprintln!("{}: {}", row.what, row.measured);
            results.rows.push(Entry { part, client_waited, row });
        }
        if let Some(path) = &plan.json {
            write(path, &results)?;
        }
    }
    output::print(&render(&results))
}

fn write(path: &Path, results: &Results) -> Result<(), String> {
    let text = serde_json::to_string_pretty(results).map_err(|error| error.to_string())?;
    std::fs::write(path, text + "\n")
        .map_err(|error| format!("cannot write {}: {error}", path.display()))
}

fn render(results: &Results) -> String {
    let Results { machine, load_average, directory, .. } = results;
    let mut text = format!(
        "\n{machine}, load average before the start {load_average}, {}\n\n\
         | what | measured | paper or peer | goal |\n| --- | --- | --- | --- |\n",
        directory.display()
    );
    for Entry { row, client_waited, .. } in &results.rows {
        let Row { what, measured, paper_or_peer, goal, .. } = row;
        let busy = match client_waited * 100.0 {
            percent if *client_waited > WAIT_TOLERATED => {
                format!(" (BUSY: the client was without its core for {percent:.0} % of the time)")
            }
            _ => String::new(),
        };
        let _ = writeln!(text, "| {what} | {measured}{busy} | {paper_or_peer} | {goal} |");
    }
    text
}

/// What other work the machine has, which spoils the figures.
fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_owned()
}

/// How far something long has come, on a terminal.
struct Progress {
    what: &'static str,
    total: u64,
    shown: Option<u64>,
}

impl Progress {
    fn new(what: &'static str, total: u64) -> Self {
        Self { what, total, shown: None }
    }

    /// `done` of the total are done. An error when the run is to end.
    fn at(&mut self, done: u64) -> Result<(), String> {
        if interrupt::requested() {
            return Err("interrupted".into());
        }
        let percent = done * 100 / self.total.max(1);
        if self.shown != Some(percent) && std::io::stderr().is_terminal() {
            self.shown = Some(percent);
            eprint!("\r{}: {percent} % \r", self.what);
        }
        Ok(())
    }
}

/// Values that are looked at by their order.
struct Sorted(Vec<f64>);

impl Sorted {
    fn new(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// The value that a `share` of all lies below; not a number when there is none.
    fn at(&self, share: f64) -> f64 {
        let index = ((self.0.len() as f64 * share) as usize).min(self.0.len().saturating_sub(1));
        self.0.get(index).copied().unwrap_or(f64::NAN)
    }

    fn median(&self) -> f64 {
        self.at(0.5)
    }

    /// How far the middle half lies apart, in percent of the median.
    fn spread_percent(&self) -> f64 {
        (self.at(0.75) - self.at(0.25)) / self.median() * 100.0
    }
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    Sorted::new(values).median()
}

/// The ratios of what was measured in the same turn.
fn ratios(these: &[f64], those: &[f64]) -> Sorted {
    Sorted::new(these.iter().zip(those).map(|(this, that)| this / that))
}

/// Measures `count` things `rounds` times, in an order that rotates; the samples of each, round by round. On a
/// terminal it says how far `what` has come.
fn in_turns<T>(
    what: &'static str,
    rounds: u32,
    count: usize,
    mut measure: impl FnMut(usize, u32) -> Result<T, String>,
) -> Result<Vec<Vec<T>>, String> {
    let mut samples: Vec<Vec<T>> = (0..count).map(|_| Vec::new()).collect();
    let mut progress = Progress::new(what, u64::from(rounds) * count as u64);
    for round in 0..rounds {
        for turn in 0..count {
            progress.at(u64::from(round) * count as u64 + turn as u64)?;
            let which = (turn + round as usize) % count;
            samples[which].push(measure(which, round)?);
        }
    }
    Ok(samples)
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
        let values = Sorted::new((1..=1000).rev().map(f64::from));
        assert_eq!((values.at(0.5), values.at(0.99), values.at(1.0)), (501.0, 991.0, 1000.0));
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert!(median([]).is_nan());
        assert_eq!(Sorted::new([8.0, 9.0, 10.0, 12.0]).spread_percent(), 30.0);
    }

    #[test]
    fn ratios_are_between_samples_of_the_same_round() {
        let samples =
            in_turns("ratios", 3, 2, |which, round| Ok([10.0, 5.0][which] * f64::from(round + 1)));
        let samples = samples.unwrap();
        assert_eq!(samples[1], [5.0, 10.0, 15.0]);
        assert_eq!(ratios(&samples[1], &samples[0]).0, [0.5; 3]);
    }

    #[test]
    fn a_table_has_a_line_for_each_row_with_its_goal() {
        let row = Row::new("what", "1").goal("≤ 2").paper_or_peer("3").figure("x_us", 1.0);
        let results = Results {
            unix_seconds: 0,
            machine: "m".into(),
            load_average: "0".into(),
            directory: "/d".into(),
            size_bytes: 1,
            seconds: 1.0,
            rounds: 1,
            rows: vec![Entry { part: Part::Idle, client_waited: 0.01, row }],
        };
        assert!(render(&results).ends_with("| --- |\n| what | 1 | 3 | ≤ 2 |\n"));
        let json = serde_json::to_value(&results).unwrap();
        assert_eq!(json["rows"][0]["part"], "idle");
        assert_eq!(json["rows"][0]["figures"]["x_us"], 1.0);
    }
}
