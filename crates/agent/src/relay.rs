//! The xDS relay: the proxy speaks to a unix socket, the agent to the control plane.
//!
//! Each stream of the proxy gets a stream of its own to the control plane, in the same form of the protocol, and
//! the messages pass as they are. When the upstream is lost the proxy's stream ends, too, so that the proxy always
//! begins anew with all it wants. A newer stream of the proxy ends the older one.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
};

use prost::Message as _;
use proto::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    aggregated_discovery_service_server::{
        AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
    },
};
use proto::istio::networking::nds::v1::NameTable;
use tokio::{
    net::UnixListener,
    sync::{mpsc, watch},
};
use tokio_stream::{
    Stream,
    wrappers::{UnboundedReceiverStream, UnixListenerStream},
};
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap, transport::Channel};
use tracing::{info, warn};

use xds::{client::MAX_RESPONSE, type_url::NDS};

use crate::{AgentError, control_plane::ControlPlane, dns::Dns};

/// Types that only the agent understands are not passed to the proxy.
const PROXY_TYPES: [&str; 2] = [
    "type.googleapis.com/envoy.",
    "type.googleapis.com/istio.workload.",
];

/// The relay.
#[derive(Debug)]
pub struct Relay {
    control_plane: ControlPlane,
    /// Who takes the mesh's names, where DNS is captured: they are asked for beside what the proxy asks for.
    names: Option<Arc<Dns>>,
    /// Counts streams of the proxy: an older one ends when it sees a newer one.
    newest: watch::Sender<u64>,
}

impl Relay {
    /// Relays to the control plane.
    pub fn new(control_plane: ControlPlane) -> Self {
        Self {
            control_plane,
            names: None,
            newest: watch::Sender::new(0),
        }
    }

    /// Subscribes to the mesh's names as well, for `dns`.
    pub fn with_names(mut self, dns: Option<Arc<Dns>>) -> Self {
        self.names = dns;
        self
    }

    /// Binds the socket and serves it until the returned future is dropped. A stale socket file is replaced.
    pub fn serve(
        self: Arc<Self>,
        path: &Path,
    ) -> Result<impl Future<Output = Result<(), AgentError>> + use<>, AgentError> {
        let fail = |source: io::Error| AgentError::Listen {
            address: path.display().to_string(),
            source,
        };
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(e)),
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(fail)?;
        // Readable by the pod's group, so that a proxyless gRPC application can use it.
        fs::set_permissions(path, fs::Permissions::from_mode(0o660)).map_err(fail)?;
        let path: PathBuf = path.to_owned();
        let service = AggregatedDiscoveryServiceServer::from_arc(self)
            .max_decoding_message_size(usize::MAX)
            .max_encoding_message_size(usize::MAX);
        Ok(async move {
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await
                .map_err(|e| AgentError::Listen {
                    address: path.display().to_string(),
                    source: io::Error::other(e),
                })
        })
    }

    /// A connection a stream, and what goes along with its first request: a token is read when it is needed.
    async fn client(
        &self,
    ) -> Result<(AggregatedDiscoveryServiceClient<Channel>, MetadataMap), Status> {
        let unavailable = |why: String| {
            let why = format!("control plane {}: {why}", self.control_plane.address());
            warn!("{why}");
            Status::unavailable(why)
        };
        let metadata = self.control_plane.metadata().map_err(unavailable)?;
        let channel = self.control_plane.connect().await.map_err(unavailable)?;
        let client = AggregatedDiscoveryServiceClient::new(channel)
            .max_decoding_message_size(MAX_RESPONSE)
            .max_encoding_message_size(usize::MAX);
        Ok((client, metadata))
    }

    /// Reads the proxy's requests into a queue. It is unbounded on purpose: with a bound, a control plane that
    /// waits for us to read and a proxy that waits for us to read lock each other up.
    fn requests<T: Ask>(
        &self,
        mut from: Streaming<T>,
        metadata: MetadataMap,
    ) -> (
        Request<UnboundedReceiverStream<T>>,
        mpsc::UnboundedSender<T>,
    ) {
        let (send, receive) = mpsc::unbounded_channel();
        let own = send.clone();
        let mut names = self.names.is_some();
        tokio::spawn(async move {
            while let Ok(Some(request)) = from.message().await {
                if send.send(request).is_err() {
                    return;
                }
                // Behind the proxy's first request, which says who this is.
                if std::mem::take(&mut names) && send.send(T::subscribe(NDS)).is_err() {
                    return;
                }
            }
        });
        let mut request = Request::new(UnboundedReceiverStream::new(receive));
        *request.metadata_mut() = metadata;
        (request, own)
    }

    /// Carries responses to the proxy until either end closes or a newer stream takes over.
    fn responses<T: TypeUrl>(
        &self,
        mut from: Streaming<T>,
        requests: mpsc::UnboundedSender<T::Request>,
    ) -> Responses<T> {
        let names = self.names.clone();
        let mine = self.newest.borrow().wrapping_add(1);
        self.newest.send_replace(mine);
        let mut newest = self.newest.subscribe();
        let (send, receive) = mpsc::channel(1);
        let upstream = self.control_plane.address().to_owned();
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    message = from.message() => message,
                    _ = newest.wait_for(|n| *n != mine) => {
                        Err(Status::aborted("a newer stream of the proxy took over"))
                    }
                    () = send.closed() => return,
                };
                let item = match message {
                    Ok(Some(m)) if PROXY_TYPES.iter().any(|p| m.type_url().starts_with(p)) => Ok(m),
                    Ok(Some(m)) if m.type_url() == NDS && names.is_some() => {
                        let error = names.as_ref().and_then(|dns| take_names(dns, &m).err());
                        if let Some(e) = &error {
                            warn!("the control plane's name table cannot be read: {e}");
                        }
                        // Where the stream has ended meanwhile, the next one asks anew.
                        let _ = requests.send(m.answer(error));
                        continue;
                    }
                    Ok(Some(m)) => {
                        warn!("dropped a response of type {}: no proxy type", m.type_url());
                        continue;
                    }
                    Ok(None) => Err(Status::unavailable("the control plane closed the stream")),
                    Err(status) => Err(status),
                };
                let end = item.is_err();
                if let Err(status) = &item {
                    info!("stream to {upstream} ended: {}", status.message());
                }
                if send.send(item).await.is_err() || end {
                    return;
                }
            }
        });
        Box::pin(tokio_stream::wrappers::ReceiverStream::new(receive))
    }
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A response of either form.
trait TypeUrl: Send + 'static {
    type Request: Send + 'static;

    fn type_url(&self) -> &str;

    /// The messages in it.
    fn bodies(&self) -> Vec<&prost_types::Any>;

    /// ACK, or NACK with a reason.
    fn answer(&self, error: Option<String>) -> Self::Request;
}

/// A request of either form.
trait Ask: Send + 'static {
    /// The first request for all resources of a type.
    fn subscribe(type_url: &str) -> Self;
}

impl TypeUrl for DeltaDiscoveryResponse {
    type Request = DeltaDiscoveryRequest;

    fn type_url(&self) -> &str {
        &self.type_url
    }

    fn bodies(&self) -> Vec<&prost_types::Any> {
        let bodies = self.resources.iter().map(|r| r.resource.as_ref());
        bodies.flatten().collect()
    }

    fn answer(&self, error: Option<String>) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            type_url: self.type_url.clone(),
            response_nonce: self.nonce.clone(),
            error_detail: error.map(refusal),
            ..DeltaDiscoveryRequest::default()
        }
    }
}

impl TypeUrl for DiscoveryResponse {
    type Request = DiscoveryRequest;

    fn type_url(&self) -> &str {
        &self.type_url
    }

    fn bodies(&self) -> Vec<&prost_types::Any> {
        self.resources.iter().collect()
    }

    fn answer(&self, error: Option<String>) -> DiscoveryRequest {
        DiscoveryRequest {
            type_url: self.type_url.clone(),
            version_info: match error {
                None => self.version_info.clone(),
                Some(_) => String::new(),
            },
            response_nonce: self.nonce.clone(),
            error_detail: error.map(refusal),
            ..DiscoveryRequest::default()
        }
    }
}

impl Ask for DeltaDiscoveryRequest {
    fn subscribe(type_url: &str) -> Self {
        DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            ..Self::default()
        }
    }
}

impl Ask for DiscoveryRequest {
    fn subscribe(type_url: &str) -> Self {
        DiscoveryRequest {
            type_url: type_url.to_owned(),
            ..Self::default()
        }
    }
}

fn refusal(message: String) -> proto::google::rpc::Status {
    proto::google::rpc::Status {
        code: tonic::Code::InvalidArgument as i32,
        message,
        details: Vec::new(),
    }
}

/// Gives the name table of a response to the name server. A response without one says that nothing has changed.
fn take_names<T: TypeUrl>(dns: &Dns, response: &T) -> Result<(), String> {
    for body in response.bodies() {
        let table = NameTable::decode(&body.value[..]).map_err(|e| e.to_string())?;
        dns.update(&table);
    }
    Ok(())
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Relay {
    type StreamAggregatedResourcesStream = Responses<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Responses<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        let (mut client, metadata) = self.client().await?;
        let (requests, own) = self.requests(request.into_inner(), metadata);
        let responses = client.stream_aggregated_resources(requests).await?;
        info!(
            "relaying a state-of-the-world stream to {}",
            self.control_plane.address()
        );
        Ok(Response::new(self.responses(responses.into_inner(), own)))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (mut client, metadata) = self.client().await?;
        let (requests, own) = self.requests(request.into_inner(), metadata);
        let responses = client.delta_aggregated_resources(requests).await?;
        info!(
            "relaying a delta stream to {}",
            self.control_plane.address()
        );
        Ok(Response::new(self.responses(responses.into_inner(), own)))
    }
}
