//! A file of arrivals, as they once were. Pure.
//!
//! One JSON object a line, `{"at_s": 0.25, "prompt_bytes": 900, "output_tokens": 40}`, or CSV with these names in its first
//! line, in any order; the lengths may be missing. Times are seconds from the start of the run and never go back.

use serde::Deserialize;

use super::{arrivals::SECOND_NS, lengths::whole};

/// One line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// When it arrives, after the start of the run.
    pub at_ns: u64,
    /// Bytes of text added to its prompt.
    pub prompt_bytes: Option<u64>,
    /// Tokens of its answer.
    pub output_tokens: Option<u64>,
}

/// All of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trace {
    /// In order of time.
    pub entries: Vec<Entry>,
    /// The lengths of prompts that are told.
    pub prompt_bytes: Vec<u64>,
    /// The lengths of answers that are told.
    pub output_tokens: Vec<u64>,
}

/// What is wrong with a trace, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct BadTrace {
    /// From 1.
    pub line: usize,
    /// In words.
    pub why: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    at_s: f64,
    prompt_bytes: Option<u64>,
    output_tokens: Option<u64>,
}

impl Trace {
    /// Reads a file's text.
    ///
    /// # Errors
    /// [`BadTrace`], with the first line that is wrong.
    pub fn parse(text: &str) -> Result<Self, BadTrace> {
        let bad = |line: usize, why: String| BadTrace { line, why };
        let mut lines = text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty()).peekable();
        let Some((first, at)) = lines.peek().copied() else { return Err(bad(1, "no arrivals".into())) };
        let columns = match first.trim_start().starts_with('{') {
            true => None,
            false => {
                lines.next();
                Some(Columns::parse(first).map_err(|why| bad(at, why))?)
            }
        };
        let mut trace = Self::default();
        for (text, line) in lines {
            let parsed = match &columns {
                None => serde_json::from_str(text).map_err(|e| e.to_string()),
                Some(columns) => columns.line(text),
            };
            let entry = parsed.map_err(|why| bad(line, why))?;
            trace.add(&entry).map_err(|why| bad(line, why))?;
        }
        if trace.entries.is_empty() { Err(bad(at, "no arrivals".into())) } else { Ok(trace) }
    }

    fn add(&mut self, line: &Line) -> Result<(), String> {
        if !(0.0..=1e9).contains(&line.at_s) {
            return Err(format!("at_s is {}, which is not from 0 to 1000000000", line.at_s));
        }
        let at_ns = whole(line.at_s * SECOND_NS);
        if self.entries.last().is_some_and(|last| at_ns < last.at_ns) {
            return Err(format!("at_s is {}, before that of the line above", line.at_s));
        }
        if line.output_tokens == Some(0) {
            return Err("output_tokens is 0: an answer has at least one".into());
        }
        let entry = Entry { at_ns, prompt_bytes: line.prompt_bytes, output_tokens: line.output_tokens };
        self.prompt_bytes.extend(entry.prompt_bytes);
        self.output_tokens.extend(entry.output_tokens);
        self.entries.push(entry);
        Ok(())
    }
}

/// Which column of a CSV file is what.
struct Columns {
    at_s: usize,
    prompt_bytes: Option<usize>,
    output_tokens: Option<usize>,
    count: usize,
}

impl Columns {
    fn parse(header: &str) -> Result<Self, String> {
        let names: Vec<&str> = header.split(',').map(str::trim).collect();
        let known = ["at_s", "prompt_bytes", "output_tokens"];
        if let Some(unknown) = names.iter().find(|name| !known.contains(name)) {
            return Err(format!("`{unknown}` is none of {}", known.join(", ")));
        }
        let column = |wanted: &str| names.iter().position(|name| *name == wanted);
        Ok(Self {
            at_s: column("at_s").ok_or("the first line names no at_s")?,
            prompt_bytes: column("prompt_bytes"),
            output_tokens: column("output_tokens"),
            count: names.len(),
        })
    }

    fn line(&self, text: &str) -> Result<Line, String> {
        let fields: Vec<&str> = text.split(',').map(str::trim).collect();
        if fields.len() != self.count {
            return Err(format!("{} fields instead of {}", fields.len(), self.count));
        }
        let field = |column: usize| fields.get(column).copied().unwrap_or_default();
        let at_s = field(self.at_s);
        let length = |column: Option<usize>| match column.map(field) {
            None | Some("") => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| format!("`{text}` is not a whole number")),
        };
        Ok(Line {
            at_s: at_s.parse().map_err(|_| format!("`{at_s}` is not a number of seconds"))?,
            prompt_bytes: length(self.prompt_bytes)?,
            output_tokens: length(self.output_tokens)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ENTRY: Entry = Entry { at_ns: 1_500_000_000, prompt_bytes: Some(9), output_tokens: Some(4) };

    #[test]
    fn both_forms_say_the_same() {
        let json = "{\"at_s\": 0}\n\n{\"at_s\":1.5,\"prompt_bytes\":9,\"output_tokens\":4}\n";
        let csv = "output_tokens, at_s ,prompt_bytes\n,0,\n4,1.5,9\n";
        let trace = Trace::parse(json).unwrap();
        assert_eq!(trace, Trace::parse(csv).unwrap());
        assert_eq!(trace.entries, [Entry { at_ns: 0, prompt_bytes: None, output_tokens: None }, ENTRY]);
        assert_eq!((trace.prompt_bytes, trace.output_tokens), (vec![9], vec![4]));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, line, why) in [
            ("", 1, "no arrivals"),
            ("at_s\n", 1, "no arrivals"),
            ("when\n1\n", 1, "`when` is none of"),
            ("prompt_bytes\n1\n", 1, "names no at_s"),
            ("at_s,output_tokens\n1\n", 2, "1 fields instead of 2"),
            ("at_s\n1\nx\n", 3, "`x` is not a number"),
            ("at_s,output_tokens\n1,0.5\n", 2, "`0.5` is not a whole number"),
            ("at_s,output_tokens\n1,0\n", 2, "at least one"),
            ("at_s\n2\n1\n", 3, "before that of the line above"),
            ("at_s\n-1\n", 2, "not from 0"),
            ("{\"at_s\":1}\n{\"at\":1}\n", 2, "unknown field `at`"),
            ("{\"at_s\":1}\nnonsense\n", 2, "expected"),
        ] {
            let error = Trace::parse(text).unwrap_err();
            assert!(error.line == line && error.why.contains(why), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,80}", body in "(at_s|,|1|\n|\\{|\\}|\"){0,30}") {
            let _unread = (Trace::parse(&text), Trace::parse(&format!("at_s\n{body}")), Trace::parse(&body));
        }
    }
}
