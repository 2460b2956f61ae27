//! Gateways: what the Gateway objects that select a router make it listen to, and the routes behind that.

pub mod listeners;
pub mod merge;
pub mod routes;
