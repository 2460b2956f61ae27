//! Attempts that gave no response: what they mean for retries, and Envoy's words for them.

use std::{
    borrow::Cow,
    io::ErrorKind,
    task::{Context, Poll},
};

use outrigger_http::{BodyReader, BodyWriter, Error, h2};

use super::{
    ConnectionManager, Exchange, Flags, LocalReply, forward::AttemptError,
    stats::ConnectionManagerStats, timers::Expired,
};
use crate::{cluster::UpstreamError, io::Stream, router::retry::Failure};

/// How a client went away.
#[derive(Debug)]
pub(super) enum Gone {
    /// Its connection ended.
    Closed {
        /// It broke the connection instead of ending its stream.
        reset: bool,
    },
    /// It reset the stream.
    Reset,
    /// It broke the protocol in the middle of its request.
    Protocol(&'static str),
}

impl From<Error> for Gone {
    fn from(error: Error) -> Gone {
        match error {
            Error::Reset(_) | Error::Unprocessed => Gone::Reset,
            Error::Refused(refusal) => Gone::Protocol(refusal.detail),
            Error::Io(error) => Gone::Closed {
                reset: error.kind() == ErrorKind::ConnectionReset,
            },
            _ => Gone::Closed { reset: false },
        }
    }
}

impl Gone {
    /// Writes down why the exchange ended.
    pub(super) fn tell(&self, exchange: &mut Exchange<'_>) {
        match self {
            Gone::Closed { reset } => {
                let how = if *reset { "RemoteReset" } else { "Normal" };
                exchange.upstream.closed.downstream = Some(how);
                exchange.flags.add(Flags::DOWNSTREAM_CONNECTION_TERMINATION);
                exchange.details = "downstream_remote_disconnect".into();
            }
            Gone::Reset => {
                exchange.flags.add(Flags::DOWNSTREAM_REMOTE_RESET);
                exchange.details = "http2.remote_reset".into();
            }
            Gone::Protocol(detail) => {
                exchange.flags.add(Flags::DOWNSTREAM_PROTOCOL_ERROR);
                exchange.details = (*detail).into();
            }
        }
    }
}

/// Whether the client has gone away while nothing is expected of it.
pub(super) fn poll_gone(
    cx: &mut Context<'_>,
    reader: &mut BodyReader<'_, Stream>,
    writer: &mut BodyWriter<'_, Stream>,
) -> Poll<Gone> {
    if let Poll::Ready(closed) = reader.poll_closed(cx) {
        return Poll::Ready(Gone::from(
            closed.map_or_else(Error::Io, |()| Error::Closed),
        ));
    }
    writer.poll_reset(cx).map(Gone::from)
}

/// What an attempt without response means for retries; `None` when there is nobody to retry for.
pub(super) fn kind(error: &AttemptError) -> Option<Failure> {
    Some(match error {
        AttemptError::NoConnection(
            UpstreamError::NoHealthyHost
            | UpstreamError::NoSuchHost
            | UpstreamError::DropOverload
            | UpstreamError::MaintenanceMode
            | UpstreamError::Overflow(_),
        ) => Failure::Overflow,
        AttemptError::NoConnection(_) => Failure::Connect,
        AttemptError::Broken {
            error: Error::Unprocessed,
            ..
        } => Failure::Refused,
        AttemptError::Broken { .. } => Failure::Reset,
        AttemptError::Expired(Expired::PerTry | Expired::PerTryIdle) => Failure::PerTryTimeout,
        // We have reset it ourselves.
        AttemptError::Expired(Expired::UpstreamStream) => Failure::Reset,
        AttemptError::Expired(_) | AttemptError::Downstream(_) => return None,
    })
}

/// The flag for a broken upstream stream.
pub(super) fn flag(error: &Error) -> Flags {
    match error {
        Error::Refused(_) | Error::Length | Error::Reset(h2::Reason::PROTOCOL_ERROR) => {
            Flags::UPSTREAM_PROTOCOL_ERROR
        }
        Error::Reset(_) | Error::Unprocessed => Flags::UPSTREAM_REMOTE_RESET,
        Error::Closed | Error::Io(_) | Error::Unresponsive => {
            Flags::UPSTREAM_CONNECTION_TERMINATION
        }
    }
}

/// Envoy's words for a broken upstream stream.
pub(super) fn reason(error: &Error) -> Cow<'static, str> {
    Cow::Borrowed(match error {
        // Whichever end found it: a stream whose answer is invalid is reset with that reason.
        Error::Refused(_) | Error::Length | Error::Reset(h2::Reason::PROTOCOL_ERROR) => {
            "protocol error"
        }
        Error::Unprocessed => "remote refused stream reset",
        Error::Reset(h2::Reason::CONNECT_ERROR) => "remote error with CONNECT request",
        Error::Reset(_) => "remote reset",
        Error::Closed | Error::Io(_) | Error::Unresponsive => "connection termination",
    })
}

/// `what{reason|transport failure}`, without spaces.
pub(super) fn details(what: &str, reason: &str, transport: &str) -> Cow<'static, str> {
    let text = match transport {
        "" => format!("{what}{{{reason}}}"),
        transport => format!("{what}{{{reason}|{transport}}}"),
    };
    Cow::Owned(text.replace(' ', "_"))
}

/// Whether the reply to a failure counts as the cluster's: those to limits of the client's stream are its connection's.
pub(super) fn is_routers(error: &AttemptError) -> bool {
    match error {
        AttemptError::NoConnection(_) | AttemptError::Broken { .. } => true,
        AttemptError::Expired(expired) => matches!(
            expired,
            Expired::Request | Expired::PerTry | Expired::PerTryIdle | Expired::UpstreamStream
        ),
        AttemptError::Downstream(_) => false,
    }
}

/// The answer for a failed attempt; `None` when the client is gone.
pub(super) fn reply(
    error: AttemptError,
    exchange: &mut Exchange<'_>,
    complete: bool,
    live: &ConnectionManager,
) -> Option<LocalReply> {
    let stats = &live.stats;
    match error {
        AttemptError::NoConnection(
            error @ (UpstreamError::NoHealthyHost | UpstreamError::NoSuchHost),
        ) => {
            exchange.upstream.host = None;
            let session = exchange.filters.session.as_ref();
            let status = match (error, session) {
                (UpstreamError::NoSuchHost, Some(session)) => session.status_without_host(),
                _ => 503,
            };
            Some(
                LocalReply::new(status, "no healthy upstream", "no_healthy_upstream")
                    .flag(Flags::NO_HEALTHY_UPSTREAM),
            )
        }
        AttemptError::NoConnection(UpstreamError::DropOverload) => Some(
            LocalReply::new(503, "drop overload", "drop_overload")
                .flag(Flags::DROP_OVERLOAD)
                .header("x-envoy-drop-overload", "true"),
        ),
        AttemptError::NoConnection(UpstreamError::MaintenanceMode) => Some(
            LocalReply::new(503, "maintenance mode", "maintenance_mode")
                .flag(Flags::UPSTREAM_OVERFLOW),
        ),
        AttemptError::NoConnection(error) => {
            let transport = error.transport_failure_reason();
            let (reason, flag) = match &error {
                UpstreamError::Overflow(_) => ("overflow", Flags::UPSTREAM_OVERFLOW),
                UpstreamError::ConnectTimeout => {
                    ("connection timeout", Flags::UPSTREAM_CONNECTION_FAILURE)
                }
                _ => (
                    "remote connection failure",
                    Flags::UPSTREAM_CONNECTION_FAILURE,
                ),
            };
            exchange.upstream.failure.clone_from(&transport);
            let told = live.tells_failure.then_some(&*transport);
            Some(unavailable(503, reason, &transport, told, flag, exchange))
        }
        AttemptError::Broken { error, .. } => {
            let flag = flag(&error);
            let status = if flag == Flags::UPSTREAM_PROTOCOL_ERROR {
                502
            } else {
                503
            };
            Some(unavailable(
                status,
                &reason(&error),
                "",
                None,
                flag,
                exchange,
            ))
        }
        AttemptError::Expired(expired) => {
            tell_expired(expired, exchange, stats);
            let (status, body) = match expired {
                Expired::Request | Expired::PerTry | Expired::PerTryIdle => {
                    (504, "upstream request timeout")
                }
                Expired::Stream if complete => (504, STREAM),
                Expired::Idle if complete => (504, "stream timeout"),
                Expired::UpstreamStream if complete => (504, UPSTREAM_STREAM),
                expired => (408, late(expired)),
            };
            let mut reply = LocalReply::new(status, body, std::mem::take(&mut exchange.details));
            // What took too long for the route is Unavailable to gRPC, as any 504 is.
            if matches!(expired, Expired::Stream) {
                reply.grpc_status = Some(4);
            }
            Some(reply)
        }
        AttemptError::Downstream(gone) => {
            gone.tell(exchange);
            stats.downstream_rq_rx_reset().inc();
            match gone {
                // A broken message is answered; whether the client still reads is its affair.
                Gone::Protocol(detail) => Some(
                    LocalReply::new(400, "Bad Request", detail)
                        .flag(Flags::DOWNSTREAM_PROTOCOL_ERROR),
                ),
                _ => None,
            }
        }
    }
}

/// The answer to a head that did not come in time.
pub(super) fn late_head(expired: Expired, stats: &ConnectionManagerStats) -> LocalReply {
    let (flag, details) = count_expired(expired, stats);
    LocalReply::new(408, late(expired), details).flag(flag)
}

/// Envoy's text for a request that did not come in time.
fn late(expired: Expired) -> &'static str {
    match expired {
        Expired::Headers => "request header timeout",
        Expired::Receive => "request timeout",
        Expired::UpstreamStream => UPSTREAM_STREAM,
        Expired::Stream => STREAM,
        _ => "stream timeout",
    }
}

const STREAM: &str = "downstream duration timeout";
const UPSTREAM_STREAM: &str = "upstream max stream duration reached";

fn unavailable(
    status: u16,
    reason: &str,
    transport: &str,
    told: Option<&str>,
    flag: Flags,
    exchange: &Exchange<'_>,
) -> LocalReply {
    let again = if exchange.upstream.attempts > 1 {
        "retried and the latest "
    } else {
        ""
    };
    // What the transport says (addresses, names in certificates) is for logs only, as in Envoy, unless a switch says otherwise.
    let mut body = format!(
        "upstream connect error or disconnect/reset before headers. {again}reset reason: {reason}"
    );
    if let Some(told) = told.filter(|told| !told.is_empty()) {
        body.push_str(", transport failure reason: ");
        body.push_str(told);
    }
    let details = details("upstream_reset_before_response_started", reason, transport);
    LocalReply::new(status, "", details).body(body).flag(flag)
}

/// Writes down which limit ended the exchange.
pub(super) fn tell_expired(
    expired: Expired,
    exchange: &mut Exchange<'_>,
    stats: &ConnectionManagerStats,
) {
    let (flag, details) = count_expired(expired, stats);
    exchange.flags.add(flag);
    exchange.details = details.into();
}

fn count_expired(expired: Expired, stats: &ConnectionManagerStats) -> (Flags, &'static str) {
    match expired {
        Expired::Request => (Flags::UPSTREAM_REQUEST_TIMEOUT, "response_timeout"),
        Expired::PerTry => (Flags::UPSTREAM_REQUEST_TIMEOUT, "upstream_per_try_timeout"),
        Expired::PerTryIdle => (
            Flags::UPSTREAM_REQUEST_TIMEOUT,
            "upstream_per_try_idle_timeout",
        ),
        Expired::Stream => {
            stats.downstream_rq_max_duration_reached().inc();
            (Flags::default(), "max_duration_timeout")
        }
        Expired::UpstreamStream => (
            Flags::UPSTREAM_MAX_STREAM_DURATION,
            "upstream_max_stream_duration_reached",
        ),
        Expired::Receive => {
            stats.downstream_rq_timeout().inc();
            (Flags::default(), "request_overall_timeout")
        }
        Expired::Headers => {
            stats.downstream_rq_header_timeout().inc();
            (Flags::default(), "request_header_timeout")
        }
        // Envoy says nothing of it here: for the filters the response was complete.
        Expired::Flush => (Flags::default(), "via_upstream"),
        Expired::Idle => {
            stats.downstream_rq_idle_timeout().inc();
            (Flags::STREAM_IDLE_TIMEOUT, "stream_idle_timeout")
        }
    }
}
