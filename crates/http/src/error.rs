//! What can go wrong on a connection, in the words a proxy needs: whose fault, and which answer.

use std::io;

use thiserror::Error;

use crate::h2;

/// A message that RFC 9112 or a limit forbids. Facing a client it becomes `status` and a closed
/// connection; facing an upstream it becomes a 502.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{detail} ({status})")]
pub struct Refusal {
    /// The status that a server answers.
    pub status: u16,
    /// Envoy's response code detail.
    pub detail: &'static str,
}

impl Refusal {
    pub(crate) const fn bad(detail: &'static str) -> Refusal {
        Refusal {
            status: 400,
            detail,
        }
    }

    pub(crate) const CODEC: Refusal = Refusal::bad("http1.codec_error");
    pub(crate) const TOO_LARGE: Refusal = Refusal {
        status: 431,
        detail: "http1.headers_too_large",
    };
    pub(crate) const TOO_MANY: Refusal = Refusal {
        status: 431,
        detail: "http1.too_many_headers",
    };
}

/// Why a read or a write on a connection ended.
#[derive(Debug, Error)]
pub enum Error {
    /// The peer sent what may not be.
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    /// The peer closed before the message was complete.
    #[error("connection closed in the middle of a message")]
    Closed,
    /// The system's error.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    /// The stream was reset by the peer (HTTP/2); the code is RFC 9113's.
    #[error("stream reset by the peer: {0:?}")]
    Reset(h2::Reason),
    /// The peer went away before it looked at the stream (GOAWAY, or REFUSED_STREAM).
    #[error("the peer did not process the stream")]
    Unprocessed,
    /// The peer did not answer a PING in time (HTTP/2).
    #[error("the peer does not answer PINGs any more")]
    Unresponsive,
    /// What the caller wrote does not agree with the length it had declared.
    #[error("body does not agree with the declared length")]
    Length,
}

impl Error {
    /// Whether the peer provably did nothing with the message.
    pub fn is_unprocessed(&self) -> bool {
        matches!(self, Error::Unprocessed)
    }
}
