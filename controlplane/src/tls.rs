//! Mutual TLS on the gRPC side: handshakes apart from the server, and certificates that change on disk.
//!
//! A stranger costs a handshake of bounded length and nothing else: streams reach the gRPC server when both sides have shown
//! their certificates. Why one was refused is told to the log and to a counter; TLS tells the other side no more than an
//! alert. Certificates are read every [`INTERVAL`] and compared with what was last looked at; handshakes from then on use
//! the new ones. Those that cannot be used, or have expired already, are refused once, and the old ones stay.

use std::{
    io,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use penstock_config::TlsConfig;
use penstock_proto::tls::ClientTls;
use rustls::{
    CertificateError, Error, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use crate::metrics::Metrics;

/// Between two looks at the files.
pub const INTERVAL: Duration = Duration::from_secs(5);
/// Longest handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at a time; more wait in the listener's backlog.
const HANDSHAKES: usize = 256;
/// Pause after a failure to accept, as when there are no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the files hold.
type Contents = [Vec<u8>; 3];

/// The files, and what of them is in use.
#[derive(Debug)]
pub struct ServerTls {
    files: TlsConfig,
    config: watch::Sender<Arc<ServerConfig>>,
    /// What was last judged; an error counts, so that it is told once.
    seen: Result<Contents, String>,
    /// When the first of our certificates expires, in seconds since 1970.
    expires_unix_s: i64,
}

/// The files as those who dial use them; None: TLS is off.
pub fn client(files: &TlsConfig) -> Option<ClientTls> {
    ClientTls::of(&files.ca_file, &files.cert_file, &files.key_file)
}

impl ServerTls {
    /// Reads the files.
    ///
    /// # Errors
    /// A sentence that names the file and what is wrong with it.
    pub fn load(files: &TlsConfig) -> Result<Self, String> {
        let contents = read(files)?;
        let (config, expires_unix_s) = judge(files, &contents, now_unix_s())?;
        Ok(Self {
            files: files.clone(),
            config: watch::Sender::new(config),
            seen: Ok(contents),
            expires_unix_s,
        })
    }

    /// What handshakes use.
    pub fn config(&self) -> watch::Receiver<Arc<ServerConfig>> {
        self.config.subscribe()
    }

    /// Looks at the files and takes what is new. Whether anything was.
    fn look(&mut self, now_unix_s: i64) -> Result<bool, String> {
        let read = read(&self.files);
        if self.seen == read {
            return Ok(false);
        }
        let judged = match &read {
            Ok(contents) => judge(&self.files, contents, now_unix_s),
            Err(e) => Err(e.clone()),
        };
        self.seen = read;
        let (config, expires_unix_s) = judged?;
        self.expires_unix_s = expires_unix_s;
        self.config.send_replace(config);
        Ok(true)
    }

    /// Looks at the files again and again.
    pub async fn watch(mut self, metrics: Arc<Metrics>) {
        loop {
            metrics.grpc_certificate_expires.set(self.expires_unix_s);
            tokio::time::sleep(INTERVAL).await;
            let look = tokio::task::spawn_blocking(move || {
                let looked = self.look(now_unix_s());
                (self, looked)
            });
            let Ok((back, looked)) = look.await else {
                tracing::error!("certificates are not watched any more; restart to take new ones");
                return std::future::pending().await;
            };
            self = back;
            match looked {
                Ok(false) => {}
                Ok(true) => {
                    metrics.grpc_certificate_reloads.with_label_values(&["taken"]).inc();
                    tracing::info!(expires_unix_s = self.expires_unix_s, "new gRPC certificates are in use");
                }
                Err(reason) => {
                    metrics.grpc_certificate_reloads.with_label_values(&["refused"]).inc();
                    tracing::error!(reason, "new gRPC certificates are refused, the former stay in use");
                }
            }
        }
    }
}

/// Accepts, shakes hands, and gives on who is known, until `stop`.
pub async fn accept(
    listener: TcpListener,
    config: watch::Receiver<Arc<ServerConfig>>,
    accepted: mpsc::Sender<Known>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
    let mut open = tokio::task::JoinSet::new();
    loop {
        while open.try_join_next().is_some() {}
        let Some(Ok(slot)) = stop.run_until_cancelled(slots.clone().acquire_owned()).await else { return };
        let Some(connection) = stop.run_until_cancelled(listener.accept()).await else { return };
        let (stream, peer) = match connection {
            Ok(connection) => connection,
            Err(error) => {
                tracing::warn!(%error, "a gRPC connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, accepted) = (TlsAcceptor::from(config.borrow().clone()), accepted.clone());
        let metrics = metrics.clone();
        open.spawn(async move {
            let shaken = async {
                stream.set_nodelay(true)?;
                acceptor.accept(stream).await
            };
            let reason = match timeout(HANDSHAKE, shaken).await {
                Ok(Ok(stream)) => {
                    // The server has ended.
                    drop(accepted.send(Ok(stream)).await);
                    drop(slot);
                    return;
                }
                Ok(Err(error)) => in_words(&error),
                Err(_) => format!("its handshake took longer than {HANDSHAKE:?}"),
            };
            metrics.grpc_refused.inc();
            tracing::warn!(%peer, reason, "a gRPC client was refused");
        });
    }
}

/// A connection whose other side is known.
pub type Known = io::Result<TlsStream<TcpStream>>;

/// The connections that [`accept`] gives on.
pub fn incoming() -> (mpsc::Sender<Known>, ReceiverStream<Known>) {
    let (sender, receiver) = mpsc::channel(1);
    (sender, ReceiverStream::new(receiver))
}

/// Why a handshake failed, for whoever set the client up.
fn in_words(error: &io::Error) -> String {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
    match cause {
        Some(Error::NoCertificatesPresented) => "it presents no certificate".into(),
        Some(Error::InvalidMessage(_)) => "it does not speak TLS".into(),
        Some(Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        )) => "its certificate has expired".into(),
        Some(Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
            "its certificate is of none of the authorities in listen.tls.ca_file".into()
        }
        Some(Error::InvalidCertificate(other)) => format!("its certificate is not accepted: {other:?}"),
        Some(Error::AlertReceived(alert)) => format!("it does not accept our certificate: {alert:?}"),
        _ => error.to_string(),
    }
}

fn read(files: &TlsConfig) -> Result<Contents, String> {
    let bytes = |path: &String| std::fs::read(path).map_err(|e| format!("{path} cannot be read: {e}"));
    Ok([bytes(&files.ca_file)?, bytes(&files.cert_file)?, bytes(&files.key_file)?])
}

/// A server's side of TLS 1.2 and 1.3 that takes known clients only, and when our chain expires.
fn judge(
    files: &TlsConfig,
    [ca, cert, key]: &Contents,
    now_unix_s: i64,
) -> Result<(Arc<ServerConfig>, i64), String> {
    let of = |path: &str, what: String| format!("{}: {what}", Path::new(path).display());
    let chain = certificates(cert).map_err(|e| of(&files.cert_file, e))?;
    let expires = expiry(&chain).map_err(|e| of(&files.cert_file, e))?;
    if expires <= now_unix_s {
        return Err(of(&files.cert_file, "a certificate in it has expired".into()));
    }
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|e| of(&files.key_file, format!("no private key in PEM: {e}")))?;
    let mut roots = RootCertStore::empty();
    for authority in certificates(ca).map_err(|e| of(&files.ca_file, e))? {
        roots.add(authority).map_err(|e| of(&files.ca_file, e.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|e| of(&files.ca_file, e.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|e| match e {
            Error::InconsistentKeys(_) => {
                of(&files.key_file, format!("this is not the key of the certificate in {}", files.cert_file))
            }
            e => of(&files.cert_file, e.to_string()),
        })?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok((Arc::new(config), expires))
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|e| format!("not certificates in PEM: {e}"))?;
    if all.is_empty() { Err("it holds no certificate in PEM".into()) } else { Ok(all) }
}

fn expiry(chain: &[CertificateDer<'_>]) -> Result<i64, String> {
    let expiries = chain.iter().map(|certificate| {
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|e| format!("a certificate in it cannot be parsed: {e}"))?;
        Ok(parsed.validity().not_after.timestamp())
    });
    let expiries: Vec<i64> = expiries.collect::<Result<_, String>>()?;
    expiries.into_iter().min().ok_or_else(|| "it holds no certificate".into())
}

fn now_unix_s() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
