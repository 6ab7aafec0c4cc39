//! The parts: pure functions in a program of their own, which runs one of them as often as it is told.

use std::{path::Path, process::Stdio};

use tokio::process::Command;

use super::{
    Options,
    pins::Counted,
    valgrind::{self, Dump},
};

/// Nothing in there depends on time; what an allocation costs depends on those before it.
const TOLERANCE_PERCENT: f64 = 3.0;

/// One of them, as the program lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    name: String,
    /// How often it is to be run so that one time more is measured well.
    times: u64,
}

/// Counts each that is wanted.
pub(super) async fn count(options: &Options, folder: &Path) -> Result<Vec<Counted>, String> {
    let mut counted = Vec::new();
    for (number, part) in list(&options.parts).await?.into_iter().enumerate() {
        let Part { name, times } = part;
        if !options.wants(&name) {
            continue;
        }
        let run = async |times: u64| {
            let out = folder.join(format!("part-{number}-{times}"));
            let times = times.to_string();
            valgrind::run(&options.parts, &["--run", &name, &times], &out).await
        };
        let (once, twice) = (run(times).await?, run(2 * times).await?);
        options.keep(&name, &once, &twice, times)?;
        let total = |dumps: &[Dump]| dumps.iter().map(|dump| dump.total).sum::<u64>();
        let each = total(&twice).saturating_sub(total(&once)) / times.max(1);
        counted.push(Counted { name, instructions: each, tolerance_percent: TOLERANCE_PERCENT });
    }
    Ok(counted)
}

async fn list(program: &Path) -> Result<Vec<Part>, String> {
    let cannot = |why: String| format!("{} --list: {why}", program.display());
    let listed = Command::new(program).arg("--list").stdin(Stdio::null()).kill_on_drop(true).output().await;
    let listed = listed.map_err(|e| cannot(e.to_string()))?;
    if !listed.status.success() {
        return Err(cannot(format!("{}: {}", listed.status, String::from_utf8_lossy(&listed.stderr))));
    }
    parts_of(&String::from_utf8_lossy(&listed.stdout)).ok_or_else(|| cannot("not a list of parts".into()))
}

/// Lines of a number, a blank and a name.
fn parts_of(list: &str) -> Option<Vec<Part>> {
    let part = |line: &str| {
        let (times, name) = line.split_once(' ')?;
        let times = times.parse().ok().filter(|times| *times > 0)?;
        (!name.is_empty()).then(|| Part { name: name.into(), times })
    };
    let parts: Vec<Part> = list.lines().map(part).collect::<Option<_>>()?;
    (!parts.is_empty()).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_a_number_and_a_name_in_each_line() {
        let part = |name: &str, times| Part { name: name.into(), times };
        assert_eq!(parts_of("10 scan, 1 KB\n2 pick\n"), Some(vec![part("scan, 1 KB", 10), part("pick", 2)]));
        for broken in ["", "scan\n", "x scan\n", "0 scan\n", "3 \n", "3 a\n\n"] {
            assert_eq!(parts_of(broken), None, "{broken:?}");
        }
    }
}
