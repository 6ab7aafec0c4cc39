//! What a check found, and how it is told.

use serde::Serialize;
use serde_json::{Value, json};

use crate::api::ApiError;

/// How it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Level {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) level: Level,
    /// What was looked at, in a word or two.
    pub(super) what: String,
    /// How it is.
    pub(super) why: String,
    /// What to do; empty: nothing.
    pub(super) advice: String,
}

pub(super) fn ok(what: &str, why: impl Into<String>) -> Finding {
    Finding { level: Level::Ok, what: what.into(), why: why.into(), advice: String::new() }
}

pub(super) fn warn(what: &str, why: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { level: Level::Warn, what: what.into(), why: why.into(), advice: advice.into() }
}

pub(super) fn fail(what: &str, why: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { level: Level::Fail, what: what.into(), why: why.into(), advice: advice.into() }
}

pub(super) fn json(findings: &[Finding]) -> Value {
    let worst = findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok);
    json!({ "worst": worst, "findings": findings })
}

/// One line for each, and one more for what to do.
pub(super) fn text(findings: &[Finding]) -> String {
    let mut out = String::new();
    for finding in findings {
        let level = match finding.level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        out.push_str(&format!("{level}  {}: {}\n", finding.what, finding.why.replace('\n', "\n        ")));
        if !finding.advice.is_empty() {
            out.push_str(&format!("      -> {}\n", finding.advice));
        }
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let (fine, warned, failed) = (count(Level::Ok), count(Level::Warn), count(Level::Fail));
    out + &format!("{fine} ok, {warned} to look at, {failed} wrong\n")
}

/// An error if anything is wrong; with `strict` also if anything is to be looked at.
pub(super) fn verdict(findings: &[Finding], strict: bool) -> Result<(), ApiError> {
    let bad = if strict { Level::Warn } else { Level::Fail };
    match findings.iter().filter(|finding| finding.level >= bad).count() {
        0 => Ok(()),
        1 => Err(ApiError::Found("1 check failed".into())),
        n => Err(ApiError::Found(format!("{n} checks failed"))),
    }
}

/// Bytes for people.
pub(super) fn bytes(bytes: u64) -> String {
    match bytes {
        0..1_048_576 => format!("{} KiB", bytes / 1_024),
        1_048_576..1_073_741_824 => format!("{} MiB", bytes / 1_048_576),
        _ => format!("{}.{} GiB", bytes / 1_073_741_824, bytes % 1_073_741_824 * 10 / 1_073_741_824),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_told_with_what_to_do_and_decide_the_exit() {
        let findings = [ok("a", "fine"), warn("b", "so so", "look"), fail("c", "bad\nworse", "act")];
        assert_eq!(
            text(&findings),
            "ok    a: fine\nwarn  b: so so\n      -> look\nFAIL  c: bad\n        worse\n      -> act\n1 ok, 1 to look at, 1 wrong\n"
        );
        assert!(verdict(&findings[..1], true).is_ok() && verdict(&findings[..2], false).is_ok());
        assert!(verdict(&findings[..2], true).is_err() && verdict(&findings, false).is_err());
        assert_eq!(json(&findings)["worst"], "fail");
        assert_eq!([bytes(2_048), bytes(5 << 20), bytes(3 << 29)], ["2 KiB", "5 MiB", "1.5 GiB"]);
    }
}
