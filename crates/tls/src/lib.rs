//! TLS for every room: identities, trust, the judgement of a peer's certificate, configurations of both sides.
//!
//! This room knows rustls and X.509 and nothing of Envoy's messages. [`identity`] and [`trust`] turn PEM into what
//! handshakes need; [`verify`] judges a peer as Envoy does (a chain to a trusted certificate, then names, then
//! pins); [`server`] and [`client`] build configurations; [`session`] tells what a handshake came to, good or bad;
//! [`request`] makes keys of our own. [`jwt`] reads the tokens that stand beside certificates, and the key sets that
//! they are judged by.

pub mod certificate;
pub mod client;
pub mod client_hello;
mod error;
pub mod identity;
pub mod jwt;
pub mod parameters;
mod pem;
pub mod request;
pub mod server;
pub mod session;
pub mod signature;
pub mod trust;
pub mod verify;

pub use error::TlsError;
