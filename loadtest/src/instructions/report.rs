//! The middle of several runs, and the table. Pure.

use super::pins::{Compared, Counted, Verdict};

/// The middle of each count over all runs, and how far the runs are apart, in percent of it.
pub(super) fn middles(runs: &[Vec<Counted>]) -> (Vec<Counted>, Vec<f64>) {
    let Some(first) = runs.first() else { return Default::default() };
    let middle = |count: &Counted| {
        let same = runs.iter().flatten().filter(|other| other.name == count.name);
        let mut values: Vec<u64> = same.map(|other| other.instructions).collect();
        values.sort_unstable();
        let at = |index: usize| values.get(index).copied().unwrap_or_default();
        let (least, middle, most) = (at(0), at(values.len() / 2), at(values.len().saturating_sub(1)));
        let spread = (most - least) as f64 / middle.max(1) as f64 * 100.0;
        (Counted { instructions: middle, ..count.clone() }, spread)
    };
    first.iter().map(middle).unzip()
}

/// One line for each count; `spreads` beside those that were made.
pub(super) fn table(compared: &[Compared], spreads: &[f64]) -> String {
    let mut text = format!(
        "{:<44} {:>12} {:>12} {:>9} {:>9} {:>8}\n",
        "instructions", "now", "pinned", "change", "allowed", "spread"
    );
    let number = |number: Option<u64>| number.map_or("-".to_owned(), |n| n.to_string());
    for (index, line) in compared.iter().enumerate() {
        let change = line.percent().map_or("-".to_owned(), |percent| format!("{percent:+.1} %"));
        let spread = spreads.get(index).map_or("-".to_owned(), |spread| format!("{spread:.1} %"));
        let (now, before) = (number(line.now), number(line.before));
        let allowed = format!("{} %", line.tolerance_percent);
        let verdict = match line.verdict {
            Verdict::Within => "",
            Verdict::More => "  MORE",
            Verdict::Less => "  LESS",
            Verdict::New => "  NEW",
            Verdict::Gone => "  GONE",
        };
        text += &format!(
            "{:<44} {now:>12} {before:>12} {change:>9} {allowed:>9} {spread:>8}{verdict}\n",
            line.name
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(counts: &[(&str, u64)]) -> Vec<Counted> {
        let counted = |(name, instructions): &(&str, u64)| Counted {
            name: (*name).into(),
            instructions: *instructions,
            tolerance_percent: 5.0,
        };
        counts.iter().map(counted).collect()
    }

    #[test]
    fn the_middle_of_the_runs_counts_and_their_spread_is_told() {
        let runs = [run(&[("a", 90), ("b", 7)]), run(&[("a", 100), ("b", 7)]), run(&[("a", 101), ("b", 7)])];
        assert_eq!(middles(&runs), (run(&[("a", 100), ("b", 7)]), vec![11.0, 0.0]));
        assert_eq!(middles(&[]), (Vec::new(), Vec::new()));
    }

    #[test]
    fn the_table_tells_what_stands_out() {
        let line = |name: &str, before, now, verdict| Compared {
            name: name.into(),
            before,
            now,
            tolerance_percent: 2.0,
            verdict,
        };
        let lines = [
            line("scan", Some(100), Some(110), Verdict::More),
            line("pick", Some(100), Some(100), Verdict::Within),
            line("old", Some(5), None, Verdict::Gone),
        ];
        let text = table(&lines, &[0.0, 0.1]);
        let has = |n: usize, part: &str| text.lines().nth(n).is_some_and(|line| line.contains(part));
        assert!(has(1, "+10.0 %") && has(1, "MORE") && has(2, "+0.0 %") && has(3, "GONE"), "{text}");
    }
}
