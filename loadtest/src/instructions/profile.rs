//! Which functions the instructions of one more event or request are spent in: dumps of callgrind, less those of another
//! time. Pure.
//!
//! callgrind_annotate shows one dump, with all that happens once and with whatever was under way when it was written.

use std::collections::HashMap;

/// Functions shown, of each kind.
const SHOWN: usize = 40;

/// What one function has cost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Cost {
    /// Itself.
    own: f64,
    /// With all that it has called.
    whole: f64,
}

/// The costliest functions of one more of `units`, by what they cost themselves and by what they cost in all.
pub(super) fn text(name: &str, once: &[String], twice: &[String], units: u64) -> String {
    let mut costs: HashMap<String, Cost> = HashMap::new();
    for (dumps, sign) in [(once, -1.0), (twice, 1.0)] {
        for (function, one) in dumps.iter().flat_map(|dump| costs_of(dump)) {
            let cost = costs.entry(function).or_default();
            cost.own += sign * one.own;
            cost.whole += sign * one.whole;
        }
    }
    let units = units.max(1) as f64;
    let mut text = format!("{name}: instructions of one more, by function\n");
    for (kind, is_own) in [("itself", true), ("with all that it calls", false)] {
        let of = |cost: &Cost| if is_own { cost.own } else { cost.whole };
        let mut sorted: Vec<(&str, f64)> =
            costs.iter().map(|(function, cost)| (function.as_str(), of(cost) / units)).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(b.0)));
        text += &format!("\n{kind}\n");
        for (function, cost) in sorted.iter().take(SHOWN).filter(|(_, cost)| *cost >= 0.5) {
            text += &format!("{cost:>12.0}  {function}\n");
        }
    }
    text
}

/// Reads the lines of a dump that tell costs: those of the function named last, and behind `calls=` those of a call, which
/// are the called function's.
fn costs_of(dump: &str) -> HashMap<String, Cost> {
    let mut names: HashMap<&str, &str> = HashMap::new();
    let mut costs: HashMap<String, Cost> = HashMap::new();
    let (mut function, mut called, mut is_call) = ("", "", false);
    for line in dump.lines() {
        if let Some(name) = line.strip_prefix("fn=") {
            function = full(name, &mut names);
        } else if let Some(name) = line.strip_prefix("cfn=") {
            called = full(name, &mut names);
        } else if line.starts_with("calls=") {
            is_call = true;
        } else if line.starts_with(|c: char| c.is_ascii_digit() || "+-*".contains(c)) {
            if function.is_empty() {
                continue;
            }
            // A position, then the count.
            let Some(count) = line.split(' ').nth(1).and_then(|count| count.parse::<f64>().ok()) else {
                continue;
            };
            if !std::mem::take(&mut is_call) {
                let cost = costs.entry(function.to_owned()).or_default();
                cost.own += count;
                cost.whole += count;
            } else if called != function {
                // What it calls itself for is in there already.
                costs.entry(function.to_owned()).or_default().whole += count;
            }
        }
    }
    costs
}

/// A name is written out once, as `(7) name`, and is `(7)` from then on.
fn full<'a>(name: &'a str, names: &mut HashMap<&'a str, &'a str>) -> &'a str {
    match name.split_once(' ') {
        Some((id, name)) if id.starts_with('(') => {
            names.insert(id, name);
            name
        }
        _ => names.get(name).copied().unwrap_or(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONCE: &str =
        "events: Ir\n\nfn=(1) main\n0 10\ncfn=(2) scan\ncalls=1 0\n0 100\n\nfn=(2)\n0 100\n\ntotals: 110\n";
    const TWICE: &str = "events: Ir\n\nfn=(1) main\n0 14\ncfn=(3) scan\ncalls=3 0\n* 300\n\nfn=(3)\n+3 260\n\
        cfn=(4) copy\ncalls=9 0\n0 40\ncfn=(3)\ncalls=1 0\n0 99\n\nfn=(4)\n0 40\n\ntotals: 314\n";

    #[test]
    fn one_dump_less_the_other_is_divided_by_the_units() {
        let text = text("scans", &[ONCE.into()], &[TWICE.into()], 2);
        let lines: Vec<&str> = text.lines().collect();
        let wanted = [
            "scans: instructions of one more, by function",
            "",
            "itself",
            "          80  scan",
            "          20  copy",
            "           2  main",
            "",
            "with all that it calls",
            "         102  main",
            "         100  scan",
            "          20  copy",
        ];
        assert_eq!(lines, wanted);
    }

    #[test]
    fn what_is_no_dump_has_no_costs() {
        for broken in ["", "fn=\n0\ncalls=\n", "calls=1 0\n* x\n", "+ 1", "fn=(1) f\n+ x"] {
            let shown = text("x", &[], &[broken.into()], 0);
            assert_eq!(shown.lines().filter(|line| line.starts_with(' ')).count(), 0, "{broken:?}: {shown}");
        }
    }
}
