//! tonic adaptor: the ADS service, with a codec that writes responses from shared bytes.

use std::{
    convert::Infallible,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use prost::Message;
use proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use tokio_stream::{Stream, StreamExt};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::{Grpc, NamedService, StreamingService},
};

use super::{Request, Response};
use crate::Mode;

/// Requests of one client, in order; ends when the client goes.
pub type Incoming = Pin<Box<dyn Stream<Item = Result<Request, Status>> + Send>>;
/// Responses to one client, in order; ending it ends the stream.
pub type Responses = Pin<Box<dyn Stream<Item = Result<Response, Status>> + Send>>;

/// Who serves the streams.
pub trait Handler: Send + Sync + 'static {
    /// Serves one stream. `request` carries metadata and connection info (peer address, certificates).
    fn open(
        &self,
        mode: Mode,
        request: tonic::Request<Incoming>,
    ) -> impl Future<Output = Result<Responses, Status>> + Send;
}

/// `envoy.service.discovery.v3.AggregatedDiscoveryService` over a [`Handler`], to be added to a tonic server.
#[derive(Debug)]
pub struct Service<H> {
    handler: Arc<H>,
}

impl<H> Service<H> {
    /// Serves `handler`.
    pub fn new(handler: Arc<H>) -> Self {
        Self { handler }
    }
}

impl<H> Clone for Service<H> {
    fn clone(&self) -> Self {
        Self {
            handler: self.handler.clone(),
        }
    }
}

impl<H> NamedService for Service<H> {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}

impl<H: Handler> tower::Service<http::Request<tonic::body::Body>> for Service<H> {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let handler = self.handler.clone();
        Box::pin(async move {
            let method = request
                .uri()
                .path()
                .rsplit('/')
                .next()
                .unwrap_or_default()
                .to_owned();
            Ok(match method.as_str() {
                "DeltaAggregatedResources" => {
                    let method = Method {
                        handler,
                        mode: Mode::Delta,
                        request: PhantomData,
                    };
                    Grpc::new(SharedCodec::<DeltaDiscoveryRequest>::default())
                        .apply_max_message_size_config(Some(MAX_REQUEST), Some(usize::MAX))
                        .streaming(method, request)
                        .await
                }
                "StreamAggregatedResources" => {
                    let method = Method {
                        handler,
                        mode: Mode::Sotw,
                        request: PhantomData,
                    };
                    Grpc::new(SharedCodec::<DiscoveryRequest>::default())
                        .apply_max_message_size_config(Some(MAX_REQUEST), Some(usize::MAX))
                        .streaming(method, request)
                        .await
                }
                other => Status::unimplemented(format!("no method {other}")).into_http(),
            })
        })
    }
}

/// A request lists names at most: 64 MiB is far above a million of them.
const MAX_REQUEST: usize = 64 << 20;

struct Method<H, R> {
    handler: Arc<H>,
    mode: Mode,
    request: PhantomData<R>,
}

impl<H, R> StreamingService<R> for Method<H, R>
where
    H: Handler,
    R: Into<Request> + Send + 'static,
{
    type Response = Response;
    type ResponseStream = Responses;
    type Future = Pin<Box<dyn Future<Output = Result<tonic::Response<Responses>, Status>> + Send>>;

    fn call(&mut self, request: tonic::Request<tonic::Streaming<R>>) -> Self::Future {
        let (handler, mode) = (self.handler.clone(), self.mode);
        Box::pin(async move {
            let request = request.map(|s| -> Incoming { Box::pin(s.map(|r| r.map(Into::into))) });
            handler.open(mode, request).await.map(tonic::Response::new)
        })
    }
}

struct SharedCodec<R>(PhantomData<R>);

impl<R> Default for SharedCodec<R> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<R: Message + Default + Send + 'static> Codec for SharedCodec<R> {
    type Encode = Response;
    type Decode = R;
    type Encoder = ResponseEncoder;
    type Decoder = RequestDecoder<R>;

    fn encoder(&mut self) -> ResponseEncoder {
        ResponseEncoder
    }

    fn decoder(&mut self) -> RequestDecoder<R> {
        RequestDecoder(PhantomData)
    }
}

#[derive(Debug)]
struct ResponseEncoder;

impl Encoder for ResponseEncoder {
    type Item = Response;
    type Error = Status;

    fn encode(&mut self, response: Response, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.reserve(response.encoded_len());
        response.encode(out);
        Ok(())
    }
}

#[derive(Debug)]
struct RequestDecoder<R>(PhantomData<R>);

impl<R: Message + Default> Decoder for RequestDecoder<R> {
    type Item = R;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<R>, Status> {
        R::decode(bytes)
            .map(Some)
            .map_err(|e| Status::invalid_argument(format!("not a discovery request: {e}")))
    }
}
