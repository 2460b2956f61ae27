//! See docs/ARCHITECTURE.md.

pub mod jwt;
