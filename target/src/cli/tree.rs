//! `bessel tree`: volumes and snapshots by descent, as text, as a Graphviz graph, as
//! a picture, or as JSON.

mod svg;

use super::output::print_either;
use super::{ApiArgs, Outcome};
use crate::api::types::{SnapshotView, TreeView, TreeVolume};
use bessel_reactor::units::ByteCount;
use clap::{Args, ValueEnum};
use std::fmt::Write as _;

/// `bessel tree`
#[derive(Args, Debug)]
pub(crate) struct TreeArgs {
    #[command(flatten)]
    api: ApiArgs,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
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
        Format::Dot => dot(tree),
        Format::Svg => svg::svg(tree),
        Format::Text | Format::Json => text(tree),
    })
}

/// A line of the drawing, before its branches are drawn.
struct Line {
    depth: usize,
    text: String,
}

/// What the text does not say by itself.
const LEGEND: &str = "\n+: space allocated for the volume since the snapshot before\n";

/// Lines in order of descent: a volume, below it its snapshots, below each the clones made of it.
fn text(tree: &TreeView) -> String {
    let mut lines = Vec::new();
    // What is still to be drawn, last first: a work list, since clones nest as deep as users like.
    enum Todo<'a> {
        Volume(usize, &'a TreeVolume),
        Snapshot(usize, &'a SnapshotView),
    }
    let known = |id: &str| {
        tree.volumes.iter().flat_map(|volume| &volume.snapshots).any(|snapshot| snapshot.id == id)
    };
    // A clone whose snapshot is not in the answer stands on its own rather than being left out.
    let is_top = |volume: &&TreeVolume| !volume.origin.as_deref().is_some_and(known);
    let tops = tree.volumes.iter().filter(is_top).rev();
    let mut todo: Vec<Todo<'_>> = tops.map(|volume| Todo::Volume(0, volume)).collect();
    while let Some(next) = todo.pop() {
        match next {
            Todo::Volume(depth, volume) => {
                lines.push(Line { depth, text: volume_line(volume) });
                let snapshots = volume.snapshots.iter().rev();
                todo.extend(snapshots.map(|snapshot| Todo::Snapshot(depth + 1, snapshot)));
            }
            Todo::Snapshot(depth, snapshot) => {
                lines.push(Line { depth, text: snapshot_line(snapshot) });
                let clones = tree.volumes.iter().rev();
                let clones = clones.filter(|it| it.origin.as_deref() == Some(&snapshot.id));
                todo.extend(clones.map(|volume| Todo::Volume(depth + 1, volume)));
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
fn dot(tree: &TreeView) -> String {
    let mut graph = String::from("digraph bessel {\n  rankdir=LR;\n");
    for volume in &tree.volumes {
        let size = ByteCount::new(volume.size_bytes).human();
        // Names and labels are words (see `reference`): nothing in them needs escaping.
        let (id, name) = (volume.id, &volume.name);
        let style = if volume.deleted { ", style=dashed" } else { "" };
        let _ = writeln!(graph, "  \"v{id}\" [shape=box, label=\"{name}\\n{size}\"{style}];");
        let mut previous = volume.origin.as_ref().map(|origin| format!("s{origin}"));
        for snapshot in &volume.snapshots {
            let node = format!("s{}", snapshot.id);
            let label = snapshot.label.as_ref().map_or(String::new(), |it| format!("\\n@{it}"));
            let (id, time) = (&snapshot.id, &snapshot.time);
            let allocated = ByteCount::new(snapshot.allocated_bytes).human();
            let style = if snapshot.deleted { ", style=dashed" } else { "" };
            let label = format!("{id}{label}\\n{time}\\n+{allocated}");
            let _ = writeln!(graph, "  \"{node}\" [label=\"{label}\"{style}];");
            if let Some(previous) = previous {
                let _ = writeln!(graph, "  \"{previous}\" -> \"{node}\";");
            }
            previous = Some(node);
        }
        if let Some(previous) = previous {
            let _ = writeln!(graph, "  \"{previous}\" -> \"v{id}\";");
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
        }
    }

    pub(super) fn volume(
        id: u64,
        origin: Option<&str>,
        snapshots: Vec<SnapshotView>,
    ) -> TreeVolume {
        TreeVolume {
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
                volume(1, None, vec![snapshot("1.0", Some("base")), snapshot("1.1", None)]),
                volume(2, Some("1.0"), vec![snapshot("2.0", None)]),
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
        assert_eq!(text(&family()), expected);
    }

    #[test]
    fn the_graph_has_every_edge_of_descent() {
        let graph = dot(&family());
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
}
