//! See docs/ARCHITECTURE.md.

pub mod client_hello;
