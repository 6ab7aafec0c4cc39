//! What each version of vLLM has and has not. Pure, and mostly data.
//!
//! An option that the installed vLLM does not have ends it with a usage error, and it would be started again and again. So a
//! command line is fitted to the version first: what it does not have is refused in words, once, or left out where it only is a
//! nicety. Where the version is not known everything is passed on.
//!
//! The table was read off the wheels of vLLM, not remembered: `vllm/engine/arg_utils.py` and the `cli_args.py` of its server,
//! of 0.6.0, 0.7.0, 0.8.0 to 0.8.5, 0.9.0 to 0.9.2, 0.10.0 to 0.10.2, 0.11.0 to 0.11.2, and every minor version from 0.12.0 to 0.33.0.
//! What the typed fields need and has not changed within them (`--dtype`, `--seed` ...) is not in it.

use std::fmt;

use penstock_proto::engine::{FIELDS, option_of};

/// A released version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32, pub(crate) u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// When an option was there.
struct Change {
    option: &'static str,
    /// The first version that has it; None: it was there before the table begins.
    since: Option<Version>,
    /// The first version that does not have it any more.
    gone: Option<Version>,
    /// What to do instead.
    instead: &'static str,
    /// It can be left out without harm.
    nicety: bool,
}

const fn came(option: &'static str, since: Version, instead: &'static str) -> Change {
    Change { option, since: Some(since), gone: None, instead, nicety: false }
}

const fn went(option: &'static str, gone: Version, instead: &'static str) -> Change {
    Change { option, since: None, gone: Some(gone), instead, nicety: false }
}

const fn needless(mut change: Change) -> Change {
    change.nicety = true;
    change
}

const NEWER: &str = "leave it out, or install a newer vLLM on this node";
const DROP: &str = "leave it out: later versions do by themselves what it was for";
const SPECULATIVE: &str = "say --speculative-config";
const STRUCTURED: &str = "say --structured-outputs-config";

const CHANGES: [Change; 31] = [
    // The typed fields, and what they bring along.
    came("--shutdown-timeout", Version(0, 18, 0), NEWER),
    came("--max-num-queued-reqs", Version(0, 29, 0), NEWER),
    came("--kv-events-config", Version(0, 9, 0), NEWER),
    came("--data-parallel-size", Version(0, 8, 3), NEWER),
    // Without it the ranks of one node meet on a port that vLLM finds by itself.
    needless(came("--data-parallel-rpc-port", Version(0, 9, 0), NEWER)),
    came("--reasoning-parser", Version(0, 8, 0), NEWER),
    // What else deployments are likely to say.
    came("--max-num-queued-tokens", Version(0, 29, 0), NEWER),
    came("--enable-sleep-mode", Version(0, 7, 0), NEWER),
    came("--enable-log-requests", Version(0, 10, 1), NEWER),
    needless(went(
        "--disable-log-requests",
        Version(0, 17, 0),
        "requests are not logged unless --enable-log-requests is said",
    )),
    came("--structured-outputs-config", Version(0, 11, 0), NEWER),
    went("--guided-decoding-backend", Version(0, 12, 0), STRUCTURED),
    went("--guided-decoding-disable-fallback", Version(0, 12, 0), STRUCTURED),
    went("--guided-decoding-disable-any-whitespace", Version(0, 12, 0), STRUCTURED),
    needless(went("--enable-reasoning", Version(0, 10, 0), "--reasoning-parser is enough")),
    needless(went("--use-v2-block-manager", Version(0, 10, 0), DROP)),
    needless(went("--disable-async-output-proc", Version(0, 11, 0), DROP)),
    went("--num-scheduler-steps", Version(0, 10, 1), DROP),
    went("--multi-step-stream-outputs", Version(0, 10, 1), DROP),
    went("--scheduler-delay-factor", Version(0, 11, 0), DROP),
    went("--preemption-mode", Version(0, 11, 0), DROP),
    went("--num-lookahead-slots", Version(0, 12, 0), DROP),
    went("--max-seq-len-to-capture", Version(0, 11, 0), "say --compilation-config"),
    went("--swap-space", Version(0, 18, 0), "say --kv-offloading-size"),
    went("--device", Version(0, 10, 0), DROP),
    went("--task", Version(0, 13, 0), "say --runner and --convert"),
    went("--rope-scaling", Version(0, 11, 1), "say --hf-overrides"),
    went("--rope-theta", Version(0, 11, 1), "say --hf-overrides"),
    went("--override-pooler-config", Version(0, 12, 0), "say --pooler-config"),
    went("--speculative-model", Version(0, 8, 3), SPECULATIVE),
    went("--num-speculative-tokens", Version(0, 8, 3), SPECULATIVE),
];

/// What is told of a version, for those who choose nodes by it: names, and the options that tell.
const FEATURES: [(&str, &str); 6] = [
    ("data_parallel", "--data-parallel-size"),
    ("kv_events", "--kv-events-config"),
    ("max_num_queued_reqs", "--max-num-queued-reqs"),
    ("reasoning_parser", "--reasoning-parser"),
    ("shutdown_timeout", "--shutdown-timeout"),
    ("sleep", "--enable-sleep-mode"),
];

impl Change {
    fn has(&self, version: Version) -> bool {
        self.since.is_none_or(|since| version >= since) && self.gone.is_none_or(|gone| version < gone)
    }

    /// Why a version that does not have it has not.
    fn why(&self, version: Version) -> String {
        match (self.since, self.gone) {
            (Some(since), _) if version < since => format!("it came with {since}"),
            (_, Some(gone)) => format!("{gone} no longer has it"),
            _ => "it is not there".into(),
        }
    }
}

/// The version in what a program printed: the last line that has one counts, since programs log before they answer.
pub(crate) fn printed(text: &str) -> Option<String> {
    let word_of = |line: &str| {
        let words = line.split_ascii_whitespace().map(|word| word.trim_matches([',', ';', '(', ')', '"']));
        let plain = |word: &&str| word.bytes().all(|b| b.is_ascii_alphanumeric() || b"._+-".contains(&b));
        let mut bare = words.map(|word| word.strip_prefix('v').unwrap_or(word)).filter(plain);
        bare.find(|word| parse(word).is_some()).map(str::to_owned)
    };
    text.lines().rev().find_map(word_of)
}

/// "0.32.0+cpu", "0.11.0rc2.dev3+g12ab", "0.9"; None: no version.
pub(crate) fn parse(text: &str) -> Option<Version> {
    let mut parts = text.splitn(3, '.');
    let number = |part: &str| part.parse::<u32>().ok().filter(|_| part.len() <= 6 && !part.starts_with('+'));
    let (major, minor) = (parts.next()?, parts.next()?);
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let Some(patch) = parts.next() else {
        let (whole, rest) = minor.split_at_checked(digits(minor))?;
        let plain = rest.is_empty() || rest.starts_with(['+', '-', 'r', 'a', 'b']);
        return plain.then_some(Version(number(major)?, number(whole)?, 0));
    };
    let (whole, rest) = patch.split_at_checked(digits(patch))?;
    let plain = rest.is_empty() || rest.starts_with(['+', '-', '.', 'r', 'a', 'b', 'd']);
    let whole = if whole.is_empty() { 0 } else { number(whole)? };
    plain.then_some(Version(number(major)?, number(minor)?, whole))
}

/// The released version behind what a program printed; None for a build that does not know which one it is of.
pub(crate) fn released(printed: &str) -> Option<Version> {
    // setuptools_scm without tags: "0.1.dev1+g12ab".
    parse(printed).filter(|version| *version >= Version(0, 2, 0))
}

/// Names of what the version supports.
pub(crate) fn supports(version: Version) -> Vec<&'static str> {
    let has =
        |option: &str| CHANGES.iter().find(|change| change.option == option).is_none_or(|c| c.has(version));
    FEATURES.iter().filter(|(_, option)| has(option)).map(|(name, _)| *name).collect()
}

/// Arguments that a version takes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Fitted {
    /// Without those that were left out.
    pub(crate) arguments: Vec<String>,
    /// What was left out, and why.
    pub(crate) notes: Vec<String>,
}

/// `arguments` as `version` takes them. `niceties`: options that may be left out here whatever the table says.
///
/// # Errors
/// The first option that it does not have, with what to do instead.
pub(crate) fn fit(arguments: Vec<String>, version: Version, niceties: &[&str]) -> Result<Fitted, String> {
    let mut fitted = Fitted::default();
    let mut words = arguments.into_iter().peekable();
    while let Some(word) = words.next() {
        let option = option_of(&word).unwrap_or_default();
        let option = option.strip_prefix("--no-").map_or(option.clone(), |rest| format!("--{rest}"));
        let change = CHANGES.iter().find(|change| change.option == option && !change.has(version));
        let Some(change) = change else {
            fitted.arguments.push(word);
            continue;
        };
        let why = change.why(version);
        if !change.nicety && !niceties.contains(&change.option) {
            let field = FIELDS.iter().find(|field| field.option == option);
            let field = field.map(|field| format!(" (field {})", field.name)).unwrap_or_default();
            let Change { option, instead, .. } = change;
            return Err(format!("vLLM {version} of this node has no {option}{field}: {why}; {instead}"));
        }
        fitted.notes.push(format!("{option} was left out: vLLM {version} does not have it, {why}"));
        if !word.contains('=') {
            while words.next_if(|next| option_of(next).is_none()).is_some() {}
        }
    }
    Ok(fitted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn versions_are_found_in_what_programs_print() {
        for (text, version) in [
            ("0.32.0+cpu\n", Version(0, 32, 0)),
            (
                "INFO 11-21 18:00:00 [__init__.py:216] Automatically detected platform cpu.\n0.11.0\n",
                Version(0, 11, 0),
            ),
            ("vllm 0.9.1", Version(0, 9, 1)),
            ("0.11.0rc2.dev3+g12ab", Version(0, 11, 0)),
            ("version: v0.5.9 (build x)", Version(0, 5, 9)),
            ("0.9.0.1", Version(0, 9, 0)),
            ("1.4", Version(1, 4, 0)),
        ] {
            let printed = printed(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(released(&printed), Some(version), "{text}");
        }
        for none in ["", "usage: x", "11-21 18:00:00", "127.0.0.1:80", "see https://x.y/1.2z", "1.x"] {
            assert_eq!(printed(none), None, "{none}");
        }
        assert_eq!(printed("0.1.dev1+g12ab").as_deref(), Some("0.1.dev1+g12ab"));
        assert_eq!(released("0.1.dev1+g12ab"), None, "which one it is of is not known");
    }

    #[test]
    fn what_a_version_does_not_have_is_refused_with_the_field_and_the_way_out() {
        let refused = |text: &str, version| fit(words(text), version, &[]).expect_err(text);
        assert_eq!(
            refused("--seed 1 --max-num-queued-reqs 5", Version(0, 28, 0)),
            "vLLM 0.28.0 of this node has no --max-num-queued-reqs (field max_num_queued_reqs): it came with 0.29.0; \
             leave it out, or install a newer vLLM on this node"
        );
        assert!(
            refused("--swap_space=4", Version(0, 32, 0))
                .contains("0.18.0 no longer has it; say --kv-offloading-size")
        );
        fit(words("--max-num-queued-reqs 5"), Version(0, 29, 0), &[]).expect("there");
        fit(words("--swap-space 4"), Version(0, 17, 1), &[]).expect("still there");
    }

    #[test]
    fn niceties_are_left_out_with_their_values_and_a_note() {
        let fitted =
            fit(words("--a 1 --shutdown-timeout 10 --b"), Version(0, 17, 0), &["--shutdown-timeout"]);
        let fitted = fitted.expect("a nicety here");
        assert_eq!(fitted.arguments, words("--a 1 --b"));
        assert_eq!(
            fitted.notes,
            ["--shutdown-timeout was left out: vLLM 0.17.0 does not have it, it came with 0.18.0"]
        );
        let fitted = fit(words("--disable-log-requests --no-enable-reasoning -O3 x"), Version(0, 32, 0), &[])
            .expect("both");
        assert_eq!((fitted.arguments, fitted.notes.len()), (words("-O3 x"), 2));
    }

    #[test]
    fn the_table_is_in_order_and_features_follow_it() {
        for change in &CHANGES {
            assert!(change.since.is_some() || change.gone.is_some(), "{}", change.option);
            assert_eq!(CHANGES.iter().filter(|other| other.option == change.option).count(), 1);
        }
        for (name, option) in FEATURES {
            assert!(CHANGES.iter().any(|change| change.option == option), "{name}");
        }
        assert_eq!(supports(Version(0, 17, 0)), ["data_parallel", "kv_events", "reasoning_parser", "sleep"]);
        assert_eq!(supports(Version(0, 33, 0)).len(), FEATURES.len());
        assert!(supports(Version(0, 6, 0)).is_empty());
    }
}
