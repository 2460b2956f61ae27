//! See docs/ARCHITECTURE.md.

pub mod command;
