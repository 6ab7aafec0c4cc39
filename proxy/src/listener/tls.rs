//! Certificates: from PEM files to what a handshake needs. Reading is apart from judging, so that the reloader can tell
//! whether anything has changed.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
};

use penstock_config::proxy::ListenerConfig;
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
    version::{TLS12, TLS13},
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

/// What can be negotiated, the best first.
const ALPN_BOTH: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// A listener's files.
#[derive(Debug)]
pub struct TlsFiles {
    certificate: PathBuf,
    key: PathBuf,
    /// Empty: no client certificates are asked for.
    client_ca: PathBuf,
}

/// What the files hold.
#[derive(Debug, PartialEq, Eq)]
pub struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

/// What operators want to know of certificates in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificates {
    /// When the first of them expires, in seconds since 1970.
    pub expires_unix_s: i64,
    /// Whom the server's own is for.
    pub subject: String,
}

impl TlsFiles {
    /// The files that `config` names.
    pub fn new(config: &ListenerConfig) -> Self {
        Self {
            certificate: config.certificate.clone().into(),
            key: config.key.clone().into(),
            client_ca: config.client_ca.clone().into(),
        }
    }

    /// Reads them. They are small and local; it blocks for that long.
    ///
    /// # Errors
    /// A sentence with the file that cannot be read.
    pub fn read(&self) -> Result<Contents, String> {
        let bytes = |path: &Path| {
            std::fs::read(path).map_err(|e| match e.kind() {
                ErrorKind::NotFound => format!("{} does not exist", path.display()),
                _ => format!("{} cannot be read: {e}", path.display()),
            })
        };
        let client_ca =
            (!self.client_ca.as_os_str().is_empty()).then(|| bytes(&self.client_ca)).transpose()?;
        Ok(Contents { certificate: bytes(&self.certificate)?, key: bytes(&self.key)?, client_ca })
    }
}

/// Makes a server's side of TLS 1.2 and 1.3 of what the files hold.
///
/// # Errors
/// A sentence with the file that cannot be used, and why: no PEM, a key of another certificate.
pub fn load(
    contents: &Contents,
    files: &TlsFiles,
    http2: bool,
) -> Result<(Arc<ServerConfig>, Certificates), String> {
    let of = |path: &Path, what: String| format!("{}: {what}", path.display());
    let chain = certificates(&contents.certificate).map_err(|e| of(&files.certificate, e))?;
    let key = PrivateKeyDer::from_pem_slice(&contents.key)
        .map_err(|e| of(&files.key, format!("no private key in PEM: {e}")))?;
    let described = describe(&chain).map_err(|e| of(&files.certificate, e))?;

    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(|e| e.to_string())?;
    let builder = match &contents.client_ca {
        None => builder.with_no_client_auth(),
        Some(pem) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates(pem).map_err(|e| of(&files.client_ca, e))? {
                roots.add(authority).map_err(|e| of(&files.client_ca, e.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|e| of(&files.client_ca, e.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|e| match e {
        rustls::Error::InconsistentKeys(_) => of(
            &files.key,
            format!("this is not the key of the certificate in {}", files.certificate.display()),
        ),
        e => of(&files.certificate, e.to_string()),
    })?;
    config.alpn_protocols =
        ALPN_BOTH.iter().skip(usize::from(!http2)).map(|protocol| protocol.to_vec()).collect();
    Ok((Arc::new(config), described))
}

/// The subject of a client's certificate, as `CN=name, O=...`. It has been verified.
pub fn subject(certificate: &CertificateDer<'_>) -> Option<Arc<str>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(parsed.subject().to_string().into())
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|e| format!("not certificates in PEM: {e}"))?;
    if all.is_empty() { Err("it holds no certificate in PEM".into()) } else { Ok(all) }
}

fn describe(chain: &[CertificateDer<'_>]) -> Result<Certificates, String> {
    let mut described: Option<Certificates> = None;
    for certificate in chain {
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|e| format!("a certificate in it cannot be parsed: {e}"))?;
        let expires_unix_s = parsed.validity().not_after.timestamp();
        described = Some(match described {
            None => Certificates { expires_unix_s, subject: parsed.subject().to_string() },
            Some(first) => Certificates { expires_unix_s: first.expires_unix_s.min(expires_unix_s), ..first },
        });
    }
    described.ok_or_else(|| "it holds no certificate".into())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    fn pair(name: &str, expires_year: i32) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        params.not_after = date_time_ymd(expires_year, 1, 1);
        (params.self_signed(&key).expect("signed").pem(), key.serialize_pem())
    }

    fn files() -> TlsFiles {
        TlsFiles { certificate: "c.pem".into(), key: "k.pem".into(), client_ca: "ca.pem".into() }
    }

    fn tried(certificate: &str, key: &str, client_ca: Option<&str>) -> Result<Certificates, String> {
        let bytes = |text: &str| text.as_bytes().to_vec();
        let contents =
            Contents { certificate: bytes(certificate), key: bytes(key), client_ca: client_ca.map(bytes) };
        load(&contents, &files(), true).map(|(_, described)| described)
    }

    #[test]
    fn a_pair_is_taken_and_the_earliest_expiry_of_its_chain_is_told() {
        let (certificate, key) = pair("localhost", 2040);
        let (between, _) = pair("between", 2035);
        let described = tried(&[certificate, between.clone()].concat(), &key, Some(&between)).expect("good");
        assert_eq!(described.expires_unix_s, date_time_ymd(2035, 1, 1).unix_timestamp());
    }

    #[test]
    fn a_clients_certificate_says_who_it_is() {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "alice");
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "partners");
        let certificate = params.self_signed(&key).expect("signed");
        assert_eq!(subject(certificate.der()).as_deref(), Some("CN=alice, O=partners"));
        assert_eq!(subject(&CertificateDer::from(vec![1, 2, 3])), None);
    }

    #[test]
    fn what_is_wrong_names_the_file() {
        let ((certificate, key), (_, other)) = (pair("localhost", 2040), pair("other", 2040));
        let cases = [
            (tried(&certificate, &other, None), "k.pem: this is not the key of the certificate in c.pem"),
            (tried("", &key, None), "c.pem: it holds no certificate"),
            (tried(&key, &key, None), "c.pem: it holds no certificate"),
            (tried(&certificate[..certificate.len() / 2], &key, None), "c.pem: not certificates in PEM"),
            (tried(&certificate, "", None), "k.pem: no private key in PEM"),
            (tried(&certificate, &certificate, None), "k.pem: no private key in PEM"),
            (tried(&certificate, &key, Some("")), "ca.pem: it holds no certificate"),
        ];
        for (result, message) in cases {
            let error = result.expect_err(message);
            assert!(error.starts_with(message), "{error}");
        }
        let error = files().read().expect_err("there are no such files");
        assert_eq!(error, "ca.pem does not exist");
    }
}
