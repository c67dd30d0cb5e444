//! The forest as a picture that needs nothing else to be shown: one SVG.
//!
//! Each volume has a lane: its box, then a line on which time runs to the right, with a dot for
//! each snapshot. A clone's lane hangs from the dot it was made of. Lanes never share a height, and
//! of two snapshots the newer one's clones come first, so no branch crosses a lane or a text: what
//! a dot says stands to the right of the branch below it.
//!
//! Text is set in a monospaced face, because then its width can be computed here.

use super::forest::{Forest, Lane, Stop};
use crate::api::types::{SnapshotView, TreeView, TreeVolume};
use bessel_reactor::units::ByteCount;
use std::fmt::Write as _;

/// Sizes are in pixels.
const FONT: u64 = 12;
/// An upper bound: monospaced faces advance by 0.55 to 0.61 of their size.
const CHARACTER_WIDTH: f64 = 0.61 * FONT as f64;
const LINE_HEIGHT: u64 = 16;
const MARGIN: u64 = 24;
/// Between two lanes, and between two texts on a lane.
const GAP: u64 = 24;
const BOX_PADDING: u64 = 10;
/// From a lane's line to the first baseline below it.
const TEXT_BELOW: u64 = 20;
/// From a dot, and from the branch below it, to its text and to the boxes of its clones.
const TEXT_RIGHT: u64 = 8;
const BRANCH_RIGHT: u64 = 28;
const CORNER: u64 = 8;
/// Names and labels longer than this are broken; they have up to 64 characters.
const LINE_CHARACTERS_MAX: usize = 24;
const LEGEND: [&str; 4] = [
    "Box: a volume and its size. Dot: a snapshot; times are UTC and run from left to right.",
    "+: space allocated for the volume since the snapshot before.",
    "A branch leads from a snapshot to the volumes cloned from it, and to what a rollback to it has left:",
    "a lane with no arrow, whose last snapshot the volume can go back to.",
];

const STYLE: &str = "\
text{font-family:'DejaVu Sans Mono',Menlo,Consolas,'Liberation Mono',monospace;font-size:12px;\
fill:#202124}\
.b{font-weight:bold}.s{fill:#5f6368}.l{fill:#6a1b9a}\
.box{fill:#e8f0fe;stroke:#3367d6;stroke-width:1.5}\
.gone{fill:#f1f3f4;stroke:#80868b;stroke-width:1.5;stroke-dasharray:4 3}\
.lane{stroke:#80868b;stroke-width:2;fill:none}\
.branch{stroke:#188038;stroke-width:2;fill:none}\
.dot{fill:#3367d6;stroke:#fff;stroke-width:1.5}\
.hollow{fill:#fff;stroke:#80868b;stroke-width:2}\
.fold{fill:#5f6368;stroke:#fff;stroke-width:2}";

/// A line of text and its class.
struct Text {
    class: &'static str,
    text: String,
}

impl Text {
    fn new(class: &'static str, text: impl Into<String>) -> Self {
        Self { class, text: text.into() }
    }
}

/// A lane that is still to be drawn, and the point its branch comes from.
struct Todo<'a> {
    lane: &'a Lane<'a>,
    from: Option<(u64, u64)>,
}

/// What has been drawn, and how far it reaches.
struct Drawing {
    /// Lines, which lie below everything else.
    lines: String,
    shapes: String,
    right: u64,
    /// Below everything so far.
    bottom: u64,
}

/// Draws the forest.
pub(super) fn svg(tree: &TreeView, fold: bool) -> String {
    let forest = Forest::new(tree);
    // A work list, since clones nest as deep as users like.
    let tops = forest.tops().iter().rev();
    let mut todo: Vec<Todo<'_>> = tops.map(|lane| Todo { lane, from: None }).collect();
    let mut drawing = Drawing::new();
    while let Some(next) = todo.pop() {
        drawing.lane(&next, &forest, fold, &mut todo);
    }
    drawing.finish()
}

impl Drawing {
    fn new() -> Self {
        let mut drawing =
            Self { lines: String::new(), shapes: String::new(), right: 0, bottom: MARGIN };
        let legend: Vec<Text> = LEGEND.iter().map(|line| Text::new("s", *line)).collect();
        drawing.texts(MARGIN, MARGIN + FONT, &legend);
        drawing.bottom += legend.len() as u64 * LINE_HEIGHT;
        drawing
    }

    /// Draws a lane below everything so far, and notes what hangs from it, to be drawn next.
    fn lane<'a>(
        &mut self,
        Todo { lane, from }: &Todo<'a>,
        forest: &'a Forest<'a>,
        fold: bool,
        todo: &mut Vec<Todo<'a>>,
    ) {
        let texts = lane_texts(lane);
        let left = from.map_or(MARGIN, |(x, _)| x + BRANCH_RIGHT);
        let (width, height) = (width(&texts) + 2 * BOX_PADDING, box_height(&texts));
        let top = self.bottom + GAP;
        let y = top + height / 2;
        self.bottom = top + height;
        if let Some((x, from)) = from {
            let (bend, end) = (y - CORNER, x + CORNER);
            let path = format!("M{x} {from}V{bend}Q{x} {y} {end} {y}H{left}");
            let _ = writeln!(self.lines, "<path class=\"branch\" d=\"{path}\"/>");
        }
        let class = if lane.volume.deleted || !lane.current { "gone" } else { "box" };
        let _ = writeln!(
            self.shapes,
            "<rect class=\"{class}\" x=\"{left}\" y=\"{top}\" width=\"{width}\" \
             height=\"{height}\" rx=\"8\"/>"
        );
        self.texts(left + BOX_PADDING, top + BOX_PADDING + FONT - 2, &texts);
        let start = left + width;
        let (mut x, mut last) = (start, start);
        for stop in forest.stops(lane, fold) {
            x += GAP;
            last = x;
            let texts = self.stop(x, y, &stop);
            if let Stop::Snapshot(snapshot) = stop {
                let made = forest.from(&snapshot.id).iter().rev();
                todo.extend(made.map(|lane| Todo { lane, from: Some((x, y)) }));
            }
            x += texts;
        }
        if lane.current && x > start {
            // An arrow: the volume goes on from its newest snapshot.
            let (tip, up, down) = (x + GAP, y - 4, y + 4);
            let back = tip - 7;
            let path = format!("M{start} {y}H{tip}M{back} {up}L{tip} {y}L{back} {down}");
            let _ = writeln!(self.lines, "<path class=\"lane\" d=\"{path}\"/>");
            x = tip;
        } else {
            let _ = writeln!(self.lines, "<path class=\"lane\" d=\"M{start} {y}H{last}\"/>");
        }
        self.right = self.right.max(x);
    }

    /// Draws a dot with its text, and returns how far right of it that reaches.
    fn stop(&mut self, x: u64, y: u64, stop: &Stop<'_>) -> u64 {
        let texts = match stop {
            Stop::Snapshot(snapshot) => {
                let class = if snapshot.deleted || snapshot.settling { "hollow" } else { "dot" };
                let _ = writeln!(
                    self.shapes,
                    "<circle class=\"{class}\" cx=\"{x}\" cy=\"{y}\" r=\"6\"/>"
                );
                snapshot_texts(snapshot)
            }
            Stop::Fold(snapshots) => {
                for dot in [x, x + 11, x + 22] {
                    let _ = writeln!(
                        self.shapes,
                        "<circle class=\"fold\" cx=\"{dot}\" cy=\"{y}\" r=\"4\"/>"
                    );
                }
                fold_texts(snapshots)
            }
        };
        self.texts(x + TEXT_RIGHT, y + TEXT_BELOW, &texts);
        let lines = texts.len() as u64;
        self.bottom = self.bottom.max(y + TEXT_BELOW + lines * LINE_HEIGHT - FONT);
        TEXT_RIGHT + width(&texts)
    }

    /// Sets lines of text, the first on the baseline `y`.
    fn texts(&mut self, x: u64, mut y: u64, texts: &[Text]) {
        for Text { class, text } in texts {
            let text = escape(text);
            let _ =
                writeln!(self.shapes, "<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{text}</text>");
            y += LINE_HEIGHT;
        }
        self.right = self.right.max(x + width(texts));
    }

    fn finish(self) -> String {
        let (width, height) = (self.right + MARGIN, self.bottom + MARGIN);
        let Self { lines, shapes, .. } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\">\n\
             <title>Volumes and snapshots of a Bessel store</title>\n\
             <style>{STYLE}</style>\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n\
             {lines}{shapes}</svg>\n"
        )
    }
}

fn lane_texts(lane: &Lane<'_>) -> Vec<Text> {
    if lane.current {
        return volume_texts(lane.volume);
    }
    vec![Text::new("s", "left by"), Text::new("s", "a rollback")]
}

fn volume_texts(volume: &TreeVolume) -> Vec<Text> {
    let mut texts: Vec<Text> =
        broken(&volume.name).into_iter().map(|line| Text::new("b", line)).collect();
    let deleted = if volume.deleted { ", deleted" } else { "" };
    let size = ByteCount::new(volume.size_bytes).human();
    texts.push(Text::new("s", format!("{size}{deleted}")));
    texts
}

fn snapshot_texts(snapshot: &SnapshotView) -> Vec<Text> {
    let mut texts = vec![Text::new("b", &*snapshot.id)];
    if let Some(label) = &snapshot.label {
        let lines = broken(&format!("@{label}"));
        texts.extend(lines.into_iter().map(|line| Text::new("l", line)));
    }
    texts.push(Text::new("s", readable(&snapshot.time)));
    let state = match (snapshot.deleted, snapshot.settling) {
        (true, _) => ", deleted",
        (false, true) => ", settling",
        (false, false) => "",
    };
    let allocated = ByteCount::new(snapshot.allocated_bytes).human();
    texts.push(Text::new("s", format!("+{allocated}{state}")));
    texts
}

fn fold_texts(snapshots: &[&SnapshotView]) -> Vec<Text> {
    super::forest::fold_texts(snapshots).into_iter().map(|text| Text::new("s", text)).collect()
}

/// `2026-11-20 11:40:00` of an RFC 3339 time; anything else as it is.
fn readable(time: &str) -> String {
    match (time.get(..10), time.get(10..11), time.get(11..19)) {
        (Some(date), Some("T"), Some(clock)) => format!("{date} {clock}"),
        _ => time.to_owned(),
    }
}

/// A word in lines of at most [`LINE_CHARACTERS_MAX`], broken behind punctuation where there is
/// some in the second half of a line.
fn broken(word: &str) -> Vec<String> {
    let mut rest: Vec<char> = word.chars().collect();
    let mut lines = Vec::new();
    while rest.len() > LINE_CHARACTERS_MAX {
        let line = &rest[..LINE_CHARACTERS_MAX];
        let end = line.iter().rposition(|it| matches!(it, '-' | '_' | '.'));
        let end = end.map_or(LINE_CHARACTERS_MAX, |place| place + 1);
        let end = if end > LINE_CHARACTERS_MAX / 2 { end } else { LINE_CHARACTERS_MAX };
        lines.push(rest.drain(..end).collect());
    }
    lines.push(rest.into_iter().collect());
    lines
}

fn width(texts: &[Text]) -> u64 {
    let characters = texts.iter().map(|line| line.text.chars().count()).max().unwrap_or(0);
    (characters as f64 * CHARACTER_WIDTH).ceil() as u64
}

fn box_height(texts: &[Text]) -> u64 {
    texts.len() as u64 * LINE_HEIGHT + 2 * BOX_PADDING - (LINE_HEIGHT - FONT)
}

/// As text of an XML document. Control characters have no place in one.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            _ if character.is_control() => escaped.push('\u{fffd}'),
            _ => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::tests::{after, family, snapshot, volume};
    use super::*;

    /// The boxes, as left, top, width and height.
    fn boxes(svg: &str) -> Vec<[u64; 4]> {
        let attribute = |line: &str, name: &str| -> u64 {
            let (_, rest) = line.split_once(&format!(" {name}=\"")).unwrap();
            rest.split_once('"').unwrap().0.parse().unwrap()
        };
        let rects = svg.lines().filter(|line| line.starts_with("<rect class="));
        rects.map(|line| ["x", "y", "width", "height"].map(|name| attribute(line, name))).collect()
    }

    #[test]
    fn every_volume_and_snapshot_is_there_and_every_clone_has_its_branch() {
        let picture = svg(&family(), true);
        for shown in ["vm1", "vm2", "vm3", "vm4", "vm5", "1.0", "1.1", "2.0", "@base", "+8KiB"] {
            assert!(picture.contains(&format!(">{shown}</text>")), "{shown} not in {picture}");
        }
        assert_eq!(picture.matches("class=\"branch\"").count(), 3);
        assert_eq!(picture.matches("class=\"dot\"").count(), 3);
    }

    #[test]
    fn boxes_lie_inside_the_picture_and_below_each_other() {
        let picture = svg(&family(), true);
        let head = picture.lines().next().unwrap();
        let (_, size) = head.split_once("viewBox=\"0 0 ").unwrap();
        let size: Vec<u64> =
            size.trim_end_matches("\">").split(' ').map(|it| it.parse().unwrap()).collect();
        let boxes = boxes(&picture);
        assert_eq!(boxes.len(), 5);
        for [x, y, width, height] in &boxes {
            assert!(x + width < size[0] && y + height < size[1], "{x} {y} {width} {height}");
        }
        assert!(boxes.windows(2).all(|pair| pair[0][1] + pair[0][3] < pair[1][1]), "{boxes:?}");
    }

    #[test]
    fn snapshots_without_label_or_clone_are_folded_and_no_others() {
        let mut snapshots = vec![snapshot("1.0", None)];
        snapshots.extend(
            (1..30).map(|it| after(&format!("1.{}", it - 1), snapshot(&format!("1.{it}"), None))),
        );
        snapshots[20].label = Some("kept".to_owned());
        let tree =
            TreeView { volumes: vec![volume(1, None, snapshots), volume(2, Some("1.10"), vec![])] };
        let picture = svg(&tree, true);
        for shown in
            ["1.0", "\u{2026} 8 snapshots", "1.9", "1.10", "1.11", "\u{2026} 7 snapshots", "1.19"]
        {
            assert!(picture.contains(&format!(">{shown}</text>")), "{shown} not in {picture}");
        }
        for shown in ["1.20", "@kept", "1.21", "1.29"] {
            assert!(picture.contains(&format!(">{shown}</text>")), "{shown} not in {picture}");
        }
        assert!(!picture.contains(">1.5</text>") && !picture.contains(">1.25</text>"));
    }

    #[test]
    fn what_a_rollback_has_left_is_a_lane_without_an_arrow() {
        let snapshots = vec![
            snapshot("1.0", None),
            after("1.0", snapshot("1.1", Some("before-rollback-1"))),
            after("1.0", snapshot("1.2", None)),
        ];
        let picture = svg(&TreeView { volumes: vec![volume(1, None, snapshots)] }, true);
        assert_eq!(picture.matches("class=\"lane\"").count(), 2);
        assert_eq!(picture.matches("class=\"branch\"").count(), 1);
        let arrows = picture.lines().filter(|it| it.contains("class=\"lane\"") && it.contains('L'));
        assert_eq!(arrows.count(), 1, "{picture}");
        assert!(picture.contains(">a rollback</text>"));
    }

    #[test]
    fn text_is_escaped_and_long_words_are_broken_without_loss() {
        assert_eq!(escape("a<b>&\"\u{1}"), "a&lt;b&gt;&amp;\"\u{fffd}");
        let mut evil = family();
        evil.volumes[0].name = "</text><script>".to_owned();
        assert!(!svg(&evil, true).contains("<script>"));
        for word in ["x".repeat(64), "before-upgrade-to-".repeat(4), "a".to_owned(), "-".repeat(49)]
        {
            let lines = broken(&word);
            assert_eq!(lines.concat(), word);
            assert!(lines.iter().all(|line| line.len() <= LINE_CHARACTERS_MAX), "{lines:?}");
        }
        assert_eq!(readable("2026-11-20T11:40:00.123Z"), "2026-11-20 11:40:00");
    }

    #[test]
    fn an_empty_store_is_a_picture_too() {
        assert!(svg(&TreeView { volumes: vec![] }, true).ends_with("</svg>\n"));
    }
}
