//! The tables. Pure.

use std::collections::BTreeMap;

use super::{
    Options,
    cell::{Axis, Measured},
    model::{Fleet, Line, Lines, Need, spread},
};

const BEGIN: &str = "<!-- made by make bench-scale: begin -->";
const END: &str = "<!-- made by make bench-scale: end -->";
const MIB: f64 = 1_048_576.0;

/// All that was measured.
#[derive(Debug, Default)]
pub(super) struct Figures(pub(super) BTreeMap<(Axis, u32), Vec<Measured>>);

/// One kind of figure: its name and unit, how it is taken, and its digits.
type Column = (&'static str, fn(&Measured) -> f64, usize);

impl Figures {
    /// The medians of an axis.
    fn points(&self, axis: Axis, of: fn(&Measured) -> f64) -> Vec<(f64, f64)> {
        let places = self.0.iter().filter(|((at, _), _)| *at == axis);
        places.map(|((_, place), all)| (f64::from(*place), spread(all.iter().map(of).collect())[0])).collect()
    }

    fn line(&self, axis: Axis, of: fn(&Measured) -> f64) -> Option<Line> {
        Line::fit(&self.points(axis, of))
    }

    /// The line of what may be 0 at some places: as it was at the largest, from none at none.
    fn through_nothing(&self, axis: Axis, of: fn(&Measured) -> f64) -> Option<Line> {
        let (place, value) = self.points(axis, of).last().copied()?;
        Some(Line { base: 0.0, each: value / place })
    }

    fn lines(&self) -> Option<Lines> {
        Some(Lines {
            event: self.line(Axis::Streams, |m| m.cpu_us)?,
            stream_memory: self.line(Axis::Streams, |m| m.memory)?,
            request: self.line(Axis::Endpoints, |m| m.cpu_us)?,
            idle: self.through_nothing(Axis::Endpoints, |m| m.idle)?,
            endpoint_memory: self.line(Axis::Endpoints, |m| m.memory)?,
            prompt: self.line(Axis::Prompt, |m| m.cpu_us)?,
        })
    }

    /// All tables, and the fleet if all axes were measured.
    pub(super) fn text(&self, options: &Options) -> String {
        let mut text = format!(
            "{} rounds, {} s each; the middle of each, the smallest and the largest behind it, and how far the middle is from the line. \
             Streams: {} events a second on all of them together.\n",
            options.rounds, options.seconds, options.events_per_s
        );
        for axis in Axis::ALL.into_iter().filter(|axis| self.0.keys().any(|(at, _)| at == axis)) {
            text.push_str(&self.table(axis));
        }
        if let Some(lines) = self.lines() {
            text.push_str(&fleets(&lines));
        }
        text
    }

    fn table(&self, axis: Axis) -> String {
        let cpu: Column = (
            if axis.unit() == "event" { "CPU of an event, µs" } else { "CPU of a request, µs" },
            |m| m.cpu_us,
            2,
        );
        let memory: Column = ("memory at most, MiB", |m| m.memory / MIB, 1);
        let idle: Column = ("a core at rest, %", |m| m.idle * 100.0, 1);
        // Large prompts have fewer clients, and what is buffered is bounded: no line.
        let has_line = |column: Column| axis != Axis::Prompt || column.0 == cpu.0;
        let line = |column: Column| if has_line(column) { self.line(axis, column.1) } else { None };
        let fitted = [cpu, memory].map(|column| (column, line(column)));
        let mut text = format!("\n| {} |", axis.name());
        for ((name, ..), _) in fitted {
            text.push_str(&format!(" {name} | from the line |"));
        }
        text.push_str(&format!(" {} |\n|---|---|---|---|---|---|\n", idle.0));
        for ((_, place), all) in self.0.iter().filter(|((at, _), _)| *at == axis) {
            text.push_str(&format!("| {place} |"));
            let cell = |(_, of, digits): Column| {
                let [middle, least, most] = spread(all.iter().map(of).collect());
                (middle, format!("{middle:.digits$} ({least:.digits$} to {most:.digits$})"))
            };
            for (column, line) in fitted {
                let (middle, shown) = cell(column);
                let residual = line.map_or("".into(), |line| {
                    format!("{:+.1} %", rounded(line.residual(f64::from(*place), middle) * 100.0, 10.0))
                });
                text.push_str(&format!(" {shown} | {residual} |"));
            }
            text.push_str(&format!(" {} |\n", cell(idle).1));
        }
        text.push('\n');
        for ((name, ..), line) in fitted.into_iter().filter(|(column, _)| has_line(*column)) {
            match line {
                Some(Line { base, each }) => text.push_str(&format!(
                    "- {name}: {base:.3} and {:.4} for each thousand of {}\n",
                    rounded(each * 1e3, 1e4),
                    axis.name()
                )),
                None => text.push_str(&format!("- {name}: no line, there are too few places\n")),
            }
        }
        text
    }
}

/// A number cut to a few digits, and never minus nothing.
fn rounded(number: f64, parts: f64) -> f64 {
    (number * parts).round() / parts + 0.0
}

/// What fleets need, computed.
fn fleets(lines: &Lines) -> String {
    let mut text = String::from(
        "\nComputed from these lines, for each proxy: streams of 40 events a second and 400 tokens, prompts of 8,000 bytes, all endpoints in \
         one pool that every proxy knows, load spread evenly.\n\n\
         | proxies | endpoints | streams | cores for events | for requests | for endpoints at rest | memory, MiB |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for (proxies, endpoints, streams) in
        [(10.0, 100.0, 10_000.0), (100.0, 1_000.0, 100_000.0), (1_000.0, 10_000.0, 1_000_000.0)]
    {
        let fleet = Fleet { proxies, endpoints, streams, rate: 40.0, tokens: 400.0, prompt_bytes: 8_000.0 };
        let Need { cores: [events, requests, rest], memory } = fleet.need(lines);
        text.push_str(&format!(
            "| {proxies} | {endpoints} | {streams} | {events:.2} | {requests:.3} | {rest:.3} | {:.0} |\n",
            memory / MIB
        ));
    }
    text
}

/// `old` with `text` between its marks; none if it does not have both, in order.
pub(super) fn between_marks(old: &str, text: &str) -> Option<String> {
    let (before, rest) = old.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n\n{}\n\n{END}{after}", text.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_have_the_middle_and_the_line_and_the_fleet_is_behind_them() {
        let options = <Options as clap::Parser>::parse_from(["b", "--proxy", "p", "--engine-sim", "e"]);
        let mut figures = Figures::default();
        for axis in Axis::ALL {
            for place in [10, 1_000] {
                let measured = |cpu_us| Measured {
                    cpu_us,
                    units: 9,
                    idle: 0.01,
                    memory: 10.0 * MIB + f64::from(place) * MIB,
                };
                let all = vec![measured(5.0), measured(9.0), measured(6.0)];
                figures.0.insert((axis, place), all);
            }
        }
        let text = figures.text(&options);
        assert!(
            text.contains("| 10 | 6.00 (5.00 to 9.00) | +0.0 % | 20.0 (20.0 to 20.0) | +0.0 % |"),
            "{text}"
        );
        assert!(
            text.contains("- memory at most, MiB: 10.000 and 1000.0000 for each thousand of open streams"),
            "{text}"
        );
        // A thousand streams a proxy: 40,000 events of 6 µs.
        assert!(text.contains("| 1000 | 10000 | 1000000 | 0.24 |"), "{text}");
        figures.0.retain(|(axis, place), _| *axis == Axis::Streams && *place == 10);
        let text = figures.text(&options);
        assert!(text.contains("no line, there are too few places") && !text.contains("Computed"), "{text}");
    }

    #[test]
    fn what_is_between_the_marks_is_replaced() {
        let old = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let new = between_marks(&old, "\nnew\n").unwrap();
        assert_eq!(new, format!("a\n{BEGIN}\n\nnew\n\n{END}\nb\n"));
        assert_eq!(between_marks(&new, "new"), Some(new.clone()));
        assert_eq!(between_marks("a", "new"), None);
        assert_eq!(between_marks(&format!("{END}{BEGIN}"), "new"), None);
    }
}
