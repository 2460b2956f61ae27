//! See docs/ARCHITECTURE.md.

pub mod authorization;
pub mod bpffs;
pub mod conntrack;
pub mod envoy;
pub mod frames;
pub mod jwt;
pub mod needs;
pub mod rate_limit;
