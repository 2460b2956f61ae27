//! See docs/ARCHITECTURE.md.

pub mod command;
pub mod plan;
