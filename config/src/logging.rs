//! How a process logs: `tracing` to stderr, as text for people or JSON for collectors.
//!
//! Records of the `log` crate (Pingora's) take the same way. Libraries whose debug lines come per packet or per frame
//! are held at `warn` unless the filter names them: `info,h2=debug` shows h2's. Pingora reports a client that leaves and an
//! engine that refuses a connection as errors; both are in our own log and metrics with what became of the request, so the
//! modules that do so are heard from `debug` on, or when the filter names them.
//!
//! The last [`KEPT_LINES`] lines are kept in memory too, for [`recent`]. They are the process's, as its logging is.

use std::{
    collections::VecDeque,
    io::{self, IsTerminal, Write},
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// `[log]` of every process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// `tracing` filter: a level, or `target=level` directives with commas between.
    pub level: String,
    /// "text" or "json".
    pub format: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".into(), format: "text".into() }
    }
}

/// The libraries that are held at `warn`.
const NOISY: [&str; 10] = [
    "h2",
    "hyper",
    "hyper_util",
    "tower",
    "tonic",
    "reqwest",
    "rustls",
    "pingora_core",
    "pingora_pool",
    "pingora_proxy",
];

/// Modules whose errors and warnings are single connections that ended.
const PER_CONNECTION: [&str; 3] =
    ["pingora_core::apps", "pingora_core::connectors", "pingora_core::protocols"];

/// The accepted levels, quietest first.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Lines of log that are kept in memory.
pub const KEPT_LINES: usize = 1_000;
/// Longest line that is kept whole, in bytes.
const KEPT_BYTES: usize = 4_096;

static KEPT: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());

/// The last `count` lines that this process logged, oldest first; empty before [`init`].
pub fn recent(count: usize) -> Vec<String> {
    let kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    kept.iter().skip(kept.len().saturating_sub(count)).cloned().collect()
}

/// Standard error, and what is kept.
struct Tee;

impl Write for Tee {
    /// Called once for each event, with its whole text.
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        keep(&mut KEPT.lock().unwrap_or_else(PoisonError::into_inner), text);
        io::stderr().write_all(text)?;
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn keep(kept: &mut VecDeque<String>, text: &[u8]) {
    for line in String::from_utf8_lossy(text).lines().filter(|line| !line.is_empty()) {
        if kept.len() >= KEPT_LINES {
            kept.pop_front();
        }
        kept.push_back(plain(line));
    }
}

/// Without colours, and cut at [`KEPT_BYTES`].
fn plain(line: &str) -> String {
    let mut out = String::new();
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            // A colour is ESC [ digits m.
            chars.by_ref().take_while(|c| *c != 'm').for_each(drop);
        } else if out.len() + c.len_utf8() > KEPT_BYTES {
            out.push('…');
            break;
        } else {
            out.push(c);
        }
    }
    out
}

/// Makes `config` the way the whole process logs. Once per process.
///
/// # Errors
/// A sentence that names the key: an unknown level or format, or a second call in one process.
pub fn init(config: &LogConfig) -> Result<(), String> {
    let filter = EnvFilter::try_new(directives(&config.level)?)
        .map_err(|e| format!("log.level: {:?} is not a filter: {e}", config.level))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Tee)
        .with_ansi(std::io::stderr().is_terminal());
    match config.format.as_str() {
        "text" => builder.try_init(),
        "json" => builder.json().flatten_event(true).try_init(),
        other => return Err(format!("log.format: {other:?} is unknown; accepted: \"text\", \"json\"")),
    }
    .map_err(|e| format!("logging was already set up in this process: {e}"))
}

/// The filter's text: [`NOISY`] libraries at `warn`, then what the settings say, which wins where both name a target.
///
/// `EnvFilter` takes any lone word for a target at `trace`, so that `level = "inof"` would silence the process; each
/// directive is checked here instead.
fn directives(level: &str) -> Result<String, String> {
    let mut general = "error";
    for directive in level.split(',').map(str::trim).filter(|d| !d.is_empty()) {
        let (target, word) = directive.rsplit_once('=').map_or((None, directive), |(t, w)| (Some(t), w));
        let known = LEVELS.into_iter().find(|known| word.eq_ignore_ascii_case(known)).ok_or_else(|| {
            format!("log.level: {word:?} is no level; accepted: {}, or target=level", LEVELS.join(", "))
        })?;
        if target.is_none() {
            general = known;
        }
    }
    let quiet = matches!(general, "off" | "error");
    let held = NOISY.iter().filter(|_| !quiet).map(|library| format!("{library}=warn"));
    let curious = matches!(general, "debug" | "trace");
    let muted = PER_CONNECTION.iter().filter(|_| !curious).map(|module| format!("{module}=off"));
    Ok(held.chain(muted).chain([level.to_string()]).collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_held_at_warn_unless_the_whole_process_is_quieter() {
        let text = directives("debug,h2=info").unwrap();
        assert!(text.starts_with("h2=warn,"), "{text}");
        assert!(text.ends_with(",debug,h2=info"), "{text}");
        assert!(!directives("error").unwrap().contains("h2="));
        assert!(EnvFilter::try_new(directives("info").unwrap()).is_ok());
    }

    /// What a filter lets through, as the `tracing-log` bridge asks for it.
    fn hears(level: &str, target: &'static str) -> bool {
        let filter = EnvFilter::try_new(directives(level).unwrap()).unwrap();
        let heard = std::sync::Arc::<std::sync::Mutex<Vec<u8>>>::default();
        let writer = std::sync::Arc::clone(&heard);
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(move || Lines(std::sync::Arc::clone(&writer)))
            .finish();
        tracing::subscriber::with_default(subscriber, || match target {
            "apps" => tracing::error!(target: "pingora_core::apps::http_app", "gone"),
            "connectors" => tracing::error!(target: "pingora_core::connectors::l4", "refused"),
            _ => tracing::error!(target: "pingora_core::server", "real"),
        });
        let heard = heard.lock().unwrap();
        !heard.is_empty()
    }

    struct Lines(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_client_that_leaves_is_no_error_of_ours_and_a_real_error_stays_one() {
        for level in ["info", "error", "warn"] {
            assert!(!hears(level, "apps") && !hears(level, "connectors"), "{level}");
            assert!(hears(level, "server"), "{level}");
        }
        assert!(hears("debug", "apps") && hears("info,pingora_core::apps=debug", "apps"));
    }

    #[test]
    fn a_misspelt_level_is_refused_and_the_accepted_ones_are_named() {
        for wrong in ["inof", "info,pingora_core=loud", "penstock_proxy"] {
            let error = directives(wrong).unwrap_err();
            assert!(error.contains("warn") && error.starts_with("log.level"), "{error}");
        }
    }

    #[test]
    fn the_last_lines_are_kept_plain_and_bounded() {
        let mut kept = VecDeque::new();
        keep(&mut kept, b"\x1b[2mtime\x1b[0m \x1b[32m INFO\x1b[0m first\nsecond\n");
        assert_eq!(kept, ["time  INFO first", "second"]);
        keep(&mut kept, "ü".repeat(5_000).as_bytes());
        assert_eq!(kept[2].len(), KEPT_BYTES + '…'.len_utf8());
        (0..3_000).for_each(|n| keep(&mut kept, n.to_string().as_bytes()));
        assert_eq!((kept.len(), kept[0].as_str()), (KEPT_LINES, "2000"));
    }

    #[test]
    fn an_unknown_format_is_refused() {
        let error = init(&LogConfig { level: "info".into(), format: "xml".into() }).unwrap_err();
        assert!(error.contains("xml") && error.contains("json"), "{error}");
    }
}
