//! Listeners of sidecars: `virtualOutbound`, `virtualInbound`, one per outbound address and port.

mod access_log;
mod chain;
mod env;
pub(crate) mod filters;
mod hcm;
mod settings;
pub(crate) mod tls;
mod tracing;
