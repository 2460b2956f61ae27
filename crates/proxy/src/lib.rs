//! See docs/ARCHITECTURE.md.

pub mod access_log;
pub mod admin;
pub mod bootstrap;
pub mod cluster;
mod codec;
pub mod command;
pub mod discovery;
pub mod filter;
pub mod filter_state;
mod grpc;
pub mod http;
pub mod io;
pub mod listener;
pub mod logging;
pub mod lua;
pub mod network;
pub mod overload;
pub mod plan;
pub mod proxy_protocol;
mod report;
pub mod router;
pub mod server;
mod socket;
mod splice;
mod trace;
mod transport;
pub mod worker;
