//! See docs/ARCHITECTURE.md.

pub mod authorization;
pub mod jwt;
