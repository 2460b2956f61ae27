//! The chunked coding: the same bytes give the same body, however they come.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use outrigger_http::{
    Limits,
    h1::{ChunkDecoder, ChunkStep},
};

/// The body; `Err` where it is refused, with a mark where it is incomplete.
fn decode(pieces: &mut dyn Iterator<Item = &[u8]>) -> (Vec<u8>, Option<bool>) {
    let limits = Limits::default();
    let (mut decoder, mut buffer, mut body) = (ChunkDecoder::new(), BytesMut::new(), Vec::new());
    for piece in pieces {
        buffer.extend_from_slice(piece);
        loop {
            match decoder.decode(&mut buffer, &limits) {
                Ok(ChunkStep::Data(data)) => body.extend_from_slice(&data),
                Ok(ChunkStep::Partial) => break,
                Ok(ChunkStep::End(_)) => return (body, Some(true)),
                Err(_) => return (body, Some(false)),
            }
        }
    }
    (body, None)
}

fuzz_target!(|bytes: &[u8]| {
    let whole = decode(&mut std::iter::once(bytes));
    let single = decode(&mut bytes.chunks(1));
    assert_eq!(whole, single);
});
