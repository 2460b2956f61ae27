//! Port 15012: the same gRPC over TLS, with a certificate of our own authority, for peers with a certificate or a token.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use base::{clock::Clock, spiffe::Identity};
use rustls::{
    RootCertStore, ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tls::parameters::Time;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tracing::{debug, warn};

use crate::ca::{Authority, CaError};

/// A handshake takes a few round trips; who needs longer is no proxy.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Age at which the port's certificate is replaced: it is signed for 90 days.
const RENEW: Duration = Duration::from_secs(30 * 24 * 3600);
/// How often that age is looked at.
const LOOK: Duration = Duration::from_secs(60);
/// Handshakes at once: what they cost is spent before anybody has proven anything.
const HANDSHAKES: usize = 256;

/// The names that proxies and the API server know the control plane of a revision by.
pub fn names(namespace: &str, revision: &str) -> Vec<String> {
    let own = kubernetes::of_revision("istiod", revision);
    let mut services = vec!["istiod".to_owned(), "istio-pilot".to_owned()];
    if !services.contains(&own) {
        services.push(own);
    }
    services
        .iter()
        .flat_map(|service| {
            [
                format!("{service}.{namespace}.svc"),
                format!("{service}.{namespace}"),
            ]
        })
        .chain(std::iter::once("localhost".to_owned()))
        .collect()
}

/// TLS settings with a fresh certificate of the authority. Clients may show a certificate, and then it must be good.
pub fn server_config(
    authority: &Authority,
    names: &[String],
    clock: &Clock,
) -> Result<ServerConfig, CaError> {
    let sign = |e: &dyn std::fmt::Display| CaError::Sign(e.to_string());
    let (chain, key) = authority.serve(names)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain.as_bytes()).collect();
    let chain = chain.map_err(|e| sign(&e))?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|e| sign(&e))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let time = Arc::new(Time(clock.clone()));
    let mut config = ServerConfig::builder_with_details(provider.clone(), time)
        .with_safe_default_protocol_versions()
        .map_err(|e| sign(&e))?
        .with_client_cert_verifier(clients(authority, provider)?)
        .with_single_cert(chain, key)
        .map_err(|e| sign(&e))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A session that is taken up again shows no certificate, and who it was may have none that is good any more.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn clients(
    authority: &Authority,
    provider: Arc<rustls::crypto::CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, CaError> {
    let sign = |e: &dyn std::fmt::Display| CaError::Sign(e.to_string());
    let mut roots = RootCertStore::empty();
    for der in CertificateDer::pem_slice_iter(authority.roots().as_bytes()) {
        roots
            .add(der.map_err(|e| sign(&e))?)
            .map_err(|e| sign(&e))?;
    }
    WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
        .allow_unauthenticated()
        .build()
        .map_err(|e| sign(&e))
}

/// Keeps the TLS settings of a port in step with the authority, and its certificate good; ends with its receivers.
pub fn keep(
    authority: Arc<Authority>,
    names: Vec<String>,
    clock: Clock,
) -> Result<watch::Receiver<Arc<ServerConfig>>, CaError> {
    let first = Arc::new(server_config(&authority, &names, &clock)?);
    let (send, receive) = watch::channel(first);
    let mut roots = authority.changes();
    roots.mark_unchanged();
    tokio::spawn(async move {
        let mut made = clock.now();
        loop {
            let changed = tokio::select! {
                changed = roots.changed() => changed.is_ok(),
                () = tokio::time::sleep(LOOK) => false,
                () = send.closed() => return,
            };
            // A clock that was set back makes a certificate that has not begun.
            let age = clock.now().duration_since(made);
            if !changed && age.is_ok_and(|age| age < RENEW) {
                continue;
            }
            match server_config(&authority, &names, &clock) {
                Ok(config) => {
                    made = clock.now();
                    send.send_replace(Arc::new(config));
                }
                Err(error) => warn!("secureGRPCAddr: the former certificate stays: {error}"),
            }
        }
    });
    Ok(receive)
}

/// Accepts connections and shakes hands with each on a task of its own, with the settings of the moment.
pub fn incoming(
    listener: TcpListener,
    config: watch::Receiver<Arc<ServerConfig>>,
) -> ReceiverStream<io::Result<Secure>> {
    let (send, receive) = mpsc::channel(64);
    let places = Arc::new(Semaphore::new(HANDSHAKES));
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = send.closed() => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // No descriptors left, for example: others end, and then there are some.
                    warn!("secureGRPCAddr: accept: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            let acceptor = TlsAcceptor::from(config.borrow().clone());
            let send = send.clone();
            tokio::spawn(async move {
                let _ = stream.set_nodelay(true);
                match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => {
                        let _ = send.send(Ok(Secure::new(stream, peer))).await;
                    }
                    Ok(Err(error)) => debug!("secureGRPCAddr: {peer}: handshake: {error}"),
                    Err(_) => debug!("secureGRPCAddr: {peer}: no handshake in {HANDSHAKE:?}"),
                }
                drop(place);
            });
        }
    });
    ReceiverStream::new(receive)
}

/// A connection over TLS, with whom it is.
#[derive(Debug)]
pub struct Secure {
    stream: TlsStream<TcpStream>,
    info: SecureInfo,
}

/// What the service learns of a connection.
#[derive(Debug, Clone)]
pub struct SecureInfo {
    /// Addresses, under the type that `Request::remote_addr` looks for.
    pub tcp: TcpConnectInfo,
    /// The identity of the client's certificate.
    pub identity: Option<Identity>,
}

impl Secure {
    fn new(stream: TlsStream<TcpStream>, peer: SocketAddr) -> Self {
        let (tcp, session) = stream.get_ref();
        let leaf = session.peer_certificates().and_then(|c| c.first());
        let identity = leaf.and_then(|leaf| identity_of(leaf));
        let info = SecureInfo {
            tcp: TcpConnectInfo {
                local_addr: tcp.local_addr().ok(),
                remote_addr: Some(peer),
            },
            identity,
        };
        Self { stream, info }
    }
}

/// Who is at the other end of a request's connection, over TLS or not.
#[derive(Debug, Clone, Default)]
pub struct Peer {
    /// Its address.
    pub address: Option<SocketAddr>,
    /// The identity that its certificate proved.
    pub identity: Option<Identity>,
}

impl Peer {
    /// The peer of a request.
    pub fn of<T>(request: &tonic::Request<T>) -> Self {
        match request.extensions().get::<SecureInfo>() {
            Some(info) => Self {
                address: info.tcp.remote_addr,
                identity: info.identity.clone(),
            },
            None => Self {
                address: request.remote_addr(),
                identity: None,
            },
        }
    }

    /// Its address for logs.
    pub fn name(&self) -> String {
        self.address
            .map_or_else(|| "unknown".to_owned(), |a| a.to_string())
    }
}

/// The one workload identity of a certificate. Two would leave open who it is; a common name is none.
fn identity_of(leaf: &CertificateDer<'_>) -> Option<Identity> {
    use x509_parser::extensions::GeneralName;
    let (_, parsed) = x509_parser::parse_x509_certificate(leaf).ok()?;
    let names = parsed.subject_alternative_name().ok()??;
    let mut uris = names.value.general_names.iter().filter_map(|n| match n {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let first = uris.next()?;
    if uris.next().is_some() {
        return None;
    }
    first.parse().ok()
}

impl Connected for Secure {
    type ConnectInfo = SecureInfo;

    fn connect_info(&self) -> SecureInfo {
        self.info.clone()
    }
}

impl AsyncRead for Secure {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Secure {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_answers_to_its_own_service_too() {
        let of = |revision: &str| names("istio-system", revision);
        assert!(of("canary").contains(&"istiod-canary.istio-system.svc".to_owned()));
        assert!(of("canary").contains(&"istiod.istio-system.svc".to_owned()));
        assert_eq!(of("default"), of(""));
        assert_eq!(of("default").len(), 5);
    }
}
