//! What a request costs a server that does not depend on neighbours: system calls, instructions and cycles, as
//! `perf` counts them, and messages between threads, as Bessel does.
//!
//! Each is counted over a load of its own, so that counting slows no measurement down. That load is counted
//! whole: what the server does while its client connects and leaves is part of it, and is little.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;

use crate::clock::Clock;
use crate::report::Report;
use crate::server::spawn_on_core;

const SYSTEM_CALLS: &str = "raw_syscalls:sys_enter";
const INSTRUCTIONS: &str = "instructions:u";
const CYCLES: &str = "cycles:u";

/// How long perf may take to begin, and to say what it has counted.
const PERF_TIMEOUT: Duration = Duration::from_secs(10);

/// From the moment that perf has its first counter to that when it has them for all threads.
const ATTACH: Duration = Duration::from_millis(100);

/// Of one request, flushes included. What the machine does not count is not there.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Costs {
    pub(super) system_calls: Option<f64>,
    /// In user mode.
    pub(super) instructions: Option<f64>,
    /// In user mode.
    pub(super) cycles: Option<f64>,
    /// That reactors have taken.
    pub(super) messages: Option<f64>,
}

/// What there is to count a server's costs by.
pub(super) struct Meter<'a> {
    pub(super) pid: u32,
    /// Where perf sleeps most of the time; nothing if it cannot count here.
    pub(super) perf_core: Option<usize>,
    /// Messages taken until now, of a server that counts them.
    pub(super) messages: Option<&'a dyn Fn() -> Result<u64, String>>,
}

/// Why nothing can be counted here, if so.
pub(super) fn check() -> Result<(), String> {
    let mut command = perf();
    command.args(["--", "true"]);
    let output = command.output().map_err(|error| format!("cannot start perf: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let first = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("no reason given");
    Err(format!("perf cannot count here: {}", first.trim()))
}

/// Counts what the process does while `load` runs.
pub(super) fn count(
    meter: &Meter<'_>,
    load: impl FnOnce() -> Result<Report, String>,
) -> Result<Costs, String> {
    // Asked for before perf counts and after it has: to answer takes system calls.
    let messages = || meter.messages.map(|messages| messages()).transpose();
    let before = messages()?;
    let mut counter = meter.perf_core.map(|core| Counter::start(meter.pid, core)).transpose()?;
    let report = load()?;
    let said = counter.as_mut().map(Counter::finish).transpose()?.unwrap_or_default();
    let taken = before.zip(messages()?).map(|(before, after)| after - before);
    let messages =
        taken.filter(|_| report.requests > 0).map(|it| it as f64 / report.requests as f64);
    Ok(Costs { messages, ..parse(&said, report.requests) })
}

fn perf() -> Command {
    let mut command = Command::new("perf");
    command
        .args(["stat", "-x,", "-e", SYSTEM_CALLS, "-e", INSTRUCTIONS, "-e", CYCLES])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// A perf that counts; stopped when dropped.
struct Counter(Option<Child>);

impl Counter {
    /// Starts one on `core`, and waits until it counts.
    fn start(pid: u32, core: usize) -> Result<Self, String> {
        let mut command = perf();
        command.arg("-p").arg(pid.to_string());
        let counter = Self(Some(spawn_on_core(command, core)?));
        counter.wait_until_it_counts()?;
        Ok(counter)
    }

    fn pid(&self) -> Option<Pid> {
        self.0.as_ref().map(|child| Pid::from_raw(child.id() as i32))
    }

    /// perf does not say when it has begun, but the kernel shows the counters that it has open.
    fn wait_until_it_counts(&self) -> Result<(), String> {
        let deadline = Clock::start().deadline(PERF_TIMEOUT);
        let Some(pid) = self.pid() else { return Ok(()) };
        let files = format!("/proc/{pid}/fd");
        while !has_counter(Path::new(&files)) {
            if deadline.passed() {
                return Err("perf does not begin to count".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(ATTACH);
        Ok(())
    }

    /// Ends the counting, and returns what perf says.
    fn finish(&mut self) -> Result<String, String> {
        self.interrupt();
        let mut child = self.0.take().expect("a counter is finished once");
        let deadline = Clock::start().deadline(PERF_TIMEOUT);
        // What it says fits the buffer of a pipe, so it does not wait for a reader.
        while matches!(child.try_wait(), Ok(None)) {
            if deadline.passed() {
                // Dropped, which kills it.
                self.0 = Some(child);
                return Err("perf does not stop counting".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let output =
            child.wait_with_output().map_err(|error| format!("cannot wait for perf: {error}"))?;
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn interrupt(&self) {
        if let Some(pid) = self.pid() {
            // Fails only when perf has already gone, which its output then tells.
            let _ = kill(pid, Signal::SIGINT);
        }
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.interrupt();
        if let Some(mut child) = self.0.take() {
            // Both fail only when it has already gone.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn has_counter(files: &Path) -> bool {
    let is_counter = |file: std::fs::DirEntry| {
        std::fs::read_link(file.path()).is_ok_and(|it| it.to_string_lossy().contains("perf_event"))
    };
    std::fs::read_dir(files).is_ok_and(|files| files.flatten().any(is_counter))
}

/// perf's lines are `value,unit,event,...`; the value is words in angle brackets when there is none.
fn parse(said: &str, requests: u64) -> Costs {
    let counted = |event: &str| {
        said.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(',').collect();
            // Who may not count the kernel gets what he may, under a name with more behind it.
            (fields.get(2)?.starts_with(event) && requests > 0)
                .then(|| fields[0].parse::<u64>().ok())?
                .map(|count| count as f64 / requests as f64)
        })
    };
    Costs {
        system_calls: counted(SYSTEM_CALLS),
        instructions: counted(INSTRUCTIONS),
        cycles: counted(CYCLES),
        messages: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_perf_says_is_divided_by_the_requests() {
        let said = "# started\n\n300,,raw_syscalls:sys_enter,1,100.00,,\n9000,,instructions:u,1,100.00,2,insn per cycle\n4500,,cycles:u,1,100.00,,\n";
        let costs = Costs {
            system_calls: Some(3.0),
            instructions: Some(90.0),
            cycles: Some(45.0),
            messages: None,
        };
        assert_eq!(parse(said, 100), costs);
    }

    #[test]
    fn what_a_machine_does_not_count_is_not_there() {
        let said = "<not counted>,,raw_syscalls:sys_enter,0,0.00,,\n<not supported>,,instructions:u,0,100.00,,\n";
        let nothing =
            Costs { system_calls: None, instructions: None, cycles: None, messages: None };
        assert_eq!(parse(said, 100), nothing);
        assert_eq!(parse("1,,raw_syscalls:sys_enter,1,100,,", 0), nothing);
        assert_eq!(parse("Error: no permission, at all", 1), nothing);
    }
}
