//! Plots as SVG, written by hand: some lines over two axes, a legend, and nothing else.
//!
//! Colours are variables of the page that holds the plot (`--line-0` and so on, `--ink`, `--grid`), so that it
//! follows the page from light to dark. Lines differ by the shape of their points too, for those who do not see
//! the colours.

use std::fmt::Write as _;

/// Lines that can be told apart.
pub(super) const STYLES: usize = 6;

const WIDTH: f64 = 460.0;
/// Height of the part that has the lines.
const BODY: f64 = 210.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 16.0;
const TITLE: f64 = 24.0;
const LEGEND_ROW: f64 = 17.0;
/// Ticks and the label of the x axis.
const BOTTOM: f64 = 46.0;
/// Of a character, about, at the size of a legend.
const CHARACTER: f64 = 6.2;
/// Ticks of an axis from zero, at most.
const TICKS_MAX: f64 = 6.0;

/// Lines over two axes.
pub(super) struct Plot {
    pub(super) title: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) lines: Vec<Line>,
}

/// What the points of one contender are joined by.
pub(super) struct Line {
    pub(super) name: String,
    /// Which of the [`STYLES`]; equal in all plots for the same contender.
    pub(super) style: usize,
    pub(super) points: Vec<Point>,
}

/// One figure.
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    /// The lowest and the highest of what `y` is the median of.
    pub(super) range: Option<[f64; 2]>,
    /// What is shown when it is pointed at.
    pub(super) note: String,
}

/// A scale with its ticks.
pub(super) struct Axis {
    label: String,
    scale: Scale,
    ticks: Vec<(f64, String)>,
}

#[derive(Clone, Copy)]
enum Scale {
    Linear { from: f64, to: f64 },
    Log { from: f64, to: f64 },
}

impl Scale {
    /// How far along the axis `value` lies: 0 at its start, 1 at its end, and never beyond.
    fn share(self, value: f64) -> f64 {
        let (value, from, to) = match self {
            Self::Linear { from, to } => (value, from, to),
            // A zero lies at the start, where its logarithm would lie further down than any page.
            Self::Log { from, to } => (value.max(from).ln(), from.ln(), to.ln()),
        };
        let share = (value - from) / (to - from);
        if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.5 }
    }
}

impl Axis {
    /// From 0 to a round number that is not below `highest`; ticks are written by `text`.
    pub(super) fn from_zero(label: &str, highest: f64, text: fn(f64) -> String) -> Self {
        let highest = if highest.is_finite() && highest > 0.0 { highest } else { 1.0 };
        let step = round_step(highest / TICKS_MAX);
        let count = (highest / step).ceil() as u32;
        let ticks = (0..=count).map(|index| f64::from(index) * step);
        Self {
            label: label.into(),
            scale: Scale::Linear { from: 0.0, to: f64::from(count) * step },
            ticks: ticks.map(|value| (value, text(value))).collect(),
        }
    }

    /// Powers of ten around `values`; those that are not above 0 count for nothing.
    pub(super) fn powers(
        label: &str,
        values: impl IntoIterator<Item = f64>,
        text: fn(f64) -> String,
    ) -> Self {
        let (mut lowest, mut highest) = (f64::INFINITY, 0.0f64);
        for value in values.into_iter().filter(|value| value.is_finite() && *value > 0.0) {
            lowest = lowest.min(value);
            highest = highest.max(value);
        }
        if highest == 0.0 {
            (lowest, highest) = (1.0, 10.0);
        }
        let from = lowest.log10().floor() as i32;
        let to = (highest.log10().ceil() as i32).max(from + 1);
        let ticks = (from..=to).map(|power| 10f64.powi(power));
        Self {
            label: label.into(),
            scale: Scale::Log { from: 10f64.powi(from), to: 10f64.powi(to) },
            ticks: ticks.map(|value| (value, text(value))).collect(),
        }
    }

    /// Logarithmic, with a tick at each of `values`, which are above 0 and in order.
    pub(super) fn doubling(label: &str, values: &[f64]) -> Self {
        let from = values.first().copied().unwrap_or(1.0);
        let to = values.last().copied().unwrap_or(1.0);
        Self {
            label: label.into(),
            scale: Scale::Log { from, to },
            ticks: values.iter().map(|value| (*value, value.to_string())).collect(),
        }
    }

    /// Places side by side, numbered from 0, each with a name.
    pub(super) fn places(label: &str, names: impl IntoIterator<Item = String>) -> Self {
        let ticks: Vec<_> =
            names.into_iter().enumerate().map(|(index, name)| (index as f64, name)).collect();
        let to = ticks.len().saturating_sub(1) as f64;
        Self { label: label.into(), scale: Scale::Linear { from: 0.0, to }, ticks }
    }
}

/// 1, 2 or 5 times a power of ten, not below `least`.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let steps = [1.0, 2.0, 5.0].map(|step| step * power);
    steps.into_iter().find(|step| *step >= least).unwrap_or(10.0 * power)
}

/// Where each name of a legend stands: its distance from the left, and its row.
fn legend_places(lines: &[Line]) -> Vec<(f64, usize)> {
    let (mut x, mut row) = (LEFT, 0);
    let mut places = Vec::new();
    for line in lines {
        let width = 26.0 + CHARACTER * line.name.chars().count() as f64;
        if x > LEFT && x + width > WIDTH {
            (x, row) = (LEFT, row + 1);
        }
        places.push((x, row));
        x += width;
    }
    places
}

impl Plot {
    /// The plot as an element of a page.
    pub(super) fn svg(&self) -> String {
        let mut out = String::new();
        self.write(&mut out).expect("writing to a string cannot fail");
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let legend = legend_places(&self.lines);
        let rows = legend.last().map_or(0, |(_, row)| row + 1);
        let top = TITLE + LEGEND_ROW * rows as f64 + 8.0;
        let height = top + BODY + BOTTOM;
        let title = escape(&self.title);
        writeln!(
            out,
            "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">\n\
             <text class=\"title\" x=\"{LEFT}\" y=\"15\">{title}</text>"
        )?;
        for (line, (x, row)) in self.lines.iter().zip(legend) {
            let y = TITLE + LEGEND_ROW * row as f64 + 8.0;
            let style = line.style % STYLES;
            writeln!(out, "<g class=\"line-{style}\">{}</g>", marker(style, x + 6.0, y, ""))?;
            writeln!(
                out,
                "<text x=\"{}\" y=\"{}\">{}</text>",
                x + 15.0,
                y + 4.0,
                escape(&line.name)
            )?;
        }
        self.write_axes(out, top)?;
        for line in &self.lines {
            self.write_line(out, line, top)?;
        }
        writeln!(out, "</svg>")
    }

    fn x_of(&self, value: f64) -> f64 {
        // Room to both sides, so that no point lies on an edge.
        LEFT + 14.0 + self.x.scale.share(value) * (WIDTH - LEFT - RIGHT - 28.0)
    }

    fn y_of(&self, value: f64, top: f64) -> f64 {
        top + (1.0 - self.y.scale.share(value)) * BODY
    }

    fn write_axes(&self, out: &mut String, top: f64) -> std::fmt::Result {
        let (right, bottom) = (WIDTH - RIGHT, top + BODY);
        for (value, text) in &self.y.ticks {
            let (y, text) = (self.y_of(*value, top), escape(text));
            writeln!(
                out,
                "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{right}\"/>\
                 <text class=\"y\" x=\"{}\" y=\"{:.1}\">{text}</text>",
                LEFT - 6.0,
                y + 4.0
            )?;
        }
        for (value, text) in &self.x.ticks {
            let (x, text) = (self.x_of(*value), escape(text));
            writeln!(
                out,
                "<path class=\"axis\" d=\"M{x:.1} {bottom}v4\"/>\
                 <text class=\"x\" x=\"{x:.1}\" y=\"{}\">{text}</text>",
                bottom + 17.0
            )?;
        }
        let (middle, center) = (f64::midpoint(LEFT, right), f64::midpoint(top, bottom));
        let (x_label, y_label) = (escape(&self.x.label), escape(&self.y.label));
        writeln!(
            out,
            "<path class=\"axis\" d=\"M{LEFT} {bottom}H{right}\"/>\n\
             <text class=\"x label\" x=\"{middle}\" y=\"{}\">{x_label}</text>\n\
             <text class=\"x label\" transform=\"translate(12 {center}) rotate(-90)\">{y_label}</text>",
            bottom + 36.0
        )
    }

    fn write_line(&self, out: &mut String, line: &Line, top: f64) -> std::fmt::Result {
        let style = line.style % STYLES;
        let place = |point: &Point| (self.x_of(point.x), self.y_of(point.y, top));
        let mut path = String::new();
        for (index, point) in line.points.iter().enumerate() {
            let (x, y) = place(point);
            write!(path, "{}{x:.1} {y:.1}", if index == 0 { 'M' } else { 'L' })?;
        }
        writeln!(out, "<g class=\"line-{style}\"><path class=\"line\" d=\"{path}\"/>")?;
        for point in &line.points {
            let (x, y) = place(point);
            if let Some([low, high]) = point.range {
                let (low, high) = (self.y_of(low, top), self.y_of(high, top));
                writeln!(out, "<path class=\"range\" d=\"M{x:.1} {low:.1}V{high:.1}\"/>")?;
            }
            let note = format!("{}: {}", line.name, point.note);
            writeln!(out, "{}", marker(style, x, y, &note))?;
        }
        writeln!(out, "</g>")
    }
}

/// The shape of a style's points, around (x, y).
fn marker(style: usize, x: f64, y: f64, note: &str) -> String {
    let shape = match style {
        0 => "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
        1 => "m-3.6-3.6h7.2v7.2h-7.2z",
        2 => "m0-4.6l4.4 7.8h-8.8z",
        3 => "m0 4.6l4.4-7.8h-8.8z",
        4 => "m0-5l5 5l-5 5l-5-5z",
        _ => "m-4.2-1.4h2.8v-2.8h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8z",
    };
    let note =
        if note.is_empty() { String::new() } else { format!("<title>{}</title>", escape(note)) };
    format!("<path class=\"point\" d=\"M{x:.1} {y:.1}{shape}\">{note}</path>")
}

/// Text as it may stand between tags and in quoted attributes. Control characters, which XML has no way to
/// write, become spaces.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            '\u{fffe}' | '\u{ffff}' => escaped.push(' '),
            control if control.is_control() && control != '\n' => escaped.push(' '),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Panics unless every element of `text` is closed in order, attributes are quoted, and text is escaped.
    pub(in crate::compare) fn assert_well_formed(text: &str) {
        let mut open = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('<') {
            assert_escaped(before);
            let (tag, after) = after.split_once('>').expect("a tag does not end");
            rest = after;
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "closed out of order");
            } else if !tag.starts_with('!') {
                let inner = tag.trim_end_matches('/');
                let mut pieces = inner.split('"');
                let name = pieces.next().unwrap().split(' ').next().unwrap();
                assert_eq!(inner.matches('"').count() % 2, 0, "<{tag}>");
                assert!(!inner.contains('<'), "<{tag}>");
                inner.split('"').skip(1).step_by(2).for_each(assert_escaped);
                if !tag.ends_with('/') {
                    open.push(name);
                }
            }
        }
        assert_escaped(rest);
        assert!(open.is_empty(), "left open: {open:?}");
    }

    fn assert_escaped(text: &str) {
        for after in text.split('&').skip(1) {
            let entity = after.split_once(';').map(|(entity, _)| entity);
            assert!(matches!(entity, Some("amp" | "lt" | "gt" | "quot" | "#39")), "&{after}");
        }
    }

    fn plain(value: f64) -> String {
        value.to_string()
    }

    fn line(name: &str, points: &[(f64, f64)]) -> Line {
        let point =
            |&(x, y)| Point { x, y, range: Some([y / 2.0, y * 2.0]), note: "<note>".into() };
        Line { name: name.into(), style: 0, points: points.iter().map(point).collect() }
    }

    #[test]
    fn values_lie_where_their_scale_says_and_never_outside() {
        let linear = Scale::Linear { from: 0.0, to: 10.0 };
        assert_eq!(
            [0.0, 2.5, 10.0, 99.0, -1.0].map(|it| linear.share(it)),
            [0.0, 0.25, 1.0, 1.0, 0.0]
        );
        let log = Scale::Log { from: 1.0, to: 100.0 };
        assert_eq!([1.0, 10.0, 100.0, 0.0].map(|it| log.share(it)), [0.0, 0.5, 1.0, 0.0]);
        let point = Scale::Linear { from: 3.0, to: 3.0 };
        assert_eq!(point.share(3.0), 0.5, "a lone value is in the middle");
        assert_eq!(linear.share(f64::NAN), 0.5);
    }

    #[test]
    fn axes_from_zero_end_at_a_round_number_with_few_ticks() {
        for (highest, last, count) in
            [(1.0, "1", 6), (99.0, "100", 6), (101.0, "120", 7), (0.0, "1", 6)]
        {
            let axis = Axis::from_zero("", highest, plain);
            assert_eq!(axis.ticks.last().unwrap().1, last, "for {highest}");
            assert_eq!(axis.ticks.len(), count, "for {highest}");
        }
        for extreme in [1e-300, 1e300, f64::INFINITY, f64::NAN, -5.0] {
            assert!(Axis::from_zero("", extreme, plain).ticks.len() <= 8, "for {extreme}");
        }
    }

    #[test]
    fn axes_of_powers_hold_what_they_are_for() {
        let names = |values: &[f64]| -> Vec<String> {
            let axis = Axis::powers("", values.iter().copied(), plain);
            axis.ticks.into_iter().map(|(_, name)| name).collect()
        };
        assert_eq!(names(&[3.0, 500.0]), ["1", "10", "100", "1000"]);
        assert_eq!(names(&[10.0]), ["10", "100"]);
        assert_eq!(names(&[0.0, f64::NAN]), ["1", "10"], "nothing to show is shown");
    }

    #[test]
    fn a_plot_is_well_formed_and_its_text_is_escaped() {
        let hostile = "</text><script>alert('1')</script> & \"more\" \u{1}";
        let plot = Plot {
            title: hostile.into(),
            x: Axis::places(hostile, [hostile.to_owned(), "b".into()]),
            y: Axis::powers("µs", [1.0, 1000.0], plain),
            lines: vec![line(hostile, &[(0.0, 5.0), (1.0, 50.0)]), line("empty", &[])],
        };
        let svg = plot.svg();
        assert_well_formed(&svg);
        assert!(!svg.contains("<script"), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn points_are_drawn_at_the_same_height_as_their_tick() {
        let plot = Plot {
            title: String::new(),
            x: Axis::doubling("depth", &[1.0, 32.0]),
            y: Axis::from_zero("k", 100.0, plain),
            lines: vec![line("a", &[(1.0, 0.0), (32.0, 100.0)])],
        };
        let top = 50.0;
        assert_eq!(plot.y_of(100.0, top), top);
        assert_eq!(plot.y_of(0.0, top), top + BODY);
        assert!(plot.x_of(1.0) > LEFT && plot.x_of(32.0) < WIDTH - RIGHT);
    }

    #[test]
    fn a_long_legend_goes_on_in_another_row() {
        let lines: Vec<_> = (0..7).map(|_| line("qsd io_uring", &[])).collect();
        let places = legend_places(&lines);
        assert_eq!(places[0], (LEFT, 0));
        assert!(places[6].1 > 0);
        let width = 26.0 + CHARACTER * 12.0;
        assert!(places.iter().all(|(x, _)| x + width <= WIDTH));
    }
}
