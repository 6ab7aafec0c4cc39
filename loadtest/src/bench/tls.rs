//! A certificate for the cells in which clients speak TLS: made for each run, trusted by nobody.

use std::path::Path;

use super::configs::{BOTH, CERTIFICATE, KEY};

/// Writes certificate and key into the folder.
pub(super) fn write(folder: &Path) -> Result<(), String> {
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).map_err(|e| format!("no certificate: {e}"))?;
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    let both = format!("{certificate}{key}");
    for (name, text) in [(CERTIFICATE, certificate), (KEY, key), (BOTH, both)] {
        let path = folder.join(name);
        std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}
