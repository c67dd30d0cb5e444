//! The report: one page with tables and plots, which needs nothing but a browser.
//!
//! It is well-formed XML too. Nothing in it comes from elsewhere: style and plots are part of the page, and
//! there are no scripts. All text that is not ours is escaped.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use super::plot::{Axis, Line, Plot, Point, escape};
use super::scenario::Load;
use super::summary::{QUANTILES, REFERENCES, Summary, warning};
use super::table::two_decimals;
use super::{Cell, Place, Results};
use crate::clock::format_utc;
use crate::server::Contender;
use crate::size;

/// A result of `bessel-bench snapshots` has some dozen kilobytes.
const SNAPSHOTS_BYTES_MAX: u64 = 16 << 20;

/// It reads with ten times as many snapshots each time, so there are not more rows than digits.
const SNAPSHOTS_ROWS_MAX: usize = 32;

const RATE: &str = "thousand requests a second";

const STYLE: &str = "
:root { color-scheme: light dark; --page: #fff; --ink: #1c1c1e; --dim: #5f6368; --grid: #dfe1e5; --shade: #f5f6f8;
  --line-0: #0067b1; --line-1: #4c9bd6; --line-2: #a8428a; --line-3: #00866a; --line-4: #d9480f; --line-5: #7a7a7a; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --ink: #e6e7e9; --dim: #9aa0a6; --grid: #33373d;
  --shade: #1f2228; --line-0: #4ea7f0; --line-1: #a3d3f7; --line-2: #e58fcb; --line-3: #3fd0a8; --line-4: #ff8a4c;
  --line-5: #a9a9a9; } }
body { margin: 2rem auto; padding: 0 1.25rem; max-width: 1240px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: .25rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin-top: 2rem; }
p { max-width: 72em; } p.warning { border-left: 4px solid #d9480f; padding: .2rem .8rem; }
code { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; } dt { color: var(--dim); }
dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; text-align: right; white-space: nowrap; font-weight: normal; }
thead th { color: var(--dim); border-bottom: 1px solid var(--ink); vertical-align: bottom; }
th.name, td.name { text-align: left; } tbody { border-bottom: 1px solid var(--grid); }
tbody th { text-align: left; vertical-align: top; font-weight: 600; }
td.name { border-left: 4px solid var(--line); } tr.ours td { background: var(--shade); font-weight: 600; }
figure { margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .title { font-size: 12.5px; font-weight: 600; }
svg .y { text-anchor: end; fill: var(--dim); } svg .x { text-anchor: middle; fill: var(--dim); }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--dim); fill: none; }
svg .line { stroke: var(--line); stroke-width: 1.8; fill: none; } svg .point { fill: var(--line); }
svg .range { stroke: var(--line); stroke-width: 1.2; opacity: .55; }
";

/// Rates of reads with snapshots behind, as `bessel-bench snapshots` has measured them.
pub(super) struct SnapshotReads {
    machine: String,
    unix_seconds: u64,
    /// Snapshots, and thousand reads a second.
    rows: Vec<(f64, f64)>,
}

/// Takes them out of the file that `bessel-bench snapshots --json` has written.
pub(super) fn read_snapshots(path: &Path) -> Result<SnapshotReads, String> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(SNAPSHOTS_BYTES_MAX + 1).read_to_end(&mut text))
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    parse_snapshots(&text).map_err(|what| {
        format!(
            "{} {what}; give a file that `bessel-bench snapshots --only reads --json FILE` has written",
            path.display()
        )
    })
}

fn parse_snapshots(text: &[u8]) -> Result<SnapshotReads, String> {
    if text.len() as u64 > SNAPSHOTS_BYTES_MAX {
        return Err(format!("is larger than {}", size::format(SNAPSHOTS_BYTES_MAX)));
    }
    let json: Value =
        serde_json::from_slice(text).map_err(|error| format!("is not JSON: {error}"))?;
    let mut rows = Vec::new();
    for row in json["rows"].as_array().map_or(&[][..], Vec::as_slice) {
        if row["part"] == "reads" {
            let figure = |name: &str| row["figures"][name].as_f64().filter(|it| *it >= 0.0);
            let [snapshots, rate] = ["snapshots", "kilo_reads_per_second"].map(figure);
            rows.push(snapshots.zip(rate).ok_or("has a row of part `reads` without its figures")?);
        }
    }
    rows.sort_by(|a, b| a.0.total_cmp(&b.0));
    match rows.len() {
        0 => Err("has no rows of part `reads`".into()),
        1..=SNAPSHOTS_ROWS_MAX => Ok(SnapshotReads {
            machine: json["machine"].as_str().unwrap_or("an unknown machine").to_owned(),
            unix_seconds: json["unix_seconds"].as_u64().unwrap_or(0),
            rows,
        }),
        count => Err(format!("has {count} rows of part `reads`, more than it can have")),
    }
}

/// The whole page.
pub(super) fn render(results: &Results, snapshots: Option<&SnapshotReads>) -> String {
    let mut page = String::new();
    write_page(&mut page, results, snapshots).expect("writing to a string cannot fail");
    page
}

fn write_page(
    out: &mut String,
    results: &Results,
    snapshots: Option<&SnapshotReads>,
) -> fmt::Result {
    let title = "Bessel beside its peers";
    writeln!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width\"/>\n<title>{title}</title>\n\
         <style>{STYLE}"
    )?;
    for style in 0..super::plot::STYLES {
        writeln!(out, ".line-{style} {{ --line: var(--line-{style}); }}")?;
    }
    writeln!(out, "</style>\n</head>\n<body>\n<h1>{title}</h1>")?;
    write_circumstances(out, results)?;
    for place in &results.places {
        write_place(out, results, place)?;
    }
    if let Some(snapshots) = snapshots {
        write_snapshots(out, snapshots)?;
    }
    writeln!(out, "</body>\n</html>")
}

/// What is needed to do it again, and how to read the rest.
fn write_circumstances(out: &mut String, results: &Results) -> fmt::Result {
    let command: Vec<String> = results.command.iter().map(|word| quoted(word)).collect();
    let measured = format!(
        "disk of {}, medians of {} x {} s",
        size::format(results.size_bytes),
        results.rounds,
        results.seconds
    );
    let mut entries = vec![
        ("date", format_utc(results.unix_seconds)),
        ("machine", results.machine.clone()),
        ("measured", measured),
    ];
    entries.extend(results.contenders.iter().map(|it| (it.contender.name(), it.version.clone())));
    entries.extend(results.skipped.iter().map(|skipped| ("skipped", skipped.clone())));
    writeln!(out, "<dl>")?;
    for (name, value) in entries {
        writeln!(out, "<dt>{name}</dt><dd>{}</dd>", escape(&value))?;
    }
    let [first, second, malloc, lvol, null] = REFERENCES.map(Contender::name);
    writeln!(out, "<dt>command</dt><dd><code>{}</code></dd>", escape(&command.join(" ")))?;
    writeln!(
        out,
        "</dl>\n<p>Medians of the rounds. The spread is the lowest and the highest round, and the bar through a \
         point of a rate. The ratio is the rate over that of {first} under the same load, or of {second} where \
         {first} cannot do it; in memory over that of {malloc} or else {lvol}, on null over that of {null}. Disks that are empty, or have a snapshot taken just before, are written from the \
         first request on, and half as many blocks as they have: then that state is used up. Point at a point \
         for its figure.</p>"
    )
}

fn write_place(out: &mut String, results: &Results, place: &Place) -> fmt::Result {
    let device = escape(&place.device.to_string());
    writeln!(out, "<h2>{device} ({})</h2>", place.medium())?;
    if let Some(warning) = warning(place) {
        writeln!(out, "<p class=\"warning\">{}</p>", escape(&warning))?;
    }
    write_table(out, place)?;
    if !place.left_out.is_empty() {
        writeln!(out, "<p>Left out. {}.</p>", escape(&place.left_out.join("; ")))?;
    }
    let measured: Vec<(&Cell, Summary)> = place
        .cells
        .iter()
        .filter_map(|cell| Summary::of(place, cell).map(|summary| (cell, summary)))
        .collect();
    let contenders: Vec<Contender> = results.contenders.iter().map(|it| it.contender).collect();
    let plots = Plots { measured: &measured, contenders: &contenders };
    write_plots(out, "Rate against depth", &plots.against_depth())?;
    write_plots(out, "Rate against queues", &plots.against_queues())?;
    write_plots(out, "Latency", &plots.latencies())
}

fn write_table(out: &mut String, place: &Place) -> fmt::Result {
    writeln!(
        out,
        "<div class=\"wide\"><table>\n<thead><tr><th class=\"name\">load</th><th>depth</th>\
         <th class=\"name\">contender</th><th>k IOPS</th><th>spread</th><th>MB/s</th><th>ratio</th>\
         <th>p50 µs</th><th>p99 µs</th><th>p99.9 µs</th><th>max µs</th><th>CPU µs<br/>a request</th><th>system calls<br/>a request</th>\
         <th>instructions<br/>a request</th><th>cycles<br/>a request</th><th>messages<br/>a request</th></tr></thead>"
    )?;
    for group in place.cells.chunk_by(|a, b| a.load == b.load) {
        writeln!(out, "<tbody>")?;
        for (index, cell) in group.iter().enumerate() {
            let ours = if cell.contender == Contender::Bessel { " class=\"ours\"" } else { "" };
            write!(out, "<tr{ours}>")?;
            if index == 0 {
                let (rows, load) = (group.len(), &cell.load);
                let name = escape(&load.name());
                write!(out, "<th class=\"name\" rowspan=\"{rows}\">{name}</th>")?;
                write!(out, "<th rowspan=\"{rows}\">{}</th>", load.depth)?;
            }
            write_row(out, place, cell)?;
        }
        writeln!(out, "</tbody>")?;
    }
    writeln!(out, "</table></div>")
}

fn write_row(out: &mut String, place: &Place, cell: &Cell) -> fmt::Result {
    let (style, name) = (style_of(cell.contender), cell.contender.name());
    write!(out, "<td class=\"name line-{style}\">{name}</td>")?;
    match Summary::of(place, cell) {
        None => writeln!(out, "<td colspan=\"13\">not measured</td></tr>"),
        Some(summary) => {
            let megabytes = summary.iops * f64::from(cell.load.block_bytes) / 1e6;
            let [low, high] = summary.iops_range;
            writeln!(
                out,
                "<td>{}</td><td>{} – {}</td><td>{megabytes:.0}</td><td>{}</td><td>{:.1}</td><td>{:.1}</td>\
                 <td>{:.1}</td><td>{:.1}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                kilo(summary.iops),
                kilo(low),
                kilo(high),
                two_decimals(summary.ratio),
                summary.latency_us("p50"),
                summary.latency_us("p99"),
                summary.latency_us("p99.9"),
                summary.latency_us("max"),
                two_decimals(summary.server_cpu_us_per_request),
                two_decimals(cell.costs.and_then(|costs| costs.system_calls)),
                whole(cell.costs.and_then(|costs| costs.instructions)),
                whole(cell.costs.and_then(|costs| costs.cycles)),
                two_decimals(cell.costs.and_then(|costs| costs.messages))
            )
        }
    }
}

fn write_plots(out: &mut String, heading: &str, plots: &[Plot]) -> fmt::Result {
    if plots.is_empty() {
        return Ok(());
    }
    writeln!(out, "<h3>{heading}</h3>\n<div class=\"plots\">")?;
    for plot in plots {
        writeln!(out, "<figure>{}</figure>", plot.svg())?;
    }
    writeln!(out, "</div>")
}

fn write_snapshots(out: &mut String, snapshots: &SnapshotReads) -> fmt::Result {
    let highest = snapshots.rows.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
    let points = snapshots.rows.iter().enumerate().map(|(index, &(count, rate))| Point {
        x: index as f64,
        y: rate * 1e3,
        range: None,
        note: format!("{count} snapshots: {} k/s", kilo(rate * 1e3)),
    });
    let style = style_of(Contender::Bessel);
    let plot = Plot {
        title: "4 KiB random reads, snapshots behind".into(),
        x: Axis::places("snapshots", snapshots.rows.iter().map(|(count, _)| count.to_string())),
        y: Axis::from_zero(RATE, highest * 1e3, kilo_tick),
        lines: vec![Line { name: "bessel".into(), style, points: points.collect() }],
    };
    let (when, machine) = (format_utc(snapshots.unix_seconds), escape(&snapshots.machine));
    writeln!(
        out,
        "<h2>Snapshots</h2>\n<p>By <code>bessel-bench snapshots</code>, {when}, {machine}.</p>"
    )?;
    write_plots(out, "Rate against snapshots", &[plot])
}

/// What plots of one place are made of.
struct Plots<'a> {
    measured: &'a [(&'a Cell, Summary)],
    /// In the order in which they are shown.
    contenders: &'a [Contender],
}

impl Plots<'_> {
    /// A plot for each kind of load that was measured at several depths.
    fn against_depth(&self) -> Vec<Plot> {
        self.against("depth (requests in flight on each queue)", Load::name, |load| load.depth)
    }

    /// A plot for each kind of load that was measured with several numbers of queues.
    fn against_queues(&self) -> Vec<Plot> {
        let name = |load: &Load| format!("{}, depth {}", load.kind(), load.depth);
        self.against("queues", name, |load| load.queues)
    }

    fn against(
        &self,
        label: &str,
        name: impl Fn(&Load) -> String,
        place: impl Fn(&Load) -> u16,
    ) -> Vec<Plot> {
        let mut plots = Vec::new();
        for title in self.distinct(&name) {
            let is_part = |load: &Load| name(load) == title;
            let measured = self.measured.iter().filter(|(cell, _)| is_part(&cell.load));
            let mut places: Vec<u16> =
                measured.clone().map(|(cell, _)| place(&cell.load)).collect();
            places.sort_unstable();
            places.dedup();
            if places.len() < 2 {
                continue;
            }
            let highest = measured.map(|(_, summary)| summary.iops_range[1]).fold(0.0, f64::max);
            let places: Vec<f64> = places.into_iter().map(f64::from).collect();
            let lines = self.lines(is_part, |cell, summary| {
                let at = place(&cell.load);
                let [low, high] = summary.iops_range;
                let note = format!(
                    "at {at}: {} k/s ({} to {})",
                    kilo(summary.iops),
                    kilo(low),
                    kilo(high)
                );
                vec![Point { x: at.into(), y: summary.iops, range: Some([low, high]), note }]
            });
            plots.push(Plot {
                title,
                x: Axis::doubling(label, &places),
                y: Axis::from_zero(RATE, highest, kilo_tick),
                lines,
            });
        }
        plots
    }

    /// A plot for each load: how long all but a share of the requests take.
    fn latencies(&self) -> Vec<Plot> {
        let name = |load: &Load| format!("{}, depth {}", load.name(), load.depth);
        let titles = self.distinct(name).into_iter();
        titles
            .map(|title| {
                let lines = self.lines(
                    |load| name(load) == title,
                    |_, summary| {
                        let point = |(index, ns): (usize, &f64)| Point {
                            x: index as f64,
                            y: *ns,
                            range: None,
                            note: format!("{} {:.1} µs", QUANTILES[index], ns / 1e3),
                        };
                        summary.latency_ns.iter().enumerate().map(point).collect()
                    },
                );
                let values: Vec<f64> =
                    lines.iter().flat_map(|line| line.points.iter().map(|point| point.y)).collect();
                Plot {
                    title,
                    x: Axis::places(
                        "share of requests that take no longer",
                        QUANTILES.map(String::from),
                    ),
                    y: Axis::powers("latency", values, time_tick),
                    lines,
                }
            })
            .collect()
    }

    /// The names of the loads, each once, in order.
    fn distinct(&self, name: impl Fn(&Load) -> String) -> Vec<String> {
        let mut names = Vec::new();
        for (cell, _) in self.measured {
            let name = name(&cell.load);
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// A line for each contender that did any of these loads.
    fn lines(
        &self,
        is_part: impl Fn(&Load) -> bool,
        points: impl Fn(&Cell, &Summary) -> Vec<Point>,
    ) -> Vec<Line> {
        let line = |&contender: &Contender| {
            let measured = self.measured.iter();
            let its =
                measured.filter(|(cell, _)| cell.contender == contender && is_part(&cell.load));
            let mut points: Vec<Point> =
                its.flat_map(|(cell, summary)| points(cell, summary)).collect();
            points.sort_by(|a, b| a.x.total_cmp(&b.x));
            let (name, style) = (contender.name().to_owned(), style_of(contender));
            (!points.is_empty()).then_some(Line { name, style, points })
        };
        self.contenders.iter().filter_map(line).collect()
    }
}

/// The same for a contender in all plots of all reports. Those that are never measured on the same device share
/// one: SPDK's plain disks, and the two formats with snapshots.
fn style_of(contender: Contender) -> usize {
    match contender {
        Contender::QsdUring => 0,
        Contender::QsdThreads => 1,
        Contender::QsdQcow2 | Contender::SpdkLvol => 2,
        Contender::SpdkAio | Contender::SpdkMalloc | Contender::SpdkNull => 3,
        Contender::Bessel => 4,
        Contender::BareUring => 5,
    }
}

/// A count that may not be known.
fn whole(value: Option<f64>) -> String {
    value.map_or("-".into(), |value| format!("{value:.0}"))
}

/// A rate in thousands, with a digit behind the point.
fn kilo(rate: f64) -> String {
    format!("{:.1}", rate / 1e3)
}

/// A rate in thousands, as short as it can be said.
fn kilo_tick(rate: f64) -> String {
    // What a sum of steps leaves behind the last digit that means something is rounded off.
    ((rate * 1e6).round() / 1e9).to_string()
}

/// A power of ten, in nanoseconds, with its unit.
fn time_tick(ns: f64) -> String {
    let units = [(1e9, "s"), (1e6, "ms"), (1e3, "µs")];
    let (unit, name) = units.into_iter().find(|(unit, _)| ns >= *unit).unwrap_or((1.0, "ns"));
    format!("{} {name}", (ns / unit).round())
}

/// A word as a shell would take it.
fn quoted(word: &str) -> String {
    let is_plain = |it: char| it.is_ascii_alphanumeric() || "_-./,:=@%+".contains(it);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::super::plot::tests::assert_well_formed;
    use super::super::tests::results;
    use super::*;
    use crate::server::Device;

    const SNAPSHOTS: &str = r#"{"machine": "m<1>", "unix_seconds": 0, "rows": [
        {"part": "idle", "figures": {"p50_us": 1.0}},
        {"part": "reads", "figures": {"snapshots": 10.0, "kilo_reads_per_second": 90.5}},
        {"part": "reads", "figures": {"snapshots": 0.0, "kilo_reads_per_second": 100.0}}]}"#;

    #[test]
    fn a_report_is_well_formed_and_whole_in_itself() {
        let snapshots = parse_snapshots(SNAPSHOTS.as_bytes()).unwrap();
        let page = render(&results(), Some(&snapshots));
        assert_well_formed(&page);
        for outside in ["http", "<script", "<link", "<img", "url(", "@import", "NaN"] {
            assert!(!page.contains(outside), "{outside} in {page}");
        }
        // One of depths, one of snapshots, and latencies of two loads.
        assert_eq!(page.matches("<svg").count(), 4);
        assert!(page.contains("1970-01-01 00:00:00 UTC") && page.contains("m&lt;1&gt;"), "{page}");
        assert!(page.contains("spdk aio: not there"), "{page}");
        // The rate, system calls and messages; instructions and cycles are not counted everywhere.
        assert!(page.contains("<td>0.3</td>"), "{page}");
        assert!(page.contains("<td>0.12</td><td>-</td><td>-</td><td>0.00</td></tr>"), "{page}");
    }

    #[test]
    fn text_from_outside_is_escaped() {
        let hostile = "\"><script>alert('x')</script>&nbsp;\u{7}";
        let mut results = results();
        results.machine = hostile.into();
        results.command.push(hostile.into());
        results.skipped.push(hostile.into());
        results.contenders[0].version = hostile.into();
        results.places[0].device = Device::Directory(hostile.into());
        results.places[0].left_out.push(hostile.into());
        let page = render(&results, None);
        assert_well_formed(&page);
        assert!(!page.contains("<script"), "{page}");
    }

    #[test]
    fn a_report_of_nothing_is_a_report() {
        let mut results = results();
        results.places[0].cells.iter_mut().for_each(|cell| cell.samples.clear());
        let page = render(&results, None);
        assert_well_formed(&page);
        assert!(page.contains("not measured") && !page.contains("<svg"), "{page}");
        results.places.clear();
        assert_well_formed(&render(&results, None));
    }

    #[test]
    fn rows_of_reads_are_found_and_put_in_order() {
        let found = parse_snapshots(SNAPSHOTS.as_bytes()).unwrap();
        assert_eq!(found.rows, [(0.0, 100.0), (10.0, 90.5)]);
    }

    #[test]
    fn a_file_that_is_something_else_is_refused_with_what_to_give() {
        let row = r#"{"part": "reads", "figures": {"snapshots": 1, "kilo_reads_per_second": 2}}"#;
        let many = format!(r#"{{"rows": [{}]}}"#, vec![row; 33].join(","));
        let large = vec![b' '; SNAPSHOTS_BYTES_MAX as usize + 1];
        for (text, what) in [
            (&b"\xff"[..], "is not JSON"),
            (b"[]", "has no rows of part `reads`"),
            (br#"{"rows": [{"part": "idle"}]}"#, "has no rows of part `reads`"),
            (br#"{"rows": [{"part": "reads"}]}"#, "without its figures"),
            (many.as_bytes(), "33 rows"),
            (&large, "is larger than 16MiB"),
        ] {
            let error = parse_snapshots(text).map(drop).unwrap_err();
            assert!(error.contains(what), "{what}: {error}");
        }
        let error = read_snapshots(Path::new("/nonexistent")).map(drop).unwrap_err();
        assert!(error.starts_with("cannot read /nonexistent"), "{error}");
    }

    #[test]
    fn figures_are_written_with_their_unit_and_without_noise() {
        let ticks = [1e2, 1e3, 1e5, 1e6, 1e9, 1e10].map(time_tick);
        assert_eq!(ticks, ["100 ns", "1 µs", "100 µs", "1 ms", "1 s", "10 s"]);
        assert_eq!([0.0, 3.0 * 0.2 * 1e3, 250_000.0].map(kilo_tick), ["0", "0.6", "250"]);
    }

    #[test]
    fn a_command_can_be_given_to_a_shell_again() {
        assert_eq!(quoted("--dir=/dev/shm"), "--dir=/dev/shm");
        assert_eq!(["", "a b", "it's"].map(quoted), ["''", "'a b'", "'it'\\''s'"]);
    }
}
