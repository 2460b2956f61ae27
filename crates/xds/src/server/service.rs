//! tonic adaptor: the ADS service, with a body that sends responses from shared bytes.

use std::{
    collections::VecDeque,
    convert::Infallible,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body::{Body as _, Frame};
use prost::Message;
use proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use tokio_stream::{Stream, StreamExt};
use tonic::{Status, metadata::MetadataMap, server::NamedService};

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
                    serve::<_, DeltaDiscoveryRequest>(&*handler, Mode::Delta, request).await
                }
                "StreamAggregatedResources" => {
                    serve::<_, DiscoveryRequest>(&*handler, Mode::Sotw, request).await
                }
                other => Status::unimplemented(format!("no method {other}")).into_http(),
            })
        })
    }
}

async fn serve<H: Handler, R>(
    handler: &H,
    mode: Mode,
    request: http::Request<tonic::body::Body>,
) -> http::Response<tonic::body::Body>
where
    R: Message + Default + Into<Request> + Send + 'static,
{
    let (parts, body) = request.into_parts();
    let requests = Requests::<R> {
        body,
        buffer: BytesMut::new(),
        ended: false,
        message: PhantomData,
    };
    let incoming: Incoming = Box::pin(requests.map(|r| r.map(Into::into)));
    let metadata = MetadataMap::from_headers(parts.headers);
    let request = tonic::Request::from_parts(metadata, parts.extensions, incoming);
    match handler.open(mode, request).await {
        Ok(responses) => {
            let mut response =
                http::Response::new(tonic::body::Body::new(ResponseBody::new(responses)));
            let content_type = http::HeaderValue::from_static("application/grpc");
            response
                .headers_mut()
                .insert(http::header::CONTENT_TYPE, content_type);
            response
        }
        Err(status) => status.into_http(),
    }
}

/// A request lists names at most: 64 MiB is far above a million of them.
const MAX_REQUEST: usize = 64 << 20;

/// Responses as gRPC frames, made piece by piece as the client takes them. tonic's own encoder would write each message
/// to a buffer of its own and keep the largest for the life of the stream: a megabyte for every proxy of a large mesh.
struct ResponseBody {
    responses: Responses,
    pending: VecDeque<Bytes>,
    ended: bool,
}

impl ResponseBody {
    fn new(responses: Responses) -> Self {
        Self {
            responses,
            pending: VecDeque::new(),
            ended: false,
        }
    }

    /// The next piece: small segments together, large ones as they are.
    fn piece(&mut self) -> Option<Bytes> {
        let first = self.pending.pop_front()?;
        if first.len() >= PIECE || self.pending.is_empty() {
            return Some(first);
        }
        let mut piece = BytesMut::with_capacity(PIECE);
        piece.put_slice(&first);
        while let Some(next) = self.pending.front()
            && piece.len() + next.len() <= PIECE
        {
            piece.put_slice(next);
            self.pending.pop_front();
        }
        Some(piece.freeze())
    }
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        loop {
            if let Some(piece) = this.piece() {
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            // The list of a large response's segments is not kept for the life of the stream.
            this.pending = VecDeque::new();
            if this.ended {
                return Poll::Ready(None);
            }
            let status = match this.responses.as_mut().poll_next(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(response))) => match message_head(&response) {
                    Ok(head) => {
                        this.pending.push_back(head);
                        this.pending.extend(response.into_segments());
                        continue;
                    }
                    Err(status) => status,
                },
                Poll::Ready(Some(Err(status))) => status,
                Poll::Ready(None) => Status::ok(""),
            };
            this.ended = true;
            let mut trailers = http::HeaderMap::new();
            status.add_header(&mut trailers)?;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
    }
}

/// gRPC's five bytes before a message: not compressed, and the length.
fn message_head(response: &Response) -> Result<Bytes, Status> {
    let length = u32::try_from(response.encoded_len())
        .map_err(|_| Status::resource_exhausted("a response of more than 4 GiB"))?;
    let mut head = BytesMut::with_capacity(5);
    head.put_u8(0);
    head.put_u32(length);
    Ok(head.freeze())
}

/// One HTTP/2 frame of the default size.
const PIECE: usize = 16 << 10;

/// Requests out of gRPC frames. tonic's own decoder keeps a buffer of at least its largest message for the life of the
/// stream; a proxy sends a few kilobytes once (its node) and hardly anything afterwards.
struct Requests<R> {
    body: tonic::body::Body,
    /// The beginning of a request that is not complete.
    buffer: BytesMut,
    ended: bool,
    message: PhantomData<fn() -> R>,
}

impl<R: Message + Default> Requests<R> {
    /// The next request, where all of it is there.
    fn next_message(&mut self) -> Result<Option<R>, Status> {
        let Some((head, rest)) = self.buffer.split_first_chunk::<FRAME_HEAD>() else {
            return Ok(None);
        };
        let [compressed, length @ ..] = *head;
        if compressed != 0 {
            return Err(Status::unimplemented("requests are not taken compressed"));
        }
        let length = u32::from_be_bytes(length) as usize;
        if length > MAX_REQUEST {
            return Err(Status::out_of_range(format!(
                "a request of {length} bytes is above the limit of {MAX_REQUEST}"
            )));
        }
        let Some(message) = rest.get(..length) else {
            return Ok(None);
        };
        let request = R::decode(message)
            .map_err(|e| Status::invalid_argument(format!("not a discovery request: {e}")))?;
        self.buffer.advance(FRAME_HEAD + length);
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
        Ok(Some(request))
    }
}

impl<R: Message + Default> Stream for Requests<R> {
    type Item = Result<R, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        while !this.ended {
            match this.next_message() {
                Ok(None) => {}
                Ok(Some(request)) => return Poll::Ready(Some(Ok(request))),
                Err(status) => {
                    this.ended = true;
                    return Poll::Ready(Some(Err(status)));
                }
            }
            match Pin::new(&mut this.body).poll_frame(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        this.buffer.extend_from_slice(&data);
                    }
                }
                Poll::Ready(Some(Err(status))) => {
                    this.ended = true;
                    return Poll::Ready(Some(Err(status)));
                }
                Poll::Ready(None) => {
                    this.ended = true;
                    if !this.buffer.is_empty() {
                        let status = Status::internal("the stream ended within a request");
                        return Poll::Ready(Some(Err(status)));
                    }
                }
            }
        }
        Poll::Ready(None)
    }
}

/// gRPC's five bytes before a message.
const FRAME_HEAD: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;

    /// What arrives when the body comes in pieces of `size` bytes.
    async fn read(bytes: &[u8], size: usize) -> (Vec<String>, Option<tonic::Code>, usize) {
        let pieces: Vec<Result<Frame<Bytes>, Status>> = bytes
            .chunks(size)
            .map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece))))
            .collect();
        let body = http_body_util::StreamBody::new(tokio_stream::iter(pieces));
        let mut requests = Requests::<DiscoveryRequest> {
            body: tonic::body::Body::new(body),
            buffer: BytesMut::new(),
            ended: false,
            message: PhantomData,
        };
        let (mut types, mut code) = (Vec::new(), None);
        while let Some(next) = requests.next().await {
            match next {
                Ok(request) => types.push(request.type_url),
                Err(status) => code = Some(status.code()),
            }
        }
        (types, code, requests.buffer.capacity())
    }

    fn framed(type_url: &str) -> Vec<u8> {
        let message = DiscoveryRequest {
            type_url: type_url.to_owned(),
            ..Default::default()
        };
        let mut out = vec![0];
        out.extend((message.encoded_len() as u32).to_be_bytes());
        out.extend(message.encode_to_vec());
        out
    }

    #[tokio::test]
    async fn requests_arrive_however_they_are_cut_and_leave_no_buffer() {
        let long = "x".repeat(5000);
        let bytes = [framed("a"), framed(&long), framed("b")].concat();
        for size in [1, 7, 4096, bytes.len()] {
            let want = vec!["a".to_owned(), long.clone(), "b".to_owned()];
            assert_eq!(read(&bytes, size).await, (want, None, 0));
        }
    }

    #[tokio::test]
    async fn what_is_no_request_ends_the_stream() {
        let (_, code, _) = read(&[1, 0, 0, 0, 0], 5).await;
        assert_eq!(code, Some(tonic::Code::Unimplemented));
        let (_, code, _) = read(&[0, 255, 255, 255, 255], 5).await;
        assert_eq!(code, Some(tonic::Code::OutOfRange));
        let (_, code, _) = read(&[0, 0, 0, 0, 1, 0xff], 6).await;
        assert_eq!(code, Some(tonic::Code::InvalidArgument));
        let (types, code, _) = read(&[&framed("a")[..], &[0, 0, 0]].concat(), 4).await;
        assert_eq!((types.len(), code), (1, Some(tonic::Code::Internal)));
    }
}
