//! The head of a part, and the parameters of a header's value.

/// The boundary that a `multipart/form-data` content type names.
///
/// # Errors
/// `None` where it names none, or one that RFC 2046 does not allow.
#[must_use]
pub fn boundary(content_type: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(content_type).ok()?;
    let boundary = Parameters::of(text).find(|(name, _)| name.eq_ignore_ascii_case("boundary"))?.1;
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"'()+_,-./:=? ".contains(&byte);
    let fine =
        (1..=70).contains(&boundary.len()) && boundary.bytes().all(allowed) && !boundary.ends_with(' ');
    fine.then_some(boundary)
}

/// Takes a part's head: its length with the blank line, and the part's name and whether it is a file, or `None` for a head
/// that is malformed. `None` altogether when the head does not end in `bytes`.
pub(super) fn parse(bytes: &[u8]) -> Option<(usize, Option<(String, bool)>)> {
    let end = if bytes.starts_with(b"\r\n") { 2 } else { memchr::memmem::find(bytes, b"\r\n\r\n")? + 4 };
    Some((end, disposition(bytes.get(..end).unwrap_or_default())))
}

fn disposition(head: &[u8]) -> Option<(String, bool)> {
    let text = std::str::from_utf8(head).ok()?;
    let mut found = None;
    for line in text.split("\r\n").filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':')?;
        if name.is_empty() || name.bytes().any(|byte| byte.is_ascii_whitespace()) {
            return None; // folded, or no header at all
        }
        if name.eq_ignore_ascii_case("content-disposition") && found.replace(value).is_some() {
            return None;
        }
    }
    let value = found?;
    let kind = value.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("form-data") {
        return None;
    }
    let mut name = None;
    let mut is_file = false;
    for (key, value) in Parameters::of(value) {
        match &*key.to_ascii_lowercase() {
            "name" if name.replace(value).is_some() => return None,
            "filename" | "filename*" => is_file = true,
            _ => {}
        }
    }
    name.map(|name| (name, is_file))
}

/// `; key=value; key="quoted \"value\""`, in order. Ends at the first thing that is no parameter.
struct Parameters<'a> {
    rest: &'a str,
}

impl<'a> Parameters<'a> {
    /// Those of a header's value, behind its first word.
    fn of(value: &'a str) -> Self {
        Self { rest: value.find(';').and_then(|at| value.get(at..)).unwrap_or_default() }
    }
}

impl<'a> Iterator for Parameters<'a> {
    type Item = (&'a str, String);

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.rest.trim_start_matches([';', ' ', '\t']);
        let (key, rest) = rest.split_once('=')?;
        let key = key.trim();
        if key.is_empty() || key.contains([' ', ';', '"', ',']) {
            return None;
        }
        let rest = rest.trim_start();
        let Some(quoted) = rest.strip_prefix('"') else {
            let end = rest.find(';').unwrap_or(rest.len());
            let (value, after) = rest.split_at(end);
            self.rest = after;
            return Some((key, value.trim().to_owned()));
        };
        let mut value = String::new();
        let mut letters = quoted.char_indices();
        while let Some((at, letter)) = letters.next() {
            match letter {
                '"' => {
                    self.rest = quoted.get(at + 1..).unwrap_or_default();
                    return Some((key, value));
                }
                // Only quotes and backslashes are escaped: a Windows path in a file name is not.
                '\\' => match letters.clone().next() {
                    Some((_, escaped @ ('"' | '\\'))) => {
                        value.push(escaped);
                        letters.next();
                    }
                    _ => value.push('\\'),
                },
                other => value.push(other),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boundaries_are_those_of_rfc_2046() {
        let of = |text: &str| boundary(text.as_bytes());
        assert_eq!(of("multipart/form-data; boundary=abc"), Some("abc".into()));
        assert_eq!(of("multipart/form-data;charset=utf-8; Boundary=\"a b=c\" "), Some("a b=c".into()));
        for bad in [
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "x; boundary=\"a",
            "x; boundary=\"a \"",
            "x; boundary=a\u{e9}",
        ] {
            assert_eq!(of(bad), None, "{bad}");
        }
        assert_eq!(of(&format!("x; boundary={}", "a".repeat(71))), None);
        assert_eq!(boundary(b"x; boundary=\xff"), None);
    }

    #[test]
    fn names_and_file_names() {
        let head = |line: &str| parse(format!("{line}\r\n\r\n").as_bytes()).and_then(|(_, fields)| fields);
        let named = |name: &str, file| Some((name.to_owned(), file));
        assert_eq!(head("Content-Disposition: form-data; name=\"model\""), named("model", false));
        assert_eq!(head("content-disposition:form-data;name=model"), named("model", false));
        assert_eq!(
            head(
                "X: y\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a;name=x.wav\"\r\nContent-Type: audio/wav"
            ),
            named("file", true)
        );
        assert_eq!(
            head("Content-Disposition: form-data; name=\"a\\\"b\\\\c\\d\""),
            named("a\"b\\c\\d", false)
        );
        assert_eq!(head("Content-Disposition: form-data; name=f; filename*=UTF-8''x"), named("f", true));
        for bad in [
            "Content-Type: text/plain",
            "Content-Disposition: attachment; name=\"a\"",
            "Content-Disposition: form-data",
            "Content-Disposition: form-data; name=\"a",
            "Content-Disposition: form-data; name=a; name=b",
            "Content-Disposition: form-data; name=a\r\nContent-Disposition: form-data; name=b",
            "no header",
            " Content-Disposition: form-data; name=a",
        ] {
            assert_eq!(head(bad), None, "{bad}");
        }
        assert_eq!(parse(b"Content-Disposition: form-data; name=a\r\n"), None, "not ended");
        assert_eq!(parse(b"\r\nrest"), Some((2, None)), "a part without any header");
    }
}
