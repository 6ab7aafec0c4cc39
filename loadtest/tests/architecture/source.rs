//! Just enough of Rust's grammar to check rules on source text: comments and literals told from code, `#[cfg(test)]`
//! items cut out, paths read with their `use` trees expanded.
//!
//! A parser crate would do this exactly; it would also be the slowest dependency of the tests. What is absent: macros
//! are read as plain tokens, so a path made by concatenation inside a macro is not seen.

/// A source text split by what its characters are. Line numbers hold in both.
pub(crate) struct Source {
    /// The text with comments and the contents of literals blanked, and without `#[cfg(test)]` items.
    pub(crate) code: String,
    /// Contents of the string literals outside `#[cfg(test)]` items, each with its line, counted from 1.
    pub(crate) strings: Vec<(usize, String)>,
}

/// A path as written, `use` trees expanded: `use std::{fs, io::Read}` gives `std::fs` and `std::io::Read`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PathUse {
    /// The line it starts on, counted from 1.
    pub(crate) line: usize,
    /// Its segments.
    pub(crate) segments: Vec<String>,
}

impl Source {
    pub(crate) fn new(text: &str) -> Self {
        let (mut code, literals) = blank(text);
        let tests = test_items(&code);
        for &(start, end) in &tests {
            for byte in &mut code[start..end] {
                if *byte != b'\n' {
                    *byte = b' ';
                }
            }
        }
        let line_of = |at: usize| text[..at].matches('\n').count() + 1;
        let outside = |at: usize| !tests.iter().any(|&(start, end)| (start..end).contains(&at));
        let strings =
            literals.into_iter().filter(|(at, _)| outside(*at)).map(|(at, s)| (line_of(at), s)).collect();
        Self { code: String::from_utf8_lossy(&code).into_owned(), strings }
    }

    /// Every path of the code, and every method call as the one-segment path `.name`.
    pub(crate) fn paths(&self) -> Vec<PathUse> {
        let tokens = tokens(&self.code);
        let mut paths = Vec::new();
        let mut at = 0;
        while at < tokens.len() {
            let (line, token) = &tokens[at];
            // `+ use<'a>` in a type captures lifetimes.
            if token == "use" && tokens.get(at + 1).is_none_or(|t| t.1 != "<") {
                at = use_tree(&tokens, at + 1, &[], &mut paths);
            } else if token == "." && is_name(tokens.get(at + 1)) {
                paths.push(PathUse { line: *line, segments: vec![format!(".{}", tokens[at + 1].1)] });
                at += 2;
            } else if is_name(tokens.get(at)) {
                let mut segments = vec![token.clone()];
                at += 1;
                while tokens.get(at).is_some_and(|t| t.1 == "::") && is_name(tokens.get(at + 1)) {
                    segments.push(tokens[at + 1].1.clone());
                    at += 2;
                }
                paths.push(PathUse { line: *line, segments });
            } else {
                at += 1;
            }
        }
        paths
    }
}

/// The text as bytes of the same length with comments and literals blanked, and the string literals by offset.
fn blank(text: &str) -> (Vec<u8>, Vec<(usize, String)>) {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut strings = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let in_word = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
        let end = if rest.starts_with(b"//") {
            at + text[at..].find('\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            at + block_comment(rest)
        } else if let Some(hashes) = raw_string(rest).filter(|_| !in_word) {
            let open = at + text[at..].find('"').unwrap_or(0) + 1;
            let close = format!("\"{}", "#".repeat(hashes));
            let length = text[open..].find(&close).unwrap_or(bytes.len() - open);
            strings.push((at, text[open..open + length].to_owned()));
            (open + length + close.len()).min(bytes.len())
        } else if rest[0] == b'"' {
            let length = quoted(&rest[1..], b'"');
            strings.push((at, text[at + 1..at + 1 + length].to_owned()));
            (at + length + 2).min(bytes.len())
        } else if rest[0] == b'\'' && is_char_literal(&text[at..]) {
            (at + quoted(&rest[1..], b'\'') + 2).min(bytes.len())
        } else {
            at += 1;
            continue;
        };
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    (out, strings)
}

/// Length of the (nested) block comment that `bytes` starts with.
fn block_comment(bytes: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < bytes.len() {
        let step = match &bytes[at..] {
            [b'/', b'*', ..] => {
                depth += 1;
                2
            }
            [b'*', b'/', ..] => {
                depth -= 1;
                2
            }
            _ => 1,
        };
        at += step;
        if depth == 0 {
            break;
        }
    }
    at
}

/// The number of `#` if `bytes` starts a raw string.
fn raw_string(bytes: &[u8]) -> Option<usize> {
    let rest = bytes.strip_prefix(b"br").or_else(|| bytes.strip_prefix(b"r"))?;
    let hashes = rest.iter().take_while(|b| **b == b'#').count();
    (rest.get(hashes) == Some(&b'"')).then_some(hashes)
}

/// Length up to the closing `quote`, escapes skipped.
fn quoted(bytes: &[u8], quote: u8) -> usize {
    let mut at = 0;
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    at.min(bytes.len())
}

/// Whether the `'` that `text` starts with opens a character rather than a lifetime.
fn is_char_literal(text: &str) -> bool {
    let mut chars = text.chars().skip(1);
    chars.next() == Some('\\') || chars.next() == Some('\'')
}

/// Ranges of the items under `#[cfg(test)]`: from the attribute to the closing brace or the semicolon.
fn test_items(code: &[u8]) -> Vec<(usize, usize)> {
    let text = String::from_utf8_lossy(code);
    let mut items: Vec<(usize, usize)> = Vec::new();
    for (start, found) in text.match_indices("#[cfg(test)]") {
        if items.last().is_some_and(|&(_, end)| start < end) {
            continue;
        }
        let (mut depth, mut brackets) = (0_usize, 0_usize);
        let mut end = code.len();
        for (at, byte) in code.iter().enumerate().skip(start + found.len()) {
            match byte {
                b'(' | b'[' => brackets += 1,
                b')' | b']' => brackets = brackets.saturating_sub(1),
                b'{' => depth += 1,
                b'}' if depth <= 1 => {
                    end = at + 1;
                    break;
                }
                b'}' => depth -= 1,
                b';' if depth == 0 && brackets == 0 => {
                    end = at + 1;
                    break;
                }
                _ => {}
            }
        }
        items.push((start, end));
    }
    items
}

/// Names, `::` and single characters, each with its line.
fn tokens(code: &str) -> Vec<(usize, String)> {
    let mut tokens = Vec::new();
    let mut line = 1;
    let mut rest = code;
    while let Some(first) = rest.chars().next() {
        let length = if first.is_alphanumeric() || first == '_' {
            rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        if first == '\n' {
            line += 1;
        } else if !first.is_whitespace() {
            tokens.push((line, rest[..length].to_owned()));
        }
        rest = &rest[length..];
    }
    tokens
}

fn is_name(token: Option<&(usize, String)>) -> bool {
    token.is_some_and(|(_, t)| t.starts_with(|c: char| c.is_alphabetic() || c == '_'))
}

/// Reads one branch of a `use` tree from `at`, adds its leaves to `paths`, returns where it stopped.
fn use_tree(tokens: &[(usize, String)], mut at: usize, prefix: &[String], paths: &mut Vec<PathUse>) -> usize {
    let mut segments = prefix.to_vec();
    let line = tokens.get(at).map_or(0, |t| t.0);
    while let Some((_, token)) = tokens.get(at) {
        match token.as_str() {
            "::" => at += 1,
            "{" => {
                at += 1;
                while tokens.get(at).is_some_and(|t| t.1 != "}") {
                    at = use_tree(tokens, at, &segments, paths);
                    if tokens.get(at).is_some_and(|t| t.1 == ",") {
                        at += 1;
                    }
                }
                return at + 1;
            }
            "as" => at += 2,
            "," | ";" | "}" => break,
            _ => {
                segments.push(token.clone());
                at += 1;
            }
        }
    }
    paths.push(PathUse { line, segments });
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(text: &str) -> Vec<String> {
        Source::new(text).paths().into_iter().map(|p| p.segments.join("::")).collect()
    }

    #[test]
    fn comments_and_literals_are_not_code() {
        let source = Source::new(
            "// tokio::a\n/* x /* tokio */ y */ let s = \"tokio \\\" b\"; let r = r#\"a \" b\"#; 'x' fn f<'a>() {}",
        );
        assert!(!source.code.contains("tokio"), "{}", source.code);
        assert!(source.code.contains("fn f<'a>() {}"), "{}", source.code);
        assert_eq!(source.strings, [(2, "tokio \\\" b".to_owned()), (2, "a \" b".to_owned())]);
    }

    #[test]
    fn test_items_are_cut_out_and_what_follows_them_stays() {
        let source = Source::new(
            "#[cfg(test)]\nmod tests { fn a() { tokio::x(\"in\") } }\n#[cfg(test)]\nuse std::fs;\nfn kept() { \"out\" }",
        );
        assert!(!source.code.contains("tokio") && !source.code.contains("fs"), "{}", source.code);
        assert!(source.code.contains("fn kept"), "{}", source.code);
        assert_eq!(source.strings, [(5, "out".to_owned())]);
    }

    #[test]
    fn use_trees_are_expanded() {
        let paths = joined(
            "use std::{fs, io::{self as i, Read}, time::Instant};\nfn f() { Instant::now().elapsed() }",
        );
        for wanted in
            ["std::fs", "std::io::self", "std::io::Read", "std::time::Instant", "Instant::now", ".elapsed"]
        {
            assert!(paths.iter().any(|p| p == wanted), "{wanted} not in {paths:?}");
        }
        let captured = joined("fn f() -> impl Drop + use<> { one(); two() }\nfn g() { tokio::x() }");
        assert!(captured.contains(&"tokio::x".to_owned()), "{captured:?}");
    }
}
