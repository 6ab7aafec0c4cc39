//! Where a checkpoint lies: `file:///PATH`, `s3://BUCKET/PREFIX` or `oci://REGISTRY/REPOSITORY:TAG`.
//!
//! Read strictly, because what is read here is handed to a command as one argument: no spaces, no control characters, no
//! credentials, no `..`, no query. The control plane checks a deployment with it and the agent what it is about to run.

use std::{fmt, str::FromStr};

/// Longest text of one.
const LONGEST: usize = 1_024;

/// A checked storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storage {
    /// A folder that is mounted on the node.
    File {
        /// From the root, without an ending slash.
        path: String,
    },
    /// Objects under a prefix.
    S3 {
        /// The bucket.
        bucket: String,
        /// Without slashes at its ends; may be empty.
        prefix: String,
    },
    /// An image in a registry.
    Oci {
        /// HOST or HOST:PORT.
        registry: String,
        /// Its name there, with slashes.
        repository: String,
        /// Which of them.
        tag: String,
    },
}

/// What is not accepted, and what is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StorageError(String);

fn refused<T>(text: &str, why: &str) -> Result<T, StorageError> {
    let shown: String = text.chars().take(128).collect();
    Err(StorageError(format!(
        "{shown:?} is no storage: {why}; accepted: file:///PATH, s3://BUCKET/PREFIX, oci://REGISTRY/REPOSITORY:TAG"
    )))
}

impl FromStr for Storage {
    type Err = StorageError;

    fn from_str(text: &str) -> Result<Self, StorageError> {
        if text.len() > LONGEST {
            return refused(text, &format!("it is longer than {LONGEST} bytes"));
        }
        let fine = |c: char| c.is_ascii_alphanumeric() || "._-/:+@".contains(c);
        if let Some(bad) = text.chars().find(|c| !fine(*c)) {
            return refused(text, &format!("it has the character {bad:?}"));
        }
        let Some((scheme, rest)) = text.split_once("://") else { return refused(text, "it has no scheme") };
        if rest.split('/').any(|part| part == ".." || part == ".") {
            return refused(text, "a part of its path is \".\" or \"..\"");
        }
        if rest.contains('@') {
            return refused(text, "credentials do not belong into it: give secret_ref");
        }
        match scheme {
            "file" => file(text, rest),
            "s3" => s3(text, rest),
            "oci" => oci(text, rest),
            _ => refused(text, &format!("the scheme {scheme:?} is not known")),
        }
    }
}

fn file(text: &str, rest: &str) -> Result<Storage, StorageError> {
    let path = rest.trim_end_matches('/');
    if !rest.starts_with('/') {
        return refused(text, "file:// is followed by a path from the root, which makes three slashes");
    }
    if path.is_empty() || path.contains("//") || path.contains(':') {
        return refused(text, "its path is empty, or has an empty part or a ':'");
    }
    Ok(Storage::File { path: path.to_owned() })
}

fn s3(text: &str, rest: &str) -> Result<Storage, StorageError> {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
    let ends = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let named = (3..=63).contains(&bucket.len()) && bucket.chars().all(letters);
    if !named || !bucket.starts_with(ends) || !bucket.ends_with(ends) || bucket.contains("..") {
        let why =
            format!("{bucket:?} is no bucket's name: 3 to 63 of a-z 0-9 . -, a letter or digit at each end");
        return refused(text, &why);
    }
    let prefix = prefix.trim_end_matches('/');
    if prefix.starts_with('/') || prefix.contains("//") {
        return refused(text, "its prefix has an empty part");
    }
    Ok(Storage::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
}

fn oci(text: &str, rest: &str) -> Result<Storage, StorageError> {
    let Some((registry, image)) = rest.split_once('/') else {
        return refused(text, "there is no repository after the registry");
    };
    let (host, port) = registry.split_once(':').map_or((registry, None), |(host, port)| (host, Some(port)));
    let host_fine = !host.is_empty()
        && host.chars().all(|c| c.is_ascii_alphanumeric() || "-.".contains(c))
        && !host.starts_with(['-', '.']);
    let port_fine = port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0));
    if !host_fine || !port_fine {
        return refused(text, &format!("{registry:?} is no HOST or HOST:PORT"));
    }
    let Some((repository, tag)) = image.rsplit_once(':') else {
        return refused(text, "it has no :TAG, and the newest is not taken for granted");
    };
    let part_fine = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c))
            && part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.ends_with(|c: char| c.is_ascii_alphanumeric())
    };
    if !repository.split('/').all(part_fine) {
        return refused(
            text,
            &format!("{repository:?} is no repository: parts of a-z 0-9 . _ - between slashes"),
        );
    }
    let tag_fine = (1..=128).contains(&tag.len())
        && tag.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        && !tag.starts_with(['.', '-']);
    if !tag_fine {
        return refused(text, &format!("{tag:?} is no tag: 1 to 128 of A-Z a-z 0-9 . _ -"));
    }
    let (registry, repository, tag) = (registry.to_owned(), repository.to_owned(), tag.to_owned());
    Ok(Storage::Oci { registry, repository, tag })
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path } => write!(f, "file://{path}"),
            Self::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
            Self::Oci { registry, repository, tag } => write!(f, "oci://{registry}/{repository}:{tag}"),
        }
    }
}

impl Storage {
    /// Whether a mount at `base` holds it: a folder's path is the base or lies under it. Others are not mounted.
    ///
    /// # Errors
    /// The sentence that says which two paths disagree.
    pub fn agrees_with(&self, base: &str) -> Result<(), StorageError> {
        let Self::File { path } = self else { return Ok(()) };
        let base = base.trim_end_matches('/');
        let under = path.strip_prefix(base).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if under && !base.is_empty() {
            return Ok(());
        }
        Err(StorageError(format!(
            "the storage {self} does not lie under the path {base:?}: both must name the folder as it is mounted on the node"
        )))
    }
}

/// Where a secret is found on the node: never the secret itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretRef {
    /// A file in the agent's secrets folder.
    File(String),
    /// A variable of the agent's environment.
    Env(String),
}

impl FromStr for SecretRef {
    type Err = StorageError;

    fn from_str(text: &str) -> Result<Self, StorageError> {
        // Not quoted back: somebody may have put the secret itself there.
        let wanted = || {
            Err(StorageError(
                "it is neither file:NAME (a file in the agent's warm.secrets_dir) nor env:NAME (a variable of the agent's \
                 environment); NAME has 1 to 128 of A-Z a-z 0-9 . _ - and does not begin with '.'"
                    .into(),
            ))
        };
        let Some((kind, name)) = text.split_once(':') else { return wanted() };
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let fine = (1..=128).contains(&name.len());
        match kind {
            "file"
                if fine && !name.starts_with('.') && name.chars().all(|c| plain(c) || ".-".contains(c)) =>
            {
                Ok(Self::File(name.to_owned()))
            }
            "env" if fine && !name.starts_with(|c: char| c.is_ascii_digit()) && name.chars().all(plain) => {
                Ok(Self::Env(name.to_owned()))
            }
            _ => wanted(),
        }
    }
}

impl fmt::Display for SecretRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(name) => write!(f, "file:{name}"),
            Self::Env(name) => write!(f, "env:{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_kind_is_read_and_shown_as_it_was() {
        for text in [
            "file:///ckpt/llama-8b",
            "s3://my-bucket/models/llama",
            "s3://abc",
            "oci://registry.example:5000/team/llama:v1.2",
        ] {
            assert_eq!(text.parse::<Storage>().expect(text).to_string(), text);
        }
        assert_eq!("file:///a/".parse::<Storage>().expect("fine").to_string(), "file:///a");
    }

    #[test]
    fn what_is_refused_is_told_why_and_what_is_accepted() {
        for (text, part) in [
            ("", "no scheme"),
            ("/ckpt", "no scheme"),
            ("nfs://host/x", "scheme \"nfs\""),
            ("file://host/x", "three slashes"),
            ("file:///", "empty"),
            ("file:///a/../b", "\"..\""),
            ("file:///a b", "' '"),
            ("file:///$(id)", "'$'"),
            ("s3://UP/x", "no bucket's name"),
            ("s3://b/x", "no bucket's name"),
            ("s3://key:secret@bucket/x", "credentials"),
            ("s3://bucket//x", "empty part"),
            ("s3://bucket/x?versionId=1", "'?'"),
            ("oci://registry", "no repository"),
            ("oci://registry/repo", "no :TAG"),
            ("oci://registry:0/repo:t", "no HOST"),
            ("oci://registry/Repo:t", "no repository"),
            ("oci://registry/repo:.t", "no tag"),
        ] {
            let error = text.parse::<Storage>().expect_err(text).to_string();
            assert!(error.contains(part) && error.contains("accepted: file:///PATH"), "{text}: {error}");
        }
    }

    #[test]
    fn a_folder_lies_under_the_mount_or_nowhere() {
        let agrees = |text: &str, base: &str| text.parse::<Storage>().expect(text).agrees_with(base).is_ok();
        assert!(agrees("file:///ckpt", "/ckpt") && agrees("file:///ckpt/llama", "/ckpt/"));
        assert!(!agrees("file:///ckpt2", "/ckpt") && !agrees("file:///ckpt", "/other"));
        assert!(!agrees("file:///ckpt", "") && !agrees("file:///ckpt", "/"));
        assert!(agrees("s3://bucket/x", "/anything"), "it is mounted nowhere");
    }

    #[test]
    fn a_secret_is_named_and_never_quoted() {
        for text in ["file:s3-key", "env:S3_SECRET"] {
            assert_eq!(text.parse::<SecretRef>().expect(text).to_string(), text);
        }
        for text in ["", "AKIAVERYSECRET", "file:../x", "file:.x", "file:a/b", "env:1A", "env:A-B", "vault:x"]
        {
            let error = text.parse::<SecretRef>().expect_err(text).to_string();
            assert!(!error.contains("AKIA") && error.contains("file:NAME"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_is_one_plain_word(text in "(file|s3|oci)://[ -~]{0,40}") {
            if let Ok(storage) = text.parse::<Storage>() {
                let shown = storage.to_string();
                prop_assert!(!shown.contains([' ', '$', '`', '\'', '"', '\\', '\n']) && !shown.contains("/../"));
                prop_assert_eq!(shown.parse::<Storage>().expect("again"), storage);
            }
        }
    }
}
