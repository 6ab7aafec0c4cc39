//! How does the cost of a proxy grow: with the streams it carries, the endpoints and tenants it knows, the prompts it passes?
//!
//! Each place is a proxy of its own, a process that begins empty, before four engine simulators, under a load every answer of
//! which is verified ([`crate::load`]). Rounds go through all places in turn. Measured: the proxy's CPU time between two
//! moments, divided by what it passed on between them, and the most memory that it had. A line goes through the medians of each
//! axis ([`model`](self) is pure), and from the lines a fleet is computed: what was measured and what was computed is told apart.
//!
//! Endpoints are distinct in the proxy's tables and share the addresses of the four engines.

mod cell;
mod model;
mod options;
mod report;

use std::{collections::BTreeMap, ffi::OsString, io::Write, path::Path, process::ExitCode};

use clap::Parser;

pub use self::options::Options;
use self::{
    cell::{Axis, Measured, measure},
    report::Figures,
};
use crate::limits::raise_open_files;

/// Runs the command line `argv`, program name first: 0 done, 1 something broke, 2 usage.
pub fn main(argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    let options = match Options::try_parse_from(argv) {
        Ok(options) => options,
        Err(e) => {
            // Help and version are errors to clap, with exit code 0.
            let code = u8::try_from(e.exit_code()).unwrap_or(2);
            return if e.print().is_ok() { ExitCode::from(code) } else { ExitCode::FAILURE };
        }
    };
    let ran = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|e| format!("cannot start the runtime: {e}"))
        .and_then(|runtime| runtime.block_on(run(&options)))
        .and_then(|figures| {
            let text = figures.text(&options);
            options.write.as_deref().map_or(Ok(()), |path| write(path, &text)).map(|()| text)
        });
    let (text, code) = match ran {
        Ok(text) => (text, 0),
        Err(e) => (format!("penstock-bench-scale: {e}\n"), 1),
    };
    let printed = std::io::stdout().lock().write_all(text.as_bytes()).is_ok();
    ExitCode::from(if printed { code } else { 1 })
}

/// Goes through all places, round by round.
async fn run(options: &Options) -> Result<Figures, String> {
    // The proxy inherits the limit, and needs two for each stream.
    raise_open_files();
    let mut all: BTreeMap<(Axis, u32), Vec<Measured>> = BTreeMap::new();
    for round in 1..=options.rounds {
        for axis in Axis::ALL {
            for place in axis.places(options) {
                let measured = measure(options, axis, *place).await?;
                say(&format!(
                    "round {round}, {place} {}: {:.2} µs of CPU for each of {} {}s, {:.0} MiB",
                    axis.name(),
                    measured.cpu_us,
                    measured.units,
                    axis.unit(),
                    measured.memory / f64::from(1 << 20)
                ));
                all.entry((axis, *place)).or_default().push(measured);
            }
        }
    }
    Ok(Figures(all))
}

/// Puts `text` between the two marks in the file.
fn write(path: &Path, text: &str) -> Result<(), String> {
    let of = |why: &str| format!("--write {}: {why}", path.display());
    let old = std::fs::read_to_string(path).map_err(|e| of(&e.to_string()))?;
    let new = report::between_marks(&old, text).ok_or_else(|| of("it does not have both marks"))?;
    std::fs::write(path, new).map_err(|e| of(&e.to_string()))
}

fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").unwrap_or_default();
}
