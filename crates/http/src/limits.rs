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
    /// Whether trailers of HTTP/1 messages are handed on when they are read, and sent (`enable_trailers`); else they are
    /// dropped.
    pub trailers: bool,
    /// What HTTP/1 alone may say.
    pub http1: Http1Grammar,
}

/// What an HTTP/1 message may say beyond what every server takes (`Http1ProtocolOptions`); the defaults are Envoy's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Http1Grammar {
    /// Methods that nobody has registered (`allow_custom_methods`); otherwise they are answered 400.
    pub custom_methods: bool,
    /// `content-length` beside `transfer-encoding: chunked`, which then counts (`allow_chunked_length`).
    pub chunked_length: bool,
    /// A target with scheme and host is a request for that host (`allow_absolute_url`); otherwise it is a path, which no
    /// route has.
    pub absolute_url: bool,
}

impl Default for Http1Grammar {
    fn default() -> Self {
        Http1Grammar {
            custom_methods: false,
            chunked_length: false,
            absolute_url: true,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            head_bytes: 60 * 1024,
            headers: 100,
            chunk_overhead: 16 * 1024,
            informational: 16,
            trailers: false,
            http1: Http1Grammar::default(),
        }
    }
}
