//! Port 15017: what the API server asks us about objects before it takes them. `/inject` adds sidecars to pods,
//! `/validate` judges Istio's objects.
//!
//! Whoever reaches the port may send anything: what is held of bodies, handshakes and work at once are bounded, a slow
//! sender is cut off and takes up no more than what it sent, and nothing that is sent here changes anything.

mod inject;
mod patch;
mod review;
mod validate;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::BytesMut;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Frame;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, SemaphorePermit, watch},
};
use tokio_stream::StreamExt;
use tracing::debug;

use crate::server::{Server, secure};

pub use self::inject::Injector;

/// What the pages need.
#[derive(Debug)]
struct Webhook {
    server: Arc<Server>,
    injector: Injector,
    /// What may still be held of bodies, in KiB.
    held: Semaphore,
    /// Work that may still begin.
    work: Semaphore,
}

/// The pages.
pub fn router(server: Arc<Server>, injector: Injector) -> Router {
    let webhook = Arc::new(Webhook {
        server,
        injector,
        held: Semaphore::new(HELD),
        work: Semaphore::new(AT_ONCE),
    });
    Router::new()
        .route("/inject", post(injected))
        .route("/inject/{*rest}", post(injected))
        .route("/validate", post(validated))
        .route("/ready", axum::routing::get(|| async { "ok\n" }))
        .with_state(webhook)
}

/// Serves the pages over TLS until the task is dropped.
pub async fn serve(
    listener: TcpListener,
    tls: watch::Receiver<Arc<rustls::ServerConfig>>,
    router: Router,
) {
    let mut incoming = secure::incoming(listener, either_protocol(tls));
    while let Some(Ok(stream)) = incoming.next().await {
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let mut builder = auto::Builder::new(TokioExecutor::new());
            builder
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(SLOWEST);
            builder
                .http2()
                .timer(TokioTimer::new())
                .keep_alive_interval(SLOWEST)
                .max_concurrent_streams(STREAMS);
            let served = builder
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(e) = served {
                debug!("httpsAddr: {e}");
            }
        });
    }
}

/// The settings of the gRPC port for callers that speak HTTP/1.1 too: API servers do no other.
fn either_protocol(
    mut given: watch::Receiver<Arc<rustls::ServerConfig>>,
) -> watch::Receiver<Arc<rustls::ServerConfig>> {
    let made = |config: &Arc<rustls::ServerConfig>| {
        let mut config = rustls::ServerConfig::clone(config);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Arc::new(config)
    };
    let (send, receive) = watch::channel(made(&given.borrow_and_update()));
    tokio::spawn(async move {
        while given.changed().await.is_ok() {
            let next = made(&given.borrow_and_update());
            if send.send(next).is_err() {
                return;
            }
        }
    });
    receive
}

async fn injected(State(webhook): State<Arc<Webhook>>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    answer(webhook, request, move |webhook, body| {
        inject::answer(&webhook.injector, &webhook.server, &path, body)
    })
    .await
}

async fn validated(State(webhook): State<Arc<Webhook>>, request: Request) -> Response {
    answer(webhook, request, |_, body| validate::answer(body)).await
}

/// The body in, the answer out; the work itself on a thread where it delays no stream of a proxy.
async fn answer(
    webhook: Arc<Webhook>,
    request: Request,
    work: impl FnOnce(&Webhook, &[u8]) -> serde_json::Value + Send + 'static,
) -> Response {
    if request
        .headers()
        .get(header::CONTENT_TYPE)
        .map(|v| v.as_bytes())
        != Some(b"application/json")
    {
        return (
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid Content-Type, want `application/json`\n",
        )
            .into_response();
    }
    let read = read(&webhook, request.into_body());
    let (body, _held) = match tokio::time::timeout(SLOWEST, read).await {
        Ok(Ok(read)) => read,
        Ok(Err(refused)) => return refused,
        Err(_) => return StatusCode::REQUEST_TIMEOUT.into_response(),
    };
    if body.is_empty() {
        return (StatusCode::BAD_REQUEST, "no body found\n").into_response();
    }
    let Ok(Ok(_place)) = tokio::time::timeout(SLOWEST, webhook.work.acquire()).await else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let shared = webhook.clone();
    match tokio::task::spawn_blocking(move || work(&shared, &body)).await {
        Ok(answer) => axum::Json(answer).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// The whole body, and its place among all that are held.
async fn read(
    webhook: &Webhook,
    body: Body,
) -> Result<(BytesMut, Option<SemaphorePermit<'_>>), Response> {
    let mut body = Limited::new(body, LARGEST);
    let (mut out, mut place) = (BytesMut::new(), None::<SemaphorePermit>);
    while let Some(frame) = body.frame().await {
        let data = match frame.map(Frame::into_data) {
            Ok(Ok(data)) => data,
            // Trailers.
            Ok(Err(_)) => continue,
            Err(e) if e.is::<LengthLimitError>() => {
                let why = format!("at most {LARGEST} bytes are read\n");
                return Err((StatusCode::PAYLOAD_TOO_LARGE, why).into_response());
            }
            Err(_) => return Err(StatusCode::BAD_REQUEST.into_response()),
        };
        out.extend_from_slice(&data);
        let has = place.as_ref().map_or(0, SemaphorePermit::num_permits);
        let more = u32::try_from(out.len().div_ceil(1024).saturating_sub(has));
        let Some(more) = more
            .ok()
            .and_then(|n| webhook.held.try_acquire_many(n).ok())
        else {
            return Err(StatusCode::SERVICE_UNAVAILABLE.into_response());
        };
        match &mut place {
            Some(place) => place.merge(more),
            None => place = Some(more),
        }
    }
    Ok((out, place))
}

/// Objects of the API server are at most 3 MiB, and a review holds two of them.
const LARGEST: usize = 6 << 20;
/// Of all bodies together, in KiB. One that grows may take up twice what it holds: 192 MiB at most.
const HELD: usize = 96 << 10;
/// Answers that are made at once.
const AT_ONCE: usize = 32;
/// Requests at once on one connection; further ones wait for these.
const STREAMS: u32 = 64;
/// The API server waits 10 s by default, and 30 at most.
const SLOWEST: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests;
