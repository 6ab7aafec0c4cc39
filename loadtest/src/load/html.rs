//! The report as a page: one file, with its plots drawn in it. Pure.
//!
//! Two plots, drawn by hand: a plotting crate would be ten times this.

use super::report::{Report, milliseconds};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 320.0;
/// Room for the axes.
const LEFT: f64 = 70.0;
const BOTTOM: f64 = 40.0;
const TOP: f64 = 20.0;
const RIGHT: f64 = 120.0;
/// Told apart also by those who do not tell red from green.
const COLOURS: [&str; 4] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];

/// A line of a plot.
struct Line {
    name: &'static str,
    points: Vec<(f64, f64)>,
}

/// An axis: its ends, and where it has marks.
struct Axis {
    from: f64,
    to: f64,
    marks: Vec<(f64, String)>,
}

impl Axis {
    /// Where a value is, as a share of the axis.
    fn at(&self, value: f64) -> f64 {
        let length = self.to - self.from;
        if length > 0.0 { ((value - self.from) / length).clamp(0.0, 1.0) } else { 0.0 }
    }

    /// From 0 to `to`, with round marks.
    fn linear(to: f64) -> Self {
        let to = if to > 0.0 { to } else { 1.0 };
        let power = 10f64.powf((to / 5.0).log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|step| to / step <= 6.0);
        let step = step.unwrap_or(to);
        let count = super::lengths::whole(to / step);
        let marks = (0..=count).map(|n| (n as f64 * step, label(n as f64 * step)));
        Self { from: 0.0, to, marks: marks.collect() }
    }

    /// From the power of ten below the smallest to the one above the largest, over logarithms.
    fn powers_of_ten(values: impl Iterator<Item = f64> + Clone) -> Self {
        let logs = values.filter(|value| *value > 0.0).map(f64::log10);
        let from = logs.clone().fold(f64::INFINITY, f64::min).floor();
        let to = logs.fold(f64::NEG_INFINITY, f64::max).ceil();
        let (from, to) = if from.is_finite() && to > from { (from, to) } else { (0.0, 1.0) };
        let count = super::lengths::whole(to - from);
        let marks = (0..=count).map(|n| (from + n as f64, label(10f64.powf(from + n as f64))));
        Self { from, to, marks: marks.collect() }
    }
}

fn label(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{}M", v / 1e6),
        v if v >= 1e3 => format!("{}k", v / 1e3),
        v => format!("{v}"),
    }
}

/// The page.
pub(super) fn page(report: &Report) -> String {
    let mut text = String::from(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>penstock load</title>\n<style>\n\
         body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }\n\
         table { border-collapse: collapse; margin: 1rem 0; }\n\
         td, th { border-bottom: 1px solid #ccc; padding: .2rem .8rem; text-align: right; }\n\
         td:first-child, th:first-child, .facts td { text-align: left; }\n\
         svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; }\n\
         </style>\n<h1>penstock load</h1>\n",
    );
    let about = format!(
        "{} streams of {} tokens, {:.2} s",
        report.streams, report.tokens_per_request, report.elapsed_s
    );
    text.push_str(&format!("<p>{}</p>\n<table class=\"facts\">\n", escaped(&about)));
    for (name, fact) in report.facts() {
        text.push_str(&format!("<tr><td>{name}<td>{}\n", escaped(&fact)));
    }
    for (kind, failed) in &report.failures {
        let (kind, example) = (escaped(kind), escaped(&failed.example));
        text.push_str(&format!("<tr><td>failed: {kind}<td>{}, the first: {example}\n", failed.count));
    }
    text.push_str("</table>\n<table>\n<tr><th>ms<th>p50<th>p90<th>p99<th>p99.9<th>max\n");
    for (name, quantiles) in report.times() {
        let cells = milliseconds(&quantiles).map(|ms| format!("<td>{ms:.3}")).concat();
        text.push_str(&format!("<tr><td>{}{cells}\n", name.trim()));
    }
    text.push_str("</table>\n<h2>Times by percentile, ms</h2>\n");
    text.push_str(&percentiles(report));
    text.push_str("<h2>Each second</h2>\n");
    text.push_str(&seconds(report));
    text.push_str("</html>\n");
    text
}

fn percentiles(report: &Report) -> String {
    let logs =
        |points: &[(f64, f64)]| points.iter().map(|(nines, ms)| (*nines, ms.max(1e-3).log10())).collect();
    let lines: Vec<Line> = report
        .curves
        .iter()
        .filter(|(_, points)| !points.is_empty())
        .map(|(name, points)| Line { name, points: logs(points) })
        .collect();
    let all = report.curves.iter().flat_map(|(_, points)| points.iter().map(|(_, ms)| *ms));
    let most = lines.iter().flat_map(|line| line.points.last()).map(|(nines, _)| *nines).fold(1.0, f64::max);
    let names = ["0", "p90", "p99", "p99.9", "p99.99", "p99.999"];
    let marks = names.into_iter().zip(0u32..).map(|(name, nines)| (f64::from(nines), name.to_string()));
    let x = Axis { from: 0.0, to: most, marks: marks.filter(|(nines, _)| *nines <= most).collect() };
    plot(&x, &Axis::powers_of_ten(all), &lines)
}

fn seconds(report: &Report) -> String {
    let each = |of: fn(&super::Counts) -> u64| -> Vec<(f64, f64)> {
        let before = std::iter::once(0).chain(report.seconds.iter().map(of));
        let rates = report.seconds.iter().map(of).zip(before).map(|(now, before)| now.saturating_sub(before));
        rates.zip(1u32..).map(|(rate, second)| (f64::from(second), rate as f64)).collect()
    };
    let lines = [
        Line { name: "events", points: each(|counts| counts.events) },
        Line { name: "good requests", points: each(|counts| counts.good) },
        Line { name: "failed", points: each(|counts| counts.failed) },
    ];
    let most = lines.iter().flat_map(|line| line.points.iter()).map(|(_, rate)| *rate).fold(0.0, f64::max);
    plot(&Axis::linear(report.seconds.len() as f64), &Axis::linear(most), &lines)
}

/// A plot as SVG.
fn plot(x: &Axis, y: &Axis, lines: &[Line]) -> String {
    let across = |value: f64| LEFT + x.at(value) * (WIDTH - LEFT - RIGHT);
    let up = |value: f64| HEIGHT - BOTTOM - y.at(value) * (HEIGHT - BOTTOM - TOP);
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n");
    let (bottom, end) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    for (value, name) in &y.marks {
        let at = up(*value);
        svg.push_str(&format!(
            "<path d=\"M{LEFT} {at:.1}H{end}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>\n",
            LEFT - 8.0,
            at + 4.0
        ));
    }
    for (value, name) in &x.marks {
        let at = across(*value);
        svg.push_str(&format!(
            "<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"#eee\"/><text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>\n",
            bottom + 18.0
        ));
    }
    for ((line, colour), row) in lines.iter().zip(COLOURS.iter().cycle()).zip(0u32..) {
        let points: Vec<String> =
            line.points.iter().map(|(x, y)| format!("{:.1},{:.1}", across(*x), up(*y))).collect();
        let label = TOP + 14.0 + 18.0 * f64::from(row);
        svg.push_str(&format!(
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{label:.1}\" fill=\"{colour}\">{}</text>\n",
            points.join(" "),
            end + 10.0,
            line.name
        ));
    }
    svg.push_str("</svg>\n");
    svg
}

/// Text in HTML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_a_few_round_marks() {
        for (to, wanted) in [(10.0, "10"), (40_000.0, "40k"), (0.0, "1"), (3.0, "3")] {
            let axis = Axis::linear(to);
            assert!((2..=7).contains(&axis.marks.len()), "{to}: {:?}", axis.marks);
            assert!(axis.marks.iter().any(|(_, name)| name == wanted), "{to}: {:?}", axis.marks);
        }
        let axis = Axis::powers_of_ten([0.3, 40.0].into_iter());
        let names: Vec<&str> = axis.marks.iter().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, ["0.1", "1", "10", "100"]);
        assert_eq!(Axis::powers_of_ten(std::iter::empty()).to, 1.0);
    }

    #[test]
    fn lines_stay_within_their_plot() {
        let lines = [Line { name: "a", points: vec![(0.0, 0.0), (5.0, 7.0), (99.0, -3.0)] }];
        let svg = plot(&Axis::linear(5.0), &Axis::linear(7.0), &lines);
        assert!(svg.contains("points=\"70.0,280.0 780.0,20.0 780.0,280.0\""), "{svg}");
    }

    #[test]
    fn nothing_in_a_page_is_markup_by_accident() {
        assert_eq!(escaped("<b>\"&"), "&lt;b&gt;&quot;&amp;");
    }
}
