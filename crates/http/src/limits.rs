//! What one message may cost us.

/// Limits of one connection; the defaults are Envoy's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a head, start line and empty line included (`max_request_headers_kb`, 60 KiB).
    pub head_bytes: usize,
    /// Header fields of a head, and of a trailer section (`max_headers_count`, 100).
    pub headers: usize,
    /// Bytes of chunk lines beyond what the data they announce can excuse.
    pub chunk_overhead: usize,
    /// Informational (1xx) responses before a final one.
    pub informational: usize,
    /// Whether trailers of HTTP/1 messages are handed on (`enable_trailers`); Envoy drops them.
    pub trailers: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            head_bytes: 60 * 1024,
            headers: 100,
            chunk_overhead: 16 * 1024,
            informational: 16,
            trailers: false,
        }
    }
}
