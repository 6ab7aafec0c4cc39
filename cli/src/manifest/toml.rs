//! TOML: one document, or several as `[[manifest]]`.

use std::collections::BTreeMap;

use serde_json::{Map, Number, Value};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::read::{Broken, Lined, MAX_DEPTH, inside};

/// Every document of a file.
pub(super) fn documents(text: &str) -> Result<Vec<Lined>, Broken> {
    let table = DeTable::parse(text).map_err(|error| {
        let line = error.span().map_or(0, |span| line_of(text, span.start));
        Broken::new(line, format!("this is not TOML: {}", error.message()))
    })?;
    let table = table.get_ref();
    let several = table.iter().find(|(key, _)| key.get_ref() == "manifest");
    let Some((key, list)) = several else {
        return if table.is_empty() { Ok(Vec::new()) } else { Ok(vec![document(text, table, 1)?]) };
    };
    if let Some((other, _)) = table.iter().find(|(key, _)| key.get_ref() != "manifest") {
        let line = line_of(text, other.span().start);
        let name = other.get_ref();
        return Err(Broken::new(line, format!("{name} stands outside of [[manifest]]: put it into one")));
    }
    let DeValue::Array(items) = list.get_ref() else {
        return Err(Broken::new(
            line_of(text, key.span().start),
            "manifest must be [[manifest]], an array of tables",
        ));
    };
    let tables = items.iter().map(|item| {
        let line = line_of(text, item.span().start);
        match item.get_ref() {
            DeValue::Table(table) => document(text, table, line),
            _ => Err(Broken::new(line, "manifest must be [[manifest]], an array of tables")),
        }
    });
    tables.collect()
}

fn document(text: &str, table: &DeTable<'_>, line: usize) -> Result<Lined, Broken> {
    let mut lines = BTreeMap::new();
    let value = Value::Object(fields(text, table, "", 0, &mut lines)?);
    Ok(Lined { value, line, lines })
}

fn fields(
    text: &str,
    table: &DeTable<'_>,
    path: &str,
    depth: usize,
    lines: &mut BTreeMap<String, usize>,
) -> Result<Map<String, Value>, Broken> {
    let mut fields = Map::new();
    for (key, value) in table.iter() {
        let inner = inside(path, key.get_ref());
        lines.insert(inner.clone(), line_of(text, key.span().start));
        fields.insert(key.get_ref().to_string(), one(text, value, &inner, depth + 1, lines)?);
    }
    Ok(fields)
}

fn one(
    text: &str,
    value: &Spanned<DeValue<'_>>,
    path: &str,
    depth: usize,
    lines: &mut BTreeMap<String, usize>,
) -> Result<Value, Broken> {
    let line = line_of(text, value.span().start);
    if depth > MAX_DEPTH {
        return Err(Broken::new(line, format!("this is nested more than {MAX_DEPTH} deep")));
    }
    Ok(match value.get_ref() {
        DeValue::String(text) => text.as_ref().into(),
        DeValue::Boolean(truth) => (*truth).into(),
        DeValue::Integer(integer) => {
            let whole = i64::from_str_radix(integer.as_str(), integer.radix());
            whole.map(Value::from).map_err(|_| Broken::new(line, format!("{path} is too large a number")))?
        }
        DeValue::Float(float) => {
            let number = float.as_str().parse::<f64>().ok().and_then(Number::from_f64);
            number.map(Value::Number).ok_or_else(|| Broken::new(line, format!("{path} is no number")))?
        }
        DeValue::Datetime(_) => {
            return Err(Broken::new(line, format!("{path} is a date, which no field takes: quote it")));
        }
        DeValue::Array(items) => {
            let mut out = Vec::new();
            for (n, item) in items.iter().enumerate() {
                let inner = format!("{path}[{n}]");
                lines.insert(inner.clone(), line_of(text, item.span().start));
                out.push(one(text, item, &inner, depth + 1, lines)?);
            }
            Value::Array(out)
        }
        DeValue::Table(table) => Value::Object(fields(text, table, path, depth, lines)?),
    })
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn one_document_or_several_with_their_lines() {
        let one = documents(
            "kind = \"Route\"\nname = \"chat\"\n[spec]\ntargets = [{model = \"m\", weight = 1_000}]\n",
        );
        let one = one.unwrap();
        assert_eq!(one[0].value["spec"], json!({"targets": [{"model": "m", "weight": 1000}]}));
        assert_eq!(one[0].lines["spec.targets[0].weight"], 4);
        let text = "[[manifest]]\nkind = \"a\"\n\n[[manifest]]\nkind = \"b\"\nspec.replicas = 0x10\n";
        let two = documents(text).unwrap();
        assert_eq!((two.len(), two[1].lines["spec.replicas"]), (2, 6));
        assert_eq!(two[1].value, json!({"kind": "b", "spec": {"replicas": 16}}));
        assert!(documents("# nothing\n").unwrap().is_empty());
    }

    #[test]
    fn what_is_no_manifest_is_refused_with_its_line() {
        for (text, line, part) in [
            ("a = 1\na = 2\n", 2, "not TOML"),
            ("a = \n", 1, "not TOML"),
            ("kind = \"x\"\n[[manifest]]\nkind = \"y\"\n", 1, "stands outside"),
            ("manifest = 1\n", 1, "[[manifest]]"),
            ("[spec]\nwhen = 2026-01-01\n", 2, "a date"),
            ("[spec]\nn = 99999999999999999999\n", 2, "too large"),
        ] {
            let broken = documents(text).unwrap_err();
            assert!(broken.message.contains(part), "{text}: {broken:?}");
            assert_eq!(broken.line, line, "{text}: {broken:?}");
        }
    }
}
