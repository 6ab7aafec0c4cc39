//! Mutual TLS between proxies, agents and control planes: the same three files everywhere.

use serde::{Deserialize, Serialize};

/// PEM files; all three or none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// Authorities that sign the certificates of the other side.
    pub ca_file: String,
    /// Our certificate, and those between it and an authority.
    pub cert_file: String,
    /// Its key.
    pub key_file: String,
}

impl TlsConfig {
    /// Whether TLS is spoken.
    #[must_use]
    pub fn is_on(&self) -> bool {
        !self.cert_file.is_empty()
    }

    /// Refuses a part of the three; the text names `section`.
    pub fn validate(&self, section: &str) -> Result<(), String> {
        let files =
            [("ca_file", &self.ca_file), ("cert_file", &self.cert_file), ("key_file", &self.key_file)];
        let empty: Vec<_> = files.iter().filter(|(_, file)| file.is_empty()).map(|(key, _)| *key).collect();
        match empty.as_slice() {
            [] | [_, _, _] => Ok(()),
            [key, ..] => Err(format!(
                "{section}.{key} is empty: {section} takes ca_file, cert_file and key_file, or none of them for no TLS"
            )),
        }
    }

    /// Refuses endpoints, `HOST:PORT` or URLs, that do not fit; the text names `section` and `key`, which holds them.
    pub fn validate_endpoints(&self, section: &str, key: &str, endpoints: &[String]) -> Result<(), String> {
        self.validate(section)?;
        for endpoint in endpoints {
            if endpoint.starts_with("https://") && !self.is_on() {
                return Err(format!("{key} has {endpoint:?}: https needs the files of {section}"));
            }
            if endpoint.starts_with("http://") && self.is_on() {
                return Err(format!(
                    "{key} has {endpoint:?}: with {section} it must be https, or HOST:PORT alone"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_all_three_or_none_and_endpoints_that_fit() {
        let off = TlsConfig::default();
        let on = TlsConfig { ca_file: "ca".into(), cert_file: "c".into(), key_file: "k".into() };
        let half = TlsConfig { key_file: String::new(), ..on.clone() };
        assert!(half.validate("x.tls").expect_err("half").starts_with("x.tls.key_file is empty"));
        let tried = |tls: &TlsConfig, endpoint: &str| {
            tls.validate_endpoints("x.tls", "x.endpoints", &[endpoint.to_owned()]).err().unwrap_or_default()
        };
        for (tls, endpoint, part) in [
            (&off, "http://a:1", ""),
            (&off, "a:1", ""),
            (&off, "https://a:1", "https needs"),
            (&on, "https://a:1", ""),
            (&on, "a:1", ""),
            (&on, "http://a:1", "must be https"),
        ] {
            let error = tried(tls, endpoint);
            assert!(error.contains(part) && error.is_empty() == part.is_empty(), "{endpoint}: {error}");
        }
    }
}
