//! HTTP on the wire, and nothing else: bytes in, heads, bodies and trailers out, and back.
//!
//! The proxy pulls: it asks a connection for the next head, then for the frames of the body, and
//! writes to the other side in the same function. Nothing here spawns a task, holds a lock or
//! knows a route. Read in this order:
//!
//! - [`headers`]: a header block, kept as the peer's bytes plus edits;
//! - [`head`]: the head of a request and of a response;
//! - [`body`]: frames, framing, and one reader and one writer for both protocols;
//! - [`h1`]: the HTTP/1 codec, server and client side; strict, allocation-free when warm;
//! - [`h2`]: the same vocabulary over HTTP/2, with a codec of our own;
//! - [`path`]: the normal form of a path.

pub mod body;
mod buffer;
pub mod error;
pub mod h1;
pub mod h2;
pub mod head;
pub mod headers;
pub mod limits;
pub mod path;

pub use body::{BodyReader, BodyWriter, Frame, Framing};
pub use error::{Error, Refusal};
pub use head::{Method, RequestHead, ResponseHead, Version, reason};
pub use headers::Headers;
pub use limits::{Http1Grammar, Limits};
