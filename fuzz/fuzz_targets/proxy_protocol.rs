//! PROXY headers: no bytes make the parser panic, a header that is read is read again as it was written, and what is cut
//! off is never taken for something else.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use outrigger_proxy::proxy_protocol::{Parsed, parse};

fuzz_target!(|bytes: &[u8]| {
    let Ok(Parsed::Header(header, length)) = parse(bytes) else {
        return;
    };
    assert!(length <= bytes.len());
    for end in 0..length {
        assert_eq!(parse(&bytes[..end]), Ok(Parsed::More));
    }
    let mut written = BytesMut::new();
    header.write_to(&mut written);
    let Ok(Parsed::Header(again, taken)) = parse(&written) else {
        panic!("{header:?} is not read again");
    };
    assert_eq!((again.addresses, taken), (header.addresses, written.len()));
    assert_eq!(again.tlvs, header.tlvs);
});
