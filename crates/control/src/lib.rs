//! The control plane: the user's objects in, xDS out. See docs/ARCHITECTURE.md.

pub mod apiserver;
pub mod ca;
pub mod cluster;
pub mod command;
pub mod compat;
pub mod debug;
pub mod endpoint;
mod envoy_filter;
pub mod gateway;
pub mod gateway_api;
pub mod grpc;
pub mod listener;
pub mod metrics;
pub mod model;
pub mod names;
mod names_table;
pub mod push;
pub mod route;
pub mod secret;
pub mod security;
pub mod server;
pub mod translate;
mod unserved;
pub mod webhook;
mod weights;
