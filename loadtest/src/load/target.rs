//! Where requests go.

/// `--url` is not usable.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("--url {url}: {why}; it must be http://HOST:PORT or https://HOST:PORT")]
pub struct BadUrl {
    url: String,
    why: String,
}

/// Where requests go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// HOST:PORT, for the connection and the Host header.
    pub authority: String,
    /// HOST, for the certificate.
    pub host: String,
    /// Path in front of `/v1`.
    pub base: String,
    /// Over TLS.
    pub tls: bool,
}

impl Target {
    /// Reads a URL.
    ///
    /// # Errors
    /// [`BadUrl`].
    pub fn parse(url: &str) -> Result<Self, BadUrl> {
        let bad = |why: &str| BadUrl { url: url.into(), why: why.into() };
        let uri: http::Uri = url.parse().map_err(|e: http::uri::InvalidUri| bad(&e.to_string()))?;
        let (tls, port) = match uri.scheme_str() {
            Some("http") => (false, 80),
            Some("https") => (true, 443),
            _ => return Err(bad("neither http nor https")),
        };
        let host = uri.host().ok_or_else(|| bad("no host"))?;
        let base = uri.path().trim_end_matches('/').trim_end_matches("/v1").to_string();
        let authority = format!("{host}:{}", uri.port_u16().unwrap_or(port));
        let host = host.trim_start_matches('[').trim_end_matches(']').to_string();
        Ok(Self { authority, host, base, tls })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let target = |url| Target::parse(url).map(|t| (t.authority, t.host, t.base, t.tls));
        let of = |a: &str, h: &str, b: &str, tls| Ok((a.into(), h.into(), b.into(), tls));
        assert_eq!(target("http://h:1"), of("h:1", "h", "", false));
        assert_eq!(target("http://h/x/v1/"), of("h:80", "h", "/x", false));
        assert_eq!(target("https://[::1]"), of("[::1]:443", "::1", "", true));
        for wrong in ["ftp://h", "h:1", "http://", ""] {
            assert!(target(wrong).is_err(), "{wrong}");
        }
    }
}
