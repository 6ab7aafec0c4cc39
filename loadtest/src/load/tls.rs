//! TLS of the generator: whom it trusts, and which protocol it asks for.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
    version::{TLS12, TLS13},
};
use tokio_rustls::TlsConnector;

use super::Options;

/// What speaks TLS as the options say.
///
/// # Errors
/// In words: nobody to trust, or a file that cannot be used.
pub(super) fn connector(options: &Options) -> Result<TlsConnector, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(|e| e.to_string())?;
    let mut config = match (&options.ca, options.insecure) {
        (_, true) => {
            let anyone = Arc::new(Anyone(provider));
            builder.dangerous().with_custom_certificate_verifier(anyone).with_no_client_auth()
        }
        (Some(path), false) => builder.with_root_certificates(roots(path)?).with_no_client_auth(),
        (None, false) => return Err("https: say whom to trust, with --ca FILE or --insecure".into()),
    };
    let protocol: &[u8] = if options.http2 { b"h2" } else { b"http/1.1" };
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

fn roots(path: &Path) -> Result<RootCertStore, String> {
    let of = |e: &dyn std::fmt::Display| format!("--ca {}: {e}", path.display());
    let pem = std::fs::read(path).map_err(|e| of(&e))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|e| of(&format!("not certificates in PEM: {e}")))?;
        roots.add(certificate).map_err(|e| of(&e))?;
    }
    if roots.is_empty() { Err(of(&"it holds no certificate in PEM")) } else { Ok(roots) }
}

/// Trusts any certificate: what is measured is no secret.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn whom_to_trust_has_to_be_said_and_to_be_there() {
        let refused = |options: &Options| connector(options).err().unwrap_or_default();
        assert!(refused(&Options::default()).contains("--ca FILE or --insecure"));
        assert_eq!(refused(&Options { insecure: true, ..Options::default() }), "");
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let with = |path: &Path| Options { ca: Some(path.into()), ..Options::default() };
        assert!(refused(&with(file.path())).contains("no certificate"));
        assert!(refused(&with(Path::new("/nonexistent"))).contains("--ca /nonexistent: No such file"));
        let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        file.write_all(certified.cert.pem().as_bytes()).unwrap();
        assert_eq!(refused(&with(file.path())), "");
    }
}
