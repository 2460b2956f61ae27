//! HTTP/2 (RFC 9113) in the vocabulary of this crate.
//!
//! One thread serves a connection and all of its streams, so nothing here is shared or locked. From
//! the wire upwards:
//!
//! - `frame` and `hpack`: how things are said;
//! - `guard`: flood budgets, on every frame that comes in;
//! - `core`: the state of a connection; `receive` and `control` take frames in, `send` puts them
//!   out, `store` holds the streams, `outbox` what is to be written; `fields_in` and `fields_out`
//!   make heads of header blocks and back;
//! - `connection`: reads as many frames as come at once, hands them to the core, and writes what
//!   all streams have said in one go when their tasks have had their turn;
//! - `server` accepts streams, `client` opens them, `stream` holds the two halves of one;
//! - `linger` waits for the rest of requests that were answered early;
//! - `keepalive` finds out whether the peer still lives.
//!
//! Flow control is passed on: a frame's bytes are given back to the peer when the frame is pulled,
//! and of a stream whose peer gives no window no more than a little data is taken.

mod client;
mod connection;
mod control;
mod core;
mod fate;
mod fields_in;
mod fields_out;
mod frame;
mod guard;
mod hpack;
mod keepalive;
mod linger;
mod outbox;
mod reason;
mod receive;
mod send;
mod server;
mod store;
mod stream;

pub use client::{ClientHandle, ClientStream, ResponseReader, connect};
pub use guard::{Facts, Flood, FloodLimits};
pub use keepalive::KeepAlive;
pub use reason::Reason;
pub use server::ServerConnection;
pub use stream::{Reader, Writer};

use std::time::Duration;

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
    /// Bytes of one field of a head, name and value together; none by default but `header_list`.
    pub header_field: u32,
    /// Values of fields may have bytes beyond ASCII (`obs-text`), as they may by default.
    pub obs_text: bool,
    /// Strings of our own heads are said in Huffman code where that is shorter, as by default.
    pub huffman: bool,
    /// Fields of a head (100); a request with more is answered with 431.
    pub headers: usize,
    /// Whether extended CONNECT (RFC 8441) is offered.
    pub extended_connect: bool,
    /// Bytes of the table that the peer may compress heads with (4096).
    pub header_table: u32,
    /// Settings that mean nothing here, said to the peer after the others: identifier and value.
    pub custom: Option<std::sync::Arc<[(u16, u32)]>>,
    /// Budgets for what a peer can send at no cost of its own.
    pub floods: FloodLimits,
    /// How long the rest of a request whose answer is complete may take to come before the client is told to stop
    /// (100 ms).
    pub linger: Duration,
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
            header_field: u32::MAX,
            obs_text: true,
            huffman: true,
            headers: 100,
            extended_connect: false,
            header_table: 4096,
            custom: None,
            floods: FloodLimits::default(),
            linger: linger::LONGEST,
            keep_alive: None,
        }
    }
}
