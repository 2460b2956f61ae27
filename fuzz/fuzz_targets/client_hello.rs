//! ClientHellos: no bytes make the reader panic, and what is cut off is never taken for something else.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outrigger_tls::client_hello::{Peek, peek};

fuzz_target!(|bytes: &[u8]| {
    let Peek::Hello(_) = peek(bytes) else {
        return;
    };
    for end in 0..bytes.len() {
        assert!(matches!(peek(&bytes[..end]), Peek::More | Peek::Hello(_)));
    }
});
