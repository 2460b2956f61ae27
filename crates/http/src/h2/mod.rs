//! HTTP/2 in the vocabulary of this crate, on the `h2` crate.
//!
//! `server` accepts streams, `client` opens them, `stream` holds the two halves of one, and
//! `convert` turns heads into `h2`'s types and back. `guard` holds the peer to the flood budgets,
//! `keepalive` finds out whether it still lives. Flow control is passed on: a frame's bytes
//! are given back to the peer when the frame is pulled, and data is taken when there is a window.

mod client;
mod convert;
mod guard;
mod keepalive;
mod server;
mod stream;

pub use ::h2::Reason;
pub use client::{ClientHandle, ClientStream, ResponseReader, connect};
pub use guard::{Facts, Flood, FloodLimits};
pub use keepalive::KeepAlive;
pub use server::ServerConnection;
pub use stream::{Reader, Writer};

/// What starts every HTTP/2 connection with prior knowledge (RFC 9113, 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Settings of a connection; the defaults are Envoy's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Bytes that a peer may send on a stream before we have taken any (16 MiB in Envoy 1.36 and
    /// later, 256 MiB before).
    pub stream_window: u32,
    /// Bytes for all streams together (24 MiB).
    pub connection_window: u32,
    /// Streams that the peer may have open (1024).
    pub concurrent_streams: u32,
    /// Bytes of a head's fields (60 KiB).
    pub header_list: u32,
    /// Fields of a head (100); counted by [`ServerConnection`].
    pub headers: usize,
    /// Whether extended CONNECT (RFC 8441) is offered.
    pub extended_connect: bool,
    /// Bytes of the table that the peer may compress heads with (4096).
    pub header_table: u32,
    /// Budgets for what a peer can send at no cost of its own.
    pub floods: FloodLimits,
    /// PINGs; none by default.
    pub keep_alive: Option<KeepAlive>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            stream_window: 16 * 1024 * 1024,
            connection_window: 24 * 1024 * 1024,
            concurrent_streams: 1024,
            header_list: 60 * 1024,
            headers: 100,
            extended_connect: false,
            header_table: 4096,
            floods: FloodLimits::default(),
            keep_alive: None,
        }
    }
}

/// Bytes of one stream that wait in the codec while the peer does not read. All streams of a
/// connection together can hold this many times their number.
const SEND_BUFFER: usize = 128 * 1024;

/// A stream of small messages is ordinary gRPC: `h2` would take a hundred of them in one read for
/// an attack. This is 65,536 of them.
const SMALL_DATA_BUDGET: usize = 1 << 24;
