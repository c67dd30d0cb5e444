//! `bessel check`: verifies a store that no daemon serves. Changes nothing.

use super::Outcome;
use super::output::{Progress, print_either};
use bessel_mapping::check::{CheckReport, Severity, Usage, check};
use bessel_mapping::store::OpenError;
use bessel_reactor::device::{DeviceLock, FileDevice, OpenOptions};
use bessel_reactor::units::{BLOCK_SIZE, ByteCount};
use clap::Args;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// `bessel check`
#[derive(Args, Debug)]
pub(crate) struct CheckArgs {
    /// Block device or file
    device: PathBuf,
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
    place: String,
    what: String,
}

/// Runs `bessel check`.
pub(crate) fn run(arguments: &CheckArgs) -> Outcome {
    let path = &arguments.device;
    let named = |error: &dyn std::error::Error| {
        format!("cannot check {}: {}", path.display(), crate::one_line(error))
    };
    let _lock = DeviceLock::acquire(path).map_err(|error| named(&error))?;
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let mut device = FileDevice::open(path, &options).map_err(|error| named(&error))?;
    let progress = Progress::new("checking", arguments.json);
    let report = check(&mut device, &mut |done, total| progress.set(done, total));
    drop(progress);
    let report = report_of(report.map_err(|error| match error {
        // Its own advice is to run what is running.
        OpenError::Corrupt(what) => hopeless(path, &what),
        error => named(&error),
    })?);
    print_either(arguments.json, &report, text)?;
    if report.clean {
        return Ok(());
    }
    let count = report.findings.len() as u64 + report.findings_omitted;
    let worst = if report.findings.iter().any(|it| it.severity == "corrupt") {
        "restore what is named from a snapshot or a backup"
    } else {
        "nothing is lost; serving the store once repairs what can be repaired"
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
        place: finding.place,
        what: finding.what,
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

fn space(usage: Usage) -> Space {
    Space {
        allocated_bytes: usage.allocated * BLOCK_SIZE,
        reachable_bytes: usage.reachable * BLOCK_SIZE,
        leaked_bytes: usage.leaked * BLOCK_SIZE,
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for Finding { severity, place, what } in &report.findings {
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
