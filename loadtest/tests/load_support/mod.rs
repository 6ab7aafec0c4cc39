//! A front for the simulator, which speaks neither TLS nor HTTP/2: it takes both and passes on what it gets.
#![allow(clippy::unwrap_used)]

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

/// It ends with this.
pub(crate) struct Front {
    pub(crate) address: SocketAddr,
    /// PEM.
    pub(crate) certificate: String,
    pub(crate) connections: Arc<AtomicU64>,
    _task: JoinSet<()>,
}

/// In front of `engine`; over TLS with these protocols, or in clear.
pub(crate) async fn start(engine: SocketAddr, alpn: Option<&[&str]>) -> Front {
    let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
    let acceptor = alpn.map(|alpn| {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der()));
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key)
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        TlsAcceptor::from(Arc::new(config))
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&connections);
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut serving = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
            let acceptor = acceptor.clone();
            serving.spawn(async move {
                match acceptor {
                    None => serve(stream, engine).await,
                    // A client that trusts nobody here leaves within the handshake.
                    Some(acceptor) => {
                        if let Ok(stream) = acceptor.accept(stream).await {
                            serve(stream, engine).await;
                        }
                    }
                }
            });
        }
    });
    Front { address, certificate: certified.cert.pem(), connections, _task: task }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, engine: SocketAddr) {
    let client = Client::builder(TokioExecutor::new()).build_http::<Incoming>();
    let pass = service_fn(move |request: Request<Incoming>| {
        let client = client.clone();
        async move {
            let (mut head, body) = request.into_parts();
            head.uri = format!("http://{engine}{}", head.uri.path()).parse().unwrap();
            head.version = hyper::Version::HTTP_11;
            head.headers.remove("host");
            let answered: Result<Response<Incoming>, _> =
                client.request(Request::from_parts(head, body)).await;
            answered
        }
    });
    // The client closes when it wants.
    auto::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), pass)
        .await
        .unwrap_or_default();
}
