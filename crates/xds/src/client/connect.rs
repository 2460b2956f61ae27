//! tonic adaptor: opens an ADS stream over TCP or a unix socket.

use std::{path::PathBuf, time::Duration};

use proto::envoy::service::{
    discovery::v3::{
        DeltaDiscoveryResponse, DiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient,
};
use tokio::{net::UnixStream, sync::mpsc};
use tokio_stream::{StreamExt, wrappers::UnboundedReceiverStream};
use tonic::{
    metadata::{MetadataKey, MetadataValue},
    transport::{Channel, Endpoint},
};

use super::Outgoing;
use crate::Mode;

/// The largest response that is read, in bytes. A whole configuration is far beyond gRPC's default of 4 MiB: all endpoints
/// of the largest cluster that Kubernetes supports (150,000 pods) are some 40 MB. What is larger is refused by its length,
/// before it is read.
pub const MAX_RESPONSE: usize = 128 << 20;

/// Where the server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Plaintext HTTP/2 to `host:port`.
    Tcp(String),
    /// A unix socket.
    Unix(PathBuf),
}

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody answers there.
    #[error("cannot reach the xDS server at {target:?}: {source}")]
    Connect {
        /// The address.
        target: Target,
        /// The transport's word.
        source: tonic::transport::Error,
    },
    /// A header name or value that HTTP does not allow.
    #[error("header {0:?} is not valid for gRPC")]
    Header(String),
    /// The server refused the stream.
    #[error("the xDS server at {target:?} refused the stream: {status}")]
    Refused {
        /// The address.
        target: Target,
        /// Its status.
        status: Box<tonic::Status>,
    },
}

/// An open stream. Dropping `requests` half-closes it.
#[derive(Debug)]
pub struct Connection {
    /// Requests to the server; they must be of the stream's mode.
    pub requests: mpsc::UnboundedSender<Outgoing>,
    /// Responses of the server.
    pub responses: Incoming,
}

/// Responses of the server.
#[derive(Debug)]
pub enum Incoming {
    /// Of a delta stream.
    Delta(tonic::Streaming<DeltaDiscoveryResponse>),
    /// Of a state-of-the-world stream.
    Sotw(tonic::Streaming<DiscoveryResponse>),
}

/// Which stream is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// The aggregated one: all types.
    Aggregated,
    /// Secrets alone.
    Secrets,
}

/// Opens an ADS stream. `first` must hold the requests to begin with: a server may answer the call itself only when
/// it has seen one. `headers` go along as gRPC metadata.
pub async fn connect(
    target: &Target,
    mode: Mode,
    headers: &[(String, String)],
    first: Vec<Outgoing>,
) -> Result<Connection, ConnectError> {
    connect_to(Service::Aggregated, target, mode, headers, first).await
}

/// Opens a stream of a service, see [`connect`].
pub async fn connect_to(
    service: Service,
    target: &Target,
    mode: Mode,
    headers: &[(String, String)],
    first: Vec<Outgoing>,
) -> Result<Connection, ConnectError> {
    let channel = channel(target)
        .await
        .map_err(|source| ConnectError::Connect {
            target: target.clone(),
            source,
        })?;
    let (requests, queue) = mpsc::unbounded_channel();
    for request in first {
        // The receiver is right here, so this cannot fail.
        let _ = requests.send(request);
    }
    let queue = UnboundedReceiverStream::new(queue);
    let refused = |status| ConnectError::Refused {
        target: target.clone(),
        status: Box::new(status),
    };
    let mut all = AggregatedDiscoveryServiceClient::new(channel.clone())
        .max_decoding_message_size(MAX_RESPONSE);
    let mut secrets = SecretDiscoveryServiceClient::new(channel);
    let responses = match mode {
        Mode::Delta => {
            let queue = queue.filter_map(|r| match r {
                Outgoing::Delta(r) => Some(r),
                Outgoing::Sotw(_) => None,
            });
            let request = with_headers(queue, headers)?;
            let stream = match service {
                Service::Aggregated => all.delta_aggregated_resources(request).await,
                Service::Secrets => secrets.delta_secrets(request).await,
            };
            Incoming::Delta(stream.map_err(refused)?.into_inner())
        }
        Mode::Sotw => {
            let queue = queue.filter_map(|r| match r {
                Outgoing::Delta(_) => None,
                Outgoing::Sotw(r) => Some(r),
            });
            let request = with_headers(queue, headers)?;
            let stream = match service {
                Service::Aggregated => all.stream_aggregated_resources(request).await,
                Service::Secrets => secrets.stream_secrets(request).await,
            };
            Incoming::Sotw(stream.map_err(refused)?.into_inner())
        }
    };
    Ok(Connection {
        requests,
        responses,
    })
}

async fn channel(target: &Target) -> Result<Channel, tonic::transport::Error> {
    match target {
        Target::Tcp(address) => {
            configured(Endpoint::from_shared(format!("http://{address}"))?)
                .connect()
                .await
        }
        Target::Unix(path) => {
            let path = path.clone();
            // The authority is never looked up: the connector knows the path.
            configured(Endpoint::from_static("http://localhost"))
                .connect_with_connector(tower::service_fn(move |_| {
                    let path = path.clone();
                    async move {
                        UnixStream::connect(path)
                            .await
                            .map(hyper_util::rt::TokioIo::new)
                    }
                }))
                .await
        }
    }
}

fn configured(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(2 << 20)
}

fn with_headers<T>(
    message: T,
    headers: &[(String, String)],
) -> Result<tonic::Request<T>, ConnectError> {
    let mut request = tonic::Request::new(message);
    for (name, value) in headers {
        let bad = || ConnectError::Header(name.clone());
        let key =
            MetadataKey::from_bytes(name.to_ascii_lowercase().as_bytes()).map_err(|_| bad())?;
        let value = MetadataValue::try_from(value).map_err(|_| bad())?;
        request.metadata_mut().insert(key, value);
    }
    Ok(request)
}
