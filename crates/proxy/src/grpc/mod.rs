//! gRPC calls of the data path: the one place beside plans and discovery where messages are made and read.

pub(crate) mod access_log;
pub(crate) mod authorization;
pub(crate) mod open_telemetry;
pub(crate) mod rate_limit;
pub(crate) mod spans;
mod values;

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use outrigger_http::{Method, RequestHead, Version};
use prost::Message;

use crate::{
    http::{SideCallError, side_call},
    plan::{access_log::Delivery, ext_authz::GrpcCall},
    worker::Worker,
};

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GrpcError {
    #[error("{0}")]
    Call(#[from] SideCallError),
    #[error("the answer is HTTP {0}")]
    Http(u16),
    #[error("the answer is gRPC status {0}")]
    Status(u32),
    #[error("the answer is no single message")]
    Frame,
    #[error("the answer is no message of its type: {0}")]
    Message(#[from] prost::DecodeError),
}

/// One call with one message each way.
pub(crate) async fn unary<A: Message + Default>(
    worker: &Worker,
    service: &GrpcCall,
    path: &str,
    message: &impl Message,
) -> Result<A, GrpcError> {
    let body = call(worker, service, path, message).await?;
    Ok(A::decode(frame(&body)?)?)
}

/// One call with one message, whose answer means nothing but that it was taken.
async fn deliver(
    worker: &Worker,
    service: &GrpcCall,
    path: &str,
    message: &impl Message,
) -> Result<(), GrpcError> {
    call(worker, service, path, message).await.map(drop)
}

/// One call with records of a log; tells whether they were taken.
async fn deliver_records(
    worker: &Worker,
    delivery: &Delivery,
    log: &str,
    path: &str,
    message: &impl Message,
) -> bool {
    let sent = deliver(worker, &delivery.service, path, message).await;
    if let Err(error) = &sent {
        let cluster = &*delivery.service.cluster;
        tracing::debug!(log, cluster, %error, "access log records are lost");
    }
    sent.is_ok()
}

/// A call; gives the body of an answer whose status is OK.
async fn call(
    worker: &Worker,
    service: &GrpcCall,
    path: &str,
    message: &impl Message,
) -> Result<Bytes, GrpcError> {
    let mut head = RequestHead::new(Version::Http2, Method::Post, &service.authority, path);
    let headers = &mut head.headers;
    headers.set("content-type", "application/grpc");
    headers.set("te", "trailers");
    if let Some(timeout) = service.timeout {
        headers.set("grpc-timeout", grpc_timeout(timeout));
    }
    for (name, value) in &service.initial_metadata {
        headers.append(name, value.as_bytes());
    }
    let length = message.encoded_len();
    let mut body = BytesMut::with_capacity(5 + length);
    body.put_u8(0);
    body.put_u32(length as u32);
    body.put_slice(&message.encode_to_vec());
    let request = (head, body.freeze());
    let answer = side_call(
        worker,
        &service.cluster,
        request,
        true,
        MAX_ANSWER,
        service.timeout,
    )
    .await?;
    if answer.head.status != 200 {
        return Err(GrpcError::Http(answer.head.status));
    }
    let trailers = answer.trailers.as_ref();
    let status = trailers
        .and_then(|t| t.get_str("grpc-status"))
        .or_else(|| answer.head.get_str("grpc-status"));
    match status.map(|status| status.trim().parse::<u32>()) {
        Some(Ok(0)) => {}
        Some(Ok(status)) => return Err(GrpcError::Status(status)),
        // UNKNOWN.
        _ => return Err(GrpcError::Status(2)),
    }
    Ok(answer.body)
}

/// The message of a body that is one frame, uncompressed.
fn frame(body: &Bytes) -> Result<Bytes, GrpcError> {
    match body.split_at_checked(5) {
        Some(([0, a, b, c, d], rest))
            if u32::from_be_bytes([*a, *b, *c, *d]) as usize == rest.len() =>
        {
            Ok(body.slice(5..))
        }
        _ => Err(GrpcError::Frame),
    }
}

/// As `grpc-timeout` says it: at most eight digits.
fn grpc_timeout(timeout: Duration) -> String {
    match timeout.as_millis() {
        millis @ 0..=99_999_999 => format!("{millis}m"),
        _ => format!("{}S", timeout.as_secs().min(99_999_999)),
    }
}

/// Bytes of an answer at most.
const MAX_ANSWER: usize = 4 << 20;
