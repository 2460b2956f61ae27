//! Heads: nothing panics, and what is taken can be told from what is not by any reader.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outrigger_http::{
    Limits, Method,
    h1::{HeadScanner, Scan, parse_request, parse_response},
};

fuzz_target!(|bytes: &[u8]| {
    let limits = Limits::default();
    // In one piece and byte by byte: the same end.
    let whole = HeadScanner::default().scan(bytes, &limits);
    let mut scanner = HeadScanner::default();
    let mut pieces = Ok(Scan::Partial);
    for end in 0..=bytes.len() {
        pieces = scanner.scan(&bytes[..end], &limits);
        if !matches!(pieces, Ok(Scan::Partial)) {
            break;
        }
    }
    if let Ok(Scan::Complete { start, end }) = whole {
        assert_eq!(pieces, Ok(Scan::Complete { start, end }));
        let head = &bytes[start..end];
        if let Ok(request) = parse_request(head, &limits) {
            assert!(request.headers.get_all("host").count() <= 1);
            assert!(request.path().bytes().all(|byte| byte.is_ascii_graphic()));
            for (name, value) in request.headers.iter() {
                assert!(!name.is_empty() && !name.contains([' ', ':', '\r', '\n']));
                assert!(!value.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)));
            }
        }
        let _ = parse_response(head, &Method::Get, &limits);
    }
});
