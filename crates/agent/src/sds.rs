//! The secret service of the pod: the workload's certificate, its roots, and files, over a unix socket.
//!
//! `default` and `ROOTCA` are what [`Workload`] holds; `file-cert:CHAIN~KEY` and `file-root:PATH` are files of the pod,
//! read again when they change. As in Istio's agent only the state-of-the-world form is there. Whoever can open the
//! socket gets the key: it belongs to the proxy's user, and to the pod's group.

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use proto::{
    Any, any,
    envoy::{
        config::core::v3::{DataSource, data_source::Specifier},
        extensions::transport_sockets::tls::v3::{
            CertificateValidationContext, Secret, TlsCertificate, secret,
        },
        service::{
            discovery::v3::{
                DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            },
            secret::v3::secret_discovery_service_server::{
                SecretDiscoveryService, SecretDiscoveryServiceServer,
            },
        },
    },
};
use tls::{
    certificate::{hex, sha256},
    identity::Identity,
    trust::Trust,
};
use tokio::{
    net::UnixListener,
    sync::{mpsc, watch},
};
use tokio_stream::{Stream, wrappers::ReceiverStream, wrappers::UnixListenerStream};
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};
use xds::type_url::SDS;

use crate::{
    AgentError,
    control_plane::SYSTEM_ROOTS,
    identity::{Current, Options, Stamp, Workload, stamp},
};

/// The workload's own certificate.
const OWN: &str = "default";
/// The roots that its peers are trusted by.
const ROOTS: &str = "ROOTCA";
const FILE_CERTIFICATE: &str = "file-cert:";
const FILE_ROOT: &str = "file-root:";
/// Names on one stream; Envoy asks for one on each.
const MAX_NAMES: usize = 100;
/// How often files that are served are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// The service.
#[derive(Debug, Clone)]
pub struct Sds {
    /// Whose certificate is served; without it only files are.
    workload: Option<Arc<Workload>>,
}

/// What the pod's secrets are served with.
#[derive(Debug)]
pub enum Place {
    /// Our socket, with everything.
    Own(PathBuf),
    /// Another serves the workload's certificate (SPIRE); files are served at a socket beside it.
    Beside(PathBuf),
}

impl Place {
    /// Looks whether somebody serves the workload's socket already.
    ///
    /// # Errors
    /// Another was to serve it (`WORKLOAD_IDENTITY_SOCKET_FILE`), and nobody does.
    pub fn find(options: &Options) -> Result<Self, AgentError> {
        let served = UnixStream::connect(&options.socket).is_ok();
        match (served, options.foreign_socket) {
            (true, _) => {
                info!(
                    "{} is served by another: the workload's certificate comes from there",
                    options.socket.display()
                );
                Ok(Self::Beside(options.files_socket.clone()))
            }
            (false, false) => Ok(Self::Own(options.socket.clone())),
            (false, true) => Err(AgentError::Config(format!(
                "WORKLOAD_IDENTITY_SOCKET_FILE: nobody serves {}",
                options.socket.display()
            ))),
        }
    }
}

impl Sds {
    /// Serves the certificate of a workload, and files.
    pub fn new(workload: Arc<Workload>) -> Self {
        Self {
            workload: Some(workload),
        }
    }

    /// Serves files alone.
    pub fn files() -> Self {
        Self { workload: None }
    }

    /// Binds the socket and serves it until the returned future is dropped. A stale socket file is replaced.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn serve(
        self,
        path: &Path,
    ) -> Result<impl Future<Output = Result<(), AgentError>> + use<>, AgentError> {
        let path = path.to_owned();
        let fail = |source: io::Error| AgentError::Listen {
            address: path.display().to_string(),
            source,
        };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(fail)?;
        }
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(e)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(fail)?;
        // For the proxy's user, and for the group that a proxyless gRPC application shares with it.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).map_err(fail)?;
        Ok(async move {
            tonic::transport::Server::builder()
                .add_service(SecretDiscoveryServiceServer::new(self))
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await
                .map_err(|e| AgentError::Listen {
                    address: path.display().to_string(),
                    source: io::Error::other(e),
                })
        })
    }
}

type Sent<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SecretDiscoveryService for Sds {
    type DeltaSecretsStream = Sent<DeltaDiscoveryResponse>;
    type StreamSecretsStream = Sent<DiscoveryResponse>;

    async fn delta_secrets(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        Err(Status::unimplemented("use StreamSecrets"))
    }

    async fn fetch_secrets(
        &self,
        _: Request<DiscoveryRequest>,
    ) -> Result<Response<DiscoveryResponse>, Status> {
        Err(Status::unimplemented("use StreamSecrets"))
    }

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        let (send, receive) = mpsc::channel(1);
        let client = Client {
            workload: self.workload.clone(),
            secrets: None,
            names: Vec::new(),
            files: Vec::new(),
            version: String::new(),
            nonce: 0,
        };
        tokio::spawn(client.serve(request.into_inner(), send));
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }
}

/// One stream.
struct Client {
    workload: Option<Arc<Workload>>,
    secrets: Option<watch::Receiver<Current>>,
    names: Vec<String>,
    /// Files that are served, as they were when they were read.
    files: Vec<File>,
    /// Of what was sent last.
    version: String,
    nonce: u64,
}

struct File {
    name: String,
    paths: Vec<(PathBuf, Stamp)>,
    secret: Option<Secret>,
}

impl Client {
    async fn serve(
        mut self,
        mut requests: Streaming<DiscoveryRequest>,
        send: mpsc::Sender<Result<DiscoveryResponse, Status>>,
    ) {
        let mut looks = tokio::time::interval(LOOK);
        loop {
            let has_files = !self.files.is_empty();
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => if let Err(status) = self.request(&request) {
                        let _ = send.send(Err(status)).await;
                        return;
                    },
                    _ => return,
                },
                () = changed(&mut self.secrets) => {}
                _ = looks.tick(), if has_files => self.files.iter_mut().for_each(File::look),
            }
            if let Some(response) = self.response()
                && send.send(Ok(response)).await.is_err()
            {
                return;
            }
        }
    }

    fn request(&mut self, request: &DiscoveryRequest) -> Result<(), Status> {
        if !request.type_url.is_empty() && request.type_url != SDS {
            return Err(Status::invalid_argument(format!(
                "{:?} is not served here",
                request.type_url
            )));
        }
        if let Some(error) = &request.error_detail {
            warn!("the proxy refuses {:?}: {}", self.names, error.message);
            return Ok(());
        }
        if request.resource_names == self.names {
            return Ok(());
        }
        if request.resource_names.len() > MAX_NAMES {
            return Err(Status::invalid_argument(format!(
                "{} names; at most {MAX_NAMES} are served on a stream",
                request.resource_names.len()
            )));
        }
        let mut files = Vec::new();
        for name in &request.resource_names {
            match &**name {
                OWN | ROOTS => {
                    let workload = self.workload.as_ref().ok_or_else(|| {
                        Status::not_found("the workload's certificate is served by another socket")
                    })?;
                    self.secrets.get_or_insert_with(|| workload.subscribe());
                }
                name => files.push(File::open(name)?),
            }
        }
        debug!("secrets asked for: {:?}", request.resource_names);
        self.names.clone_from(&request.resource_names);
        self.files = files;
        self.version.clear();
        Ok(())
    }

    /// What is there of what was asked for, unless it was sent already.
    fn response(&mut self) -> Option<DiscoveryResponse> {
        let current = self.secrets.as_mut().map(|s| s.borrow_and_update().clone());
        let current = current.unwrap_or_default();
        let secrets: Vec<Secret> = self
            .names
            .iter()
            .filter_map(|name| match &**name {
                OWN => own(&current),
                ROOTS => roots(&current),
                name => {
                    let file = self.files.iter().find(|f| f.name == name);
                    file.and_then(|f| f.secret.clone())
                }
            })
            .collect();
        if secrets.is_empty() {
            return None;
        }
        let resources: Vec<Any> = secrets.iter().map(any::pack).collect();
        let all: Vec<u8> = resources.iter().flat_map(|r| r.value.clone()).collect();
        let version = hex(&sha256(&all)[..8]);
        if version == self.version {
            return None;
        }
        self.version.clone_from(&version);
        self.nonce += 1;
        Some(DiscoveryResponse {
            version_info: version,
            resources,
            type_url: SDS.to_owned(),
            nonce: self.nonce.to_string(),
            ..DiscoveryResponse::default()
        })
    }
}

/// Until the workload has something new; never where it was not asked for. Can be dropped at any time.
async fn changed(secrets: &mut Option<watch::Receiver<Current>>) {
    if let Some(secrets) = secrets
        && secrets.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

impl File {
    fn open(name: &str) -> Result<Self, Status> {
        let unknown = || Status::not_found(format!("there is no secret {name:?}"));
        let paths: Vec<PathBuf> = if let Some(pair) = name.strip_prefix(FILE_CERTIFICATE) {
            let (chain, key) = pair.split_once('~').ok_or_else(unknown)?;
            vec![chain.into(), key.into()]
        } else if let Some(path) = name.strip_prefix(FILE_ROOT) {
            vec![match path {
                "system" => SYSTEM_ROOTS.into(),
                path => path.into(),
            }]
        } else {
            return Err(unknown());
        };
        let paths = paths.into_iter().map(|path| (path, None)).collect();
        let mut file = Self {
            name: name.to_owned(),
            paths,
            secret: None,
        };
        file.read();
        Ok(file)
    }

    fn look(&mut self) {
        if self.paths.iter().any(|(path, seen)| stamp(path) != *seen) {
            self.read();
        }
    }

    /// A file that is missing or no certificate leaves what was read before.
    fn read(&mut self) {
        for (path, seen) in &mut self.paths {
            *seen = stamp(path);
        }
        match self.load() {
            Ok(secret) => self.secret = Some(secret),
            Err(why) => warn!("secret {}: {why}", self.name),
        }
    }

    /// Only certificates and keys: no other file leaves the pod's agent this way.
    fn load(&self) -> Result<Secret, String> {
        let text =
            |path: &Path| fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()));
        match self.paths.as_slice() {
            [(chain, _), (key, _)] => {
                let (chain, key) = (text(chain)?, text(key)?);
                Identity::from_pem(chain.as_bytes(), key.as_bytes()).map_err(|e| e.to_string())?;
                Ok(certificate(&self.name, &chain, &key))
            }
            [(path, _)] => {
                let bundle = text(path)?;
                Trust::from_pem(bundle.as_bytes()).map_err(|e| e.to_string())?;
                Ok(validation(&self.name, &bundle, None))
            }
            _ => Err("no files".to_owned()),
        }
    }
}

fn own(current: &Current) -> Option<Secret> {
    let pair = current.pair.as_ref()?;
    Some(certificate(OWN, &pair.chain, &pair.key))
}

fn roots(current: &Current) -> Option<Secret> {
    let roots = current.roots.as_ref()?;
    Some(validation(ROOTS, roots, current.revocation.as_deref()))
}

fn certificate(name: &str, chain: &str, key: &str) -> Secret {
    Secret {
        name: name.to_owned(),
        r#type: Some(secret::Type::TlsCertificate(TlsCertificate {
            certificate_chain: Some(inline(chain)),
            private_key: Some(inline(key)),
            ..TlsCertificate::default()
        })),
    }
}

fn validation(name: &str, bundle: &str, revocation: Option<&str>) -> Secret {
    Secret {
        name: name.to_owned(),
        r#type: Some(secret::Type::ValidationContext(
            CertificateValidationContext {
                trusted_ca: Some(inline(bundle)),
                crl: revocation.map(inline),
                ..CertificateValidationContext::default()
            },
        )),
    }
}

fn inline(text: &str) -> DataSource {
    DataSource {
        specifier: Some(Specifier::InlineBytes(text.as_bytes().to_vec())),
        ..DataSource::default()
    }
}
