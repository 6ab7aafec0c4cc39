//! YAML 1.2 with its core schema, strictly, out of the events of a parser that knows lines.

use std::collections::BTreeMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Span};
use serde_json::{Map, Number, Value};

use super::read::{Broken, Lined, MAX_DEPTH, inside};

/// Every document of a file that says something.
pub(super) fn documents(text: &str) -> Result<Vec<Lined>, Broken> {
    let mut reader = Reader { events: Parser::new_from_str(text), lines: BTreeMap::new() };
    let mut out = Vec::new();
    loop {
        let (event, span) = reader.next()?;
        match event {
            Event::StreamEnd => return Ok(out),
            Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing => {}
            first => {
                let value = reader.value(first, span, "", 0)?;
                let lines = std::mem::take(&mut reader.lines);
                if !value.is_null() {
                    out.push(Lined { value, line: span.start.line(), lines });
                }
            }
        }
    }
}

struct Reader<'a> {
    events: Parser<'a, saphyr_parser::StrInput<'a>>,
    lines: BTreeMap<String, usize>,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<(Event<'a>, Span), Broken> {
        match self.events.next_event() {
            Some(Ok(next)) => Ok(next),
            Some(Err(error)) => {
                Err(Broken::new(error.marker().line(), format!("this is not YAML: {}", error.info())))
            }
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    fn value(&mut self, event: Event<'a>, span: Span, path: &str, depth: usize) -> Result<Value, Broken> {
        let line = span.start.line();
        let refuse = |what: &str| Err(Broken::new(line, what));
        if depth > MAX_DEPTH {
            return refuse(&format!("this is nested more than {MAX_DEPTH} deep"));
        }
        if !path.is_empty() {
            // The key's line was noted already: that is where people look.
            self.lines.entry(path.to_owned()).or_insert(line);
        }
        match event {
            Event::Scalar(_, _, _, Some(tag)) => {
                refuse(&format!("the tag {}{} is not accepted: leave it out", tag.handle, tag.suffix))
            }
            Event::SequenceStart(_, Some(_)) | Event::MappingStart(_, Some(_)) => {
                refuse("tags are not accepted: leave it out")
            }
            Event::Alias(_) => refuse("aliases (*name) are not accepted: write out what it stands for"),
            Event::Scalar(text, style, ..) => Ok(scalar(&text, style)),
            Event::SequenceStart(..) => self.sequence(path, depth).map(Value::Array),
            Event::MappingStart(..) => self.mapping(path, depth).map(Value::Object),
            _ => refuse("a value is missing here"),
        }
    }

    fn sequence(&mut self, path: &str, depth: usize) -> Result<Vec<Value>, Broken> {
        let mut items = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::SequenceEnd {
                return Ok(items);
            }
            let path = format!("{path}[{}]", items.len());
            items.push(self.value(event, span, &path, depth + 1)?);
        }
    }

    fn mapping(&mut self, path: &str, depth: usize) -> Result<Map<String, Value>, Broken> {
        let mut fields = Map::new();
        loop {
            let (event, span) = self.next()?;
            let line = span.start.line();
            let key = match event {
                Event::MappingEnd => return Ok(fields),
                Event::Scalar(text, _, _, None) => text.into_owned(),
                _ => return Err(Broken::new(line, "a field's name must be a plain string")),
            };
            let inner = inside(path, &key);
            if fields.contains_key(&key) {
                return Err(Broken::new(line, format!("{inner} is there twice: leave one out")));
            }
            self.lines.insert(inner.clone(), line);
            let (event, span) = self.next()?;
            let value = self.value(event, span, &inner, depth + 1)?;
            fields.insert(key, value);
        }
    }
}

/// By the core schema: what is quoted is a string.
fn scalar(text: &str, style: ScalarStyle) -> Value {
    if style != ScalarStyle::Plain {
        return text.into();
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return true.into(),
        "false" | "False" | "FALSE" => return false.into(),
        _ => {}
    }
    number(text).map_or_else(|| text.into(), Value::Number)
}

fn number(text: &str) -> Option<Number> {
    let radix = |digits: &str, radix| u64::from_str_radix(digits, radix).ok().map(Number::from);
    if let Some(digits) = text.strip_prefix("0x") {
        return radix(digits, 16).filter(|_| !digits.starts_with('+'));
    }
    if let Some(digits) = text.strip_prefix("0o") {
        return radix(digits, 8).filter(|_| !digits.starts_with('+'));
    }
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let begins = unsigned.trim_start_matches('.');
    if !begins.starts_with(|c: char| c.is_ascii_digit()) || unsigned.len() > begins.len() + 1 {
        return None;
    }
    if !unsigned.bytes().all(|b| b.is_ascii_digit() || b".eE+-".contains(&b)) {
        return None;
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    let whole = text.parse::<u64>().map(Number::from).or_else(|_| text.parse::<i64>().map(Number::from));
    whole.ok().or_else(|| text.parse::<f64>().ok().and_then(Number::from_f64))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn documents_come_with_the_lines_of_their_fields() {
        let text = "# a fleet\n---\nkind: Deployment\nspec:\n  replicas: 3\n  args:\n    - --x\n    - 'yes'\n---\n\n---\na: {b: [1, 2.5, no, ~]}\n";
        let documents = documents(text).unwrap();
        assert_eq!(documents.len(), 2, "an empty one says nothing");
        let first = &documents[0];
        assert_eq!(
            first.value,
            json!({"kind": "Deployment", "spec": {"replicas": 3, "args": ["--x", "yes"]}})
        );
        let at = |path: &str| first.lines[path];
        assert_eq!((at("spec.replicas"), at("spec.args"), at("spec.args[1]"), first.line), (5, 6, 8, 3));
        assert_eq!(documents[1].value, json!({"a": {"b": [1, 2.5, "no", null]}}));
        assert_eq!(documents[1].line, 12);
    }

    #[test]
    fn json_is_yaml() {
        let documents = documents("{\"a\": [true, \"1\", -2], \"b\": {}}").unwrap();
        assert_eq!(documents[0].value, json!({"a": [true, "1", -2], "b": {}}));
    }

    #[test]
    fn what_two_readers_could_understand_differently_is_refused_with_its_line() {
        for (text, line, part) in [
            ("a: 1\nb: 2\na: 3\n", 3, "a is there twice"),
            ("a: &x 1\nb: *x\n", 2, "aliases"),
            ("a: !!str 1\n", 1, "tag"),
            ("a: !thing {b: 1}\n", 1, "tags are not accepted"),
            ("? [1, 2]\n: 3\n", 1, "plain string"),
            ("a: [1, 2\nb: 3\n", 2, "not YAML"),
            ("a: \"x\n", 2, "not YAML"),
        ] {
            let broken = documents(text).unwrap_err();
            assert!(broken.message.contains(part), "{text}: {broken:?}");
            assert!(broken.line.abs_diff(line) <= 1, "{text}: {broken:?}");
        }
        let deep = "[".repeat(200) + &"]".repeat(200);
        assert!(documents(&deep).is_err());
    }

    #[test]
    fn scalars_follow_the_core_schema() {
        let plain = |text| scalar(text, ScalarStyle::Plain);
        for (text, value) in [
            ("42949672960", json!(42_949_672_960_u64)),
            ("-7", json!(-7)),
            ("+7", json!(7)),
            ("0x1F", json!(31)),
            ("0o17", json!(15)),
            ("1e3", json!(1000.0)),
            (".5", json!(0.5)),
            ("1.2.3", json!("1.2.3")),
            ("--x", json!("--x")),
            ("-", json!("-")),
            ("40G", json!("40G")),
            ("on", json!("on")),
            ("..5", json!("..5")),
        ] {
            assert_eq!(plain(text), value, "{text}");
        }
        assert_eq!(scalar("7", ScalarStyle::DoubleQuoted), json!("7"));
    }
}
