//! The same loads by fio on the raw file, without a server: what one core of the machine can do.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::Sample;
use super::scenario::Load;
use crate::load::Options;
use crate::plan::Workload;
use crate::server::{Site, spawn_on_core};

/// Measures a load on `file`.
pub(super) fn measure(
    site: &Site,
    file: &Path,
    load: &Load,
    duration: Duration,
    warmup: Duration,
) -> Result<Sample, String> {
    let mut command = command(site, file);
    command
        .arg(format!("--rw={}", name_of(load.workload)))
        .arg(format!("--rwmixread={}", Options::default().read_percent))
        .arg(format!("--bs={}", load.block_bytes))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--fdatasync={}", load.flush_every))
        .arg(format!("--ramp_time={}ms", load.warmup(warmup).as_millis()))
        .arg(format!("--runtime={}ms", duration.as_millis()));
    match load.requests_max(site.size_bytes) {
        Some(requests) => command.arg(format!("--number_ios={requests}")),
        None => command.arg("--time_based"),
    };
    parse(&output(command, site)?)
}

/// Writes all of `file`, in order.
pub(super) fn fill(site: &Site, file: &Path) -> Result<(), String> {
    let mut command = command(site, file);
    command.args(["--rw=write", "--bs=256k", "--iodepth=8", "--end_fsync=1"]);
    output(command, site).map(drop)
}

fn command(site: &Site, file: &Path) -> Command {
    let mut command = Command::new("fio");
    command
        .args(["--name=bare", "--ioengine=io_uring", "--output-format=json"])
        // Reads and writes of a mix count together, as ours do; a sparse file stays one until it is written.
        .args(["--unified_rw_reporting=1", "--fallocate=none"])
        // A colon would end the name of one file and begin another's.
        .arg(format!("--filename={}", file.display().to_string().replace(':', "\\:")))
        .arg(format!("--size={}", site.size_bytes))
        .arg(format!("--direct={}", u8::from(site.direct)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

fn output(command: Command, site: &Site) -> Result<Vec<u8>, String> {
    let output = spawn_on_core(command, site.server_core)?
        .wait_with_output()
        .map_err(|error| format!("cannot run fio: {error}"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(format!("fio failed: {}", output.status))
}

fn name_of(workload: Workload) -> &'static str {
    match workload {
        Workload::Mix => "randrw",
        Workload::Stride => "write:60k",
        Workload::Runs => "randwrite:40",
        Workload::Discard => unreachable!("a comparison has none"),
        other => other.name(),
    }
}

/// Takes our figures out of fio's JSON.
fn parse(output: &[u8]) -> Result<Sample, String> {
    // fio may print notes before the JSON.
    let start = output.iter().position(|byte| *byte == b'{').unwrap_or(0);
    let json: serde_json::Value = serde_json::from_slice(&output[start..])
        .map_err(|error| format!("cannot read fio's output: {error}"))?;
    let job = &json["jobs"][0];
    let both = &job["mixed"];
    let percentile = |name: &str| both["clat_ns"]["percentile"][name].as_u64().unwrap_or(0);
    let iops = both["iops"].as_f64().ok_or("fio's output has no figures")?;
    let cpu_percent =
        job["usr_cpu"].as_f64().unwrap_or(0.0) + job["sys_cpu"].as_f64().unwrap_or(0.0);
    Ok(Sample {
        iops,
        p50_ns: percentile("50.000000"),
        p90_ns: percentile("90.000000"),
        p99_ns: percentile("99.000000"),
        p999_ns: percentile("99.900000"),
        p9999_ns: percentile("99.990000"),
        max_ns: both["clat_ns"]["max"].as_u64().unwrap_or(0),
        server_cpu_us_per_request: (iops > 0.0).then(|| cpu_percent * 1e4 / iops),
        client_waited: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_in_the_output_of_fio() {
        let output = br#"note: something
            {"jobs": [{"usr_cpu": 10.0, "sys_cpu": 40.0, "mixed": {"iops": 100000.0, "clat_ns":
            {"max": 9, "percentile": {"50.000000": 1, "99.000000": 2, "99.900000": 3,
            "90.000000": 4, "99.990000": 5}}}}]}"#;
        let sample = parse(output).unwrap();
        assert_eq!((sample.p50_ns, sample.p90_ns, sample.p99_ns), (1, 4, 2));
        assert_eq!((sample.p999_ns, sample.p9999_ns, sample.max_ns), (3, 5, 9));
        assert_eq!(sample.server_cpu_us_per_request, Some(5.0));
        assert!(parse(b"{\"jobs\": []}").is_err());
        assert!(parse(b"fio: failed").is_err());
    }
}
