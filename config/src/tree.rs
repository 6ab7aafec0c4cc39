//! Settings as a tree of keys: reading, overlaying and naming them. Pure; `load/` is the shell around it.

use toml::{Table, Value};

/// A key's place: `["engines", "vllm", "command"]`, written `engines.vllm.command`.
pub(crate) type KeyPath = Vec<String>;

/// The value at `path`, if the tree has it.
pub(crate) fn get<'t>(tree: &'t Table, path: &[String]) -> Option<&'t Value> {
    let (last, above) = path.split_last()?;
    let mut table = tree;
    for key in above {
        table = table.get(key)?.as_table()?;
    }
    table.get(last)
}

/// Puts `value` at `path`, making tables on the way. A non-table in the way is replaced.
pub(crate) fn set(tree: &mut Table, path: &[String], value: Value) {
    let Some((first, below)) = path.split_first() else { return };
    if below.is_empty() {
        tree.insert(first.clone(), value);
        return;
    }
    let slot = tree.entry(first.clone()).or_insert_with(|| Value::Table(Table::new()));
    if !slot.is_table() {
        *slot = Value::Table(Table::new());
    }
    if let Value::Table(table) = slot {
        set(table, below, value);
    }
}

/// The single settings that `given` makes: its leaves where `defaults` has a table too, and whole subtrees where it has
/// none (an entry of a free-form table, or a mistake).
pub(crate) fn settings(given: &Table, defaults: &Table) -> Vec<(KeyPath, Value)> {
    let mut found = Vec::new();
    for (key, value) in given {
        match (value, defaults.get(key)) {
            (Value::Table(inner), Some(Value::Table(default))) => {
                let below = settings(inner, default);
                found.extend(below.into_iter().map(|(path, v)| ([vec![key.clone()], path].concat(), v)));
            }
            _ => found.push((vec![key.clone()], value.clone())),
        }
    }
    found
}

/// Every key of the tree that is not itself a table with keys in it, an empty table included.
pub(crate) fn leaves(tree: &Table) -> Vec<KeyPath> {
    let mut found = Vec::new();
    for (key, value) in tree {
        match value {
            Value::Table(inner) if !inner.is_empty() => {
                found.extend(leaves(inner).into_iter().map(|path| [vec![key.clone()], path].concat()));
            }
            _ => found.push(vec![key.clone()]),
        }
    }
    found
}

/// The known key that was probably meant by `path`: the most alike in the same section, else the most alike anywhere
/// (its last word, or the whole path, so that a key in the wrong section is found too).
pub(crate) fn nearest(defaults: &Table, path: &[String]) -> Option<KeyPath> {
    let (last, section) = path.split_last()?;
    let siblings: Vec<KeyPath> = match section {
        [] => defaults.keys().map(|key| vec![key.clone()]).collect(),
        _ => get(defaults, section)
            .and_then(Value::as_table)
            .map(|table| table.keys().map(|key| below(section, key)).collect())
            .unwrap_or_default(),
    };
    let by_last_word = |candidate: &KeyPath| candidate.last().map_or(0.0, |word| alike(word, last));
    let by_either =
        |candidate: &KeyPath| by_last_word(candidate).max(alike(&candidate.join("."), &path.join(".")));
    best(siblings, by_last_word).or_else(|| best(everything(defaults), by_either))
}

fn below(section: &[String], key: &str) -> KeyPath {
    section.iter().cloned().chain([key.to_string()]).collect()
}

/// Below this likeness a hint would mislead more often than it helps; `timeout_ms` and `idle_timeout_ms` are at 0.87.
const ALIKE: f64 = 0.7;

fn alike(a: &str, b: &str) -> f64 {
    strsim::jaro_winkler(a, b).max(strsim::normalized_damerau_levenshtein(a, b))
}

fn best(candidates: Vec<KeyPath>, likeness: impl Fn(&KeyPath) -> f64) -> Option<KeyPath> {
    candidates
        .into_iter()
        .map(|candidate| (likeness(&candidate), candidate))
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

/// Every key, sections included.
fn everything(tree: &Table) -> Vec<KeyPath> {
    let mut found = Vec::new();
    for (key, value) in tree {
        found.push(vec![key.clone()]);
        if let Value::Table(inner) = value {
            found.extend(everything(inner).into_iter().map(|path| [vec![key.clone()], path].concat()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Table {
        text.parse().unwrap()
    }

    fn path(dotted: &str) -> KeyPath {
        dotted.split('.').map(String::from).collect()
    }

    #[test]
    fn set_makes_tables_on_the_way_and_get_finds_the_value() {
        let mut tree = table("a = 1");
        set(&mut tree, &path("a.b.c"), Value::Integer(2));
        assert_eq!(get(&tree, &path("a.b.c")), Some(&Value::Integer(2)));
        assert_eq!(get(&tree, &path("a.x.c")), None);
        assert_eq!(get(&tree, &[]), None);
    }

    #[test]
    fn a_subtree_that_the_defaults_do_not_have_is_one_setting() {
        let given = table("[engines.new]\ncommand = ['x']\nargs = []\n[log]\nlevel = 'warn'");
        let defaults = table("[engines]\n[log]\nlevel = 'info'");
        let paths: Vec<String> = settings(&given, &defaults).iter().map(|(p, _)| p.join(".")).collect();
        assert_eq!(paths, ["engines.new", "log.level"]);
    }

    #[test]
    fn leaves_count_an_empty_table_but_no_table_with_keys() {
        let found: Vec<String> =
            leaves(&table("[a]\nb = 1\n[a.labels]\n[c]\nd = []")).iter().map(|p| p.join(".")).collect();
        assert_eq!(found, ["a.b", "a.labels", "c.d"]);
    }

    #[test]
    fn the_nearest_key_is_sought_in_the_section_first_then_anywhere() {
        let defaults = table("[listen]\npublic = ''\n[timeouts]\nconnect_ms = 1\n[pool]\nconnect_s = 1");
        let hint = |dotted: &str| nearest(&defaults, &path(dotted)).map(|p| p.join("."));
        assert_eq!(hint("listen.pubilc").as_deref(), Some("listen.public"));
        assert_eq!(hint("timeouts.conect").as_deref(), Some("timeouts.connect_ms"));
        assert_eq!(hint("listen.connect_ms").as_deref(), Some("timeouts.connect_ms"));
        assert_eq!(hint("lissten").as_deref(), Some("listen"));
        assert_eq!(hint("public").as_deref(), Some("listen.public"));
        assert_eq!(hint("zzzzzz"), None);
    }
}
