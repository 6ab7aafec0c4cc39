//! Printing: tables and JSON to stdout, errors to stderr, exit codes.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;

use crate::{api::ApiError, args::Format, manifest::emit::yaml};

/// Exit code for wrong usage or settings.
pub(crate) const USAGE: u8 = 2;
/// Exit code when the control plane cannot be reached.
pub(crate) const UNREACHABLE: u8 = 3;
/// Exit code when the control plane knows no such thing.
pub(crate) const NOT_FOUND: u8 = 4;
/// Exit code when two things that were compared differ.
pub(crate) const DIFFERS: u8 = 5;

/// Writes `text` to stdout. A reader that has gone (`penstock models | head -1`) is no failure.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Writes a line to stderr. Not `eprintln`, which panics when the terminal is gone, and `up` has children to stop then.
pub(crate) fn say(text: &str) {
    drop(writeln!(io::stderr(), "penstock: {text}"));
}

/// Prints `json` as it is, the same as YAML, or the text that `table` makes.
pub(crate) fn show(format: Format, json: &Value, table: impl FnOnce() -> String) -> io::Result<()> {
    match format {
        Format::Json => print(&format!("{json:#}\n")),
        Format::Yaml => print(&yaml(json)),
        Format::Table => print(&table()),
    }
}

/// A table without frames: good to read, and to cut with awk.
pub(crate) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_string()).collect();
    lines.join("\n") + "\n"
}

/// Prints why a command failed and gives its exit code.
pub(crate) fn failed(error: &ApiError) -> ExitCode {
    say(&error.to_string());
    ExitCode::from(match error {
        ApiError::Usage(_) => USAGE,
        ApiError::Unreachable { .. }
        | ApiError::ProxyUnreachable { .. }
        | ApiError::AgentUnreachable { .. } => UNREACHABLE,
        ApiError::NotFound(_) => NOT_FOUND,
        ApiError::Differs(_) => DIFFERS,
        ApiError::Refused { .. }
        | ApiError::Malformed { .. }
        | ApiError::NotInTime(_)
        | ApiError::Found(_)
        | ApiError::Output(_) => 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_aligned_columns_and_no_trailing_blanks() {
        let text = table(["MODEL", "READY"], [["a".into(), "1".into()], ["longer-name".into(), "2".into()]]);
        assert_eq!(text, "MODEL        READY\na            1\nlonger-name  2\n");
    }
}
