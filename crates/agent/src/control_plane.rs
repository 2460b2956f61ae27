//! The control plane as a peer: where it is, what it is believed by, and what proves us to it.
//!
//! Roots, token and client certificate are read anew for each connection: they are replaced while the pod runs.

use std::{
    env, fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use base::clock::Clock;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use tls::{
    client::{ClientOptions, client},
    identity::Identity,
    parameters::Parameters,
    trust::Trust,
    verify::Validation,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::{
    metadata::{MetadataKey, MetadataMap, MetadataValue},
    transport::{Channel, Endpoint},
};

use crate::AgentError;

/// Where the root of the control plane is mounted (ConfigMap `istio-ca-root-cert`).
pub const ROOT: &str = "/var/run/secrets/istio/root-cert.pem";
/// Where the projected service account token is.
pub const TOKEN: &str = "/var/run/secrets/tokens/istio-token";
/// What `SYSTEM` stands for: the public authorities of the image.
pub const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";
/// A token beyond this is none; Kubernetes' are of about one kilobyte.
const MAX_TOKEN: u64 = 64 * 1024;

/// A port of the control plane.
#[derive(Debug, Clone)]
pub struct ControlPlane {
    /// `HOST:PORT`.
    address: String,
    secure: Option<Secure>,
    headers: MetadataMap,
}

/// What TLS to the control plane stands on.
#[derive(Debug, Clone)]
pub struct Secure {
    /// Roots that the control plane is believed by, PEM.
    pub roots: PathBuf,
    /// The name that its certificate must have; the address' host where it is not given (`ISTIOD_SAN`).
    pub server_name: Option<String>,
    /// The service account token that proves us.
    pub token: PathBuf,
    /// A certificate that proves us instead, as chain and key (`PROV_CERT`).
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// By whose time certificates are judged.
    pub clock: Clock,
}

/// The settings that environment variables give for TLS to the control plane.
impl Secure {
    /// Reads them; `root_variable` is `XDS_ROOT_CA` or `CA_ROOT_CA`.
    pub fn read(root_variable: &str, clock: Clock) -> Self {
        let text = |name: &str| env::var(name).ok().filter(|v| !v.is_empty());
        let roots = match text(root_variable) {
            Some(name) if name == "SYSTEM" => SYSTEM_ROOTS.into(),
            Some(path) => path.into(),
            None => ROOT.into(),
        };
        let certificate = text("PROV_CERT").map(|folder| {
            let folder = PathBuf::from(folder);
            (folder.join("cert-chain.pem"), folder.join("key.pem"))
        });
        Self {
            roots,
            server_name: text("ISTIOD_SAN"),
            token: TOKEN.into(),
            certificate,
            clock,
        }
    }
}

impl ControlPlane {
    /// Without TLS, for networks that are trusted (15010).
    pub fn plaintext(address: &str) -> Self {
        Self {
            address: address.to_owned(),
            secure: None,
            headers: MetadataMap::new(),
        }
    }

    /// Over TLS (15012).
    pub fn secure(address: &str, secure: Secure) -> Self {
        Self {
            address: address.to_owned(),
            secure: Some(secure),
            headers: MetadataMap::new(),
        }
    }

    /// Sends these headers along with each call.
    ///
    /// # Errors
    /// One of them cannot be sent in HTTP.
    pub fn with_headers(mut self, headers: &[(String, String)]) -> Result<Self, AgentError> {
        for (name, value) in headers {
            let bad = |what: &str| {
                AgentError::Config(format!(
                    "header {name}={value:?}: the {what} is not valid in HTTP"
                ))
            };
            let key = MetadataKey::from_bytes(name.to_ascii_lowercase().as_bytes())
                .map_err(|_| bad("name"))?;
            let value = MetadataValue::try_from(value).map_err(|_| bad("value"))?;
            self.headers.insert(key, value);
        }
        Ok(self)
    }

    /// `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What goes along with a call: the headers and, over TLS alone, the token.
    ///
    /// # Errors
    /// There is no token that could be sent, and no certificate in its place.
    pub fn metadata(&self) -> Result<MetadataMap, String> {
        let mut out = self.headers.clone();
        let Some(secure) = &self.secure else {
            return Ok(out);
        };
        match read_token(&secure.token) {
            Ok(token) => {
                let mut value = MetadataValue::try_from(format!("Bearer {token}"))
                    .map_err(|_| format!("{}: no token", secure.token.display()))?;
                value.set_sensitive(true);
                out.insert("authorization", value);
            }
            // With a certificate of its own a workload needs no token.
            Err(_) if secure.certificate.is_some() => {}
            Err(why) => return Err(why),
        }
        Ok(out)
    }

    /// A connection of its own for each purpose: names are looked up anew, and a dead one is never met again.
    ///
    /// # Errors
    /// Why there is none: the whole chain of reasons.
    pub async fn connect(&self) -> Result<Channel, String> {
        let scheme = if self.secure.is_some() {
            "https"
        } else {
            "http"
        };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{}", self.address))
            .map_err(|e| reasons(&e))?
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(2 << 20);
        let Some(secure) = &self.secure else {
            return endpoint.connect().await.map_err(|e| reasons(&e));
        };
        let config = secure.config()?;
        let host = self.address.rsplit_once(':').map_or("", |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let wanted = secure.server_name.as_deref().unwrap_or(host);
        let name = ServerName::try_from(wanted.to_owned())
            .map_err(|_| format!("{wanted:?} is not a name that a certificate can have"))?;
        let address = self.address.clone();
        let connector = tower::service_fn(move |_| {
            let connector = TlsConnector::from(config.clone());
            let (name, address) = (name.clone(), address.clone());
            async move {
                let stream = TcpStream::connect(&address).await?;
                stream.set_nodelay(true)?;
                let wanted = name.to_str().into_owned();
                let stream = connector
                    .connect(name, stream)
                    .await
                    .map_err(|e| io::Error::new(e.kind(), format!("TLS with {wanted}: {e}")))?;
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        });
        endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|e| reasons(&e))
    }
}

impl Secure {
    fn config(&self) -> Result<Arc<ClientConfig>, String> {
        let roots = fs::read(&self.roots).map_err(|e| {
            format!(
                "{}: {e} (the root that the control plane is believed by)",
                self.roots.display()
            )
        })?;
        let trust =
            Trust::from_pem(&roots).map_err(|e| format!("{}: {e}", self.roots.display()))?;
        let validation = Validation {
            trust: Some(Arc::new(trust)),
            server_name: true,
            ..Validation::default()
        };
        let options = ClientOptions {
            parameters: Parameters::default(),
            alpn: vec![b"h2".to_vec()],
            session_names: 0,
            clock: self.clock.clone(),
        };
        let identity = self.identity();
        client(&options, identity.as_ref(), Some(&Arc::new(validation))).map_err(|e| e.to_string())
    }

    /// The certificate that proves us. Where it has expired or cannot be read the token does.
    fn identity(&self) -> Option<Identity> {
        let (chain, key) = self.certificate.as_ref()?;
        let read = |path: &Path| {
            fs::read(path)
                .inspect_err(|e| tracing::warn!("{}: {e}; the token is used", path.display()))
                .ok()
        };
        let identity = Identity::from_pem(&read(chain)?, &read(key)?)
            .inspect_err(|e| tracing::warn!("{}: {e}; the token is used", chain.display()))
            .ok()?;
        let until = u64::try_from(identity.leaf().not_after).unwrap_or(0);
        if until <= self.clock.seconds() {
            tracing::warn!("{}: it has expired; the token is used", chain.display());
            return None;
        }
        Some(identity)
    }
}

/// The token as it is now: the kubelet replaces it long before it expires.
fn read_token(path: &Path) -> Result<String, String> {
    let fail = |why: &dyn fmt::Display| format!("service account token {}: {why}", path.display());
    let size = fs::metadata(path).map_err(|e| fail(&e))?.len();
    if size > MAX_TOKEN {
        return Err(fail(&format_args!("{size} bytes are too many")));
    }
    let text = fs::read_to_string(path).map_err(|e| fail(&e))?;
    match text.trim() {
        "" => Err(fail(&"it is empty")),
        token => Ok(token.to_owned()),
    }
}

/// An error with all that led to it.
fn reasons(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        out = format!("{out}: {inner}");
        source = inner.source();
    }
    out
}
