//! Puts the tables into a document that is otherwise written by hand.

use std::path::Path;

/// Around what is made.
const BEGIN: &str = "<!-- bench: made by `make bench`, do not edit -->";
const END: &str = "<!-- bench: end -->";

/// `document` with `made` between its marks.
fn filled(document: &str, made: &str) -> Result<String, String> {
    let missing = |mark: &str| format!("there is no line `{mark}`");
    let (before, rest) = document.split_once(BEGIN).ok_or_else(|| missing(BEGIN))?;
    let (_, after) = rest.split_once(END).ok_or_else(|| missing(END))?;
    if after.contains(BEGIN) {
        return Err(format!("there is more than one line `{BEGIN}`"));
    }
    Ok(format!("{before}{BEGIN}\n\n{}\n\n{END}{after}", made.trim()))
}

/// Puts `made` between the marks of the file.
pub(super) fn fill(path: &Path, made: &str) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    let document = std::fs::read_to_string(path).map_err(failed)?;
    let document = filled(&document, made).map_err(|e| format!("{}: {e}", path.display()))?;
    std::fs::write(path, document).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_between_the_marks_is_replaced_and_nothing_else() {
        let document = format!("# A\n\n{BEGIN}\nold\n{END}\n\n# B\n");
        let once = filled(&document, "new\n").unwrap();
        assert_eq!(once, format!("# A\n\n{BEGIN}\n\nnew\n\n{END}\n\n# B\n"));
        assert_eq!(filled(&once, "new").unwrap(), once);
    }

    #[test]
    fn a_document_without_marks_is_left_alone_and_says_so() {
        assert!(filled("# A\n", "new").unwrap_err().contains("no line `<!-- bench: made by"));
        assert!(filled(BEGIN, "new").unwrap_err().contains("no line `<!-- bench: end"));
        let twice = format!("{BEGIN}\n{END}\n{BEGIN}\n{END}\n");
        assert!(filled(&twice, "new").unwrap_err().contains("more than one"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.md");
        std::fs::write(&path, "# A\n").unwrap();
        assert!(fill(&path, "new").unwrap_err().contains("a.md: there is no line"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "# A\n");
    }

    #[test]
    fn the_benchmarks_page_has_the_marks() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks.md");
        filled(&std::fs::read_to_string(path).unwrap(), "new").unwrap();
    }
}
