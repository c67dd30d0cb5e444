//! `bessel check`: verifies a store that no daemon serves, and repairs what follows from the rest.
//!
//! Changes nothing unless `--repair` is given and its plan is agreed to.

use super::Outcome;
use super::output::{Progress, print, print_either};
use bessel_mapping::check::{
    CheckReport, RepairPlan, RepairStep, Severity, Usage, check, plan_repair, repair,
};
use bessel_mapping::store::OpenError;
use bessel_reactor::clock::SystemClock;
use bessel_reactor::device::{DeviceLock, FileDevice, OpenOptions};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, ByteCount};
use clap::Args;
use serde::Serialize;
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};

/// `bessel check`
#[derive(Args, Debug)]
pub(crate) struct CheckArgs {
    /// Block device or file
    device: PathBuf,
    /// Show what can be rebuilt from the rest, ask, and rebuild it
    #[arg(long)]
    repair: bool,
    /// Do not ask
    #[arg(long, requires = "repair")]
    yes: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The report as JSON.
#[derive(Serialize)]
struct Report {
    clean: bool,
    volumes: u64,
    snapshots: u64,
    data: Space,
    metadata: Space,
    findings: Vec<Finding>,
    findings_omitted: u64,
}

#[derive(Serialize)]
struct Space {
    allocated_bytes: u64,
    reachable_bytes: u64,
    leaked_bytes: u64,
}

#[derive(Serialize)]
struct Finding {
    severity: &'static str,
    structure: &'static str,
    block: Option<u64>,
    place: String,
    what: String,
    repairable: bool,
}

/// What a repair would do or has done, as JSON.
#[derive(Serialize)]
struct Repair {
    /// As it was before.
    report: Report,
    steps: Vec<Step>,
    steps_omitted: u64,
    marked_bytes: u64,
    freed_bytes: u64,
    /// Why what nothing reaches stays allocated.
    leaks_kept: Option<String>,
    /// As it is after; none when nothing was written.
    repaired: Option<Report>,
}

#[derive(Serialize)]
struct Step {
    structure: &'static str,
    block: u64,
    place: String,
    what: String,
}

/// Runs `bessel check`.
pub(crate) fn run(arguments: &CheckArgs) -> Outcome {
    let path = &arguments.device;
    let _lock = DeviceLock::acquire(path).map_err(|error| named(path, &error))?;
    if arguments.repair {
        return run_repair(arguments);
    }
    let mut device = open(path, true)?;
    let progress = Progress::new("checking", arguments.json);
    let report = check(&mut device, &mut |done, total| progress.set(done, total));
    drop(progress);
    let report = report_of(report.map_err(|error| explained(path, &error))?);
    print_either(arguments.json, &report, text)?;
    judge(path, &report)
}

/// Nobody else has the device, from the plan to the end of what it says.
fn run_repair(arguments: &CheckArgs) -> Outcome {
    let (path, json) = (&arguments.device, arguments.json);
    let mut device = open(path, true)?;
    let time = SystemClock::start().wall();
    let progress = Progress::new("checking", json);
    let plan = plan_repair(&mut device, time, &mut |done, total| progress.set(done, total));
    drop((progress, device));
    let plan = plan.map_err(|error| explained(path, &error))?;
    let mut shown = repair_of(&plan);
    if !json {
        print(&text(&shown.report))?;
        print(&plan_text(&shown))?;
    }
    if plan.is_empty() {
        if json {
            print_either(true, &shown, |_| String::new())?;
        }
        return judge(path, &shown.report);
    }
    if !arguments.yes && (json || !agreed(path)?) {
        if json {
            print_either(true, &shown, |_| String::new())?;
        }
        let path = path.display();
        return Err(format!("nothing was written to {path}; --yes does what is shown").into());
    }
    let mut device = open(path, false)?;
    let progress = Progress::new("repairing", json);
    let after = repair(&mut device, &plan, &mut |done, total| progress.set(done, total));
    drop(progress);
    let after = report_of(after.map_err(|error| {
        let told = named(path, &error);
        format!("{told}; the store is no worse than before: repair it again")
    })?);
    if !json {
        print(&format!("repaired\n{}", text(&after)))?;
    }
    shown.repaired = Some(after);
    if json {
        print_either(true, &shown, |_| String::new())?;
    }
    judge(path, shown.repaired.as_ref().expect("just set"))
}

/// Asks whoever sits at the terminal. Nobody there has not agreed.
fn agreed(path: &Path) -> Result<bool, std::io::Error> {
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Ok(false);
    }
    let mut errors = std::io::stderr().lock();
    write!(errors, "Write this to {}? [y/N] ", path.display())?;
    errors.flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn open(path: &Path, read_only: bool) -> Result<FileDevice, String> {
    let options = OpenOptions { read_only, ..OpenOptions::default() };
    FileDevice::open(path, &options).map_err(|error| named(path, &error))
}

fn named(path: &Path, error: &dyn std::error::Error) -> String {
    format!("cannot check {}: {}", path.display(), crate::one_line(error))
}

fn explained(path: &Path, error: &OpenError) -> String {
    match error {
        // Its own advice is to run what is running.
        OpenError::Corrupt(what) => hopeless(path, what),
        error => named(path, error),
    }
}

/// What the exit status says of a store.
fn judge(path: &Path, report: &Report) -> Outcome {
    if report.clean {
        return Ok(());
    }
    let count = report.findings.len() as u64 + report.findings_omitted;
    let lost = report.findings.iter().any(|it| it.severity == "corrupt" && !it.repairable);
    let corrupt = report.findings.iter().any(|it| it.severity == "corrupt");
    let worst = if lost {
        "restore what is named and cannot be repaired from a snapshot or a backup"
    } else if corrupt {
        "`bessel check --repair` shows how they can be repaired"
    } else {
        "nothing is lost; `bessel check --repair`, or serving the store once, repairs what can be"
    };
    Err(format!("{} has {count} findings; {worst}", path.display()).into())
}

/// A store so damaged that its trees cannot even be found.
fn hopeless(path: &Path, what: &str) -> String {
    let path = path.display();
    format!("{path} is too damaged to be walked: {what}; restore the device from a backup")
}

fn report_of(report: CheckReport) -> Report {
    let clean = report.is_clean();
    let findings = report.findings.into_iter().map(|finding| Finding {
        severity: match finding.severity {
            Severity::Corrupt => "corrupt",
            Severity::Warning => "warning",
        },
        structure: finding.structure.word(),
        block: finding.block.map(BlockAddr::get),
        place: finding.place,
        what: finding.what,
        repairable: finding.repairable,
    });
    Report {
        clean,
        volumes: report.volumes,
        snapshots: report.snapshots,
        data: space(report.data),
        metadata: space(report.metadata),
        findings: findings.collect(),
        findings_omitted: report.findings_omitted,
    }
}

fn repair_of(plan: &RepairPlan) -> Repair {
    let step = |step: &RepairStep| Step {
        structure: step.structure.word(),
        block: step.block.get(),
        place: step.place.clone(),
        what: step.what.clone(),
    };
    Repair {
        report: report_of(plan.report.clone()),
        steps: plan.steps.iter().map(step).collect(),
        steps_omitted: plan.steps_omitted,
        marked_bytes: plan.blocks_marked * BLOCK_SIZE,
        freed_bytes: plan.blocks_freed * BLOCK_SIZE,
        leaks_kept: plan.leaks_kept.clone(),
        repaired: None,
    }
}

fn plan_text(repair: &Repair) -> String {
    let mut text = String::new();
    for Step { place, what, .. } in &repair.steps {
        text.push_str(&format!("repair: {place}: {what}\n"));
    }
    if repair.steps_omitted > 0 {
        text.push_str(&format!("... and {} more\n", repair.steps_omitted));
    }
    for finding in repair.report.findings.iter().filter(|finding| !finding.repairable) {
        text.push_str(&format!("left as it is: {}: {}\n", finding.place, finding.what));
    }
    if let Some(why) = &repair.leaks_kept {
        text.push_str(&format!("blocks that nothing reaches stay allocated: {why}\n"));
    }
    if repair.steps.is_empty() {
        text.push_str("nothing to repair\n");
    }
    text
}

fn space(usage: Usage) -> Space {
    Space {
        allocated_bytes: usage.allocated * BLOCK_SIZE,
        reachable_bytes: usage.reachable * BLOCK_SIZE,
        leaked_bytes: usage.leaked * BLOCK_SIZE,
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for Finding { severity, place, what, .. } in &report.findings {
        text.push_str(&format!("{severity}: {place}: {what}\n"));
    }
    if report.findings_omitted > 0 {
        text.push_str(&format!("... and {} more\n", report.findings_omitted));
    }
    let bytes = |bytes: u64| ByteCount::new(bytes).human();
    text.push_str(&format!("{} volumes, {} snapshots", report.volumes, report.snapshots));
    for (name, space) in [("data", &report.data), ("metadata", &report.metadata)] {
        text.push_str(&format!(
            "; {name}: {} in use, {} allocated and not reached",
            bytes(space.reachable_bytes),
            bytes(space.leaked_bytes)
        ));
    }
    text.push_str(if report.clean { "; clean\n" } else { "\n" });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_cannot_be_walked_is_not_sent_to_be_checked() {
        let told = hopeless(Path::new("/dev/x"), "both superblocks are torn");
        assert!(told.contains("both superblocks are torn"), "{told}");
        assert!(told.contains("backup") && !told.contains("run `bessel check`"), "{told}");
    }
}
