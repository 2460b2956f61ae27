//! See docs/ARCHITECTURE.md.

pub mod authorization;
pub mod bpffs;
pub mod conntrack;
pub mod jwt;
