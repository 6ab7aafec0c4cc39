//! JSON as YAML for people: `-o yaml`.

use serde_json::Value;

/// In block style; strings are quoted where they could be read as something else.
pub(crate) fn yaml(value: &Value) -> String {
    let mut out = String::new();
    block(value, 0, &mut out);
    out
}

fn block(value: &Value, depth: usize, out: &mut String) {
    let pad = "  ".repeat(depth);
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (key, value) in fields {
                out.push_str(&format!("{pad}{}:", string(key)));
                nested(value, depth, out);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                let mut inner = String::new();
                match item {
                    Value::Object(fields) if !fields.is_empty() => block(item, depth + 1, &mut inner),
                    Value::Array(items) if !items.is_empty() => {
                        inner.push('\n');
                        block(item, depth + 1, &mut inner);
                    }
                    other => inner.push_str(&format!("{}\n", scalar(other))),
                }
                let inner = if inner.starts_with('\n') { inner } else { format!(" {}", inner.trim_start()) };
                out.push_str(&format!("{pad}-{inner}"));
            }
        }
        other => out.push_str(&format!("{pad}{}\n", scalar(other))),
    }
}

fn nested(value: &Value, depth: usize, out: &mut String) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            out.push('\n');
            block(value, depth + 1, out);
        }
        Value::Array(items) if !items.is_empty() => {
            out.push('\n');
            block(value, depth + 1, out);
        }
        other => out.push_str(&format!(" {}\n", scalar(other))),
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => string(text),
        Value::Array(_) => "[]".into(),
        Value::Object(_) => "{}".into(),
        other => other.to_string(),
    }
}

/// Plain only what surely reads as the same string.
fn string(text: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || "_-./ ()".contains(c);
    let begins = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/' || c == '_');
    let word = text.to_ascii_lowercase();
    let special = ["null", "true", "false", "yes", "no", "on", "off", "y", "n"].contains(&word.as_str());
    match begins && !special && text.chars().all(safe) && !text.ends_with(' ') {
        true => text.to_owned(),
        false => Value::from(text).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::manifest::yaml;

    #[test]
    fn what_is_written_reads_back_the_same() {
        let value = json!({
            "model": "Qwen/Qwen2.5-7B", "replicas": 3, "ratio": 0.5, "yes": "yes", "none": null, "empty": "",
            "args": ["--max-model-len=8192", "plain", "", "1", ["a", ["b"]], [], {}, {"a": {"b": [1]}, "c": true}],
            "sentence": "it waits: no node has a free GPU # really", "lines": "a\nb\t\u{1b}\"\\", "trailing ": "x ",
            "deep": {"a": {"b": {"c": {}}}}, "~": "~", "- x": "- y", "ünï": "ö",
        });
        let text = super::yaml(&value);
        let read = yaml::documents(&text).unwrap_or_else(|error| panic!("{error:?}\n{text}"));
        assert_eq!(read[0].value, value, "{text}");
        assert!(text.starts_with("model: Qwen/Qwen2.5-7B\nreplicas: 3\n"), "{text}");
    }
}
