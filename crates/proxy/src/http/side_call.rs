//! Side calls: requests of our own to a cluster, whose whole answer is wanted (keys of an issuer, an authorization).

use std::{future::poll_fn, rc::Rc, time::Duration};

use bytes::Bytes;
use outrigger_http::{Error, Frame, Framing, Headers, RequestHead, ResponseHead, Version};

use super::upstream::Upstream;
use crate::{
    cluster::{Cluster, LbContext, Outcome, UpstreamError},
    router::retry::effective_status,
    worker::Worker,
};

/// The answer to a side call.
#[derive(Debug)]
pub(crate) struct SideResponse {
    /// The final head.
    pub(crate) head: ResponseHead,
    /// All of the body.
    pub(crate) body: Bytes,
    /// Its trailers.
    pub(crate) trailers: Option<Headers>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SideCallError {
    /// The configuration names a cluster that is not there.
    #[error("there is no cluster {0}")]
    NoCluster(String),
    /// No connection.
    #[error("{0}")]
    Upstream(#[from] UpstreamError),
    /// The connection broke.
    #[error("{0}")]
    Broken(#[from] Error),
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// More than was to be read.
    #[error("the answer has more than {0} bytes")]
    TooLarge(usize),
}

/// Asks a cluster. `http2`: the request needs HTTP/2 (gRPC), where the cluster leaves that open. At most `limit` bytes
/// of body are read. Can be dropped at any time; the call is then given up.
pub(crate) async fn side_call(
    worker: &Worker,
    cluster: &str,
    request: (RequestHead, Bytes),
    http2: bool,
    limit: usize,
    timeout: Option<Duration>,
) -> Result<SideResponse, SideCallError> {
    let name = cluster;
    let Some(cluster) = worker.clusters.find(name) else {
        return Err(SideCallError::NoCluster(name.to_owned()));
    };
    let (head, body) = request;
    let asked = ask(&cluster, head, body, http2, limit);
    match timeout {
        None => asked.await,
        Some(longest) => match tokio::time::timeout(longest, asked).await {
            Ok(answer) => answer,
            Err(_) => {
                cluster.stats().upstream_rq_timeout().inc();
                Err(SideCallError::Timeout(longest))
            }
        },
    }
}

async fn ask(
    cluster: &Rc<Cluster>,
    mut head: RequestHead,
    body: Bytes,
    http2: bool,
    limit: usize,
) -> Result<SideResponse, SideCallError> {
    head.framing = match body.len() {
        0 => Framing::None,
        length => Framing::Length(length as u64),
    };
    let version = if http2 {
        Version::Http2
    } else {
        Version::Http11
    };
    let mut context = LbContext::default();
    loop {
        let host = cluster.choose(&context)?;
        let mut upstream = Upstream::acquire(cluster, &host, &context, version).await?;
        let answer = exchange(&mut upstream, &head, &body, limit).await;
        match answer {
            Ok(response) => {
                cluster.report(&host, Outcome::Status(effective_status(&response.head)));
                cluster.count_response(response.head.status, true);
                upstream.release();
                return Ok(response);
            }
            // A connection that rested had been closed meanwhile; nobody has read the request.
            Err(SideCallError::Broken(_))
                if upstream.reused && !upstream.has_response_bytes() && !context.fresh =>
            {
                context.fresh = true;
            }
            Err(error) => {
                cluster.stats().upstream_rq_rx_reset().inc();
                cluster.report(&host, Outcome::Reset);
                upstream.cancel();
                return Err(error);
            }
        }
    }
}

async fn exchange(
    upstream: &mut Upstream,
    head: &RequestHead,
    body: &Bytes,
    limit: usize,
) -> Result<SideResponse, SideCallError> {
    upstream.send_head(head, head.framing)?;
    poll_fn(|cx| upstream.poll_ready(cx)).await?;
    if !body.is_empty() {
        upstream.send_data(body.clone())?;
        poll_fn(|cx| upstream.poll_ready(cx)).await?;
    }
    upstream.send_end(None)?;
    // An HTTP/2 peer may hold the body back with its window: the answer is waited for at the same time.
    let mut flushed = false;
    let head = loop {
        let head = poll_fn(|cx| {
            if !flushed && let std::task::Poll::Ready(sent) = upstream.poll_flush(cx) {
                flushed = true;
                if let Err(error) = sent {
                    return std::task::Poll::Ready(Err(error));
                }
            }
            upstream.poll_head(cx, false)
        })
        .await?;
        if !head.is_informational() {
            break head;
        }
    };
    let (mut read, mut trailers) = (Vec::new(), None);
    while let Some(frame) = poll_fn(|cx| upstream.poll_frame(cx)).await {
        match frame? {
            Frame::Data(data) => {
                if read.len() + data.len() > limit {
                    return Err(SideCallError::TooLarge(limit));
                }
                read.extend_from_slice(&data);
            }
            Frame::Trailers(last) => trailers = Some(last),
        }
    }
    Ok(SideResponse {
        head,
        body: read.into(),
        trailers,
    })
}
