//! What was counted before, what is counted now, and what to say of the difference. Pure.

use serde::{Deserialize, Serialize};

/// One count.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Counted {
    pub(super) name: String,
    pub(super) instructions: u64,
    /// How far a later count may be from it, either way.
    pub(super) tolerance_percent: f64,
}

/// By what else a count is decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Setting {
    pub(super) rustc: String,
    pub(super) valgrind: String,
    /// Architecture, and whether there is AVX2: libraries choose their routines by it.
    pub(super) machine: String,
}

/// The file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pins {
    pub(super) setting: Setting,
    pub(super) counts: Vec<Counted>,
}

/// What the file begins with.
const HEAD: &str = "\
# What the proxy's hot path costs, in instructions, as `make count` has counted it; docs/instructions.md explains it.
# Written by `make count ARGS=--pin`; only the tolerances are to be edited by hand.

";

/// What became of one count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Within,
    More,
    Less,
    /// Not pinned yet.
    New,
    /// Pinned, but no longer counted.
    Gone,
}

/// One line of the comparison.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Compared {
    pub(super) name: String,
    pub(super) before: Option<u64>,
    pub(super) now: Option<u64>,
    pub(super) tolerance_percent: f64,
    pub(super) verdict: Verdict,
}

impl Compared {
    /// By how much it has changed.
    pub(super) fn percent(&self) -> Option<f64> {
        let (before, now) = self.before.zip(self.now)?;
        Some((now as f64 - before as f64) * 100.0 / before.max(1) as f64)
    }

    /// What is wrong, as a sentence.
    fn sentence(&self) -> Option<String> {
        let Self { name, tolerance_percent, .. } = self;
        let (before, now) = (self.before.unwrap_or_default(), self.now.unwrap_or_default());
        let percent = self.percent().unwrap_or_default();
        match self.verdict {
            Verdict::Within => None,
            Verdict::More => Some(format!(
                "\"{name}\" costs {now} instructions, {percent:+.1} % against {before}; {tolerance_percent} % are allowed"
            )),
            Verdict::Less => Some(format!(
                "\"{name}\" costs {now} instructions, {percent:+.1} % against {before}: cheaper than pinned by more than \
                 {tolerance_percent} %; pin it, so that it stays so, once it is clear why"
            )),
            Verdict::New => Some(format!("\"{name}\" ({now} instructions) is not pinned yet")),
            Verdict::Gone => Some(format!("\"{name}\" is pinned, but there is no such count any more")),
        }
    }
}

impl Pins {
    /// Reads the file's text.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let pins: Self = toml::from_str(text).map_err(|e| e.to_string())?;
        let bad =
            |count: &&Counted| count.instructions == 0 || !(0.1..=100.0).contains(&count.tolerance_percent);
        match pins.counts.iter().find(bad) {
            None => Ok(pins),
            Some(Counted { name, .. }) => {
                Err(format!("\"{name}\": instructions must not be 0, tolerance_percent be from 0.1 to 100"))
            }
        }
    }

    /// The file's text.
    pub(super) fn text(&self) -> Result<String, String> {
        toml::to_string(self).map(|text| format!("{HEAD}{text}")).map_err(|e| e.to_string())
    }

    /// These with new counts. Tolerances stay as they were; so do counts that were not made, if only `some` were to be.
    #[must_use]
    pub(super) fn with(self, setting: Setting, counted: &[Counted], some: bool) -> Self {
        let tolerance = |new: &Counted| {
            let old = self.counts.iter().find(|old| old.name == new.name);
            old.map_or(new.tolerance_percent, |old| old.tolerance_percent)
        };
        let new: Vec<Counted> =
            counted.iter().map(|new| Counted { tolerance_percent: tolerance(new), ..new.clone() }).collect();
        if !some {
            return Self { setting, counts: new };
        }
        let mut counts = self.counts.clone();
        for new in new {
            match counts.iter_mut().find(|old| old.name == new.name) {
                Some(old) => *old = new,
                None => counts.push(new),
            }
        }
        Self { setting, counts }
    }

    /// The names of those that are too far from their pins.
    pub(super) fn doubtful(&self, counted: &[Counted]) -> Vec<String> {
        let compared = self.compare(counted, true).into_iter();
        let doubtful = compared.filter(|line| matches!(line.verdict, Verdict::More | Verdict::Less));
        doubtful.map(|line| line.name).collect()
    }

    /// Each of the new counts beside the old one. `some`: not all were to be made.
    pub(super) fn compare(&self, counted: &[Counted], some: bool) -> Vec<Compared> {
        let beside = |new: &Counted| {
            let old = self.counts.iter().find(|old| old.name == new.name);
            let tolerance_percent = old.unwrap_or(new).tolerance_percent;
            let mut compared = Compared {
                name: new.name.clone(),
                before: old.map(|old| old.instructions),
                now: Some(new.instructions),
                tolerance_percent,
                verdict: Verdict::New,
            };
            if let Some(percent) = compared.percent() {
                compared.verdict = match percent {
                    p if p > tolerance_percent => Verdict::More,
                    p if p < -tolerance_percent => Verdict::Less,
                    _ => Verdict::Within,
                };
            }
            compared
        };
        let gone = self.counts.iter().filter(|old| !some && !counted.iter().any(|new| new.name == old.name));
        let gone = gone.map(|old| Compared {
            name: old.name.clone(),
            before: Some(old.instructions),
            now: None,
            tolerance_percent: old.tolerance_percent,
            verdict: Verdict::Gone,
        });
        counted.iter().map(beside).chain(gone).collect()
    }
}

/// What is wrong and what to do; nothing if nothing is.
pub(super) fn complaint(compared: &[Compared], was: &Setting, is: &Setting) -> Option<String> {
    let wrong: Vec<String> = compared.iter().filter_map(Compared::sentence).collect();
    if wrong.is_empty() {
        return None;
    }
    let mut text = wrong.join("\n");
    if was != is {
        text += &format!(
            "\nThey were pinned with rustc {}, valgrind {}, {}; this is rustc {}, valgrind {}, {}: that alone may be why.",
            was.rustc, was.valgrind, was.machine, is.rustc, is.valgrind, is.machine
        );
    }
    text += "\nWhere the instructions go: `make count ARGS=\"--keep FOLDER\"`. \
             If the change is meant: `make count ARGS=--pin`, and say why in the commit.";
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(rustc: &str) -> Setting {
        Setting { rustc: rustc.into(), valgrind: "3.19.0".into(), machine: "x86_64 with AVX2".into() }
    }

    fn counted(name: &str, instructions: u64) -> Counted {
        Counted { name: name.into(), instructions, tolerance_percent: 5.0 }
    }

    fn pins() -> Pins {
        Pins { setting: setting("1"), counts: vec![counted("scan", 1_000), counted("pick", 200)] }
    }

    fn verdicts(counts: &[Counted], some: bool) -> Vec<(String, Verdict)> {
        pins().compare(counts, some).into_iter().map(|line| (line.name, line.verdict)).collect()
    }

    #[test]
    fn the_file_is_read_as_it_was_written() {
        let text = pins().text().expect("written");
        assert!(text.starts_with("# What the proxy's hot path costs"), "{text}");
        assert_eq!(Pins::parse(&text), Ok(pins()));
        for (what, with) in [
            ("instructions = 1000", "instructions = 0"),
            ("tolerance_percent = 5.0", "tolerance_percent = 0.0"),
            ("tolerance_percent = 5.0", "tolerance_percent = nan"),
            ("rustc", "rustcc"),
            ("[setting]", ""),
        ] {
            assert!(Pins::parse(&text.replacen(what, with, 1)).is_err(), "{with}");
        }
    }

    #[test]
    fn a_count_may_move_within_its_tolerance_either_way() {
        for (now, verdict) in [
            (1_000, Verdict::Within),
            (1_050, Verdict::Within),
            (1_051, Verdict::More),
            (950, Verdict::Within),
            (949, Verdict::Less),
            (0, Verdict::Less),
        ] {
            assert_eq!(verdicts(&[counted("scan", now)], true), [("scan".to_owned(), verdict)], "{now}");
        }
    }

    #[test]
    fn what_is_too_far_from_its_pin_is_doubted() {
        let now = [counted("scan", 1_060), counted("pick", 200), counted("new", 1)];
        assert_eq!(pins().doubtful(&now), ["scan"]);
    }

    #[test]
    fn what_is_new_or_gone_is_told_unless_only_some_were_counted() {
        let now = [counted("scan", 1_000), counted("split", 5)];
        let named = |name: &str, verdict| (name.to_owned(), verdict);
        let [scan, split] = [named("scan", Verdict::Within), named("split", Verdict::New)];
        assert_eq!(verdicts(&now, false), [scan.clone(), split.clone(), named("pick", Verdict::Gone)]);
        assert_eq!(verdicts(&now, true), [scan, split]);
    }

    #[test]
    fn new_pins_keep_tolerances_and_what_was_not_counted() {
        let mut old = pins();
        old.counts[0].tolerance_percent = 9.0;
        let now = [counted("scan", 700), counted("split", 5)];
        let some = old.clone().with(setting("2"), &now, true);
        let names =
            |pins: &Pins| pins.counts.iter().map(|c| (c.name.clone(), c.instructions)).collect::<Vec<_>>();
        assert_eq!(names(&some), [("scan".into(), 700), ("pick".into(), 200), ("split".into(), 5)]);
        assert_eq!((some.counts[0].tolerance_percent, some.setting.rustc.as_str()), (9.0, "2"));
        assert_eq!(names(&old.with(setting("2"), &now, false)), [("scan".into(), 700), ("split".into(), 5)]);
    }

    #[test]
    fn a_complaint_names_what_before_after_and_what_to_do() {
        let compared = pins().compare(&[counted("scan", 1_100), counted("pick", 100)], false);
        let same = complaint(&compared, &setting("1"), &setting("1")).expect("two are wrong");
        for part in [
            "\"scan\" costs 1100 instructions, +10.0 % against 1000; 5 % are allowed",
            "\"pick\" costs 100 instructions, -50.0 % against 200: cheaper than pinned",
            "make count ARGS=--pin",
        ] {
            assert!(same.contains(part), "{part} not in {same}");
        }
        assert!(!same.contains("rustc"), "{same}");
        let other = complaint(&compared, &setting("1"), &setting("2")).expect("two are wrong");
        assert!(other.contains("pinned with rustc 1") && other.contains("this is rustc 2"), "{other}");
        let fine = pins().compare(&[counted("scan", 1_001), counted("pick", 200)], false);
        assert_eq!(complaint(&fine, &setting("1"), &setting("2")), None);
    }
}
