//! See docs/ARCHITECTURE.md.

pub mod authorization;
pub mod conntrack;
pub mod jwt;
