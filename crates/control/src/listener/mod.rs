//! Listeners of sidecars: `virtualOutbound`, `virtualInbound`, one per outbound address and port.

mod access_log;
mod chain;
mod env;
mod filters;
mod hcm;
mod settings;
mod tls;
mod tracing;
