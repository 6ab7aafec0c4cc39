//! Mutual TLS for whoever dials a control plane: proxies, agents, and other control planes.
//!
//! Files are read at every new connection, so a renewed certificate needs no restart. The other side is taken for whom the
//! address names: its certificate must be for that host name or IP address.

use std::{error::Error, path::PathBuf};

use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

/// The files of one side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientTls {
    /// PEM: authorities that sign the other side's certificates.
    pub ca_file: PathBuf,
    /// PEM: our certificate, and those between it and an authority.
    pub cert_file: PathBuf,
    /// PEM: its key.
    pub key_file: PathBuf,
}

impl ClientTls {
    /// Of settings in which a file that is not named is empty; None: there is no certificate, TLS is off.
    #[must_use]
    pub fn of(ca_file: &str, cert_file: &str, key_file: &str) -> Option<Self> {
        (!cert_file.is_empty()).then(|| Self {
            ca_file: ca_file.into(),
            cert_file: cert_file.into(),
            key_file: key_file.into(),
        })
    }

    /// Reads the files. They are small and local; it blocks for that long.
    fn read(&self) -> Result<ClientTlsConfig, String> {
        let read = |path: &PathBuf| {
            std::fs::read(path).map_err(|e| format!("{} cannot be read: {e}", path.display()))
        };
        let authorities = Certificate::from_pem(read(&self.ca_file)?);
        let identity = Identity::from_pem(read(&self.cert_file)?, read(&self.key_file)?);
        Ok(ClientTlsConfig::new().ca_certificate(authorities).identity(identity))
    }
}

/// What to connect to, for `HOST:PORT` or a URL of scheme http or https; with `tls` it is https.
///
/// # Errors
/// A sentence about an address that is none, one that asks for the other kind, or files that cannot be used.
pub fn dial(address: &str, tls: Option<&ClientTls>) -> Result<Endpoint, String> {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let url = match address.split_once("://") {
        None => format!("{scheme}://{address}"),
        Some((given, _)) if given == scheme => address.to_owned(),
        Some(("https", _)) => return Err(format!("{address} asks for TLS, but no certificates are set")),
        Some(("http", _)) => {
            return Err(format!("{address} is without TLS, but certificates are set: use https"));
        }
        Some(_) => {
            return Err(format!("{address:?} is not HOST:PORT, http://HOST:PORT or https://HOST:PORT"));
        }
    };
    let endpoint = Endpoint::from_shared(url).map_err(|_| format!("{address:?} is no address"))?;
    let Some(tls) = tls else { return Ok(endpoint) };
    endpoint.tls_config(tls.read()?).map_err(|e| {
        let files = [&tls.ca_file, &tls.cert_file, &tls.key_file].map(|path| path.display().to_string());
        format!("{} cannot be used: {}", files.join(", "), in_words(&e))
    })
}

/// An error with its causes: tonic's own words are often no more than "transport error".
#[must_use]
pub fn in_words(error: &(dyn Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !words.ends_with(&text) {
            words = format!("{words}: {text}");
        }
        cause = error.source();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_certificates_must_fit() {
        let tls = |folder: &str| {
            let file = |name: &str| PathBuf::from(format!("{folder}/{name}"));
            ClientTls { ca_file: file("ca.pem"), cert_file: file("c.pem"), key_file: file("k.pem") }
        };
        let missing = tls("/nonexistent");
        let error = |address: &str, tls| dial(address, tls).expect_err(address);
        assert!(dial("127.0.0.1:1", None).is_ok() && dial("http://host:1", None).is_ok());
        assert!(error("https://host:1", None).contains("no certificates are set"));
        assert!(error("http://host:1", Some(&missing)).contains("use https"));
        assert!(error("ftp://host:1", None).contains("is not HOST:PORT"));
        assert!(error("host:1", Some(&missing)).starts_with("/nonexistent/ca.pem cannot be read"));
    }
}
