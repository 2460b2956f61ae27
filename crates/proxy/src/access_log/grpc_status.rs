//! The gRPC status of a response, as filters of logs and formats have it.

use outrigger_http::Headers;

use super::format::{Presence, not_empty, number};
use crate::{
    http::{Exchange, grpc_status_of},
    plan::format::GrpcStatusForm,
};

/// gRPC status of a response, from its trailers or its head; else the one that stands for its HTTP status.
pub(super) fn of(exchange: &Exchange<'_>) -> Option<u32> {
    let read = |headers: &Headers| headers.get_str("grpc-status")?.trim().parse().ok();
    exchange
        .trailers
        .as_ref()
        .and_then(read)
        .or_else(|| read(&exchange.response.as_ref()?.headers))
        .or_else(|| {
            Some(exchange.status())
                .filter(|status| *status > 0)
                .map(grpc_status_of)
        })
}

/// Writes a status in the form that is asked for.
pub(super) fn write(status: u32, form: GrpcStatusForm, out: &mut Vec<u8>) -> Presence {
    let names = GRPC_NAMES.get(status as usize);
    match (form, names) {
        (GrpcStatusForm::CamelString, Some((camel, _))) => not_empty(camel, out),
        (GrpcStatusForm::SnakeString, Some((_, snake))) => not_empty(snake, out),
        _ => number(status.into(), out),
    }
}

const GRPC_NAMES: [(&str, &str); 17] = [
    ("OK", "OK"),
    ("Canceled", "CANCELLED"),
    ("Unknown", "UNKNOWN"),
    ("InvalidArgument", "INVALID_ARGUMENT"),
    ("DeadlineExceeded", "DEADLINE_EXCEEDED"),
    ("NotFound", "NOT_FOUND"),
    ("AlreadyExists", "ALREADY_EXISTS"),
    ("PermissionDenied", "PERMISSION_DENIED"),
    ("ResourceExhausted", "RESOURCE_EXHAUSTED"),
    ("FailedPrecondition", "FAILED_PRECONDITION"),
    ("Aborted", "ABORTED"),
    ("OutOfRange", "OUT_OF_RANGE"),
    ("Unimplemented", "UNIMPLEMENTED"),
    ("Internal", "INTERNAL"),
    ("Unavailable", "UNAVAILABLE"),
    ("DataLoss", "DATA_LOSS"),
    ("Unauthenticated", "UNAUTHENTICATED"),
];
