//! `bessel tree`: volumes and snapshots by descent, as text, as a Graphviz graph, as
//! a picture, or as JSON.

mod forest;
mod svg;

use super::output::print_either;
use super::{ApiArgs, Outcome};
use crate::api::types::{SnapshotView, TreeView, TreeVolume};
use bessel_reactor::units::ByteCount;
use clap::{Args, ValueEnum};
use forest::{Forest, Lane, Stop};
use std::fmt::Write as _;

/// `bessel tree`
#[derive(Args, Debug)]
pub(crate) struct TreeArgs {
    #[command(flatten)]
    api: ApiArgs,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Draw every snapshot, also in long runs that have neither labels nor clones
    #[arg(long)]
    all: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Format {
    /// Indented lines
    Text,
    /// A Graphviz graph
    Dot,
    /// A picture: save it to a file, open it in a browser
    Svg,
    /// As with --json
    Json,
}

/// Runs `bessel tree`.
pub(crate) fn run(arguments: &TreeArgs) -> Outcome {
    let tree: TreeView = arguments.api.client().get("/v1/tree")?;
    let json = arguments.api.json || arguments.format == Format::Json;
    print_either(json, &tree, |tree| match arguments.format {
        Format::Dot => dot(tree, !arguments.all),
        Format::Svg => svg::svg(tree, !arguments.all),
        Format::Text | Format::Json => text(tree, !arguments.all),
    })
}

/// A line of the drawing, before its branches are drawn.
struct Line {
    depth: usize,
    text: String,
}

/// Above the snapshots of a lane that a rollback has left.
const LEFT: &str = "left by a rollback, which going back to the last of these undoes:";

/// What the text does not say by itself.
const LEGEND: &str = "\n+: space allocated for the volume since the snapshot before\n";

/// Lines in order of descent: a volume, below it its snapshots, below each what began as a copy of it.
fn text(tree: &TreeView, fold: bool) -> String {
    let forest = Forest::new(tree);
    let mut lines = Vec::new();
    // What is still to be drawn, last first: a work list, since clones nest as deep as users like.
    enum Todo<'a> {
        Lane(usize, &'a Lane<'a>),
        Stop(usize, Stop<'a>),
    }
    let mut todo: Vec<Todo<'_>> = forest.tops().iter().rev().map(|it| Todo::Lane(0, it)).collect();
    while let Some(next) = todo.pop() {
        match next {
            Todo::Lane(depth, lane) => {
                let text = if lane.current { volume_line(lane.volume) } else { LEFT.to_owned() };
                lines.push(Line { depth, text });
                let stops = forest.stops(lane, fold).into_iter().rev();
                todo.extend(stops.map(|stop| Todo::Stop(depth + 1, stop)));
            }
            Todo::Stop(depth, Stop::Fold(snapshots)) => {
                lines.push(Line { depth, text: forest::fold_texts(snapshots).join(", ") });
            }
            Todo::Stop(depth, Stop::Snapshot(snapshot)) => {
                lines.push(Line { depth, text: snapshot_line(snapshot) });
                let lanes = forest.from(&snapshot.id).iter().rev();
                todo.extend(lanes.map(|lane| Todo::Lane(depth + 1, lane)));
            }
        }
    }
    let mut text = draw(&lines);
    if tree.volumes.iter().any(|volume| !volume.snapshots.is_empty()) {
        text.push_str(LEGEND);
    }
    text
}

/// Puts the branches before the lines. From the last line up, because whether a branch goes on
/// below a line depends on the lines after it.
fn draw(lines: &[Line]) -> String {
    let mut goes_on: Vec<bool> = Vec::new();
    let mut drawn = Vec::with_capacity(lines.len());
    for line in lines.iter().rev() {
        goes_on.resize(line.depth + 1, false);
        let mut branches = String::new();
        for open in goes_on.iter().take(line.depth).skip(1) {
            branches.push_str(if *open { "│  " } else { "   " });
        }
        if line.depth > 0 {
            branches.push_str(if goes_on[line.depth] { "├─ " } else { "└─ " });
        }
        goes_on[line.depth] = true;
        drawn.push(format!("{branches}{}\n", line.text));
    }
    drawn.into_iter().rev().collect()
}

fn volume_line(volume: &TreeVolume) -> String {
    let deleted = if volume.deleted { " (deleted)" } else { "" };
    format!("{} {}{deleted}", volume.name, ByteCount::new(volume.size_bytes).human())
}

fn snapshot_line(snapshot: &SnapshotView) -> String {
    let label = snapshot.label.as_ref().map_or(String::new(), |label| format!(" @{label}"));
    let allocated = ByteCount::new(snapshot.allocated_bytes).human();
    let state = match (snapshot.deleted, snapshot.settling) {
        (true, _) => " (deleted)",
        (false, true) => " (settling)",
        (false, false) => "",
    };
    format!("{}{label}  {}  +{allocated}{state}", snapshot.id, snapshot.time)
}

/// A Graphviz graph: boxes are volumes, ellipses snapshots; an edge leads to what came later.
fn dot(tree: &TreeView, fold: bool) -> String {
    let forest = Forest::new(tree);
    let mut graph = String::from("digraph bessel {\n  rankdir=LR;\n");
    for (from, lane) in forest.all() {
        let mut previous = (!from.is_empty()).then(|| format!("s{from}"));
        let mut link = |graph: &mut String, node: String| {
            if let Some(previous) = previous.replace(node.clone()) {
                let _ = writeln!(graph, "  \"{previous}\" -> \"{node}\";");
            }
        };
        for stop in forest.stops(lane, fold) {
            match stop {
                Stop::Snapshot(snapshot) => {
                    let node = format!("s{}", snapshot.id);
                    let label =
                        snapshot.label.as_ref().map_or(String::new(), |it| format!("\\n@{it}"));
                    let (id, time) = (&snapshot.id, &snapshot.time);
                    let allocated = ByteCount::new(snapshot.allocated_bytes).human();
                    let style = if snapshot.deleted { ", style=dashed" } else { "" };
                    let label = format!("{id}{label}\\n{time}\\n+{allocated}");
                    let _ = writeln!(graph, "  \"{node}\" [label=\"{label}\"{style}];");
                    link(&mut graph, node);
                }
                Stop::Fold(snapshots) => {
                    let node = format!("f{}", snapshots[0].id);
                    let label = forest::fold_texts(snapshots).join("\\n");
                    let _ = writeln!(graph, "  \"{node}\" [shape=plaintext, label=\"{label}\"];");
                    link(&mut graph, node);
                }
            }
        }
        if lane.current {
            // Names and labels are words (see `reference`): nothing in them needs escaping.
            let TreeVolume { id, name, size_bytes, deleted, .. } = lane.volume;
            let size = ByteCount::new(*size_bytes).human();
            let style = if *deleted { ", style=dashed" } else { "" };
            let _ = writeln!(graph, "  \"v{id}\" [shape=box, label=\"{name}\\n{size}\"{style}];");
            link(&mut graph, format!("v{id}"));
        }
    }
    graph.push_str("}\n");
    graph
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn snapshot(id: &str, label: Option<&str>) -> SnapshotView {
        SnapshotView {
            id: id.to_owned(),
            volume: String::new(),
            label: label.map(str::to_owned),
            time: "T".to_owned(),
            size_bytes: 1 << 30,
            allocated_bytes: 8192,
            settling: false,
            deleted: false,
            parent: None,
        }
    }

    pub(super) fn after(parent: &str, snapshot: SnapshotView) -> SnapshotView {
        SnapshotView { parent: Some(parent.to_owned()), ..snapshot }
    }

    pub(super) fn volume(
        id: u64,
        origin: Option<&str>,
        snapshots: Vec<SnapshotView>,
    ) -> TreeVolume {
        let newest = snapshots.last().map(|snapshot| snapshot.id.clone());
        TreeVolume {
            parent: newest.or(origin.map(str::to_owned)),
            id,
            name: format!("vm{id}"),
            size_bytes: 1 << 30,
            origin: origin.map(str::to_owned),
            deleted: false,
            snapshots,
        }
    }

    pub(super) fn family() -> TreeView {
        TreeView {
            volumes: vec![
                volume(
                    1,
                    None,
                    vec![snapshot("1.0", Some("base")), after("1.0", snapshot("1.1", None))],
                ),
                volume(2, Some("1.0"), vec![after("1.0", snapshot("2.0", None))]),
                volume(3, Some("1.0"), vec![]),
                volume(4, Some("2.0"), vec![]),
                volume(5, Some("9.9"), vec![]),
            ],
        }
    }

    #[test]
    fn clones_hang_below_the_snapshot_they_were_made_of() {
        let expected = "\
vm1 1GiB
├─ 1.0 @base  T  +8KiB
│  ├─ vm2 1GiB
│  │  └─ 2.0  T  +8KiB
│  │     └─ vm4 1GiB
│  └─ vm3 1GiB
└─ 1.1  T  +8KiB
vm5 1GiB

+: space allocated for the volume since the snapshot before
";
        assert_eq!(text(&family(), true), expected);
    }

    #[test]
    fn the_graph_has_every_edge_of_descent() {
        let graph = dot(&family(), true);
        for edge in [
            "\"s1.0\" -> \"s1.1\"",
            "\"s1.1\" -> \"v1\"",
            "\"s1.0\" -> \"s2.0\"",
            "\"s2.0\" -> \"v2\"",
            "\"s1.0\" -> \"v3\"",
            "\"s2.0\" -> \"v4\"",
        ] {
            assert!(graph.contains(edge), "{edge} not in {graph}");
        }
        let node = "\"s1.0\" [label=\"1.0\\n@base\\nT\\n+8KiB\"];";
        assert!(graph.contains(node), "{node} not in {graph}");
    }

    fn long(count: usize) -> TreeView {
        let mut snapshots = vec![snapshot("1.0", None)];
        for sequence in 1..count {
            let before = format!("1.{}", sequence - 1);
            snapshots.push(after(&before, snapshot(&format!("1.{sequence}"), None)));
        }
        TreeView { volumes: vec![volume(1, None, snapshots)] }
    }

    #[test]
    fn a_long_run_is_three_lines_and_all_of_it_when_asked() {
        let expected = "\
vm1 1GiB
├─ 1.0  T  +8KiB
├─ \u{2026} 9,998 snapshots, +78.1MiB
└─ 1.9999  T  +8KiB

+: space allocated for the volume since the snapshot before
";
        assert_eq!(text(&long(10_000), true), expected);
        assert_eq!(text(&long(10_000), false).lines().count(), 10_003);
        assert_eq!(dot(&long(10_000), true).matches(" -> ").count(), 3);
        assert_eq!(dot(&long(10_000), false).matches(" -> ").count(), 10_000);
    }

    #[test]
    fn what_a_rollback_has_left_hangs_where_the_volume_went_back_to() {
        let snapshots = vec![
            snapshot("1.0", None),
            after("1.0", snapshot("1.1", None)),
            after("1.1", snapshot("1.2", Some("before-rollback-2"))),
            after("1.0", snapshot("1.3", None)),
        ];
        let clone = volume(2, Some("1.1"), vec![]);
        let tree = TreeView { volumes: vec![volume(1, None, snapshots), clone] };
        let expected = "\
vm1 1GiB
├─ 1.0  T  +8KiB
│  └─ left by a rollback, which going back to the last of these undoes:
│     ├─ 1.1  T  +8KiB
│     │  └─ vm2 1GiB
│     └─ 1.2 @before-rollback-2  T  +8KiB
└─ 1.3  T  +8KiB

+: space allocated for the volume since the snapshot before
";
        assert_eq!(text(&tree, true), expected);
        let graph = dot(&tree, true);
        for edge in ["\"s1.0\" -> \"s1.1\"", "\"s1.0\" -> \"s1.3\"", "\"s1.3\" -> \"v1\""] {
            assert!(graph.contains(edge), "{edge} not in {graph}");
        }
        assert!(!graph.contains("\"s1.2\" ->"), "{graph}");
    }
}
