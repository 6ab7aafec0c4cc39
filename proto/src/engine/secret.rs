//! Which values are secrets: by the names they stand under. What is a secret is never shown to those who only read, nor in
//! a log.

/// What stands in a secret's place.
pub const MASKED: &str = "***";
/// Parts of names of secrets, in capitals.
const PARTS: [&str; 6] = ["KEY", "TOKEN", "PASSWORD", "PASSWD", "SECRET", "CREDENTIAL"];

/// Whether a variable's name sounds like a secret's.
pub fn is_secret(name: &str) -> bool {
    let upper = name.to_ascii_uppercase();
    PARTS.iter().any(|part| upper.contains(part))
}

/// Whether an argument's value is a secret: "--hf-token", but not "--tokenizer" or "--max-tokens".
pub fn is_secret_argument(option: &str) -> bool {
    let Some(name) = option.strip_prefix("--").map(|name| name.replace('_', "-")) else { return false };
    is_secret(&name) && !name.contains("tokenizer") && !name.ends_with("-tokens")
}

/// The arguments with every secret in them masked.
pub fn masked_args<S: AsRef<str>>(args: impl IntoIterator<Item = S>) -> Vec<String> {
    let mut next_is_secret = false;
    let mut out = Vec::new();
    for arg in args {
        let text = arg.as_ref();
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        let secret = is_secret_argument(name);
        out.push(match (secret, value) {
            (false, _) if next_is_secret && !text.starts_with("--") => MASKED.to_owned(),
            (true, Some(_)) => format!("{name}={MASKED}"),
            _ => text.to_owned(),
        });
        next_is_secret = secret && value.is_none();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_sounds_like_a_secret_is_masked() {
        let args = "--hf-token d --api_key=e --max-tokens 5 --tokenizer t --seed 1 --hf_token";
        assert_eq!(
            masked_args(args.split(' ')).join(" "),
            "--hf-token *** --api_key=*** --max-tokens 5 --tokenizer t --seed 1 --hf_token"
        );
        assert!(is_secret("HF_TOKEN") && is_secret("db_password") && !is_secret("PATH"));
    }
}
