//! The control plane: the user's objects in, xDS out. See docs/ARCHITECTURE.md.

pub mod cluster;
pub mod command;
pub mod compat;
pub mod endpoint;
pub mod gateway;
pub mod listener;
pub mod metrics;
pub mod model;
pub mod names;
pub mod push;
pub mod route;
pub mod translate;
