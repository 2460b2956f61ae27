//! See docs/ARCHITECTURE.md.

pub mod bootstrap;
pub mod cluster;
pub mod command;
pub mod discovery;
pub mod http;
pub mod io;
pub mod listener;
pub mod logging;
pub mod network;
pub mod plan;
pub mod server;
mod socket;
pub mod worker;
