//! Why a stream, or a whole connection, is over before its end.

use std::io;

use super::Reason;
use crate::{Error, Refusal};

/// As [`Error`], but it can be told to many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// Reset, by the peer or for its fault.
    Reset(Reason),
    /// The peer did not look at it.
    Unprocessed,
    /// The peer has closed the connection.
    Closed,
    /// The system's error.
    Io(io::ErrorKind),
    /// The peer does not answer PINGs.
    Unresponsive,
    /// What came may not be.
    Refused(Refusal),
}

impl From<Fate> for Error {
    fn from(fate: Fate) -> Error {
        match fate {
            Fate::Reset(reason) => Error::Reset(reason),
            Fate::Unprocessed => Error::Unprocessed,
            Fate::Closed => Error::Closed,
            Fate::Io(kind) => Error::Io(kind.into()),
            Fate::Unresponsive => Error::Unresponsive,
            Fate::Refused(refusal) => Error::Refused(refusal),
        }
    }
}
