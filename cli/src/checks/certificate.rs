//! When certificates in a PEM file expire.

use std::path::Path;

use x509_parser::pem::Pem;

/// The earliest end of any certificate in the file, in Unix seconds.
pub(super) fn expires(file: &Path) -> Result<i64, String> {
    let text = std::fs::read(file).map_err(|error| format!("cannot be read: {error}"))?;
    let mut earliest: Option<i64> = None;
    for pem in Pem::iter_from_buffer(&text) {
        let pem = pem.map_err(|error| format!("is not PEM: {error}"))?;
        if pem.label != "CERTIFICATE" {
            continue;
        }
        let certificate = pem.parse_x509().map_err(|error| format!("holds no certificate: {error}"))?;
        let end = certificate.validity().not_after.timestamp();
        earliest = Some(earliest.map_or(end, |before| before.min(end)));
    }
    earliest.ok_or_else(|| "holds no certificate".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_end_counts_and_other_files_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let made = |year| {
            let mut params = rcgen::CertificateParams::new(vec!["a".to_owned()]).unwrap();
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
            let key = rcgen::KeyPair::generate().unwrap();
            params.self_signed(&key).unwrap().pem()
        };
        let file = dir.path().join("c.pem");
        std::fs::write(&file, made(2031) + &made(2030)).unwrap();
        assert_eq!(expires(&file), Ok(1_893_456_000));
        std::fs::write(&file, "hello").unwrap();
        assert!(expires(&file).unwrap_err().contains("no certificate"));
        assert!(expires(dir.path()).unwrap_err().contains("cannot be read"));
    }
}
