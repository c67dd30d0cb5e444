//! Fresh seeds on and on, on all cores: `make soak HOURS=0.4`, or `make soak SEED=17` to replay one.
//!
//! The same runs as in `tests/simulation.rs`, with more made of each seed. A seed that fails is
//! printed with the command that replays it, and the soak goes on. It ends with a report for
//! `docs/`, and with exit status 1 when anything has failed.

use std::io::{IsTerminal, Write};
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bessel_reactor::device::sim::Random;
use bessel_tests::seeds::{Effort, Tally, run};

const USAGE: &str = "usage: soak --hours HOURS [--report FILE] | soak --seed SEED";

enum Task {
    Soak { hours: f64, report: Option<String> },
    Replay { seed: u64 },
}

fn parse(arguments: &[String]) -> Option<Task> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let hours = |text: &str| text.parse().ok().filter(|hours| *hours > 0.0);
    match arguments[..] {
        ["--seed", seed] => Some(Task::Replay { seed: seed.parse().ok()? }),
        ["--hours", text] => Some(Task::Soak { hours: hours(text)?, report: None }),
        ["--hours", text, "--report", file] => {
            Some(Task::Soak { hours: hours(text)?, report: Some(file.to_owned()) })
        }
        _ => None,
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let clean = match parse(&arguments) {
        None => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
        Some(Task::Replay { seed }) => replay(seed),
        Some(Task::Soak { hours, report }) => soak(hours, report.as_deref()),
    };
    if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn try_seed(seed: u64) -> Option<Tally> {
    catch_unwind(AssertUnwindSafe(|| run(seed, &Effort::SOAK))).ok()
}

fn replay(seed: u64) -> bool {
    let tally = try_seed(seed);
    match &tally {
        Some(tally) => println!("seed {seed}: nothing found\n{tally:#?}"),
        None => println!("seed {seed} FAILED; TRACE=1 tells what happened before"),
    }
    tally.is_some()
}

#[expect(
    clippy::disallowed_methods,
    reason = "the edge where fresh seeds and their time come from"
)]
fn soak(hours: f64, report: Option<&str>) -> bool {
    let started = Instant::now();
    let length = Duration::from_secs_f64(hours * 3600.0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
    let first = Random::new(now.as_nanos() as u64).below(1 << 40);
    println!("seeds from {first} on, for {:.0} s", length.as_secs_f64());
    // What was built; when this ends another one may be checked out.
    let commit = output("git", &["describe", "--always", "--dirty"]);
    let mut soak = Soak { started, length, commit, total: Tally::default(), failed: Vec::new() };
    let (next, (sender, ended)) = (AtomicU64::new(first), channel());
    let work = |sender: Sender<(u64, Option<Tally>)>| {
        while started.elapsed() < length {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let _ = sender.send((seed, try_seed(seed))); // The receiver outlives us.
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..cores() {
            let sender = sender.clone();
            scope.spawn(move || work(sender));
        }
        drop(sender);
        let mut shown = Duration::ZERO;
        let every = Duration::from_secs(if std::io::stderr().is_terminal() { 1 } else { 60 });
        loop {
            match ended.recv_timeout(every) {
                Ok((seed, tally)) => soak.note(seed, tally),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if started.elapsed() >= shown + every {
                shown = started.elapsed();
                soak.show();
            }
        }
    });
    let text = soak.report(first);
    match report {
        None => println!("\n{text}"),
        Some(file) => match std::fs::write(file, &text) {
            Ok(()) => println!("\nthe report is in {file}"),
            Err(error) => println!("\n{text}\n{file} was not written: {error}"),
        },
    }
    soak.failed.is_empty()
}

struct Soak {
    started: Instant,
    length: Duration,
    commit: String,
    total: Tally,
    failed: Vec<u64>,
}

impl Soak {
    fn note(&mut self, seed: u64, tally: Option<Tally>) {
        match tally {
            Some(tally) => self.total += tally,
            None => {
                self.failed.push(seed);
                println!("\nseed {seed} FAILED; replay: make soak SEED={seed}");
            }
        }
    }

    /// Crashes a second.
    fn rate(&self) -> f64 {
        self.total.crashes() as f64 / self.started.elapsed().as_secs_f64()
    }

    fn show(&self) {
        let left = self.length.saturating_sub(self.started.elapsed()).as_secs();
        let (before, after) =
            if std::io::stderr().is_terminal() { ("\r", "  ") } else { ("", "\n") };
        let (seeds, crashes, rate) = (self.total.seeds, self.total.crashes(), self.rate());
        let (failed, minutes, seconds) = (self.failed.len(), left / 60, left % 60);
        let mut stderr = std::io::stderr();
        let _ = write!(
            stderr,
            "{before}{seeds} seeds, {crashes} crashes, {rate:.0}/s, {failed} violations, \
             {minutes}:{seconds:02} left{after}"
        );
        let _ = stderr.flush();
    }

    fn report(&self, first: u64) -> String {
        let Tally {
            seeds,
            instants,
            exhausted,
            enumerated,
            sampled,
            cuts,
            nth,
            kills,
            shutdowns,
            recoveries,
            volumes,
            snapshots,
            snapshots_read,
            sectors,
            reclaims,
            collections,
            diffs,
            imports,
            moves,
            visiting,
            forwarded,
        } = self.total;
        let (crashes, violations) = (self.total.crashes(), self.failed.len());
        let (seconds, rate) = (self.started.elapsed().as_secs_f64(), self.rate());
        let hours = self.length.as_secs_f64() / 3600.0;
        let date = output("date", &["-u", "+%Y-%m-%d %H:%M UTC"]);
        let commit = &self.commit;
        let machine = machine();
        let Effort { exhaustive, samples, .. } = Effort::SOAK;
        let mut text = format!(
            "# A soak: {crashes} simulated crashes, {violations} violations\n\n\
             | | |\n|---|---|\n\
             | machine | {machine} |\n\
             | date | {date} |\n\
             | commit | {commit} |\n\
             | command | `make soak HOURS={hours}` |\n\
             | time | {seconds:.0} s, {rate:.0} crashes a second |\n\n\
             | what | how many |\n|---|---:|\n\
             | seeds, from {first} on | {seeds} |\n\
             | crashes | {crashes} |\n\
             | of these: one of all subsets of up to {exhaustive} volatile writes | {enumerated} |\n\
             | {samples} or more samples of more writes, or torn writes | {sampled} |\n\
             | a power cut at the end of a life | {cuts} |\n\
             | a power cut at the nth write or flush | {nth} |\n\
             | a kill of the process | {kills} |\n\
             | instants at which the power was cut in every or many ways | {instants} |\n\
             | of these: in every way | {exhausted} |\n\
             | orderly ends, with a power cut afterwards | {shutdowns} |\n\
             | stores opened, checked and compared as a whole | {recoveries} |\n\
             | volumes compared | {volumes} |\n\
             | snapshots listed | {snapshots} |\n\
             | snapshots cloned and read | {snapshots_read} |\n\
             | sectors compared | {sectors} |\n\
             | deleted snapshots whose own space was freed | {reclaims} |\n\
             | collections of garbage, each to its end | {collections} |\n\
             | diffs of snapshots compared | {diffs} |\n\
             | imports | {imports} |\n\
             | volumes moved to another shard | {moves} |\n\
             | requests of volumes that were at home on another shard | {visiting} |\n\
             | of these: sent to the home | {forwarded} |\n\
             | **violations** | **{violations}** |\n"
        );
        for seed in &self.failed {
            text.push_str(&format!("\nSeed {seed} failed: `make soak SEED={seed}`\n"));
        }
        text
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

fn machine() -> String {
    let line = |file: &str, key: &str| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.split_once(':'));
        line.map_or("unknown".to_owned(), |(_, value)| value.trim().to_owned())
    };
    let (cpu, memory) = (line("/proc/cpuinfo", "model name"), line("/proc/meminfo", "MemTotal"));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{} × {cpu}, {memory}, Linux {}", cores(), kernel.trim())
}

/// What a command prints, for the report; "unknown" when it does not run.
fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().ok();
    let output = output.filter(|output| output.status.success());
    output.map_or("unknown".to_owned(), |output| {
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    })
}
