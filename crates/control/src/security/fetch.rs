//! Fetching key sets over HTTP and HTTPS.
//!
//! The URL is a user's, and who may write objects need not be who may ask everything that the control plane can reach:
//! addresses of this machine and of its link are not asked, an answer that leads elsewhere is not followed, and answers
//! have a limit.

use std::{env, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{Request, StatusCode, Uri, client::conn::http1};
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tls::jwt::{KeySetError, keys::MAX_BYTES};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, lookup_host},
};
use tokio_rustls::TlsConnector;

use super::keys::Place;

/// How long an answer may take where the rule says nothing.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("{0:?} is no http or https URL")]
    Url(String),
    #[error("{url}: {source}")]
    Connect { url: String, source: io::Error },
    #[error(
        "{url}: {address} may not be asked; the environment variable BLOCKED_CIDRS_IN_JWKS_URIS of the control plane says which"
    )]
    Blocked { url: String, address: SocketAddr },
    #[error("{url}: {problem}")]
    Http { url: String, problem: String },
    #[error("{url}: no answer within {timeout:?}")]
    Timeout { url: String, timeout: Duration },
    #[error("{url}: the answer is {status}, not 200; redirects are not followed")]
    Status { url: String, status: StatusCode },
    #[error("{0}: the answer has more than {MAX_BYTES} bytes")]
    TooLarge(String),
    #[error("{0}: the answer names no jwks_uri")]
    Discovery(String),
    #[error("{0}")]
    Keys(KeySetError),
}

/// Asks servers for key sets.
#[derive(Debug, Clone)]
pub(super) struct Fetcher {
    /// Not asked, whatever name leads there.
    pub(super) blocked: Vec<IpNet>,
    /// Authorities of https servers; `None` where there are none on this machine.
    pub(super) tls: Option<Arc<ClientConfig>>,
}

impl Fetcher {
    /// With the authorities of this system, and `BLOCKED_CIDRS_IN_JWKS_URIS` or else [`BLOCKED`].
    pub(super) fn from_env() -> Self {
        let given = env::var("BLOCKED_CIDRS_IN_JWKS_URIS").ok();
        let list = given.as_deref().unwrap_or(BLOCKED);
        let mut blocked = Vec::new();
        for text in list.split(',').map(str::trim).filter(|t| !t.is_empty()) {
            match text.parse() {
                Ok(net) => blocked.push(net),
                Err(_) => tracing::error!(
                    "BLOCKED_CIDRS_IN_JWKS_URIS: {text:?} is no address range; write it as in 169.254.0.0/16"
                ),
            }
        }
        Self {
            blocked,
            tls: authorities().map(Arc::new),
        }
    }

    /// The text of a key set.
    pub(super) async fn fetch(
        &self,
        place: &Place,
        timeout: Duration,
    ) -> Result<String, FetchError> {
        let (url, fetched) = match place {
            Place::Jwks(url) => (
                url.clone(),
                tokio::time::timeout(timeout, self.get(url)).await,
            ),
            Place::Issuer(issuer) => {
                let url = format!(
                    "{}/.well-known/openid-configuration",
                    issuer.trim_end_matches('/')
                );
                let both = async {
                    let found = self.get(&url).await?;
                    let found: serde_json::Value = serde_json::from_str(&found)
                        .map_err(|_| FetchError::Discovery(url.clone()))?;
                    let keys = found.get("jwks_uri").and_then(|uri| uri.as_str());
                    let keys = keys.ok_or_else(|| FetchError::Discovery(url.clone()))?;
                    self.get(keys).await
                };
                let fetched = tokio::time::timeout(timeout, both).await;
                (url, fetched)
            }
        };
        fetched.unwrap_or(Err(FetchError::Timeout { url, timeout }))
    }

    async fn get(&self, url: &str) -> Result<String, FetchError> {
        let not_one = || FetchError::Url(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| not_one())?;
        let host = uri.host().ok_or_else(not_one)?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let (port, encrypted) = match uri.scheme_str() {
            Some("https") => (443, true),
            Some("http") => (80, false),
            _ => return Err(not_one()),
        };
        let port = uri.port_u16().unwrap_or(port);
        let connect = |source| FetchError::Connect {
            url: url.to_owned(),
            source,
        };
        let stream = self.connect(url, host, port).await?;
        if !encrypted {
            return exchange(stream, url, &uri).await;
        }
        let config = self.tls.clone().ok_or_else(|| {
            connect(io::Error::other(
                "there are no certificate authorities on this machine",
            ))
        })?;
        let name = ServerName::try_from(host.to_owned()).map_err(|_| not_one())?;
        let stream = TlsConnector::from(config).connect(name, stream).await;
        exchange(stream.map_err(connect)?, url, &uri).await
    }

    /// A connection to an address of the host that may be asked. The address is looked at, not the name: names may change
    /// their mind.
    async fn connect(&self, url: &str, host: &str, port: u16) -> Result<TcpStream, FetchError> {
        let failed = |source| FetchError::Connect {
            url: url.to_owned(),
            source,
        };
        let addresses = lookup_host((host, port)).await.map_err(failed)?;
        let mut last = FetchError::Connect {
            url: url.to_owned(),
            source: io::Error::other("the host has no address"),
        };
        for address in addresses {
            let ip = address.ip().to_canonical();
            if self.blocked.iter().any(|net| net.contains(&ip)) {
                last = FetchError::Blocked {
                    url: url.to_owned(),
                    address,
                };
                continue;
            }
            match TcpStream::connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = failed(error),
            }
        }
        Err(last)
    }
}

async fn exchange<S>(stream: S, url: &str, uri: &Uri) -> Result<String, FetchError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed = |problem: String| FetchError::Http {
        url: url.to_owned(),
        problem,
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed(error.to_string()))?;
    // Whoever asks sees the error, too.
    let driver = tokio::spawn(async move { drop(connection.await) });
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    // A user name in a URL is not for the server to see.
    let host = authority
        .rsplit_once('@')
        .map_or(authority, |(_, host)| host);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path)
        .header("host", host)
        .header("accept", "application/json")
        .header("connection", "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| failed(error.to_string()))?;
    let read = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| failed(error.to_string()))?;
        let status = response.status();
        if status != StatusCode::OK {
            return Err(FetchError::Status {
                url: url.to_owned(),
                status,
            });
        }
        let (mut body, mut read) = (response.into_body(), Vec::new());
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| failed(error.to_string()))?;
            if let Ok(data) = frame.into_data() {
                if read.len() + data.len() > MAX_BYTES {
                    return Err(FetchError::TooLarge(url.to_owned()));
                }
                read.extend_from_slice(&data);
            }
        }
        String::from_utf8(read).map_err(|_| failed("the answer is no text".to_owned()))
    };
    let text = read.await;
    driver.abort();
    text
}

/// The authorities that this system trusts.
fn authorities() -> Option<ClientConfig> {
    const BUNDLES: [&str; 4] = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/cert.pem",
        "/etc/ssl/ca-bundle.pem",
    ];
    let given = env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let mut files = given.into_iter().chain(BUNDLES.iter().map(PathBuf::from));
    let pem = files.find_map(|file| std::fs::read(file).ok())?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&pem).flatten());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .ok()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Some(config)
}

/// This machine, its link (with the metadata servers of clouds), and nowhere.
pub(super) const BLOCKED: &str = "127.0.0.0/8,::1/128,169.254.0.0/16,fe80::/10,0.0.0.0/8,::/128";
