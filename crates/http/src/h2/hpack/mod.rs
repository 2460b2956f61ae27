//! HPACK (RFC 7541): header blocks to fields and back.
//!
//! `fixed` holds the table that both sides know, `table` the one that a connection builds up,
//! `huffman` the code of strings. `decode` hands fields to whoever builds a head, `encode` writes
//! them. Neither allocates for a block once a connection is warm.

mod class;
mod decode;
mod encode;
mod fixed;
mod huffman;
mod table;

pub(super) use class::{Class, is_value, lower};
pub(super) use decode::{Broken, Decoder, Field};
pub(super) use encode::Encoder;

/// The size of a table that both sides begin with (RFC 9113, 6.5.2).
pub(super) const DEFAULT_TABLE: usize = 4096;

/// What a field counts beside its text (RFC 7541, 4.1).
pub(super) const OVERHEAD: usize = 32;
