//! The processes that this binary can be: the one place that names their entry points.

use std::{ffi::OsString, process::ExitCode};

type Main = fn(Vec<OsString>) -> ExitCode;

/// Subcommand and entry point of each.
pub(crate) const PROCESSES: [(&str, Main); 5] = [
    ("proxy", penstock_proxy::main),
    ("controlplane", penstock_controlplane::main),
    ("agent", penstock_agent::main),
    ("engine-sim", penstock_loadtest::engine::main),
    ("load", penstock_loadtest::load::main),
];

/// Becomes the process named by `argv[1]`, with the arguments after it; `None` when that names none.
///
/// Done before clap sees the line, so that each process parses its own flags, `--help` included.
pub(crate) fn run(argv: &[OsString]) -> Option<ExitCode> {
    let name = argv.get(1)?.to_str()?;
    let (_, main) = PROCESSES.into_iter().find(|(process, _)| *process == name)?;
    let title = OsString::from(format!("penstock {name}"));
    Some(main(std::iter::once(title).chain(argv.iter().skip(2).cloned()).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_word_makes_a_process() {
        let argv = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        assert!(run(&argv(&["penstock"])).is_none());
        assert!(run(&argv(&["penstock", "status", "proxy"])).is_none());
        assert!(run(&argv(&["penstock", "--proxy"])).is_none());
    }
}
