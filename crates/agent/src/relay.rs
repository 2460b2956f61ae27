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
    time::Duration,
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
use tonic::{
    Request, Response, Status, Streaming,
    metadata::{MetadataKey, MetadataMap, MetadataValue},
    transport::{Channel, Endpoint},
};
use tracing::{info, warn};

use xds::type_url::NDS;

use crate::{AgentError, dns::Dns};

/// Types that only the agent understands are not passed to the proxy.
const PROXY_TYPES: [&str; 2] = [
    "type.googleapis.com/envoy.",
    "type.googleapis.com/istio.workload.",
];

/// The relay.
#[derive(Debug)]
pub struct Relay {
    upstream: String,
    headers: MetadataMap,
    /// Who takes the mesh's names, where DNS is captured: they are asked for beside what the proxy asks for.
    names: Option<Arc<Dns>>,
    /// Counts streams of the proxy: an older one ends when it sees a newer one.
    newest: watch::Sender<u64>,
}

impl Relay {
    /// Relays to `upstream` (`host:port`, plaintext). `headers` go along with each stream.
    pub fn new(upstream: &str, headers: &[(String, String)]) -> Result<Self, AgentError> {
        let mut map = MetadataMap::new();
        for (name, value) in headers {
            let bad = |what: &str| {
                AgentError::Config(format!(
                    "xDS header {name}={value:?}: the {what} is not valid in HTTP"
                ))
            };
            let key = MetadataKey::from_bytes(name.to_ascii_lowercase().as_bytes())
                .map_err(|_| bad("name"))?;
            map.insert(
                key,
                MetadataValue::try_from(value).map_err(|_| bad("value"))?,
            );
        }
        Ok(Self {
            upstream: upstream.to_owned(),
            headers: map,
            names: None,
            newest: watch::Sender::new(0),
        })
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

    async fn client(&self) -> Result<AggregatedDiscoveryServiceClient<Channel>, Status> {
        let unavailable = |e: tonic::transport::Error| {
            let mut why = e.to_string();
            let mut source = std::error::Error::source(&e);
            while let Some(inner) = source {
                why = format!("{why}: {inner}");
                source = inner.source();
            }
            warn!("control plane {}: {why}", self.upstream);
            Status::unavailable(format!("control plane {}: {why}", self.upstream))
        };
        // A connection a stream: names are looked up anew, and a dead connection is never met again.
        let channel = Endpoint::from_shared(format!("http://{}", self.upstream))
            .map_err(unavailable)?
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(2 << 20)
            .connect()
            .await
            .map_err(unavailable)?;
        Ok(AggregatedDiscoveryServiceClient::new(channel)
            .max_decoding_message_size(usize::MAX)
            .max_encoding_message_size(usize::MAX))
    }

    /// Reads the proxy's requests into a queue. It is unbounded on purpose: with a bound, a control plane that
    /// waits for us to read and a proxy that waits for us to read lock each other up.
    fn requests<T: Ask>(
        &self,
        mut from: Streaming<T>,
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
        *request.metadata_mut() = self.headers.clone();
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
        let upstream = self.upstream.clone();
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
        let mut client = self.client().await?;
        let (requests, own) = self.requests(request.into_inner());
        let responses = client.stream_aggregated_resources(requests).await?;
        info!("relaying a state-of-the-world stream to {}", self.upstream);
        Ok(Response::new(self.responses(responses.into_inner(), own)))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let mut client = self.client().await?;
        let (requests, own) = self.requests(request.into_inner());
        let responses = client.delta_aggregated_resources(requests).await?;
        info!("relaying a delta stream to {}", self.upstream);
        Ok(Response::new(self.responses(responses.into_inner(), own)))
    }
}
