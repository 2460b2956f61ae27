//! HTTP/1 as a session that is pulled: `connection.read_head()`, then `split()` into a reader of
//! body frames and a writer, which may run at the same time in one task.
//!
//! - [`scan`](self): finds the end of a head and refuses line ends that are not CRLF;
//! - `parse`: head → [`RequestHead`](crate::RequestHead) / [`ResponseHead`](crate::ResponseHead);
//! - `fast`: the same for heads as they nearly always look, in one pass;
//! - `chunked`: the chunk decoder; both are sans-io and fuzzed;
//! - `read`, `write`: the two halves of a connection;
//! - `server`, `client`: the two roles.

mod chunked;
mod client;
mod fast;
mod parse;
mod read;
mod scan;
mod server;
mod write;

pub use chunked::{ChunkDecoder, ChunkStep};
pub use client::ClientConnection;
pub(crate) use parse::{check_host, content_length};
pub use parse::{parse_request, parse_response};
pub use read::Reader;
pub use scan::{HeadScanner, Scan};
pub use server::ServerConnection;
pub use write::{Spelling, Writer};
